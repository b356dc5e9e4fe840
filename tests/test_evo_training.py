"""How Evo-ViT is trained: a second head, selection in every block first, recipes from scratch."""

import copy
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F

import patchslim
from child_process import run_patchslim as run
from patchslim.architectures.evo_levit import EvoLevit
from patchslim.errors import BadSchedule, BadSetting, Diverged, UnsupportedModel, Untrained
from patchslim.methods.evo import Evo
from patchslim.model.load import load
from patchslim.model.training_pass import forward_training
from patchslim.runs.checkpoint import read
from patchslim.runs.layout import CHECKPOINT_FILE, MODEL_FOLDER
from patchslim.runs.log import read_log
from patchslim.testing.trial import tiny_host
from patchslim.training.config import RECIPES, TrainConfig
from patchslim.training.losses import LossModule, Target, answer_loss
from patchslim.training.train import train
from timm_variants import randomise
from tiny_training import trainable_vit, write_images
from toy_methods import KeepLongest

AT = (1, 3)


def flat(**changes):
    """Makes a tiny host with a class token whose head reads the mean of the patches."""
    settings = {"depth": 4, "class_token": True, "global_pool": "avg"}
    return tiny_host(**{**settings, **changes})


def levit():
    """Makes a pyramid of two grids, 4x4 and 2x2."""
    torch.default_generator.manual_seed(0)
    host = EvoLevit(
        img_size=64, embed_dim=(16, 24), key_dim=4, num_heads=2, depth=(2, 2), num_classes=5
    )
    randomise(host)
    return host.eval()


def slimmed(host=None, method="evo", **settings):
    return patchslim.slim(host or flat(), method, keep_rate=0.5, at=AT, **settings)


def batches(count=16, *, side=16, seed=0):
    """Draws noise whose class can be seen: the mean of the first channel."""
    noise = torch.Generator().manual_seed(seed)
    drawn = torch.randn(count, 3, side, side, generator=noise)
    kind = torch.arange(count) % 5
    drawn[:, 0] += kind[:, None, None] - 2.0
    return [(drawn[i : i + 8], kind[i : i + 8]) for i in range(0, count, 8)]


def quick(**settings):
    """Makes the config of a run of a few steps."""
    return TrainConfig(**{"steps": 4, "batch": 8, "lr": 1e-3, **settings})


def same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(weight, other[name]) for name, weight in one.items())


# ---------------------------------------------------------------------------- the head for training


@pytest.mark.parametrize("distil", ["none", "soft"])
def test_the_loss_is_shared_with_a_second_head_on_the_class_token(distil):
    config = quick(auxiliary=0.3, distil=distil)
    model = slimmed().train()
    learner = LossModule(model, config)
    for weight in learner.auxiliary.parameters():
        weight.data.add_(0.1)  # no longer a copy
    ((images, labels), *_) = batches()
    answers = torch.randn(8, 5) if distil == "soft" else None
    terms = learner(images, Target(labels, answers))
    output = forward_training(model, images, tail="full")
    second = learner.auxiliary[0](output.tokens.x[:, 0])
    assert not torch.allclose(second, output.output, atol=1e-2)

    def shared(loss):
        return 0.7 * loss(output.output) + 0.3 * loss(second)

    wanted = shared(lambda logits: F.cross_entropy(logits, labels))
    torch.testing.assert_close(terms[1], wanted.detach())
    if answers is not None:
        wanted = wanted + shared(lambda logits: answer_loss(logits, answers, "soft", 1.0))
    torch.testing.assert_close(terms[0], wanted)
    assert (terms[2] > 0) == (distil == "soft")


def test_it_begins_as_a_copy_of_the_hosts_own_and_learns_apart():
    model = slimmed().train()
    learner = LossModule(model, quick(auxiliary=0.5, distil="none"))
    (second,) = learner.auxiliary
    own = [model.host.fc_norm, model.host.head]
    for mine, its in zip(own, (second[0], second[2]), strict=True):
        same(mine.state_dict(), its.state_dict())
        assert all(p is not q for p, q in zip(mine.parameters(), its.parameters(), strict=True))
    ((images, labels), *_) = batches()
    learner(images, Target(labels))[0].backward()
    assert all(weight.grad.abs().max() > 0 for weight in second.parameters())
    assert (second[2].weight.grad - model.host.head.weight.grad).abs().max() > 1e-4


def test_the_trained_model_has_no_auxiliary_head(tmp_path):
    given = slimmed()
    trained = train(given, batches(), quick(auxiliary=0.5), out=tmp_path)
    assert trained.model.state_dict().keys() == given.state_dict().keys()
    again = load(tmp_path / MODEL_FOLDER, model=flat())
    same(again.state_dict(), trained.model.state_dict())
    alone = train(given, batches(), quick(), out=tmp_path / "alone")
    token = "host.cls_token"
    assert not torch.equal(alone.model.state_dict()[token], again.state_dict()[token])


@pytest.mark.slow
def test_stopped_and_resumed_it_ends_with_the_same_weights(tmp_path):
    """With the second head, its optimiser, and the step at which blocks stop selecting again."""
    config = quick(steps=6, auxiliary=0.5, layered=0.5, checkpoint=1, ema=0.9)
    with pytest.warns(Untrained):
        model = slimmed(learned=True)
    whole = train(model, batches(), config, out=tmp_path / "whole")
    for stop in (1, 4):
        out = tmp_path / str(stop)

        def cut(line, stop=stop):
            if line.startswith(f"step {stop + 1}/"):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            train(model, batches(), config, out=out, progress=cut)
        again = train(model, batches(), config, out=out, resume=True)
        same(again.model.state_dict(), whole.model.state_dict())


@pytest.mark.parametrize(
    "host",
    [
        lambda: flat(global_pool="token"),
        lambda: flat(class_token=False),
        lambda: flat(global_pool="map"),
        lambda: flat(num_classes=0),
        lambda: flat(global_pool=""),
    ],
    ids=["read already", "no class token", "query", "no classes", "rows"],
)
def test_hosts_with_nothing_to_read_are_refused(host):
    model = patchslim.slim(host(), "tome", r=1)
    with pytest.raises(UnsupportedModel, match=r'auxiliary.*global_pool="avg" beside class_token'):
        LossModule(model, quick(auxiliary=0.5))


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_a_share_of_the_whole_loss_is_refused(share):
    with pytest.raises(BadSetting, match=r"auxiliary.*at least 0 and below 1"):
        quick(auxiliary=share)


# ------------------------------------------------------------------------------- layer to stage


class Watched(Evo):
    """Evo that notes in which blocks it has selected."""

    chosen: ClassVar[list[int]] = []

    def choose(self, tokens, signals, keep):
        self.chosen.append(signals.block)
        return super().choose(tokens, signals, keep)


def test_every_block_selects_at_first_and_every_stage_after_that(tmp_path):
    model = patchslim.slim(flat(), Watched(), keep_rate=0.5, at=AT)
    chosen = []

    def progress(line):
        if line.startswith("step "):
            chosen.append(tuple(Watched.chosen))
            Watched.chosen.clear()

    Watched.chosen.clear()
    train(model, batches(), quick(steps=6, layered=0.5), out=tmp_path, progress=progress)
    assert chosen == [(1, 2, 3)] * 3 + [(1, 3)] * 3
    assert (
        forward_training(model, batches()[0][0], tail="full", layered=True).decisions[1].block == 2
    )


def test_the_authors_share_of_layered_steps_is_the_default():
    config = TrainConfig.of(Evo.training_defaults, {"steps": 300})
    changed = [step for step in range(300) if config.is_layered(step, 300)]
    assert changed == list(range(200))


def test_in_every_block_of_a_pyramid_but_its_strides():
    model = slimmed(levit())
    steps = model.schedule.in_every_block(5, model.plan.shape.resets)
    assert steps.at == (1, 3, 4)
    images = batches(side=64)[0][0]
    decided = forward_training(model.train(), images, tail="full", layered=True).decisions
    assert [each.block for each in decided] == [1, 3, 4]


def test_methods_whose_patches_do_not_come_back_are_refused(tmp_path):
    for method in ("tome", KeepLongest().eval()):
        model = slimmed(method=method)
        with pytest.raises(BadSetting, match=r"layered=0.5 .*evo.*--layered 0"):
            train(model, batches(), quick(layered=0.5), out=tmp_path)


def test_schedules_without_a_rate_are_refused(tmp_path):
    model = patchslim.slim(flat(), "evo", keep=[17, 10, 10, 9])
    with pytest.raises(BadSchedule, match=r"'counts' has no rate.*--keep-rate"):
        train(model, batches(), quick(layered=0.5), out=tmp_path)
    train(model, batches(), quick(steps=1), out=tmp_path)


# ----------------------------------------------------------------------------------- what learns


def test_tradeoffs_learn(tmp_path):
    with pytest.warns(Untrained):
        model = slimmed(learned=True)
    learned = train(model, batches(), quick(lr=1e-2), out=tmp_path).model.method.mixing
    assert sorted(learned) == ["1", "2"]
    assert all(each != 0 for each in learned.values())


@pytest.mark.slow
def test_evo_levit_learns_from_a_teacher_by_heads_of_their_own(tmp_path):
    """It has batch norm, two heads and two more for training, and a loss that falls."""
    model, teacher = slimmed(levit()), tiny_host(img_size=64, patch_size=16)
    config = quick(steps=30, lr=3e-3, auxiliary=0.5, distil="token", layered=0.5)
    learner = LossModule(copy.deepcopy(model).train(), config)
    learner.slimmed.host.set_distilled_training()
    ((images, labels), *_) = batches(side=64)
    learner(images, Target(labels, teacher(images).detach()))[0].backward()
    assert len(learner.auxiliary) == 2
    for head in (*learner.auxiliary, learner.slimmed.host.head, learner.slimmed.host.head_dist):
        assert all(weight.grad.abs().max() > 0 for weight in head.parameters())
    before = {name: t.clone() for name, t in model.state_dict().items()}
    trained = train(model, batches(side=64), config, out=tmp_path, teacher=teacher)
    losses = [row["loss"] for row in read_log(tmp_path / "log.csv")]
    assert float(losses[-1]) < 0.7 * float(losses[0])
    after = trained.model.state_dict()
    assert after.keys() == before.keys()
    moved = [name for name in after if name.endswith(("running_mean", "running_var"))]
    assert moved
    assert not any(torch.equal(after[name], before[name]) for name in moved)
    assert not trained.model.host.distilled_training
    same(before, dict(model.state_dict()))


def test_a_run_that_diverges_says_so_and_can_be_resumed(tmp_path):
    config = quick(steps=200, lr=1e6, clip=0.0, warmup=0.0, checkpoint=1, distil="none")
    for _ in range(2):
        with pytest.raises(Diverged, match=r"Lower lr \(now 1e"):
            train(
                slimmed(),
                batches(),
                config,
                out=tmp_path,
                resume=(tmp_path / CHECKPOINT_FILE).exists(),
            )
        state = read(tmp_path / CHECKPOINT_FILE)
        assert state["step"] > 0


# ---------------------------------------------------------------------------------- from scratch


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_make_training_configs(name):
    config = TrainConfig.of(Evo.training_defaults, {**RECIPES[name], "auxiliary": 0.5})
    assert (config.epochs, config.lr, config.layered) == (300, 1e-3, pytest.approx(2 / 3))
    assert TrainConfig(**config.to_json()) == config
    assert config.needs_teacher == (name == "levit")


def test_a_recipe_of_the_command_line_gives_way_to_options(tmp_path):
    patchslim.slim(trainable_vit(global_pool="avg"), "evo", keep_rate=0.5, at=(1,)).save(
        tmp_path / "slim"
    )
    ended = run(
        tmp_path, "train", tmp_path / "slim", "--data", write_images(tmp_path / "photos"),
        "--recipe", "deit", "--steps", 2, "--batch", 4, "--workers", 0, "--auxiliary", 0.5,
        "--lr", 2e-4, "--out", tmp_path / "o",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    config = load(tmp_path / "o" / MODEL_FOLDER).trained["course"]
    own = {"steps": 2, "batch": 4, "workers": 0, "auxiliary": 0.5, "lr": 2e-4}
    assert config == TrainConfig.of(Evo.training_defaults, {**RECIPES["deit"], **own}).to_json()
    ended = run(tmp_path, "train", tmp_path / "slim", "--recipe", "beit")
    assert ended.code != 0
    assert "deit" in ended.err
    assert "levit" in ended.err
