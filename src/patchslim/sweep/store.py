"""The folder of a sweep: a file for the answers of each model, and one for each cell.

A file is written as a whole or not at all, under the key of what it answers. So a sweep that was
stopped finds what it has, and a file of another model, other images or another version is not
found.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from patchslim.errors import BadFile
from patchslim.files import read_json, write_atomically, write_bytes_atomically
from patchslim.report.field_types import check_field_types
from patchslim.report.provenance import Provenance
from patchslim.report.report import PROVENANCE_KEY
from patchslim.report.row import Row

FORMAT_VERSION = 1
CELLS, ANSWERS = "cells", "answers"


@dataclass(frozen=True)
class CellResult:
    """What a cell has found.

    Attributes:
        rows: of the model and of `random` at its counts; empty where it was refused.
        provenance: where, when and how; None where it was refused.
        answers: the key of the answers that were scored; None where it was refused.
        refused: why there are no rows; None where there are.
        failed: whether that was an accident in a library beneath, and not a refusal: the next run
            tries again.
    """

    rows: tuple[Row, ...] = ()
    provenance: Provenance | None = None
    answers: str | None = None
    refused: str | None = None
    failed: bool = False


class Store:
    """Reads and writes what a sweep has found."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read_cell(self, key: str) -> CellResult | None:
        """Reads the result of a cell; None if there is none, or if the file is damaged."""
        file = self.folder / CELLS / f"{key}.json"
        if not file.is_file():
            return None
        try:
            return _to_result(read_json(file))
        except (BadFile, KeyError, TypeError, ValueError, AttributeError):
            return None  # it is measured again, and the file replaced

    def write_cell(self, key: str, cell: Mapping[str, Any], result: CellResult) -> None:
        """Writes the result of a cell, with what was asked beside it for people who look."""
        fields = asdict(result)
        entries = {
            "format": FORMAT_VERSION,
            "cell": dict(cell),
            "rows": fields["rows"],
            PROVENANCE_KEY: fields["provenance"],
            "answers": result.answers,
            "refused": result.refused,
            "failed": result.failed,
        }
        text = json.dumps(entries, indent=1, allow_nan=False) + "\n"
        write_atomically(self.folder / CELLS / f"{key}.json", text)

    def read_answers(self, key: str) -> dict[str, dict[str, Tensor]] | None:
        """Reads tensors with one value an image, by model and kind; None if there are none."""
        from safetensors import SafetensorError  # here, since importing patchslim stays quick
        from safetensors.torch import load

        file = self.folder / ANSWERS / f"{key}.safetensors"
        if not file.is_file():
            return None
        try:
            flat = load(file.read_bytes())
        except (OSError, SafetensorError):
            return None
        found: dict[str, dict[str, Tensor]] = {}
        for name, tensor in flat.items():
            model, _, kind = name.rpartition("/")
            found.setdefault(model, {})[kind] = tensor
        return found

    def write_answers(self, key: str, answers: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Writes the answers of one or several models."""
        from safetensors.torch import save

        flat = {
            f"{model}/{kind}": tensor.contiguous()
            for model, tensors in answers.items()
            for kind, tensor in tensors.items()
        }
        write_bytes_atomically(self.folder / ANSWERS / f"{key}.safetensors", save(flat))


def _to_result(data: Mapping[str, Any]) -> CellResult:
    """Makes a result of what was read; raises one of the usual errors if it is not whole."""
    if data["format"] != FORMAT_VERSION:
        raise ValueError("another format")
    if data["refused"] is not None:
        return CellResult(refused=str(data["refused"]), failed=bool(data["failed"]))
    origin = dict(data[PROVENANCE_KEY])
    origin["image_size"], origin["load"] = tuple(origin["image_size"]), tuple(origin["load"])
    rows = tuple(map(Row.from_json, data["rows"]))
    result = CellResult(rows, Provenance(**origin), str(data["answers"]))
    for part in (*result.rows, result.provenance):
        check_field_types(part)
    if not result.rows:
        raise ValueError("no rows")
    return result
