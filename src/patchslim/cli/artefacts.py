"""From parsed arguments to exported models: the one to measure, and the dense one beside it."""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING

from patchslim.cli.resolve import find_dense, has_budget
from patchslim.deployment.artefact import Artefact, open_artefact
from patchslim.errors import PatchslimError
from patchslim.files import resolve_path

if TYPE_CHECKING:
    from torch import nn

    from patchslim.cli.terminal import Terminal


def find_artefact(args: Namespace) -> Artefact | None:
    """The exported model in the arguments; None if they name a model of PyTorch."""
    artefact = open_artefact(resolve_path(args.model))
    if artefact is None:
        return None
    has_weights = args.weights or args.pretrained or args.model_kwargs
    if has_budget(args) or args.method or args.set or args.tail or has_weights:
        raise PatchslimError(
            f"{args.model} is exported, with a method, a budget and weights of its own; leave out "
            "--method, budgets, weights and --model-kwargs."
        )
    return artefact


def find_dense_beside(args: Namespace, terminal: Terminal) -> nn.Module | Artefact | None:
    """The model to compare an exported one with; None if none is given."""
    if args.dense is None:
        terminal.note(
            "note: an exported model holds no dense one to compare with. Give --dense: the dense "
            "model, exported (`--method identity --keep 1`) or saved."
        )
        return None
    path = resolve_path(args.dense)
    artefact = open_artefact(path)
    if artefact is not None:
        return artefact
    if path.is_file():
        raise PatchslimError(
            f"--dense {args.dense} holds weights, and an exported model does not say what to load "
            "them into. Give the dense model, exported (`--method identity --keep 1`) or saved."
        )
    return find_dense(args.dense)
