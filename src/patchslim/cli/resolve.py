"""From parsed arguments to what they name: a model, a budget, images, settings, a teacher.

A wrong argument raises a `PatchslimError`, as in Python.
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

from patchslim.calibration.patch_slimming.config import PatchSlimmingConfig
from patchslim.deployment.registry import target_of_artefact
from patchslim.errors import PatchslimError, UnknownName, UnsupportedModel
from patchslim.files import resolve_path
from patchslim.hosts._catalog import (
    EXAMPLE,
    find_host,
    has_random_weights,
    load_weights,
)
from patchslim.hosts._preprocessing import Preprocessing
from patchslim.hosts._weights import read_weights
from patchslim.methods._method import Method
from patchslim.methods._registry import DEFAULT_METHOD, find_method
from patchslim.model.load import load
from patchslim.model.slim import slim
from patchslim.saving.folder import is_saved, read_recipe
from patchslim.schedules.budget import Budget
from patchslim.training.config import RECIPES, TrainConfig

if TYPE_CHECKING:
    from torch import nn

    from patchslim.cli.terminal import Terminal
    from patchslim.data.source import Source
    from patchslim.example.digits import Split
    from patchslim.measurement.score import Batch
    from patchslim.model.model import SlimModel

# How many scenes of the embedded example are used without --limit.
SCENE_COUNTS: dict[Split, int] = {"train": 2000, "test": 400}
VALIDATION_BATCH = 32  # images per batch in a validation
CHECKING, CALIBRATION = 16, 200  # images to check an export with, and to make it int8


def slimmed_model(args: Namespace, terminal: Terminal) -> SlimModel:
    """Builds the model in the arguments and slims it with their method and budget."""
    if is_saved(args.model):
        raise PatchslimError(
            f"{args.model} is slimmed already: measure it, show it, or slim the model it was made "
            "of."
        )
    method = method_from_args(args, DEFAULT_METHOD)
    host = _build_host(args)
    if _is_random(args) and args.command != "train":
        terminal.note(
            f"note: {args.model} has random weights, so its answers mean nothing; costs do. "
            "Give --weights FILE or --pretrained."
        )
    return slim(host, method, args.schedule, tail=args.tail, **budget_from_args(args))


def dense_model(args: Namespace) -> nn.Module:
    """Builds the dense model in the arguments; refuses random weights."""
    if is_saved(args.model):
        raise PatchslimError(
            f"{args.model} is slimmed already: {args.command} the model it was made of. To improve "
            "what it answers, train it (`patchslim train`)."
        )
    if _is_random(args):
        raise PatchslimError(
            f"{args.model} has random weights, and what such a model reads means nothing. Give "
            "--weights FILE or --pretrained."
        )
    return _build_host(args)


def _build_host(args: Namespace) -> nn.Module:
    """Builds the model in the arguments, with its weights."""
    if target_of_artefact(resolve_path(args.model)) is not None:
        raise PatchslimError(
            f"{args.model} is an exported model, which can be measured (`patchslim measure`) and "
            f"timed (`patchslim benchmark`). To {args.command} it, give the model that was "
            "exported."
        )
    settings: dict[str, Any] = {}
    for text in args.model_kwargs:
        name, equals, value = text.partition("=")
        if not equals:
            raise PatchslimError(f"--model-kwargs {text}: give NAME=VALUE, such as img_size=384.")
        try:
            settings[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            settings[name] = value  # a plain word, such as avg
    return find_host(
        args.model, pretrained=args.pretrained, weights=args.weights, settings=settings
    )


def open_model(args: Namespace, terminal: Terminal) -> tuple[SlimModel, Preprocessing | None]:
    """Loads a saved model and its image preprocessing, or slims a model now."""
    if not is_saved(args.model):
        return slimmed_model(args, terminal), None
    has_weights = args.weights or args.pretrained or args.model_kwargs
    if has_budget(args) or args.method or args.set or args.tail or has_weights:
        raise PatchslimError(
            f"{args.model} is slimmed already, with a method and a budget of its own; leave out "
            "--method, budgets, weights and --model-kwargs."
        )
    return load(args.model), Preprocessing.from_json(read_recipe(args.model)["images"])


def open_measurement_images(
    args: Namespace, slimmed: Any, prepared: Preprocessing | None, terminal: Terminal
) -> Source | list[Batch] | None:
    """Opens the images to measure on; None to measure costs alone."""
    if args.data is not None or args.model == EXAMPLE:
        return open_images(args.data or EXAMPLE, "test", args, slimmed, prepared)
    if args.classes is not None or args.limit is not None:
        raise PatchslimError("--classes and --limit say which images of --data PATH; give it too.")
    terminal.note("note: without --data only costs are measured, on noise; answers are not.")
    return None


def open_training_images(
    args: Namespace, slimmed: SlimModel, prepared: Preprocessing | None, terminal: Terminal
) -> tuple[Source | list[Batch], Source | list[Batch] | None]:
    """Opens the images to train on, and those to validate on, if any."""
    data, validation = args.data, args.validation
    if data is None and args.model != EXAMPLE:
        raise PatchslimError(
            "What is it to learn from? Give --data PATH: a folder of images, an archive of one, a "
            "saved Hugging Face dataset, WebDataset shards, or `digits`."
        )
    data = data or EXAMPLE
    if data == EXAMPLE:
        validation = validation or EXAMPLE
    images = open_images(data, "train", args, slimmed, prepared)
    if validation is None:
        terminal.note(
            "note: without --validation the last weights are kept, not the best, and costs alone "
            "are reported."
        )
        return images, None
    return images, open_images(validation, "test", args, slimmed, prepared)


def open_calibration_images(
    args: Namespace, host: nn.Module, search: PatchSlimmingConfig
) -> Source | list[Batch]:
    """Opens the images to calibrate on; they need no labels."""
    path = args.data or (EXAMPLE if args.model == EXAMPLE else None)
    if path is None:
        raise PatchslimError(
            "On which images is it to be calibrated? Give --data PATH: a folder of images, an "
            "archive of one, a saved Hugging Face dataset, WebDataset shards, or `digits`. They "
            "need no labels."
        )
    if path == EXAMPLE:
        return _example_batches("train", search.images, search.batch)
    options = Namespace(
        command=args.command, classes=None, limit=None, batch=search.batch, limits=args.limits
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*so labels are left out")
        return open_images(path, "train", options, host, None)


def open_export_images(
    args: Namespace, slimmed: SlimModel, prepared: Preprocessing | None
) -> Source | list[Batch] | None:
    """The images to check an export with, if any; they need no labels."""
    path = args.data or (EXAMPLE if args.model == EXAMPLE else None)
    if path is None:
        return None
    limit = args.limit or (CALIBRATION if args.precision == "int8" else CHECKING)
    options = Namespace(
        command=args.command, classes=None, limit=limit, limits=args.limits, batch=8
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*so labels are left out")
        return open_images(path, "test", options, slimmed, prepared)


def read_labels(file: Path, limits: list[str]) -> list[str]:
    """Reads the names of classes in a file, one a line."""
    from patchslim.data.files import read_regular
    from patchslim.data.limits import Limits

    try:
        return read_regular(file, Limits.parse(limits)).decode("utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise PatchslimError(
            f"--labels {file}: {error}. Give a text file with one name a line."
        ) from error


def open_images(
    path: str, split: Split, args: Namespace, host: Any, prepared: Preprocessing | None
) -> Source | list[Batch]:
    """Opens the images at `path`, prepared for the model, or scenes of the embedded example."""
    from patchslim.data.hf_dataset import Dataset, is_dataset
    from patchslim.data.images import Images
    from patchslim.data.limits import Limits
    from patchslim.data.webdataset import Shards, is_shards

    # `--batch` of train is the batch of a training step, and may be missing.
    batch: int = VALIDATION_BATCH if args.command == "train" else args.batch
    limits = Limits.parse(args.limits)
    if path == EXAMPLE:
        if args.classes is not None:
            raise PatchslimError(
                "--classes names class folders, and `digits` has none: its labels are the digits. "
                "Leave --classes out, or give a folder as --data."
            )
        return _example_batches(split, args.limit or SCENE_COUNTS[split], batch)
    kind = Dataset if is_dataset(path) else Shards if is_shards(path) else None
    if kind is None:
        return Images.for_host(
            host,
            path,
            prepared=prepared,
            classes=args.classes,
            limit=args.limit,
            batch=batch,
            limits=limits,
        )
    if args.classes is not None:
        what = "a Hugging Face dataset" if kind is Dataset else "WebDataset shards"
        raise PatchslimError(
            f"--classes names class folders, and {path} is {what}, with labels of its own; leave "
            "--classes out."
        )
    return kind.for_host(
        host, path, prepared=prepared, limit=args.limit, batch=batch, limits=limits
    )


def _example_batches(split: Split, count: int, batch: int) -> list[Batch]:
    """Makes batches of the embedded example's scenes."""
    import torch

    from patchslim.example.digits import normalise, scenes

    examples = scenes(split, count)
    pixels, labels = normalise(examples.images), torch.from_numpy(examples.labels)
    return list(zip(pixels.split(batch), labels.split(batch), strict=True))


def train_config_from_args(args: Namespace, method: Method) -> TrainConfig:
    """Takes the method's own defaults, then `--recipe`, then the options; later ones win."""
    given = {
        each.name: getattr(args, each.name) for each in fields(TrainConfig) if each.name in args
    }
    return TrainConfig.of(method.training_defaults, {**RECIPES.get(args.recipe, {}), **given})


def search_from_args(args: Namespace) -> PatchSlimmingConfig:
    """Takes the defaults of the search mode, overridden by the options."""
    given = {
        each.name: getattr(args, each.name)
        for each in fields(PatchSlimmingConfig)
        if each.name in args
    }
    return PatchSlimmingConfig.of(given)


def teacher_from_args(args: Namespace, config: TrainConfig) -> nn.Module | None:
    """Finds the model to learn from; None for the untouched host (or for no teacher at all)."""
    if not config.needs_teacher:
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


def dense_from_args(args: Namespace, slimmed: SlimModel, terminal: Terminal) -> nn.Module | None:
    """Finds the model to compare with; None for the model's own host."""
    if args.dense is None:
        if slimmed.trained is not None:
            terminal.note(
                "note: `dense` is the trained host with all its tokens. Give --dense WEIGHTS to "
                "compare with the model as it was before."
            )
        return None
    file = resolve_path(args.dense)
    if file.is_file():
        host = copy.deepcopy(slimmed.host)
        load_weights(host, read_weights(file), file)
        return host
    return find_dense(args.dense)


def find_dense(name: str) -> nn.Module:
    """The dense model in a saved folder, or the one of this name that has weights of its own."""
    if is_saved(name):
        saved = load(name)
        if saved.trained is not None:
            raise UnsupportedModel(
                f"--dense {name} was trained with fewer tokens: it is not the dense model. "
                "Give the weights that the training began with."
            )
        return saved.host
    if has_random_weights(name, pretrained=False, weights=None):
        raise PatchslimError(
            f"--dense {name}: there is no such file or folder. Give the weights that the "
            "training began with: a .safetensors or torch file, `digits`, or a folder."
        )
    return find_host(name)


def _is_random(args: Namespace) -> bool:
    """Tells whether the model gets random weights."""
    return has_random_weights(args.model, pretrained=args.pretrained, weights=args.weights)


def has_budget(args: Namespace) -> bool:
    """Tells whether the arguments give any budget."""
    return bool(budget_from_args(args)) or args.schedule is not None


def budget_from_args(args: Namespace) -> Budget:
    """Collects the budgets in the arguments, as keywords of `patchslim.slim`."""
    given = {name: getattr(args, name) for name in Budget.__annotations__}
    budget: Any = {name: value for name, value in given.items() if value is not None}
    typed: Budget = budget
    return typed


def method_from_args(args: Namespace, default: str) -> Method:
    """Makes the method in the arguments, or the default one, with its `--set` settings."""
    chosen = args.method or default
    method = find_method(chosen)
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
        settings[name] = _parse_setting(name, value, type(parameters[name].default))
    return method(**settings)


def _parse_setting(name: str, text: str, kind: type) -> Any:
    """Reads a setting's value, with the type of its default."""
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise PatchslimError(f"--set {name}={text}: {name} is true or false.")
        return text.lower() == "true"
    try:
        return kind(text)
    except ValueError as error:
        raise PatchslimError(f"--set {name}={text}: {name} is of type {kind.__name__}.") from error
