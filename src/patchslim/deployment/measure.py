"""`measure`: the verb for slimmed models and for exported ones.

Both are scored by the same functions on the same images. Slimmed models are measured in
`measurement/measure.py`; this file measures exported ones.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from patchslim.deployment.artefact import Artefact
from patchslim.errors import BadFile, UnknownName, UnsupportedModel, WrongInput
from patchslim.hosts._adapter import Adapter
from patchslim.hosts._answers import eval_mode
from patchslim.hosts._preprocessing import Preprocessing
from patchslim.hosts._registry import find_adapter
from patchslim.measurement.latency import latency
from patchslim.measurement.measure import ROUNDS, WARMUP
from patchslim.measurement.measure import measure as measure_models
from patchslim.measurement.rows import Costs, Measurements, make_row
from patchslim.measurement.sample import (
    count_images,
    draw_noise,
    fill_batch,
    move_to_host,
    read_first,
)
from patchslim.measurement.score import Batch, check_batches, score
from patchslim.model.model import SlimModel
from patchslim.report.provenance import Provenance
from patchslim.report.report import Report
from patchslim.runs.progress import Progress, check_progress
from patchslim.settings import BATCH, SEED, check_value


def measure(  # noqa: PLR0913 (what is measured, beside what, and how)
    model: SlimModel | Artefact | Mapping[str, SlimModel] | Mapping[str, Artefact],
    images: Iterable[Batch] | None = None,
    *,
    dense: nn.Module | Artefact | None = None,
    batch: int = 8,
    repeats: int = 20,
    seed: int = 0,
    baseline: bool = True,
    progress: Progress | None = None,
) -> Report:
    """Measures accuracy, agreement, MACs, time and memory of models beside their dense host.

    Args:
        model: a slimmed or exported model, or several by name: of one host, or for images of one
            shape.
        images: batches of float images (B, 3, H, W) with their labels (B,) or None; read once.
            Without images only costs are measured, on noise. If the iterable has an attribute
            `prepared`, as `Images` has, the report says how the images were prepared.
        dense: the model to compare with. For slimmed models it is their host, unless you give
            another: for trained models, the host as it was before training. An exported model
            holds no host: give the dense model, exported or not, or nothing is compared.
        batch: how many images are timed at a time; memory is measured on as many.
        repeats: rounds of timing; 0 for no timing.
        seed: seed of the random baseline and of the noise.
        baseline: whether to run `random` at the token counts of each slimmed model, too.
        progress: is called with one line of text at a time.
    """
    models: Any = {model.path.name: model} if isinstance(model, Artefact) else model
    exported = (
        [name for name, each in models.items() if isinstance(each, Artefact)]
        if isinstance(models, Mapping)
        else []
    )
    if not exported:
        if isinstance(dense, Artefact):
            raise UnsupportedModel(
                f"dense= is {dense.path}, and a slimmed model is measured beside a torch.nn.Module,"
                " whose operations are counted. Give that, or export the slimmed model, too."
            )
        return measure_models(
            models, images, dense=dense, batch=batch, repeats=repeats, seed=seed,
            baseline=baseline, progress=progress,
        )  # fmt: skip
    if len(exported) < len(models):
        raise UnsupportedModel(
            f"{exported[0]!r} is an exported model and others are not. Measure them in two calls, "
            "each beside the same dense= on the same images; patchslim.benchmark times both kinds."
        )
    return _measure_artefacts(models, images, dense, batch, repeats, seed, progress)


def _measure_artefacts(
    artefacts: Mapping[str, Artefact],
    images: Iterable[Batch] | None,
    dense: nn.Module | Artefact | None,
    batch: int,
    repeats: int,
    seed: int,
    progress: Progress | None,
) -> Report:
    """Measures exported models beside a dense model, if there is one."""
    batch = check_value("batch", batch, int, BATCH, WrongInput)
    repeats = check_value("repeats", repeats, int, ROUNDS, WrongInput)
    seed = check_value("seed", seed, int, SEED, WrongInput)
    if images is not None:
        check_batches("images", images)
    show = check_progress(progress)
    every = {**artefacts} if dense is None else {"dense": dense, **artefacts}
    _check_alike(artefacts, dense)
    if repeats:
        _check_batch(every, batch)
    first = next(iter(artefacts.values()))
    shape = tuple(first.card["input"])
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        if isinstance(dense, nn.Module):
            stack.enter_context(eval_mode(dense))
        calls = {name: _make_call(each) for name, each in every.items()}
        if images is None:
            opening, batches = draw_noise(shape, seed), None
        else:
            opening, batches = read_first(images)
        scored = (
            {}
            if batches is None
            else score(calls, batches, total=count_images(images), progress=show)
        )
        timed = fill_batch(opening, batch)
        measured = Measurements(
            scores=scored,
            spent={},
            timed={},
            tokens={},
            seconds=latency(calls, timed, repeats, WARMUP, progress=show) if repeats else {},
            memory={},
            batch=batch,
        )
    rows = [make_row("dense", _dense_costs(first, dense), measured)]
    rows += [make_row(name, _costs(each.card), measured) for name, each in artefacts.items()]
    precisions = dict.fromkeys(each.card["precision"] for each in artefacts.values())
    provenance = Provenance.of(
        torch.device("cpu"),
        ", ".join(precisions),
        batch=batch,
        image_size=(shape[1], shape[2]),
        images=scored[next(iter(artefacts))].images if scored else 0,
        seed=seed,
        versions={name: v for each in artefacts.values() for name, v in each.runtime.items()},
    )
    prepared = getattr(images, "prepared", None)
    if not isinstance(prepared, Preprocessing):
        prepared = None
    beside = "" if dense is None else ", beside dense"
    targets = ", ".join(dict.fromkeys(each.card["target"] for each in artefacts.values()))
    return Report(tuple(rows), provenance, f"exported for {targets}{beside}", prepared)


def _check_alike(artefacts: Mapping[str, Artefact], dense: nn.Module | Artefact | None) -> None:
    """Refuses what cannot be compared: other images or classes, or a dense model that is none."""
    if "dense" in artefacts:
        raise UnknownName("'dense' is the model to compare with (dense=). Name this one otherwise.")
    first = next(iter(artefacts.values()))
    others = [*artefacts.values()] + ([dense] if isinstance(dense, Artefact) else [])
    for other in others:
        if other.card["input"] != first.card["input"]:
            raise WrongInput(
                f"{other.path} takes images of shape {tuple(other.card['input'])}, and "
                f"{first.path} of {tuple(first.card['input'])}. One measurement is of one image "
                "size."
            )
        if other.num_classes != first.num_classes:
            raise UnsupportedModel(
                f"{other.path} tells {other.num_classes} classes apart, and {first.path} "
                f"{first.num_classes}. Models of the same classes are compared."
            )
    if isinstance(dense, Artefact) and dense.card["macs"] != dense.card["dense_macs"]:
        raise UnsupportedModel(
            f"dense= is {dense.path}, which keeps fewer tokens ({dense.card['method']}). Export "
            "the dense model: method 'identity' with keep=1.0."
        )
    if dense is not None and not isinstance(dense, nn.Module | Artefact):
        raise UnsupportedModel(
            f"dense= is a {type(dense).__name__}. Give the dense torch.nn.Module, or what "
            "patchslim.load makes of it once it is exported."
        )


def _check_batch(models: Mapping[str, nn.Module | Artefact], batch: int) -> None:
    """Refuses to time an artefact at another batch than the one that it was exported for."""
    for each in models.values():
        fixed = each.card["batch"] if isinstance(each, Artefact) else None
        if fixed not in (None, batch):
            raise WrongInput(
                f"{each.path} takes {fixed} images in a call, and {batch} are to be timed. Give "
                f"batch={fixed} (--batch {fixed}), or repeats=0 (--repeats 0) for no timing."
            )


def _make_call(model: nn.Module | Artefact) -> Callable[[Tensor], Tensor]:
    """A function from any number of images to their class scores."""
    if isinstance(model, nn.Module):
        return _make_module_call(model)
    fixed = model.card["batch"]

    def run(images: Tensor) -> Tensor:
        if not fixed or len(images) == fixed:
            return model.logits(images)
        whole = fill_batch(images, len(images) + -len(images) % fixed)
        return torch.cat([model.logits(part) for part in whole.split(fixed)])[: len(images)]

    return run


def _make_module_call(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """The same for a model of PyTorch."""
    adapter: Adapter
    adapter = model.plan.adapter if isinstance(model, SlimModel) else find_adapter(model)
    return lambda images: adapter.logits(model(move_to_host(images, model)))


def _costs(card: Mapping[str, Any]) -> Costs:
    """What the card of an artefact counts. Padded, every image costs as much as the costliest."""
    return Costs(
        method=card["method"] or "own",
        tokens=tuple(card["tokens"]),
        macs=card["macs"],
        timed_macs=card["macs"],
        dense_macs=card["dense_macs"],
        choosing=card.get("choosing", 0),
        parameters=card.get("parameters"),
    )


def _dense_costs(first: Artefact, dense: nn.Module | Artefact | None) -> Costs:
    """What the dense model costs, as far as that is known."""
    tokens = dense.card["tokens"] if isinstance(dense, Artefact) else first.card.get("dense_tokens")
    if tokens is None:
        raise BadFile(
            f"The card of {first.path} does not say how many tokens the dense model has: an older "
            "version wrote it. Export it again, or give the exported dense model as dense= "
            "(--dense)."
        )
    parameters = None
    if isinstance(dense, Artefact):
        parameters = dense.card.get("parameters")
    elif dense is not None:
        parameters = sum(each.numel() for each in dense.parameters())
    macs = first.card["dense_macs"]
    return Costs("dense", tuple(tokens), macs, macs, macs, parameters=parameters)
