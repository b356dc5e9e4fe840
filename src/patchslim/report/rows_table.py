"""Makes the page's table: a row for each model, with its random baseline folded under it.

The columns that matter most come first; a style sheet hides the others on narrow screens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape

from patchslim.report.columns import (
    ACCURACY,
    AGREEMENT,
    CHANGE,
    CONVERSION,
    DETAILS,
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
from patchslim.report.report import Report
from patchslim.report.row import Row
from patchslim.report.styles import Style, style_series
from patchslim.report.svg import marker

STEP_HEIGHT, STEP_WIDTH = 24, 4  # of a block in the picture of the tokens


@dataclass(frozen=True)
class TableColumns:
    """The columns of one page's table, and how many are shown on every and on a wide screen."""

    columns: tuple[Column, ...]
    always: int
    wide: int


def choose_columns(report: Report) -> TableColumns:
    """Returns the columns in which anything was measured, the most important ones first."""
    share, other = (ACCURACY, AGREEMENT)
    if report.dense.accuracy is None:
        share, other = other, share
    measured = [
        [column for column in group if _is_measured(report, column)]
        for group in (
            (MODEL, MACS, share, KL, LATENCY, SPEEDUP),
            (LEFT, GAIN, other, CONVERSION),
            (CHANGE, MEMORY, *DETAILS),
        )
    ]
    always, wide, rest = measured
    return TableColumns((*always, *wide, *rest), len(always), len(always) + len(wide))


def write_rows_table(report: Report, chosen: TableColumns) -> str:
    """Returns the table as HTML. Row n of the report has `data-r="n"`, as its marks in charts."""
    head = "".join(
        f'<th scope="col" title="{escape(column.meaning)}" data-best="{column.best}">'
        f"{break_name(column.name)}</th>"
        for column in chosen.columns
    )
    bodies = "".join(_bodies(report, chosen.columns))
    return f'<table id="rows">\n<thead><tr>{head}</tr></thead>\n{bodies}</table>'


def draw_key(style: Style) -> str:
    """Draws the marker of a method for a legend or a table."""
    return f'<svg class="key {style.hue}" aria-hidden="true">{marker(style.shape)}</svg>'


def draw_pyramid(row: Row, dense: Row) -> str:
    """Draws the tokens after each block as steps, as high as their share of the dense model's."""
    most = max(1, *dense.tokens, *row.tokens)
    steps, before = f"M0 {STEP_HEIGHT}", -1
    for block, count in enumerate(row.tokens):
        down = STEP_HEIGHT - max(1, round(STEP_HEIGHT * count / most))
        if down != before:
            steps += f"H{STEP_WIDTH * block}V{down}"
        before = down
    width = STEP_WIDTH * len(row.tokens)
    counts = " ".join(map(str, row.tokens))
    return (
        f'<svg class="pyramid" viewBox="0 0 {width} {STEP_HEIGHT}"><title>{counts}</title>'
        f'<path d="{steps}H{width}V{STEP_HEIGHT}"/></svg>'
    )


def break_name(name: str) -> str:
    """Escapes a name and lets it be broken where a reader would break it."""
    return escape(name).replace("_", "_<wbr>").replace("/", "/<wbr>")


def _is_measured(report: Report, column: Column) -> bool:
    """Tells whether any row has something in the column."""
    return any(column.write(row, report.baseline(row)) != MISSING for row in report.rows)


def _bodies(report: Report, columns: tuple[Column, ...]) -> Iterator[str]:
    """Yields a table body for each row that stands by itself, with its baseline if it has one."""
    styles = style_series(report)
    place = {id(row): n for n, row in enumerate(report.rows)}
    groups = report.by_budget()
    alone = [row for group in groups for row in group]
    for group in groups:
        for number, row in enumerate(group):
            style, baseline = styles[report.series(row)], report.baseline(row)
            folded = baseline if baseline and baseline not in alone else None
            fold = '<label><input type="checkbox">random</label>' if folded else ""
            name = f"{draw_key(style)}<b>{break_name(row.name)}</b>{fold}"
            lines = [f'<tr data-r="{place[id(row)]}">{_cells(report, row, columns, name)}</tr>']
            if folded:
                name = f"<b>{break_name(folded.name)}</b>"
                # Its details would cost much room, and stand in the data.
                short = tuple(column for column in columns if column not in DETAILS)
                cells = _cells(report, folded, short, name)
                lines.append(f'<tr class="twin" data-r="{place[id(folded)]}">{cells}</tr>')
            first = "" if number else " first"
            yield f'<tbody class="{style.key}{first}">{"".join(lines)}</tbody>'


def _cells(report: Report, row: Row, columns: tuple[Column, ...], name: str) -> str:
    """Writes the cells of a row; `name` is the content of the first."""
    cells = [f'<th scope="row">{name}</th>']
    baseline = report.baseline(row)
    # Cells end where the next one begins: HTML wants no more, and there are thousands.
    for column in columns[1:]:
        value, spread = column.split(row, baseline)
        spread = f"<i> {escape(spread)}</i>" if spread else ""
        picture = ""
        if column is LEFT and not row.name.startswith("random/"):
            picture = draw_pyramid(row, report.dense)
        cells.append(f"<td>{picture}{escape(value)}{spread}")
    return "".join(cells)
