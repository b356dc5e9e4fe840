"""Draws the charts of a report: KL and accuracy over what they cost, measured over promised gain.

This file knows what the rows of a report mean; `svg` knows how to draw points and axes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from html import escape

from patchslim.report.report import Report
from patchslim.report.row import Estimate, Row
from patchslim.report.styles import DENSE_STYLE, RANDOM_STYLE, Style, style_series
from patchslim.report.svg import Axis, Line, Point, draw_chart

Measure = Callable[[Row], float | None]
KL_CAPTION = (
    "How far the answers drift from the dense model's, on a logarithmic scale: lower is better. "
    "It still tells methods apart where accuracy no longer does. Less than 1e-6 is drawn there."
)
LEAST_KL = 1e-6  # what is less is rounding
LEAST_SHARE = 1e-6  # of the dense model's operations; no model has less
SHARE_CAPTION = (
    "Higher is better. Bars are one standard error; random below the frame is not drawn."
)
SPEED_CAPTION = (
    "Measured in the same run, with quartiles, methods of one budget side by side. On the dashed "
    "line time falls exactly as operations do; below it, other work eats the gain."
)


@dataclass(frozen=True)
class Cost:
    """What a row costs: how it is called, where it is read, and how it is written."""

    label: str
    short: str
    read: Measure
    show: Callable[[float], str]


OPERATIONS = Cost(
    "operations, % of the dense model's",
    "operations",
    lambda row: row.macs_share,
    lambda share: f"{100 * share:g}",
)
LATENCY = Cost(
    "measured, ms an image",
    "measured time",
    lambda row: row.latency.median if row.latency else None,
    "{:g}".format,
)


def draw_tradeoffs(report: Report) -> list[str]:
    """Draws KL, then accuracy, each over operations and over time; only what was measured."""
    charts = []
    for draw, caption in ((_draw_kl, KL_CAPTION), (_draw_share, SHARE_CAPTION)):
        for cost in (OPERATIONS, LATENCY):
            chart = draw(report, cost)
            charts += [_figure(*chart, caption)] if chart else []
    return charts


def draw_conversion(report: Report) -> str:
    """Draws measured over promised speed-up; an empty string if nothing was timed."""
    if report.dense.speedup is None:
        return ""

    def to_point(row: Row) -> Point | None:
        if row.speedup is None or row.macs_share < LEAST_SHARE:
            return None
        low, high = row.speedup.low, row.speedup.high
        return Point(1 / row.macs_share, row.speedup.median, low, high)

    lines = [replace(line, joined=False) for line in _make_lines(report, to_point, twins=False)]
    if not lines:
        return ""
    promised = [point.x for line in lines for point in line.points]
    heights = [end for line in lines for p in line.points for end in (p.low, p.high)]
    x = Axis.linear("dense operations / operations left", promised)
    y = Axis.linear("measured speed-up", [1.0, *(end for end in heights if end is not None)])
    # Several methods have the same budgets. Moved a little apart, their error bars can be seen.
    step = min(0.018, 0.16 / len(lines)) * (x.high - x.low)
    for number, line in enumerate(lines[:-1]):
        shift = step * (number - (len(lines) - 2) / 2)
        points = tuple(replace(point, x=x.clamp(point.x + shift)) for point in line.points)
        lines[number] = replace(line, points=points)
    end = min(max(promised), y.high)
    ideal = (Point(1.0, 1.0), Point(end, end))
    title = "Measured speed-up over operations saved"
    return _figure(title, draw_chart(title, x, y, lines, rules=[ideal]), SPEED_CAPTION)


def _draw_kl(report: Report, cost: Cost) -> tuple[str, str] | None:
    """Draws KL without the dense model, whose 0 has no place on a log scale, over a cost."""

    def to_point(row: Row) -> Point | None:
        across = cost.read(row)
        if across is None or row.kl is None or row is report.dense:
            return None
        height = max(row.kl.value, LEAST_KL)
        return Point(across, height)

    lines = _make_lines(report, to_point)
    values = [point.y for line in lines for point in line.points]
    if not values:
        return None
    y = Axis.logarithmic("KL from dense, nats", values)
    x = _cost_axis(cost, lines, report.dense)
    dense = cost.read(report.dense)
    rules = [] if dense is None else [(Point(dense, y.low), Point(dense, y.high))]
    title = f"KL over {cost.short}"
    lines = [_find_front(lines, sign=-1), *lines]
    return title, draw_chart(title, x, y, lines, rules=rules)


def _draw_share(report: Report, cost: Cost) -> tuple[str, str] | None:
    """Draws accuracy, or agreement with the dense model without labels, over a cost."""
    name = "accuracy" if report.dense.accuracy is not None else "agreement"

    def to_point(row: Row) -> Point | None:
        across = cost.read(row)
        share: Estimate | None = getattr(row, name)
        if share is None or across is None:
            return None
        error = share.error or 0.0
        low, high = share.value - error, share.value + error
        return Point(across, share.value, low, high)

    lines = _make_lines(report, to_point, start=report.dense)
    own = [point for line in lines if "twin" not in line.style for point in line.points]
    if len(own) < 2:
        return None
    ends = [end for p in own for end in (p.low, p.high) if end is not None]
    y = Axis.linear(f"{name}, %", ends, lambda share: f"{100 * share:g}")
    x = _cost_axis(cost, lines, report.dense)
    # Random is often so far below that all methods would be one line at the top.
    lines = [
        replace(line, points=tuple(point for point in line.points if y.holds(point.y)))
        for line in lines
    ]
    start = to_point(report.dense)
    rules = [(Point(x.low, start.y), Point(x.high, start.y))] if start else []
    title = f"{name.capitalize()} over {cost.short}"
    lines = [_find_front(lines, sign=1), *lines]
    return title, draw_chart(title, x, y, lines, rules=rules)


def _make_lines(
    report: Report,
    to_point: Callable[[Row], Point | None],
    *,
    twins: bool = True,
    start: Row | None = None,
) -> list[Line]:
    """Turns rows into lines, in the order in which they are drawn: the last one is on top.

    First come the baselines of each method as loose dots, if `twins`, then a line for each method
    through its rows by cost, from `start` on, and then the dense model. Rows for which `to_point`
    returns None are left out.
    """
    place = {id(row): str(n) for n, row in enumerate(report.rows)}

    def points_of(rows: Sequence[Row]) -> tuple[Point, ...]:
        found = [(row, to_point(row)) for row in rows]
        return tuple(replace(point, key=place[id(row)]) for row, point in found if point)

    styles = style_series(report)
    alone = [row for group in report.by_budget()[1:] for row in group]
    loose, joined = [], []
    for name, style in styles.items():
        rows = [row for row in alone if report.series(row) == name]
        rows.sort(key=lambda row: -row.macs_share)
        begin = [start] if start and style != RANDOM_STYLE and _same_place(start, rows) else []
        beside = [report.baseline(row) for row in rows] if twins else []
        dots = [row for row in beside if row and row not in alone]
        loose.append(Line(f"twin {style.key}", points_of(dots), joined=False, shape="ring"))
        if rows:
            points = (*(replace(p, marked=False) for p in points_of(begin)), *points_of(rows))
            joined.append(Line(_classes(style), points, shape=style.shape))
    dense = Line(_classes(DENSE_STYLE), points_of([report.dense]), shape=DENSE_STYLE.shape)
    lines = [*loose, *joined, dense]
    return [line for line in lines if line.points]


def _same_place(start: Row, rows: Sequence[Row]) -> bool:
    """Tells whether the dense model ran where these rows did, so that a line may begin there."""
    return all(row.place == start.place for row in rows)


def _classes(style: Style) -> str:
    """Returns the CSS classes of a line of a method."""
    return f"series {style.key} {style.hue}"


def _find_front(lines: Sequence[Line], *, sign: int) -> Line:
    """Joins the points that no cheaper one equals; `sign` is -1 where lower is better.

    It is drawn broad and pale beneath all lines, so that it is seen who is on it.
    """
    points = [point for line in lines if "twin" not in line.style for point in line.points]
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (point.x, -sign * point.y)):
        if not front or sign * point.y > sign * front[-1].y:
            front.append(point)
    return Line("front", tuple(front), shape="")


def _cost_axis(cost: Cost, lines: Sequence[Line], dense: Row) -> Axis:
    """Makes the axis of a cost, with room for the dense model."""
    values = [point.x for line in lines for point in line.points]
    values += [value for value in [cost.read(dense)] if value is not None]
    return Axis.linear(cost.label, values, cost.show)


def _figure(title: str, svg: str, caption: str) -> str:
    """Frames a chart with its title and caption."""
    return (
        f"<figure><h3>{escape(title)}</h3>{svg}<figcaption>{escape(caption)}</figcaption></figure>"
    )
