"""Draws the charts of a report: accuracy and KL over cost, measured over promised speed-up.

This file knows what the rows of a report mean; `svg` knows how to draw points and axes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from html import escape

from patchslim.report.report import Report
from patchslim.report.row import Row
from patchslim.report.svg import Axis, Line, Point, draw_chart, marker

Curves = Mapping[str, Sequence[Row]]
ToPoint = Callable[[Row], Point | None]
ACCURACY_CAPTION = (
    "Further left is cheaper, higher is better. The diamond is the dense model; bars are one "
    "standard error; hollow dots are random at the counts of a method."
)
KL_CAPTION = (
    "How far the answers drift from the dense model's, on a logarithmic scale: lower is better. "
    "It still tells methods apart where accuracy no longer does."
)
SPEED_CAPTION = (
    "Measured in the same run, with quartiles, methods of one budget side by side. On the dashed "
    "line time falls exactly as operations do; below it, other work eats the gain."
)


def group_by_method(report: Report) -> dict[str, list[Row]]:
    """Groups the rows below the dense one by method, the most expensive row first.

    `random` comes last. If it was measured at budgets of its own, only those rows are in its
    group, and not the rows at the counts of other methods.
    """
    groups: dict[str, list[Row]] = {row.method: [] for row in report.rows[1:]}
    for row in sorted(report.rows[1:], key=lambda row: -row.macs):
        groups[row.method].append(row)
    random_rows = groups.pop("random", [])
    if not random_rows:
        return groups
    own = [row for row in random_rows if not row.name.startswith("random/")]
    return {**groups, "random": own or random_rows}


def draw_charts(report: Report, curves: Curves) -> str:
    """Returns a legend and every chart that has numbers, as HTML; an empty string if none has."""
    charts = [
        (_accuracy_chart(report, curves), ACCURACY_CAPTION),
        (_kl_chart(report, curves), KL_CAPTION),
        (_speed_chart(report, curves), SPEED_CAPTION),
    ]
    figures = [
        f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"
        for svg, caption in charts
        if svg
    ]
    if not figures:
        return ""
    return "\n".join([_legend(report, curves), '<div class="charts">', *figures, "</div>"])


def _styles(curves: Curves) -> dict[str, str]:
    """Assigns a CSS class to each line: a colour of its own, and grey for `random`."""
    return {name: "rand" if name == "random" else f"c{n % 8}" for n, name in enumerate(curves)}


def _legend(report: Report, curves: Curves) -> str:
    """Lists the names of the lines with their markers."""
    entries = [("dense", "dense"), *_styles(curves).items()]
    if _unjoined_random(report, curves):
        entries.append(("random, at a method's counts", "scattered"))
    labels = [
        f'<span><svg class="key" viewBox="0 0 16 16">{marker(style, 8, 8, name)}</svg>'
        f"{escape(name)}</span>"
        for name, style in entries
    ]
    return f'<p class="legend">{"".join(labels)}</p>'


def _unjoined_random(report: Report, curves: Curves) -> list[Row]:
    """Finds the rows of `random` that no line runs through."""
    shown = {row.name for rows in curves.values() for row in rows}
    return [row for row in report.rows if row.method == "random" and row.name not in shown]


def _make_lines(
    report: Report, curves: Curves, to_point: ToPoint, *, joined: bool = True
) -> list[Line]:
    """Turns rows into lines, in the order in which they are drawn: the last one is on top.

    First come the rows of `random` that no line joins, then one line for each curve, then the
    dense model. Rows for which `to_point` returns None are left out.
    """

    def make_line(style: str, rows: Sequence[Row], *, connect: bool) -> Line:
        points = tuple(point for point in map(to_point, rows) if point is not None)
        return Line(style, points, joined=connect)

    # A method that removes nothing is the dense model, so its line starts there.
    start = [report.dense] if joined else []
    lines = [make_line("scattered", _unjoined_random(report, curves), connect=False)]
    styles = _styles(curves)
    # `random` is drawn first, so that it covers no other line.
    names = sorted(styles, key=lambda name: styles[name] != "rand")
    lines += [make_line(styles[name], [*start, *curves[name]], connect=joined) for name in names]
    return [*lines, make_line("dense", [report.dense], connect=False)]


def _y_values(lines: Sequence[Line]) -> list[float]:
    """Collects the heights of all points and of the ends of their error bars."""
    points = [point for line in lines for point in line.points]
    heights = [height for point in points for height in (point.low, point.y, point.high)]
    return [height for height in heights if height is not None]


def _accuracy_chart(report: Report, curves: Curves) -> str:
    """Draws accuracy over cost; agreement with the dense model if there were no labels."""
    name = "accuracy" if report.dense.accuracy is not None else "agreement"

    def to_point(row: Row) -> Point | None:
        share = row.accuracy if name == "accuracy" else row.agreement
        if share is None:
            return None
        error = share.error or 0.0
        label = f"{row.name}: {share.value:.1%} at {row.macs_share:.0%} of the operations"
        return Point(row.macs_share, share.value, share.value - error, share.value + error, label)

    start = to_point(report.dense)
    if start is None:
        return ""
    lines = _make_lines(report, curves, to_point)
    x = _macs_axis(report)
    y = Axis.linear(f"{name}, %", _y_values(lines), _format_percent)
    level = (Point(x.low, start.y), Point(x.high, start.y))
    return draw_chart(f"{name} over operations", x, y, lines, rules=[level])


def _kl_chart(report: Report, curves: Curves) -> str:
    """Draws KL over cost, without the dense model: its KL of 0 has no place on a log scale."""

    def to_point(row: Row) -> Point | None:
        if row.kl is None or row.kl.value <= 0:
            return None
        return Point(row.macs_share, row.kl.value, label=f"{row.name}: {row.kl.value:.2g} nats")

    lines = _make_lines(report, curves, to_point)
    heights = _y_values(lines)
    if not heights:
        return ""
    y = Axis.logarithmic("KL from dense, nats", heights)
    return draw_chart("KL divergence over operations", _macs_axis(report), y, lines)


def _speed_chart(report: Report, curves: Curves) -> str:
    """Draws measured speed-up over the speed-up that the saved operations promise."""

    def to_point(row: Row) -> Point | None:
        speedup = row.speedup
        if speedup is None:
            return None
        label = f"{row.name}: {speedup.median:.2f} times, conversion {row.conversion:.2f}"
        return Point(1 / row.macs_share, speedup.median, speedup.low, speedup.high, label)

    if to_point(report.dense) is None:
        return ""
    *lines, dense = _make_lines(report, curves, to_point, joined=False)
    promised = [point.x for line in [*lines, dense] for point in line.points]
    x = Axis.linear("dense operations / operations left", promised)
    y = Axis.linear("measured speed-up", [*_y_values(lines), 1.0, max(promised)])
    # Several methods have the same budgets. Moved a little apart, their error bars can be seen.
    step = 0.018 * (x.high - x.low)
    for number, line in enumerate(lines):
        shift = step * (number - (len(lines) - 1) / 2)
        points = tuple(replace(point, x=point.x + shift) for point in line.points)
        lines[number] = replace(line, points=points)
    ideal = (Point(1.0, 1.0), Point(max(promised), max(promised)))
    return draw_chart(
        "measured speed-up over operations saved", x, y, [*lines, dense], rules=[ideal]
    )


def _macs_axis(report: Report) -> Axis:
    """Makes an axis for the share of the dense model's operations, in per cent."""
    shares = [row.macs_share for row in report.rows]
    return Axis.linear("operations, % of the dense model's", shares, _format_percent)


def _format_percent(share: float) -> str:
    """Writes a share in per cent, without the sign."""
    return f"{100 * share:g}"
