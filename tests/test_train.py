"""Training on a tiny host: what changes, what stays, how it is resumed."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import patchslim
from child_process import kill_when, needs_fork
from patchslim.errors import (
    BadFile,
    BadSetting,
    DeepCut,
    Diverged,
    TrainingStopped,
    UnknownName,
    Untrained,
)
from patchslim.methods import LearnedMethod
from patchslim.methods.topk import TopK
from patchslim.model.model import SlimModel
from patchslim.model.training_pass import forward_training
from patchslim.runs.checkpoint import read, write
from patchslim.runs.log import read_log
from patchslim.runs.ownership import LOCK_FILE
from patchslim.saving.seal import seal_recipe
from patchslim.testing.trial import tiny_host
from patchslim.training.config import TrainConfig
from patchslim.training.losses import (
    LossModule,
    Target,
    Teacher,
    answer_loss,
    label_loss,
    token_loss,
)
from patchslim.training.optim import group_parameters
from patchslim.training.train import train

Batches = list[tuple[Tensor, Tensor | None]]


def images(count: int = 24, *, seed: int = 0, labels: bool = True) -> Batches:
    """Draws noise whose class can be seen: the mean of the first channel."""
    noise = torch.Generator().manual_seed(seed)
    drawn = torch.randn(count, 3, 16, 16, generator=noise)
    kind = torch.arange(count) % 5
    drawn[:, 0] += kind[:, None, None] - 2.0
    return [(drawn[i : i + 8], kind[i : i + 8] if labels else None) for i in range(0, count, 8)]


def slimmed(method: str = "tome", **settings: object) -> SlimModel:
    learns = method == "dynamicvit"
    with pytest.warns(Untrained) if learns else contextlib.nullcontext():
        return patchslim.slim(tiny_host(**settings), method, keep=[17, 12, 8])


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(t, other[n]) for n, t in one.items())


@pytest.mark.parametrize("method", ["tome", "evit", "topk", "dynamicvit"])
def test_a_copy_learns_and_the_given_model_stays(method: str, tmp_path: Path) -> None:
    model = slimmed(method)
    before = weights(model)
    config = TrainConfig.of(model.method.training_defaults, {"steps": 6, "batch": 8, "lr": 1e-3})
    trained = train(model, images(), config, out=tmp_path / "run", validation=images(seed=1))
    assert same(weights(model), before)
    assert not same(weights(trained.model), before)
    assert model.trained is None
    assert trained.model.trained["step"] == trained.step
    assert not trained.model.training
    assert [row.name for row in trained.report.rows][:2] == ["dense", "untrained"]
    assert "trained" in {row.name for row in trained.report.rows}
    again = patchslim.load(tmp_path / "run" / "model", model=tiny_host())
    assert same(weights(again), weights(trained.model))
    assert again.trained == trained.model.trained


@pytest.mark.slow
def test_learning_from_the_teacher_alone_needs_no_labels(tmp_path: Path) -> None:
    config = TrainConfig(steps=60, batch=24, lr=1e-3, labels=0.0)
    with pytest.warns(DeepCut):
        model = patchslim.slim(tiny_host(), "topk", keep=[5, 3, 3])
    shown = images(48, labels=False)
    trained = train(model, shown, config, out=tmp_path, validation=shown)
    kl = {row.name: row.kl.value for row in trained.report.rows if row.kl}
    assert kl["trained"] < 0.8 * kl["untrained"]
    assert trained.report.dense.kl.value == 0


@pytest.mark.parametrize(
    ("method", "stops"),
    [
        pytest.param("evit", (1, 4), marks=pytest.mark.slow),
        pytest.param("dynamicvit", (1, 2, 5), marks=pytest.mark.slow),
        ("dynamicvit", (4,)),
    ],
)
def test_resumed_at_any_step_it_ends_with_the_same_weights(
    method: str, stops: tuple[int, ...], tmp_path: Path
) -> None:
    config = TrainConfig.of(
        slimmed(method).method.training_defaults,
        {"steps": 6, "batch": 8, "lr": 1e-3, "checkpoint": 1, "ema": 0.9, "mixup": 0.2}
        | {"shrink": 0.5, "wise": 0.5},
    )
    validation = images(seed=1)
    whole = train(slimmed(method), images(), config, out=tmp_path / "whole", validation=validation)
    for stop in stops:
        out = tmp_path / str(stop)

        def cut(line: str, stop: int = stop) -> None:
            if line.startswith(f"step {stop + 1}/"):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            train(slimmed(method), images(), config, out=out, validation=validation, progress=cut)
        again = train(
            slimmed(method), images(), config, out=out, validation=validation, resume=True
        )
        assert same(weights(again.model), weights(whole.model))
        assert again.step == whole.step
        one, other = read_log(tmp_path / "whole" / "log.csv"), read_log(out / "log.csv")
        for row in (*one, *other):
            row.pop("images_per_second")
        assert one == other


@pytest.mark.parametrize("ema", [0.0, pytest.param(0.9, marks=pytest.mark.slow)])
def test_wise_interpolates_the_host_and_not_the_methods_parameters(
    ema: float, tmp_path: Path
) -> None:
    model, validation = slimmed("dynamicvit"), images(seed=1)
    usual = TrainConfig.of(
        model.method.training_defaults,
        {"steps": 6, "validate": 6, "batch": 8, "lr": 1e-3, "ema": ema},
    )
    whole = train(model, images(), usual, out=tmp_path / "whole")
    part = train(
        model, images(), replace(usual, wise=0.25), out=tmp_path / "part", validation=validation
    )
    given, learned, blended = (weights(each) for each in (model, whole.model, part.model))
    for name, value in blended.items():
        of_host = name.startswith("host.")
        wanted = given[name].lerp(learned[name], 0.25) if of_host else learned[name]
        torch.testing.assert_close(value, wanted)
        assert of_host or not torch.equal(value, given[name])
    known = {row["step"]: row["kl"] for row in read_log(tmp_path / "part" / "log.csv")}
    measured = {row.name: row.kl.value for row in part.report.rows if row.kl}
    assert known[part.step] == pytest.approx(measured["trained"], rel=1e-3)


@pytest.mark.slow
def test_a_finished_run_without_validation_may_end_with_another_wise(tmp_path: Path) -> None:
    config, validation = TrainConfig(steps=2, batch=8, lr=1e-3), images(seed=1)
    train(slimmed("tome"), images(), config, out=tmp_path / "run")
    part = replace(config, wise=0.5)
    anew = train(slimmed("tome"), images(), part, out=tmp_path / "anew")
    again = train(slimmed("tome"), images(), part, out=tmp_path / "run", resume=True)
    assert same(weights(again.model), weights(anew.model))
    assert again.model.trained["course"]["wise"] == 0.5
    train(slimmed("tome"), images(), config, out=tmp_path / "seen", validation=validation)
    with pytest.raises(BadFile, match=r"there wise=1\.0, now 0\.5"):
        train(
            slimmed("tome"),
            images(),
            part,
            out=tmp_path / "seen",
            validation=validation,
            resume=True,
        )


def test_a_run_of_an_earlier_version_can_be_resumed(tmp_path: Path) -> None:
    """Config and method had fewer settings, and behaved as today's defaults do."""
    config = TrainConfig(steps=2, batch=8)
    train(slimmed("tome"), images(), config, out=tmp_path)
    file = tmp_path / "checkpoint.pt"

    def written(change: Callable[[dict[str, Any]], object]) -> None:
        state = read(file)
        change(state["run"])
        write(file, state)

    written(lambda known: (known["course"].pop("smoothing"), known["settings"].pop("threshold")))
    again = train(slimmed("tome"), images(), config, out=tmp_path, resume=True)
    assert again.step == 2
    other = replace(config, smoothing=0.1)
    with pytest.raises(BadFile, match=r"there smoothing=0\.0, now 0\.1"):
        train(slimmed("tome"), images(), other, out=tmp_path, resume=True)
    written(lambda known: known["course"].update(magic=3))
    with pytest.raises(BadFile, match="there magic=3, now None"):
        train(slimmed("tome"), images(), config, out=tmp_path, resume=True)
    written(lambda known: (known["course"].pop("magic"), known.update(moon="full")))  # a later one
    with pytest.raises(BadFile, match="its moon is full, and now it is None"):
        train(slimmed("tome"), images(), config, out=tmp_path, resume=True)


LONG = TrainConfig(steps=20, batch=8, lr=1e-3, checkpoint=3, labels=0.0)


@pytest.mark.slow
@needs_fork
def test_a_run_killed_with_sigkill_can_be_resumed(tmp_path: Path) -> None:
    """A real process, killed at any moment, ends with the weights of one that was not."""
    out, fourth = tmp_path / "killed", tmp_path / "fourth"

    def tell(line: str) -> None:
        if line.startswith("step 4/"):
            fourth.touch()

    kill_when(lambda: train(slimmed(), images(), LONG, out=out, progress=tell), fourth.exists)
    left = {path.name for path in out.iterdir()}
    written = {"checkpoint.pt", "log.csv", LOCK_FILE}  # a killed owner leaves its lock file
    assert written <= left <= {*written, ".checkpoint.pt.new"}
    assert 3 <= read(out / "checkpoint.pt")["step"] < 20
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        again = train(slimmed(), images(), LONG, out=out, resume=True)
        whole = train(slimmed(), images(), LONG, out=tmp_path / "whole")
    finally:
        torch.set_num_threads(threads)
    assert same(weights(again.model), weights(whole.model))


def test_sigterm_writes_a_checkpoint(tmp_path: Path) -> None:
    def tell(line: str) -> None:
        if line.startswith("step 3/"):
            os.kill(os.getpid(), signal.SIGTERM)

    config = TrainConfig(steps=6, batch=8, lr=1e-3, checkpoint=100)
    with pytest.raises(TrainingStopped, match=r"after step [34] of 6; a checkpoint was written"):
        train(slimmed(), images(), config, out=tmp_path, progress=tell)
    again = train(slimmed(), images(), config, out=tmp_path, resume=True)
    whole = train(slimmed(), images(), config, out=tmp_path / "whole")
    assert same(weights(again.model), weights(whole.model))


def test_groups_are_those_of_timm() -> None:
    """Layer-wise decay and weight decay by parameter, compared with timm's own grouping."""
    import timm
    from timm.optim import param_groups_layer_decay

    host = timm.create_model("test_vit")
    model = patchslim.slim(host, "tome", keep=0.5)
    after = set(map(id, host.norm.parameters()))  # timm counts the last norm with the last block
    ours = {
        id(parameter): (group["factor"], group["weight_decay"])
        for group in group_parameters(model, TrainConfig(layer_decay=0.7, weight_decay=0.1))
        for parameter in group["params"]
    }
    for group in param_groups_layer_decay(
        host, weight_decay=0.1, layer_decay=0.7, no_weight_decay_list=host.no_weight_decay()
    ):
        for parameter in group["params"]:
            factor, decay = ours.pop(id(parameter))
            if id(parameter) not in after:
                assert factor == pytest.approx(group["lr_scale"])
            assert decay == group["weight_decay"]
    assert not ours


def test_a_methods_own_parts_learn_at_their_own_rate() -> None:
    model = slimmed("dynamicvit")
    groups = group_parameters(model, TrainConfig(host_lr=0.01))
    assert {group["factor"] for group in groups if group["host"]} == {0.01}
    own = [p for group in groups if not group["host"] for p in group["params"]]
    assert {id(p) for p in own} == {id(p) for p in model.method.parameters()}


def test_a_frozen_host_does_not_change(tmp_path: Path) -> None:
    config = TrainConfig(steps=4, batch=8, lr=1e-2, host_lr=0.5, freeze=0.99, warmup=0.0)
    model = slimmed("dynamicvit")
    trained = train(model, images(), config, out=tmp_path)
    assert same(weights(trained.model.host), weights(model.host))
    assert not same(weights(trained.model.method), weights(model.method))


@pytest.mark.parametrize("method", ["tome", "dynamicvit"])
def test_parts_of_a_batch_add_up_and_recomputing_changes_nothing(
    method: str, tmp_path: Path
) -> None:
    ways = {"whole": {}, "recomputed": {"recompute": True}}
    if method == "tome":  # what dynamicvit draws follows the parts
        ways["parts"] = {"accumulate": 2}
    logged = {}
    for name, way in ways.items():
        config = TrainConfig(steps=1, batch=8, lr=1e-3, **way)
        train(slimmed(method), images(), config, out=tmp_path / name)
        logged[name] = read_log(tmp_path / name / "log.csv")[0]
    for row in logged.values():
        for term in ("loss", "labels", "answers", "method", "gradient"):
            assert row[term] == pytest.approx(logged["whole"][term], rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_learns_and_leaves_the_weights_whole(precision: str, tmp_path: Path) -> None:
    config = TrainConfig(steps=3, batch=8, lr=1e-3, precision=precision)
    trained = train(slimmed(), images(), config, out=tmp_path)
    tensors = weights(trained.model).values()
    assert {t.dtype for t in tensors if t.is_floating_point()} == {torch.float32}
    assert all(bool(t.isfinite().all()) for t in tensors)


def test_the_average_of_the_weights_is_what_is_kept(tmp_path: Path) -> None:
    still = TrainConfig(steps=5, batch=8, lr=1e-2, ema=1 - 1e-6)
    model = slimmed()
    trained = train(model, images(), still, out=tmp_path)
    for name, tensor in weights(trained.model).items():
        torch.testing.assert_close(tensor, model.state_dict()[name], rtol=0, atol=1e-4)


def test_the_best_weights_are_kept(tmp_path: Path) -> None:
    """With a rate that only harms, the first validation is the best."""
    config = TrainConfig(steps=8, batch=8, lr=0.05, warmup=0.0, labels=0.0, validate=2, clip=0.0)
    trained = train(slimmed(), images(), config, out=tmp_path, validation=images(seed=1))
    seen = {
        row["step"]: row["kl"] for row in read_log(tmp_path / "log.csv") if row["kl"] is not None
    }
    assert list(seen) == [2, 4, 6, 8]
    assert trained.step == min(seen, key=seen.get)
    kept = {row.name: row.kl.value for row in trained.report.rows if row.kl}["trained"]
    assert kept == pytest.approx(seen[trained.step], rel=1e-3)


def test_the_kept_share_falls_as_scheduled() -> None:
    config = TrainConfig(shrink=0.5)
    model = slimmed("tome")
    tokens = model.plan.adapter.embed(model.host, torch.randn(1, 3, 16, 16), {})

    def left(step: int) -> list[int]:
        eased = config.removal_share(step, 100)
        return [each.left for each in model.start_pass().steps(tokens, tail="full", eased=eased)]

    counts = [left(step) for step in range(100)]
    assert counts[0] == [17, 17, 17]
    assert counts[50] == counts[99] == list(model.counts())
    for early, late in itertools.pairwise(counts):
        assert all(a >= b for a, b in zip(early, late, strict=True))


@pytest.mark.parametrize("method", ["tome", "evit", "topk", "dynamicvit"])
def test_final_tokens_are_compared_in_their_own_places(method: str) -> None:
    """With nothing removed the student's rows are the teacher's, and the loss is zero."""
    config = TrainConfig(tokens=1.0)
    model = slimmed(method)
    shown = images()[0][0]
    target = Teacher(tiny_host(), config).make_target(shown, None)
    with torch.no_grad():
        dense = forward_training(model.eval(), shown, tail="full", eased=1e-9)
        assert float(token_loss(dense.tokens, target.tokens)) == pytest.approx(0, abs=1e-6)
        run = forward_training(model, shown, tail="full")
    rows_of = torch.cat([torch.zeros(len(shown), 1, dtype=torch.long), run.tokens.cells() + 1], 1)
    taught = torch.stack([t[r] for t, r in zip(target.tokens, rows_of, strict=True)])
    apart = (run.tokens.x - taught).square()
    wanted = apart[:, :1].mean() + apart[:, 1:].mean()
    torch.testing.assert_close(token_loss(run.tokens, target.tokens), wanted)


def test_losses_are_what_their_names_say() -> None:
    logits, answers = torch.randn(4, 5), torch.randn(4, 5)
    p, q = (answers / 2).softmax(1), (logits / 2).softmax(1)
    kl = (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(answer_loss(logits, answers, "soft", 2.0), 4 * kl)
    hard = nn.functional.cross_entropy(logits, answers.argmax(1))
    torch.testing.assert_close(answer_loss(logits, answers, "hard", 1.0), hard)
    labels = torch.tensor([0, 1, 2, 3])
    mixed = nn.functional.one_hot(labels, 5).float()
    torch.testing.assert_close(label_loss(logits, mixed, 0.0), label_loss(logits, labels, 0.0))


def test_a_distilled_host_answers_its_teacher_by_its_own_token(tmp_path: Path) -> None:
    import timm

    host = timm.create_model(
        "deit_tiny_distilled_patch16_224", img_size=32, patch_size=8, embed_dim=16, depth=2,
        num_heads=2, num_classes=5,
    )  # fmt: skip
    model = patchslim.slim(host, "topk", keep=0.5)
    shown = torch.randn(8, 3, 32, 32)
    batches = [(shown, torch.arange(8) % 5)]
    config = TrainConfig(steps=2, batch=8, lr=1e-3, distil="token")
    trained = train(model, batches, config, out=tmp_path)
    assert not trained.model.host.distilled_training
    student = LossModule(model.train(), config)
    host.set_distilled_training(True)
    own, for_teacher = forward_training(model, shown, tail="full").output
    terms = student(shown, Target(batches[0][1], torch.zeros(8, 5)))
    torch.testing.assert_close(terms[1], label_loss(own, batches[0][1], 0.0))
    wanted = answer_loss(for_teacher, torch.zeros(8, 5), "token", 1.0)
    torch.testing.assert_close(terms[2], wanted)


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ({"lr": -1.0}, BadSetting, "lr must be above 0"),
        ({"batch": 0}, BadSetting, "at least 1"),
        ({"lr": float("nan")}, BadSetting, "lr"),
        ({"batch": 2.5}, BadSetting, "takes a whole number"),
        ({"distil": "softly"}, UnknownName, "Did you mean 'soft'"),
        ({"ema": 1.0}, BadSetting, "below 1"),
        ({"learning_rate": 1e-3}, UnknownName, "setting of training"),
        ({"distil_weight": 0.0}, BadSetting, "distil='none'"),
    ],
)
def test_settings_are_checked_where_they_are_made(
    given: dict[str, object], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        TrainConfig.of({}, given)


def test_a_hugging_face_host_learns_too(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    vit_config = transformers.ViTConfig(
        image_size=16, patch_size=4, hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=32, num_labels=5,
    )  # fmt: skip
    model = patchslim.slim(transformers.ViTForImageClassification(vit_config), "evit", keep=0.5)
    config = TrainConfig(steps=2, batch=8, lr=1e-3, tokens=1.0)
    trained = train(model, images(), config, out=tmp_path / "run", validation=images(seed=1))
    assert same(weights(patchslim.load(tmp_path / "run" / "model")), weights(trained.model))


@pytest.mark.slow
def test_a_compiled_step_learns_what_an_eager_one_learns(tmp_path: Path) -> None:
    logged = {}
    for name in ("eager", "compiled"):
        config = TrainConfig(steps=2, batch=8, lr=1e-3, compile=name == "compiled", tokens=1.0)
        train(slimmed("evit"), images(), config, out=tmp_path / name)
        logged[name] = read_log(tmp_path / name / "log.csv")[-1]
    for term in ("loss", "labels", "answers", "tokens", "gradient"):
        assert logged["compiled"][term] == pytest.approx(logged["eager"][term], rel=1e-3)


def test_the_callers_generators_are_left_alone(tmp_path: Path) -> None:
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    train(slimmed("dynamicvit"), images(), TrainConfig(steps=1, batch=8), out=tmp_path)
    assert torch.equal(torch.rand(3), wanted)


def test_a_gradient_that_is_nan_names_the_step_and_the_images(tmp_path: Path) -> None:
    class Steep(LearnedMethod, TopK):
        """Top-K with a loss of zero, whose slope is infinite."""

        def __init__(self) -> None:
            super().__init__()
            self.own = nn.Parameter(torch.ones(()))

        def loss(self, decisions: object) -> Tensor:
            return (self.own - self.own.detach()).sqrt()

    model = patchslim.slim(tiny_host(), Steep(), keep=[17, 12, 8])
    with pytest.raises(Diverged, match=r"gradient of step 1 is (nan|inf); first images: image \d"):
        train(model, images(), TrainConfig(steps=2, batch=8), out=tmp_path)
    assert not (tmp_path / "model").exists()


def test_a_file_that_is_no_checkpoint_of_a_training_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "checkpoint.pt", {"step": 3})
    with pytest.raises(BadFile, match="not a checkpoint of `train`"):
        train(slimmed(), images(), TrainConfig(steps=2, batch=8), out=tmp_path, resume=True)


def test_the_training_entry_of_a_recipe_is_checked(tmp_path: Path) -> None:
    slimmed().save(tmp_path / "saved")
    file = tmp_path / "saved" / "recipe.json"
    recipe = json.loads(file.read_text())
    file.write_text(json.dumps(seal_recipe({**recipe, "trained": "yes"})))
    with pytest.raises(BadFile, match="look at: trained"):
        patchslim.load(tmp_path / "saved", model=tiny_host())
    for name in ("trained", "tied", "checksums"):
        del recipe[name]
    file.write_text(json.dumps({**recipe, "package": "0.1.0"}))  # as 0.1.0 wrote it
    assert patchslim.load(tmp_path / "saved", model=tiny_host()).trained is None
