"""What the entries of a card may be, so that whatever reads a card later finds what it needs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from patchslim.errors import BadFile, PatchslimError
from patchslim.hosts._building import MOST_PIXELS
from patchslim.hosts._preprocessing import Preprocessing
from patchslim.settings import BATCH

KINDS = ("tensor", "sequence", "mapping")
MOST_CHANNELS = 4096


def check_entries(card: Mapping[str, Any], path: Path) -> None:
    """Refuses a card with an entry that no export writes, and names the entry."""
    problem = _find_nonsense(card)
    if problem is not None:
        raise BadFile(f"The card in {path} was edited; look at: {problem}. Export it again.")
    try:
        size = Preprocessing.from_json(card["images"]).image_size
    except PatchslimError as error:
        raise BadFile(f"The card in {path} was edited; look at: images. {error}") from error
    if [*size] != card["input"][-2:]:
        raise BadFile(
            f"The card in {path} was edited: it prepares images of {size[0]} x {size[1]} pixels, "
            f"and says that the input is {card['input']}. Export it again."
        )


def _find_nonsense(card: Mapping[str, Any]) -> str | None:
    """The first entry that makes no sense, or None."""
    shape, batch, outputs, labels = (card[x] for x in ("input", "batch", "outputs", "labels"))
    names = outputs.get("names")
    makes_sense = {
        "method": isinstance(card.get("method"), str),
        "input": len(shape) in (2, 3, 4)  # a spectrogram, an image, a video
        and all(_is_whole(each) for each in shape)
        and math.prod(shape[:-2]) <= MOST_CHANNELS
        and shape[-2] * shape[-1] <= MOST_PIXELS,
        "batch": batch is None or (_is_whole(batch) and batch in BATCH),
        "outputs": outputs.get("kind") in KINDS
        and _are_names(names)
        and (outputs["kind"] != "tensor" or len(names) == 1),
        "labels": labels is None or _are_texts(labels),
    }
    return next((name for name, right in makes_sense.items() if not right), None)


def _is_whole(value: object) -> bool:
    """Whether it is a whole number above zero."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _are_texts(values: object) -> bool:
    """Whether it is a list of texts."""
    return isinstance(values, list) and all(isinstance(each, str) for each in values)


def _are_names(values: Any) -> bool:
    """Whether it is a list of different names, at least one."""
    return _are_texts(values) and 0 < len(values) == len(set(values))
