"""From parsed arguments to what they mean: a model, a budget, images, a course, a teacher.

A wrong argument is a `PatchslimError`, as it is in Python.
"""

from __future__ import annotations

import ast
import copy
import inspect
import warnings
from argparse import Namespace
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchslim.calibration.patch_slimming.config import Search
from patchslim.errors import PatchslimError, UnknownName, UnsupportedModel
from patchslim.hosts._catalog import EXAMPLE, fill, find_host, has_random_weights, read_weights
from patchslim.hosts._preprocessing import Preparation
from patchslim.methods._method import Reducer
from patchslim.methods._registry import find_reducer
from patchslim.model.load import load
from patchslim.model.slim import slim
from patchslim.saving.folder import is_saved, read_recipe
from patchslim.schedules.budget import Budget
from patchslim.training.config import RECIPES, Course

if TYPE_CHECKING:
    from torch import nn

    from patchslim.cli.terminal import Terminal
    from patchslim.data.source import Source
    from patchslim.example.digits import Split
    from patchslim.measurement.score import Batch
    from patchslim.model.model import SlimModel

# Scenes of the embedded example, where no other number is asked for.
SCENES: dict[Split, int] = {"train": 2000, "test": 400}
BATCH = 32  # images at a time in a validation


def slimmed_model(args: Namespace, terminal: Terminal) -> SlimModel:
    """The model that the arguments name, slimmed as they say."""
    if is_saved(args.model):
        raise PatchslimError(
            f"{args.model} is slimmed already: measure it, show it, or slim the model it was made "
            "of."
        )
    reducer = reducer_of(args, "tome")
    host = _host(args)
    if _is_random(args) and args.command != "train":
        terminal.note(
            f"note: {args.model} has random weights, so its answers mean nothing; costs do. "
            "Give --weights FILE or --pretrained."
        )
    return slim(host, reducer, args.schedule, tail=args.tail, **budget_of(args))


def dense_model(args: Namespace) -> nn.Module:
    """The model that the arguments name, to be calibrated: its weights must mean something."""
    if is_saved(args.model):
        raise PatchslimError(
            f"{args.model} is slimmed already: calibrate the model it was made of. To improve what "
            "it answers, train it (`patchslim train`)."
        )
    if _is_random(args):
        raise PatchslimError(
            f"{args.model} has random weights, and what such a model reads means nothing. Give "
            "--weights FILE or --pretrained."
        )
    return _host(args)


def _host(args: Namespace) -> nn.Module:
    """The model that the arguments name, built as they say."""
    settings: dict[str, Any] = {}
    for text in args.model_kwargs:
        name, equals, value = text.partition("=")
        if not equals:
            raise PatchslimError(f"--model-kwargs {text}: give NAME=VALUE, such as img_size=384.")
        try:
            settings[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            settings[name] = value  # a word, such as avg
    return find_host(
        args.model, pretrained=args.pretrained, weights=args.weights, settings=settings
    )


def opened(args: Namespace, terminal: Terminal) -> tuple[SlimModel, Preparation | None]:
    """A saved model with its preparation of images, or a model that is slimmed now."""
    if not is_saved(args.model):
        return slimmed_model(args, terminal), None
    built = args.weights or args.pretrained or args.model_kwargs
    if asks(args) or args.method or args.set or args.tail or built:
        raise PatchslimError(
            f"{args.model} is slimmed already, with a method and a budget of its own; leave out "
            "--method, budgets, weights and --model-kwargs."
        )
    return load(args.model), Preparation.from_json(read_recipe(args.model)["images"])


def images_of(
    args: Namespace, slimmed: SlimModel, prepared: Preparation | None, terminal: Terminal
) -> Source | list[Batch] | None:
    """Batches of the images to measure on, or None where there are none."""
    if args.data is not None or args.model == EXAMPLE:
        return images_at(args.data or EXAMPLE, "test", args, slimmed, prepared)
    if args.classes is not None or args.limit is not None:
        raise PatchslimError("--classes and --limit say which images of --data PATH; give it too.")
    terminal.note("note: without --data only costs are measured, on noise; answers are not.")
    return None


def lessons_of(
    args: Namespace, slimmed: SlimModel, prepared: Preparation | None, terminal: Terminal
) -> tuple[Source | list[Batch], Source | list[Batch] | None]:
    """The images to train on, and those to validate on, if there are any."""
    data, checked = args.data, args.validation
    if data is None and args.model != EXAMPLE:
        raise PatchslimError(
            "What is it to learn from? Give --data PATH: a folder of images, an archive of one, a "
            "saved Hugging Face dataset, WebDataset shards, or `digits`."
        )
    data = data or EXAMPLE
    if data == EXAMPLE:
        checked = checked or EXAMPLE
    images = images_at(data, "train", args, slimmed, prepared)
    if checked is None:
        terminal.note(
            "note: without --validation the last weights are kept, not the best, and costs alone "
            "are reported."
        )
        return images, None
    return images, images_at(checked, "test", args, slimmed, prepared)


def samples_of(args: Namespace, host: nn.Module, search: Search) -> Source | list[Batch]:
    """The images to calibrate on; whether they have labels does not matter."""
    path = args.data or (EXAMPLE if args.model == EXAMPLE else None)
    if path is None:
        raise PatchslimError(
            "On which images is it to be calibrated? Give --data PATH: a folder of images, an "
            "archive of one, a saved Hugging Face dataset, WebDataset shards, or `digits`. They "
            "need no labels."
        )
    if path == EXAMPLE:
        return _scenes("train", search.images, search.batch)
    asked = Namespace(command=args.command, classes=None, limit=None, batch=search.batch)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*so labels are left out")
        return images_at(path, "train", asked, host, None)


def images_at(
    path: str, split: Split, args: Namespace, host: nn.Module, prepared: Preparation | None
) -> Source | list[Batch]:
    """The images at `path`, prepared for the model, or scenes of the embedded example."""
    from patchslim.data.hf_dataset import Dataset, is_dataset
    from patchslim.data.images import Images
    from patchslim.data.webdataset import Shards, is_shards

    # In training `batch` is that of a step, and only where it is given.
    batch: int = BATCH if args.command == "train" else args.batch
    if path == EXAMPLE:
        return _scenes(split, args.limit or SCENES[split], batch)
    kind = Dataset if is_dataset(path) else Shards if is_shards(path) else None
    if kind is None:
        return Images.for_host(
            host, path, prepared=prepared, classes=args.classes, limit=args.limit, batch=batch
        )
    if args.classes is not None:
        what = "a Hugging Face dataset" if kind is Dataset else "WebDataset shards"
        raise PatchslimError(
            f"--classes names class folders, and {path} is {what}, with labels of its own; leave "
            "--classes out."
        )
    return kind.for_host(host, path, prepared=prepared, limit=args.limit, batch=batch)


def _scenes(split: Split, count: int, batch: int) -> list[Batch]:
    """Batches of the embedded example's scenes."""
    import torch

    from patchslim.example.digits import normalise, scenes

    drawn = scenes(split, count)
    pixels, labels = normalise(drawn.images), torch.from_numpy(drawn.labels)
    return list(zip(pixels.split(batch), labels.split(batch), strict=True))


def course_of(args: Namespace, reducer: Reducer) -> Course:
    """The method's usual course, with what the arguments say otherwise."""
    given = {each.name: getattr(args, each.name) for each in fields(Course) if each.name in args}
    return Course.of(reducer.course, {**RECIPES.get(args.recipe, {}), **given})


def search_of(args: Namespace) -> Search:
    """What is usual for the mode of the search, with what the arguments say otherwise."""
    given = {each.name: getattr(args, each.name) for each in fields(Search) if each.name in args}
    return Search.of(given)


def teacher_of(args: Namespace, course: Course) -> nn.Module | None:
    """The model whose answers are learned, or None for the untouched host."""
    if not course.distils:
        if args.teacher is not None:
            raise PatchslimError(
                "--teacher: --distil none listens to nobody. Leave one of them out."
            )
        return None
    if args.teacher is None:
        if args.teacher_weights is not None:
            raise PatchslimError("--teacher-weights: say of which model they are, with --teacher.")
        if _is_random(args):
            raise PatchslimError(
                f"{args.model} has random weights, and by default it is its own teacher. Give "
                "--weights FILE or --pretrained; or --teacher MODEL; or train from scratch on "
                "labels alone: --distil none --tokens 0."
            )
        return None
    if is_saved(args.teacher):
        return load(args.teacher)
    weights = {"pretrained": False, "weights": args.teacher_weights}
    if has_random_weights(args.teacher, **weights):
        raise PatchslimError(
            f"The teacher {args.teacher} has random weights, of which nothing can be learned. Give "
            "--teacher-weights FILE."
        )
    return find_host(args.teacher, **weights)


def dense_of(args: Namespace, slimmed: SlimModel, terminal: Terminal) -> nn.Module | None:
    """What the model is compared with; None for its own host."""
    if args.dense is None:
        if slimmed.trained is not None:
            terminal.note(
                "note: `dense` is the trained host with all its tokens. Give --dense WEIGHTS to "
                "compare with the model as it was before."
            )
        return None
    file = Path(args.dense).expanduser()
    if file.is_file():
        host = copy.deepcopy(slimmed.host)
        fill(host, read_weights(file), file)
        return host
    if is_saved(args.dense):
        saved = load(args.dense)
        if saved.trained is not None:
            raise UnsupportedModel(
                f"--dense {args.dense} was trained with fewer tokens: it is not the dense model. "
                "Give the weights that the training began with."
            )
        return saved.host
    if has_random_weights(args.dense, pretrained=False, weights=None):
        raise PatchslimError(
            f"--dense {args.dense}: there is no such file or folder. Give the weights that the "
            "training began with: a .safetensors or torch file, `digits`, or a folder."
        )
    return find_host(args.dense)


def _is_random(args: Namespace) -> bool:
    """Whether nobody has trained the weights of the model."""
    return has_random_weights(args.model, pretrained=args.pretrained, weights=args.weights)


def asks(args: Namespace) -> bool:
    """Whether any budget is given."""
    return bool(budget_of(args)) or args.schedule is not None


def budget_of(args: Namespace) -> Budget:
    """The budgets that are given, in the words of `patchslim.slim`."""
    given = {name: getattr(args, name) for name in Budget.__annotations__}
    budget: Any = {name: value for name, value in given.items() if value is not None}
    found: Budget = budget
    return found


def reducer_of(args: Namespace, default: str) -> Reducer:
    """The method with its settings."""
    chosen = args.method or default
    method = find_reducer(chosen)
    parameters = inspect.signature(method).parameters
    settings: dict[str, Any] = {}
    for text in args.set:
        name, equals, value = text.partition("=")
        if not equals:
            raise PatchslimError(f"--set {text}: give NAME=VALUE, such as fuse=false.")
        if not parameters:
            raise PatchslimError(f"--set {text}: {chosen} has no settings.")
        if name not in parameters:
            raise UnknownName.of(f"setting of {chosen}", name, parameters)
        settings[name] = _value(name, value, type(parameters[name].default))
    return method(**settings)


def _value(name: str, text: str, kind: type) -> Any:
    """A setting's value, of the kind that its default has."""
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise PatchslimError(f"--set {name}={text}: {name} is true or false.")
        return text.lower() == "true"
    try:
        return kind(text)
    except ValueError as error:
        raise PatchslimError(f"--set {name}={text}: {name} is of type {kind.__name__}.") from error
