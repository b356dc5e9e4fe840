"""From parsed arguments to what they mean: a slimmed model, a method, a budget, images.

A wrong argument is a `PatchslimError`, as it is in Python.
"""

from __future__ import annotations

import inspect
from argparse import Namespace
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from patchslim.budget import Budget
from patchslim.errors import PatchslimError, UnknownName
from patchslim.hosts import EXAMPLE, find_host, has_random_weights
from patchslim.io import load
from patchslim.preparation import Preparation
from patchslim.recipe import is_saved, read_recipe
from patchslim.reducer import Reducer, find_reducer
from patchslim.slim import slim

if TYPE_CHECKING:
    from torch import Tensor

    from patchslim.model import SlimModel
    from patchslim.terminal import Terminal

SCENES = 400  # of the embedded example, where no other number is asked for


def slimmed_model(args: Namespace, terminal: Terminal) -> SlimModel:
    """The model that the arguments name, slimmed as they say."""
    if is_saved(args.model):
        raise PatchslimError(
            f"{args.model} is slimmed already: measure it, show it, or slim the model it was made "
            "of."
        )
    weights = {"pretrained": args.pretrained, "weights": args.weights}
    reducer = reducer_of(args, "tome")
    host = find_host(args.model, **weights)
    if has_random_weights(args.model, **weights):
        terminal.note(
            f"note: {args.model} has random weights, so its answers mean nothing; costs do. "
            "Give --weights FILE or --pretrained."
        )
    return slim(host, reducer, args.schedule, tail=args.tail, **budget_of(args))


def opened(args: Namespace, terminal: Terminal) -> tuple[SlimModel, Preparation | None]:
    """A saved model with its preparation of images, or a model that is slimmed now."""
    if not is_saved(args.model):
        return slimmed_model(args, terminal), None
    if asks(args) or args.method or args.set or args.tail or args.weights or args.pretrained:
        raise PatchslimError(
            f"{args.model} is slimmed already, with a method and a budget of its own; leave out "
            "--method, budgets and weights."
        )
    return load(args.model), Preparation.from_json(read_recipe(args.model)["images"])


def images_of(
    args: Namespace, slimmed: SlimModel, prepared: Preparation | None, terminal: Terminal
) -> Iterable[tuple[Tensor, Tensor | None]] | None:
    """Batches of the images to measure on, or None where there are none."""
    from patchslim.dataset import Dataset, is_dataset
    from patchslim.images import Images

    if args.data == EXAMPLE or (args.data is None and args.model == EXAMPLE):
        return _scenes(args.limit or SCENES, args.batch)
    if args.data is None and (args.classes is not None or args.limit is not None):
        raise PatchslimError("--classes and --limit say which images of --data PATH; give it too.")
    if args.data is None:
        terminal.note("note: without --data only costs are measured, on noise; answers are not.")
        return None
    if is_dataset(args.data):
        if args.classes is not None:
            raise PatchslimError(
                f"--classes names class folders, and {args.data} is a Hugging Face dataset, which "
                "has labels of its own; leave --classes out."
            )
        return Dataset.for_host(
            slimmed, args.data, prepared=prepared, limit=args.limit, batch=args.batch
        )
    return Images.for_host(
        slimmed,
        args.data,
        prepared=prepared,
        classes=args.classes,
        limit=args.limit,
        batch=args.batch,
    )


def _scenes(count: int, batch: int) -> list[tuple[Tensor, Tensor | None]]:
    """Batches of the embedded example's test scenes."""
    import torch

    from patchslim.data.digits import normalise, scenes

    drawn = scenes("test", count)
    pixels, labels = normalise(drawn.images), torch.from_numpy(drawn.labels)
    return list(zip(pixels.split(batch), labels.split(batch), strict=True))


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
