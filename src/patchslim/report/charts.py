"""The charts of a report: answers over cost, and measured speed over what operations promise.

It knows what rows mean, and leaves how to draw to `chart`.
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
    """The rows of each method in order of cost; of `random` its own budgets, where it has any."""
    found: dict[str, list[Row]] = {row.method: [] for row in report.rows[1:]}
    for row in sorted(report.rows[1:], key=lambda row: -row.macs):
        found[row.method].append(row)
    lots = found.pop("random", [])
    own = [row for row in lots if not row.name.startswith("random/")]
    return {**found, "random": own or lots} if lots else found


def draw_charts(report: Report, curves: Curves) -> str:
    """A legend and the charts there are numbers for, as HTML; empty where there are none."""
    drawn = [
        (_accuracy_chart(report, curves), ACCURACY_CAPTION),
        (_kl_chart(report, curves), KL_CAPTION),
        (_speed_chart(report, curves), SPEED_CAPTION),
    ]
    figures = [
        f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"
        for svg, caption in drawn
        if svg
    ]
    if not figures:
        return ""
    return "\n".join([_legend(report, curves), '<div class="charts">', *figures, "</div>"])


def _styles(curves: Curves) -> dict[str, str]:
    """A CSS class for each line: a colour each, and grey for `random`."""
    return {name: "rand" if name == "random" else f"c{n % 8}" for n, name in enumerate(curves)}


def _legend(report: Report, curves: Curves) -> str:
    """The names of the lines with their markers."""
    entries = [("dense", "dense"), *_styles(curves).items()]
    if _unjoined_random(report, curves):
        entries.append(("random, at a method's counts", "lots"))
    keys = [
        f'<span><svg class="key" viewBox="0 0 16 16">{marker(style, 8, 8, name)}</svg>'
        f"{escape(name)}</span>"
        for name, style in entries
    ]
    return f'<p class="legend">{"".join(keys)}</p>'


def _unjoined_random(report: Report, curves: Curves) -> list[Row]:
    """The rows of `random` that are on no line."""
    shown = {row.name for rows in curves.values() for row in rows}
    return [row for row in report.rows if row.method == "random" and row.name not in shown]


def _make_lines(
    report: Report, curves: Curves, place: ToPoint, *, joined: bool = True
) -> list[Line]:
    """The rows that have a place: random's loose ones, one line a curve, and dense on top."""

    def line(style: str, rows: Sequence[Row], *, through: bool) -> Line:
        placed = tuple(point for point in map(place, rows) if point is not None)
        return Line(style, placed, joined=through)

    # Every method is the dense model while nothing is removed, so its line starts there.
    start = [report.dense] if joined else []
    lines = [line("lots", _unjoined_random(report, curves), through=False)]
    styles = _styles(curves)
    beneath_first = sorted(styles, key=lambda name: styles[name] != "rand")
    lines += [line(styles[name], [*start, *curves[name]], through=joined) for name in beneath_first]
    return [*lines, line("dense", [report.dense], through=False)]


def _all_points(lines: Sequence[Line]) -> list[Point]:
    """All points of all lines."""
    return [point for line in lines for point in line.points]


def _y_values(lines: Sequence[Line]) -> list[float]:
    """How high all points and their error bars reach."""
    every = [(point.low, point.y, point.high) for point in _all_points(lines)]
    return [height for heights in every for height in heights if height is not None]


def _shift_line(line: Line, across: float) -> Line:
    """The line with all its points a little to the right."""
    points = tuple(replace(point, x=point.x + across) for point in line.points)
    return replace(line, points=points)


def _accuracy_chart(report: Report, curves: Curves) -> str:
    """Accuracy over cost; agreement where there were no labels."""
    name = "accuracy" if report.dense.accuracy is not None else "agreement"

    def place(row: Row) -> Point | None:
        share = row.accuracy if name == "accuracy" else row.agreement
        if share is None:
            return None
        error = share.error or 0.0
        label = f"{row.name}: {share.value:.1%} at {row.macs_share:.0%} of the operations"
        return Point(row.macs_share, share.value, share.value - error, share.value + error, label)

    start = place(report.dense)
    if start is None:
        return ""
    lines = _make_lines(report, curves, place)
    x = _macs_axis(report)
    y = Axis.linear(f"{name}, %", _y_values(lines), _format_percent)
    level = (Point(x.low, start.y), Point(x.high, start.y))
    return draw_chart(f"{name} over operations", x, y, lines, rules=[level])


def _kl_chart(report: Report, curves: Curves) -> str:
    """KL from the dense model over cost; the dense model itself has no place on a log scale."""

    def place(row: Row) -> Point | None:
        if row.kl is None or row.kl.value <= 0:
            return None
        return Point(row.macs_share, row.kl.value, label=f"{row.name}: {row.kl.value:.2g} nats")

    lines = _make_lines(report, curves, place)
    heights = _y_values(lines)
    if not heights:
        return ""
    y = Axis.logarithmic("KL from dense, nats", heights)
    return draw_chart("KL divergence over operations", _macs_axis(report), y, lines)


def _speed_chart(report: Report, curves: Curves) -> str:
    """Measured speed-up over the speed-up that the operations promise."""

    def place(row: Row) -> Point | None:
        if row.speedup is None:
            return None
        spread = row.speedup
        label = f"{row.name}: {spread.median:.2f} times, conversion {row.conversion:.2f}"
        return Point(1 / row.macs_share, spread.median, spread.low, spread.high, label)

    if place(report.dense) is None:
        return ""
    *lines, dense = _make_lines(report, curves, place, joined=False)
    across = [point.x for point in _all_points([*lines, dense])]
    x = Axis.linear("dense operations / operations left", across)
    y = Axis.linear("measured speed-up", [*_y_values(lines), 1.0, max(across)])
    # Methods meet at the same budgets; side by side their quartiles can be told apart.
    step = 0.018 * (x.high - x.low)
    lines = [_shift_line(line, step * (n - (len(lines) - 1) / 2)) for n, line in enumerate(lines)]
    ideal = (Point(1.0, 1.0), Point(max(across), max(across)))
    return draw_chart(
        "measured speed-up over operations saved", x, y, [*lines, dense], rules=[ideal]
    )


def _macs_axis(report: Report) -> Axis:
    """The share of the dense model's operations, in per cent."""
    shares = [row.macs_share for row in report.rows]
    return Axis.linear("operations, % of the dense model's", shares, _format_percent)


def _format_percent(share: float) -> str:
    """A share as a tick says it."""
    return f"{100 * share:g}"
