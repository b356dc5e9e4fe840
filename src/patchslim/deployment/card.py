"""The card of an artefact: what it is, how its images are prepared, and what was checked.

It travels inside of the artefact as JSON, and is all that `load` knows of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from patchslim.deployment.card_entries import check_entries
from patchslim.deployment.graph import Graph
from patchslim.errors import BadFile, BadSetting
from patchslim.files import parse_json
from patchslim.model.recipe import make_recipe
from patchslim.settings import check_type
from patchslim.versions import installed_version, say_upgrade

CARD_VERSION = 1
FROM_RECIPE = (
    "package library host method settings schedule tail trained calibrated images versions".split()
)
ENTRY_TYPES: dict[str, type | tuple[type, ...]] = {
    "target": str,
    "images": dict,
    "input": list,
    "batch": (int, type(None)),
    "precision": str,
    "outputs": dict,
    "labels": (list, type(None)),
    "versions": dict,
}


def make_card(
    graph: Graph, target: str, precision: str, needs: Sequence[str], labels: Sequence[str] | None
) -> dict[str, Any]:
    """The card of an artefact that is about to be written."""
    model = graph.model
    recipe = make_recipe(model.host, model.plan, model.trained, model.calibrated)
    versions = {name: installed_version(name) for name in needs}
    return {
        "artefact": CARD_VERSION,
        "target": target,
        **{name: recipe[name] for name in FROM_RECIPE},
        "versions": {**recipe["versions"], **versions},
        "input": [*graph.image_shape],
        "batch": graph.batch,
        "precision": precision,
        "outputs": {"kind": graph.outputs.kind, "names": [*graph.outputs.names]},
        "labels": _labels(graph, labels),
        "tokens": [*model.plan.counts],
        "dense_tokens": [*model.plan.dense_cost.rows],
        "macs": model.plan.cost.total,
        "dense_macs": model.plan.dense_cost.total,
        "choosing": model.plan.cost.choosing,
        "parameters": sum(each.numel() for each in model.parameters()),
    }


def read_card(text: str | None, path: Path) -> dict[str, Any]:
    """Reads the card of the artefact at `path`; checks its version and its entries."""
    if text is None:
        raise BadFile(
            f"{path} was not written by patchslim: it has no card. Export it again with "
            "patchslim.export, or run it with its own runtime."
        )
    check_type("card", text, str, f"The card in {path} was edited. Export it again.", BadFile)
    card = parse_json(text.encode(), f"The card in {path}")
    version = card.get("artefact") if isinstance(card, dict) else None
    if not isinstance(version, int) or isinstance(version, bool):
        raise BadFile(f"The card in {path} was edited: it has no version. Export it again.")
    if version > CARD_VERSION:
        raise BadFile(
            f"{path} has a card of version {version}, written by patchslim {card.get('package')}; "
            f"this one, {installed_version('patchslim')}, reads versions up to {CARD_VERSION}: "
            f"{say_upgrade(card.get('package'))}"
        )
    wrong = [
        name for name, kind in ENTRY_TYPES.items() if not isinstance(card.get(name, ...), kind)
    ]
    if wrong:
        raise BadFile(f"The card in {path} was edited; look at: {', '.join(wrong)}.")
    check_entries(card, path)
    checked: dict[str, Any] = card
    return checked


def _labels(graph: Graph, given: Sequence[str] | None) -> list[str] | None:
    """The names of the classes: those that were given, or those that the host tells."""
    classes = getattr(graph.model.host, "num_classes", None)
    if given is not None:
        check_type("labels", given, list | tuple, "Give a list of names, one for each class.")
        if isinstance(classes, int) and len(given) != classes:
            raise BadSetting(
                f"labels= has {len(given)} names, and this model tells {classes} classes apart. "
                "Give one name for each, in their order."
            )
        for each in given:
            check_type("labels", each, str, "Give a list of names, one for each class.")
        return [*given]
    config = getattr(graph.model.host, "config", None)
    names: Mapping[int, str] | None = getattr(config, "id2label", None)
    return None if not names else [str(names[number]) for number in sorted(names)]
