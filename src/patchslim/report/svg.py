"""Draws line charts as inline SVG, coloured by the style sheet of the page.

This file knows points and axes, and nothing of what they mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 460, 320
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 14, 46
# Radii of markers that are circles, and paths around (0, 0) of the others, of about the same area.
# They differ enough to be told apart without colour. There are so many rings in a page that their
# radius stands in its style sheet.
CIRCLES = {"circle": ' r="4.4"', "dot": ' r="2.6"', "ring": ""}
PATHS = {
    "square": "M-4-4h8v8h-8z",
    "up": "M0-5.5l5.2 9.5h-10.4z",
    "plus": "M-1.7-5.2h3.4v3.5h3.5v3.4h-3.5v3.5h-3.4v-3.5h-3.5v-3.4h3.5z",
    "down": "M0 5.5l5.2-9.5h-10.4z",
    "cross": "M0-2.4l2.6-2.6 2.4 2.4-2.6 2.6 2.6 2.6-2.4 2.4-2.6-2.6-2.6 2.6-2.4-2.4 2.6-2.6"
    "-2.6-2.6 2.4-2.4z",
    "hourglass": "M-4.8-5.2h9.6l-9.6 10.4h9.6z",
    "diamond": "M0-6.2l6.2 6.2-6.2 6.2-6.2-6.2z",
    "pentagon": "M0-5.4l5.1 3.7-1.9 6h-6.4l-1.9-6z",
}


@dataclass(frozen=True)
class Point:
    """A point of a chart.

    Attributes:
        x, y: where it lies.
        low, high: the ends of its error bar, if it has one.
        label: what hovering shows where no script shows more.
        key: what scripts know it by, in the attribute `data-r`.
        marked: whether it has a marker; without one, a line only runs through it.
    """

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    label: str = ""
    key: str = ""
    marked: bool = True


@dataclass(frozen=True)
class Line:
    """Points of one kind, with or without a line through them.

    Attributes:
        style: the CSS classes of all of it.
        points: the points, in the order in which they are joined.
        joined: whether a line runs through them.
        shape: the shape of its markers, of CIRCLES or PATHS; an empty string for none.
    """

    style: str
    points: tuple[Point, ...]
    joined: bool = True
    shape: str = "circle"


@dataclass(frozen=True)
class Axis:
    """A labelled axis from `low` to `high`, on a linear or a logarithmic scale."""

    label: str
    low: float
    high: float
    ticks: tuple[float, ...]
    show: Callable[[float], str]
    log: bool = False

    @classmethod
    def linear(
        cls, label: str, values: Iterable[float], show: Callable[[float], str] = "{:g}".format
    ) -> Axis:
        """Makes an axis around `values` with round numbers for ticks."""
        numbers = list(values)
        low, high = min(numbers), max(numbers)
        margin = (high - low or abs(high) or 1.0) * 0.05
        low, high = low - margin, high + margin
        step = _round_step((high - low) / 4)
        first = math.ceil(low / step - 1e-9)
        last = math.floor(high / step + 1e-9)
        ticks = tuple(round(n * step, 12) for n in range(first, last + 1))
        return cls(label, low, high, ticks, show)

    @classmethod
    def logarithmic(cls, label: str, values: Iterable[float]) -> Axis:
        """Makes an axis around positive `values` with round ticks in every decade."""
        numbers = list(values)
        low, high = min(numbers) / 1.3, max(numbers) * 1.3
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        span = math.log10(high / low)  # in decades; the fewer there are, the more ticks each gets
        steps = (1,) if span > 2.2 else (1, 2, 5) if span > 0.6 else range(1, 10)
        ticks = tuple(s * 10.0**d for d in decades for s in steps if low <= s * 10.0**d <= high)
        return cls(label, low, high, ticks, _format_short, log=True)

    def holds(self, value: float) -> bool:
        """Tells whether `value` lies between the ends of the axis."""
        return self.low <= value <= self.high

    def clamp(self, value: float) -> float:
        """Returns the nearest value between the ends of the axis."""
        return min(max(value, self.low), self.high)

    def share(self, value: float) -> float:
        """Returns where `value` lies between the ends of the axis, from 0 to 1."""
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return (value - low) / (high - low)


def draw_chart(
    title: str, x: Axis, y: Axis, lines: Sequence[Line], *, rules: Sequence[Sequence[Point]] = ()
) -> str:
    """Returns the chart as one <svg> element; `rules` are dashed lines for reference."""
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">',
        *_draw_axes(x, y),
        *(f'<polyline class="rule" points="{_path(rule, x, y)}"/>' for rule in rules),
        *(part for line in lines for part in _draw_line(line, x, y)),
        "</svg>",
    ]
    return "".join(parts)


def define_shapes() -> str:
    """Returns the SVG element that markers other than circles refer to; a page needs it once."""
    paths = "".join(f'<path id="{name}" d="{path}"/>' for name, path in PATHS.items())
    return f"<defs>{paths}</defs>"


def marker(shape: str, across: float = 0, down: float = 0, label: str = "", key: str = "") -> str:
    """Draws a marker, centred at a point; hovering over it shows `label`."""
    x, y = ("cx", "cy") if shape in CIRCLES else ("x", "y")
    start = "circle" if shape in CIRCLES else f'use href="#{shape}"'
    start += f' {x}="{across:g}"' if across else ""
    start += f' {y}="{down:g}"' if down else ""
    start += CIRCLES.get(shape, "")
    start += f' data-r="{escape(key)}"' if key else ""
    if not label:
        return f"<{start}/>"
    return f"<{start}><title>{escape(label)}</title></{start.split()[0]}>"


def _draw_axes(x: Axis, y: Axis) -> list[str]:
    """Draws the grid, the labels of its ticks and the names of the axes."""
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = []
    for tick in x.ticks:
        a = _x_pixel(tick, x)
        parts.append(f'<line class="grid" x1="{a}" x2="{a}" y1="{TOP}" y2="{bottom}"/>')
        parts.append(f'<text x="{a}" y="{bottom + 17}" text-anchor="middle">{x.show(tick)}</text>')
    for tick in y.ticks:
        d = _y_pixel(tick, y)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{d}" y2="{d}"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{d + 4}" text-anchor="end">{y.show(tick)}</text>')
    middle = (TOP + bottom) / 2
    parts.append(
        f'<text class="name" x="{(LEFT + right) / 2}" y="{HEIGHT - 9}" text-anchor="middle">'
        f"{escape(x.label)}</text>"
    )
    parts.append(
        f'<text class="name" x="14" y="{middle}" text-anchor="middle" '
        f'transform="rotate(-90 14 {middle})">{escape(y.label)}</text>'
    )
    return parts


def _draw_line(line: Line, x: Axis, y: Axis) -> list[str]:
    """Draws the stroke, the error bars and the markers of one line, as one group."""
    if not line.points:
        return []
    parts = [f'<g class="{line.style}">']
    if line.joined and len(line.points) > 1:
        parts.append(f'<polyline class="line" points="{_path(line.points, x, y)}"/>')
    if not line.shape:
        return [*parts, "</g>"]
    marked = [point for point in line.points if point.marked]
    bars = [
        f"M{_x_pixel(point.x, x):g} {low:g}V{high:g}"
        for point in marked
        if point.low is not None and point.high is not None
        for low, high in [[_y_pixel(y.clamp(end), y) for end in (point.low, point.high)]]
        if low != high
    ]
    if bars:
        parts.append(f'<path class="bar" d="{"".join(bars)}"/>')
    marks = [
        marker(line.shape, _x_pixel(point.x, x), _y_pixel(point.y, y), point.label, point.key)
        for point in marked
    ]
    return [*parts, '<g class="marks">', *marks, "</g></g>"]


def _path(points: Sequence[Point], x: Axis, y: Axis) -> str:
    """Writes the points as an SVG polyline has them."""
    return " ".join(f"{_x_pixel(point.x, x)},{_y_pixel(point.y, y)}" for point in points)


def _x_pixel(value: float, x: Axis) -> float:
    """Returns the pixels from the left edge of the chart."""
    return round(LEFT + x.share(value) * (WIDTH - LEFT - RIGHT), 1)


def _y_pixel(value: float, y: Axis) -> float:
    """Returns the pixels from the top edge of the chart."""
    return round(HEIGHT - BOTTOM - y.share(value) * (HEIGHT - TOP - BOTTOM), 1)


def _format_short(value: float) -> str:
    """Writes a tick of a logarithmic axis: 0.02, or 1e-4 in place of many zeros."""
    mantissa, exponent = f"{value:.0e}".split("e")
    return f"{value:g}" if value >= 0.01 else f"{mantissa}e{int(exponent)}"


def _round_step(rough: float) -> float:
    """Rounds down to 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(rough))
    return max(step * power for step in (1, 2, 5) if step * power <= rough * (1 + 1e-9))
