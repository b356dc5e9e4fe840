"""`bench`: compares any models, methods, budgets, runtimes, precisions and batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from patchslim.deployment.registry import target_names
from patchslim.errors import BadSetting, UnsupportedModel
from patchslim.hosts._adapter import Adapter
from patchslim.hosts._answers import eval_mode
from patchslim.measurement.latency import use_threads
from patchslim.measurement.measure import ROUNDS
from patchslim.methods._method import Method
from patchslim.methods._registry import make_method, method_label, method_names
from patchslim.model.model import SlimModel
from patchslim.runs.ownership import own_folder
from patchslim.runs.progress import Progress, check_progress
from patchslim.settings import BATCH, SEED, Range, check_choice, check_type, check_value, show_value
from patchslim.sweep.backend import EAGER, known_precisions
from patchslim.sweep.cell import DENSE, Cell, Contestant, make_cells
from patchslim.sweep.corruption import CORRUPTIONS
from patchslim.sweep.resolution import RESOLUTION, can_resize
from patchslim.sweep.result import Sweep, check_folder
from patchslim.sweep.runner import Runner
from patchslim.sweep.scaling import check_ray
from patchslim.sweep.store import CellResult, Store
from patchslim.sweep.subject import ImagesOf, Subject

SHARE = Range(0, 1, above=True)
THREADS = Range(1, 4096)
WORKERS = Range(1, 4096)
NOT_COMPARED = ("identity", "random")  # the dense model and the baseline: both are there anyway


def bench(  # noqa: PLR0913 (a sweep is the product of these)
    models: nn.Module | Mapping[str, nn.Module],
    images: ImagesOf,
    methods: Sequence[str | Method] | Mapping[str, str | Method | SlimModel] | None = None,
    *,
    out: str | Path,
    budgets: Sequence[float] = (0.75, 0.5),
    runtimes: Sequence[str] = (EAGER,),
    precisions: Sequence[str] = ("float32",),
    batches: Sequence[int] = (8,),
    calibration: ImagesOf | None = None,
    corruptions: bool = False,
    rounds: int = 20,
    threads: int | None = None,
    workers: int | None = None,
    seed: int = 0,
    adapter: Adapter | None = None,
    progress: Progress | None = None,
) -> Sweep:
    """Compares methods on models by one protocol, and keeps what it finds in a folder.

    Each cell, that is a method at a budget on a runtime, in a precision, for a batch, is scored on
    all images and timed in turns with the dense model and with `random` at its own token counts.
    What is in the folder already is not measured again: a sweep that was stopped goes on.

    Args:
        models: a dense model, or several by name.
        images: the images to score, with labels or without: the path of a folder or an archive of
            them, a source such as `Images`, batches, or a function that returns one of these for a
            model: each prepares images in its own way.
        methods: names, or Methods with settings of your own, or a mapping from what each is to be
            called; by default all that are there. "resolution" is the dense model on smaller
            images. In a mapping there may be models that were slimmed before, such as a plan or
            one that was trained; they have their own budget.
        out: the folder of the sweep.
        budgets: shares of the dense model's operations.
        runtimes: "eager" for PyTorch, and names of targets of `export`.
        precisions: "float32" and others that the runtimes have.
        batches: numbers of images in a call.
        calibration: unlabelled images for methods that are calibrated, and for int8; not those to
            score.
        corruptions: whether to score each model on corrupted copies of the images, too: blur,
            noise, JPEG and contrast at three strengths.
        rounds: of timing; 0 for no timing.
        threads: by default as many as PyTorch has here.
        workers: lets so many processes score, with Ray (extra `scale`); times are measured by one.
        seed: of the random baseline.
        adapter: an Adapter of your own, for models of a family that does not ship here.
        progress: is called with one line of text at a time.

    Returns:
        The rows, and the cells that were refused with the reasons.
    """
    named = _name_models(models)
    chosen = _name_methods(methods)
    slimmed = [label for label, each in chosen.items() if isinstance(each, SlimModel)]
    if slimmed and len(named) > 1:
        raise BadSetting(
            f"{show_value(slimmed[0])} is a slimmed model, which is compared with the model it was "
            f"made of: give that one alone, and not {len(named)} models."
        )
    shares = [check_value("budgets", each, float, SHARE) for each in _list("budgets", budgets)]
    sizes = [check_value("batches", each, int, BATCH) for each in _list("batches", batches)]
    places = _list("runtimes", runtimes)
    for each in places:
        check_choice("runtimes", each, (EAGER, *target_names()))
    types = _list("precisions", precisions)
    for each in types:
        check_choice("precisions", each, known_precisions())
    rounds = check_value("rounds", rounds, int, ROUNDS)
    seed = check_value("seed", seed, int, SEED)
    # Processes of Ray would have other numbers of their own, and times hold for one number.
    threads = torch.get_num_threads() if threads is None else threads
    threads = check_value("threads", threads, int, THREADS)
    if workers is not None:
        workers = check_value("workers", workers, int, WORKERS)
        check_ray()
    show = check_progress(progress)
    folder = check_folder(out)
    check_type("corruptions", corruptions, bool, "Give True or False.")
    copies = CORRUPTIONS if corruptions else ()
    runner = Runner(Store(folder), chosen, copies, rounds, threads, seed, show)
    results: dict[Cell, CellResult] = {}
    prepared = None
    with own_folder(folder), use_threads(threads):
        for name, host in named.items():
            with eval_mode(host):
                subject = Subject.open(name, host, images, calibration, adapter)
                prepared = prepared or subject.prepared
                fitting = dict(chosen)
                if methods is None and not can_resize(host):
                    del fitting[RESOLUTION]
                cells = [*make_cells(name, fitting, shares, places, types, sizes)]
                if workers is not None:
                    runner.answer_ahead(subject, cells, workers)
                results |= runner.run(subject, cells)
        sweep = Sweep(results, runner.measured, prepared, folder)
        sweep.save()
    return sweep


def _name_models(models: nn.Module | Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Returns the models by name."""
    if isinstance(models, nn.Module):
        return {type(models).__name__: models}
    check_type("models", models, Mapping, "Give a dense model, or several by name.")
    if not models:
        raise BadSetting("models={}: give at least one.")
    cure = "Give a dense torch.nn.Module."
    for name, model in models.items():
        check_type(f"models[{show_value(name)}]", model, nn.Module, cure, UnsupportedModel)
    return {str(name): model for name, model in models.items()}


def _name_methods(
    methods: Sequence[str | Method] | Mapping[str, str | Method | SlimModel] | None,
) -> dict[str, Contestant]:
    """Returns the methods by what they are called in the rows; None for smaller images."""
    if methods is None:
        methods = [RESOLUTION, *(name for name in method_names() if name not in NOT_COMPARED)]
    if isinstance(methods, str | Method | SlimModel):
        methods = [methods]
    if not isinstance(methods, Mapping):
        cure = "Give names, such as ['tome', 'topk']."
        check_type("methods", methods, list | tuple | set, cure)
        if any(isinstance(each, SlimModel) for each in methods):
            raise BadSetting(
                "methods: a slimmed model has no name of its own here: give a mapping, such as "
                "{'mine': slimmed, 'tome': 'tome'}."
            )
        methods = {each if isinstance(each, str) else method_label(each): each for each in methods}
    if DENSE in methods:
        raise BadSetting("'dense' is the untouched model, which is there anyway: leave it out.")
    return {str(label): _make_contestant(each) for label, each in methods.items()}


def _make_contestant(given: Any) -> Contestant:
    """Returns the method of a name, a Method or a slimmed model as it is, None for RESOLUTION."""
    if isinstance(given, SlimModel):
        return given
    return None if isinstance(given, str) and given == RESOLUTION else make_method(given, {})


def _list(name: str, values: Any) -> list[Any]:
    """Returns several values, each once; refuses a single one, and none."""
    alone = isinstance(values, str | int | float)
    cure = f"Give a list, such as [{show_value(values)}]." if alone else "Give a list."
    check_type(name, values, list | tuple | set | range, cure)
    try:
        found = list(dict.fromkeys(values))
    except TypeError as error:
        raise BadSetting(f"{name}={show_value(values)}: {error}.") from None
    if not found:
        raise BadSetting(f"{name}=[]: give at least one.")
    return found
