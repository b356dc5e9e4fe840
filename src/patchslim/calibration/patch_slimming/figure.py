"""Draws the figure of a Patch Slimming calibration as SVG: the kept patches, and the errors.

It draws what stands in `calibration.json`. It knows no models, and computes no errors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from patchslim.methods._ranking import parse_order
from patchslim.report.svg import HEIGHT, WIDTH, Axis, Line, Point, draw_chart

GRID_SIDE = 96  # length of the longer side of a grid
GRID_SPACING = 150  # distance between the left edges of two grids
GRIDS_PER_ROW = 6
MARGIN, HEAD, LABEL = 24, 64, 34
CHART_SCALE = 1.8  # magnification of the chart
# Smaller errors are left out, or rounding errors would fill the chart.
MIN_SHARE = 0.01  # of the largest error allowed
MIN_ERROR = 1e-5  # where there is no tolerance, and so no largest error

Grid = tuple[int, int]
Layers = Sequence[Mapping[str, Any]]


def draw_figure(record: Mapping[str, Any]) -> str:
    """Returns the figure of a record (the content of calibration.json) as the text of an SVG."""
    grid, cells = parse_order(record["order"])
    layers = sorted(record["layers"], key=lambda layer: int(layer["block"]))
    width = MARGIN + GRIDS_PER_ROW * GRID_SPACING
    body, bottom = _draw_grids(layers, grid, cells)
    chart = _draw_errors(layers, record)
    if chart:
        high = round(CHART_SCALE * HEIGHT)
        body += [
            f'<text class="head" x="{MARGIN}" y="{bottom + 14}">Error over patches kept</text>',
            f'<text x="{MARGIN}" y="{bottom + 33}">{escape(_chart_caption(record))}</text>',
            f'<svg x="{MARGIN}" y="{bottom + 42}" width="{CHART_SCALE * WIDTH:g}" height="{high}">',
            chart,
            "</svg>",
        ]
        bottom += 42 + high + MARGIN
    colours = [
        f".{_css_class(n)} {{ color: {_block_colour(n, len(layers))}; }}"
        for n in range(len(layers))
    ]
    title = escape(f"{record['method']}: the patches that each block still gives out")
    size = f'viewBox="0 0 {width} {bottom}" width="{width}" height="{bottom}"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{title}">',
            f"<style>{STYLE}{' '.join(colours)}</style>",
            f'<rect class="paper" width="{width}" height="{bottom}"/>',
            f'<text class="head" x="{MARGIN}" y="30">{title}</text>',
            f'<text x="{MARGIN}" y="49">{escape(_summary(record))}</text>',
            *body,
            "</svg>",
        ]
    )


def _draw_grids(layers: Layers, grid: Grid, cells: Sequence[int]) -> tuple[list[str], int]:
    """Draws one grid for each block. Returns SVG elements, and the y coordinate below them."""
    cell = GRID_SIDE / max(grid)
    high = round(cell * grid[0]) + LABEL
    parts = []
    for place, layer in enumerate(layers):
        down, across = divmod(place, GRIDS_PER_ROW)
        left, top = MARGIN + across * GRID_SPACING, HEAD + down * high
        label = f"block {layer['block']}: {layer['kept']} of {len(cells)}"
        kept = sorted(cells[: layer["kept"]])
        parts += [
            f'<g class="{_css_class(place)}" transform="translate({left} {top})">',
            f"<title>{label}</title>",
            f'<rect class="grid" width="{cell * grid[1]:g}" height="{cell * grid[0]:g}"/>',
            f'<path class="kept" d="{_square_path(kept, grid[1], cell)}"/>',
            f'<text y="{cell * grid[0] + 16:g}">{label}</text>',
            "</g>",
        ]
    rows = -(-len(layers) // GRIDS_PER_ROW)
    return parts, HEAD + rows * high + MARGIN // 2


def _square_path(kept: Sequence[int], columns: int, cell: float) -> str:
    """Returns an SVG path with a square for each kept cell, a little smaller than the cell."""
    side = round(0.86 * cell, 2)
    corners = (divmod(each, columns) for each in kept)
    return "".join(
        f"M{(column + 0.07) * cell:.2f} {(row + 0.07) * cell:.2f}h{side}v{side}h-{side}z"
        for row, column in corners
    )


def _draw_errors(layers: Layers, record: Mapping[str, Any]) -> str:
    """Draws the error of each block over its number of patches; "" where all errors are tiny."""
    lines = [
        Line(_css_class(place), tuple(_curve_points(layer, record)), shape="dot")
        for place, layer in enumerate(layers)
    ]
    lines += [
        Line(f"{_css_class(place)} chosen", (point,), joined=False)
        for place, layer in enumerate(layers)
        for point in _error_points(layer, record, [(layer["kept"], layer["error"])], "chosen: ")
    ]
    points = [point for line in lines for point in line.points]
    if not points:
        return ""
    x = Axis.linear("patches kept", [point.x for point in points])
    heights = [point.y for point in points]
    if not record["tolerance"]:
        y = Axis.logarithmic("error", heights)
        return draw_chart("error over patches kept", x, y, lines)
    y = Axis.logarithmic("error / what is allowed", [1.0, *heights])
    allowed = (Point(x.low, 1.0), Point(x.high, 1.0))
    return draw_chart("error over patches kept", x, y, lines, rules=[allowed])


def _curve_points(layer: Mapping[str, Any], record: Mapping[str, Any]) -> list[Point]:
    """Returns the points of all numbers of patches that were tried."""
    return _error_points(layer, record, sorted(layer["curve"]), "")


def _error_points(
    layer: Mapping[str, Any],
    record: Mapping[str, Any],
    errors: Sequence[tuple[int, float]],
    which: str,
) -> list[Point]:
    """Returns the points of numbers of patches and their errors, without tiny errors."""
    scale = layer["scale"] if record["search"]["error"] == "relative" else 1.0
    allowed = _allowed_error(layer, record)
    least = MIN_SHARE if record["tolerance"] else MIN_ERROR
    return [
        Point(
            count,
            error / scale / allowed,
            label=f"{which}block {layer['block']}, {count} patches: error {error / scale:.2g}",
        )
        for count, error in errors
        if error / scale / allowed >= least
    ]


def _allowed_error(layer: Mapping[str, Any], record: Mapping[str, Any]) -> float:
    """Returns the largest error that the search accepts in a block; 1 where it had no tolerance."""
    # The tolerance is None where the counts were given, and 0 where the budget removes nothing.
    if not record["tolerance"]:
        return 1.0
    # The error is measured after the next block. After the last one it may be larger (`slack`).
    last = len(record["schedule"]["kept"]) - 1
    slack = record["search"]["slack"] if layer["block"] + 1 == last else 1.0
    return float(record["tolerance"] * slack)


def _summary(record: Mapping[str, Any]) -> str:
    """Describes the calibration in one line."""
    tolerance = "counts as given"
    if record["tolerance"] is not None:
        tolerance = f"tolerance {record['tolerance']:.2g}"
    facts = (
        f"{record['macs']:.1%} of the operations; {tolerance}, {record['images']} images, "
        f"mode {record['search']['mode']}."
    )
    if record["gates"]:
        facts += " Each image chooses its own; these matter most over all."
    return facts


def _chart_caption(record: Mapping[str, Any]) -> str:
    """Explains the chart in one line."""
    parts = ["Of the next block's features"]
    if record["tolerance"]:
        slack = record["search"]["slack"]
        times = f", {slack:g} times it in the last block" if slack != 1 else ""
        parts.append(f"dashed: the tolerance{times}")
    tuned = ", after tuning" if record["search"]["epochs"] else ""
    return "; ".join([*parts, f"hollow: what was chosen{tuned}."])


def _css_class(place: int) -> str:
    """Returns the CSS class of a block."""
    return f"block-{place}"


def _block_colour(place: int, count: int) -> str:
    """Returns the colour of a block, from blue for the first over green to red for the last."""
    return f"hsl({round(225 - 225 * place / max(count - 1, 1))}, 70%, 38%)"


STYLE = """
text { font: 12.5px system-ui, "Segoe UI", Roboto, sans-serif; fill: #5d636b; }
svg svg text { font-size: 7.5px; }
.head { font-size: 16px; font-weight: 600; fill: #1d1f22; }
.name { fill: #1d1f22; }
.paper { fill: #fcfcfa; }
rect.grid { fill: #e9ebed; }
line.grid { stroke: #dfe1e4; }
.kept { fill: currentColor; }
.rule { stroke: #1d1f22; stroke-dasharray: 5 4; fill: none; }
.line { fill: none; stroke: currentColor; stroke-width: 1.4; }
.marks { fill: currentColor; }
.chosen .marks { fill: #fcfcfa; stroke: currentColor; stroke-width: 1.6; }
"""
