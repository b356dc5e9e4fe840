"""Writes the rows of a report as a table for a terminal, which is never wider than it.

What does not fit is left to the other forms of a report, and named below the table.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from itertools import chain

from patchslim.report.columns import (
    ACCURACY,
    AGREEMENT,
    CHANGE,
    COLUMNS,
    CONVERSION,
    GAIN,
    KL,
    LATENCY,
    LEFT,
    MACS,
    MEMORY,
    MISSING,
    MODEL,
    SPEEDUP,
    Column,
)
from patchslim.report.row import Row

WIDTH = 100
LONGEST_NAME = 28  # a longer name has a line of its own, above its numbers
# Columns are shown in this order of importance, as many as fit.
BY_IMPORTANCE = (
    MODEL, MACS, ACCURACY, KL, LATENCY, SPEEDUP, GAIN, AGREEMENT, CONVERSION, LEFT, CHANGE, MEMORY,
)  # fmt: skip
ELSEWHERE = "see JSON or page"  # what does not fit is in both
WITH_SPREAD = (ACCURACY, CHANGE, SPEEDUP)

RowAndBaseline = tuple[Row, Row | None]


def write_text_table(groups: Sequence[Sequence[RowAndBaseline]]) -> str:
    """Returns a table with an empty line between two groups, and a line on what is left out.

    The first group is the dense model's. Nothing is cut: a column is there or not.
    """
    rows = list(chain.from_iterable(groups))
    cells = {column: [_write(column, *each) for each in rows] for column in COLUMNS}
    measured = [column for column in BY_IMPORTANCE if set(cells[column]) != {MISSING}]
    widths = {column: _column_width(column, cells[column]) for column in measured}
    shown = _choose_columns(widths)
    lines = [_join([column.name for column in shown], [widths[column] for column in shown])]
    lines.append("-" * len(lines[0]))
    number = 0
    for place, group in enumerate(groups):
        if place > 1:
            lines.append("")
        for _ in group:
            texts = [cells[column][number] for column in shown]
            number += 1
            if len(texts[0]) > widths[MODEL]:
                lines.append(texts[0])
                texts[0] = ""
            lines.append(_join(texts, [widths[column] for column in shown]))
    missing = [column.name for column in COLUMNS if column in measured and column not in shown]
    return "\n".join([*lines, "", _explain(rows, shown, missing)])


def wrap(text: str) -> str:
    """Breaks a text into lines of a terminal's width; those after the first are indented."""
    return "\n".join(
        textwrap.wrap(
            text, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
        )
    )


def _write(column: Column, row: Row, baseline: Row | None) -> str:
    """Writes a cell, without the spread where that is not worth its width."""
    if column is MODEL:
        return row.name
    value, spread = column.split(row, baseline)
    return f"{value} {spread}".strip() if column in WITH_SPREAD else value


def _column_width(column: Column, cells: Sequence[str]) -> int:
    """Returns how wide a column is; names that are too long do not count."""
    texts = [column.name, *cells]
    if column is MODEL:
        texts = [text for text in texts if len(text) <= LONGEST_NAME]
    return max(map(len, texts))


def _choose_columns(widths: dict[Column, int]) -> list[Column]:
    """Chooses columns by importance until the line is full; returns them in their usual order."""
    shown: list[Column] = []
    left = WIDTH + 2
    for column, width in widths.items():
        if left >= width + 2:
            shown.append(column)
            left -= width + 2
    return [column for column in COLUMNS if column in shown]


def _join(texts: Sequence[str], widths: Sequence[int]) -> str:
    """Aligns the cells of a line: the name on the left, numbers on the right."""
    name, *numbers = texts
    aligned = [text.rjust(width) for text, width in zip(numbers, widths[1:], strict=True)]
    return "  ".join([name.ljust(widths[0]), *aligned]).rstrip()


def _explain(rows: Sequence[RowAndBaseline], shown: Sequence[Column], missing: list[str]) -> str:
    """Says what the order means, how images differ in cost, and what the table leaves out."""
    gmacs = rows[0][0].macs / 1e9
    scale = f"share of the dense model's {gmacs:.4g} GMACs an image"
    texts = [f"MACs: {scale}; ± one standard error; [quartiles]."]
    if len(rows) > 2:
        texts.append("Rows of about the same cost stand together, the least KL first.")
    if GAIN in shown:
        texts.append(f"{GAIN.name}: {GAIN.meaning}.")
    texts += [f"{row.name}: MACs {row.spent.show()}" for row, _ in rows if row.spent is not None]
    if missing:
        texts.append(f"Not shown for want of width ({ELSEWHERE}): {', '.join(missing)}.")
    return "\n".join(map(wrap, texts))
