"""Gives each series of a report, such as a method, a mark of its own: hue, shape and CSS class.

A colour-blind reader tells them by the shape. There are 6 hues and 7 shapes; neighbours differ in
both, and 42 methods have different marks.
"""

from __future__ import annotations

from dataclasses import dataclass

from patchslim.report.report import Report

METHOD_SHAPES = ("circle", "square", "up", "plus", "down", "cross", "hourglass")
# Each has a contrast of 3:1 or more with both backgrounds of its scheme.
LIGHT_HUES = ("#0072b2", "#d0500a", "#00805a", "#b0399a", "#866800", "#3b2f8f")
DARK_HUES = ("#56b4e9", "#ff8a3d", "#2fc695", "#ee8fd2", "#e3c545", "#a99cff")


@dataclass(frozen=True)
class Style:
    """How a method is drawn.

    Attributes:
        key: a CSS class for all that belongs to the method, such as "m3".
        hue: a CSS class for its colour.
        shape: the shape of its markers.
    """

    key: str
    hue: str
    shape: str


DENSE_STYLE = Style("dense", "ink", "diamond")
RANDOM_STYLE = Style("mr", "grey", "pentagon")


def style_series(report: Report) -> dict[str, Style]:
    """Returns a style for each series of the report: dense, by the alphabet, then random.

    The dense model of the report and random always look the same; others go by their number.
    """
    found = {report.series(row): row.method for row in report.rows}
    dense = report.series(report.dense)
    random = [name for name, method in found.items() if method == "random"]
    styles = {dense: DENSE_STYLE}
    for n, name in enumerate(sorted({*found} - {dense, *random})):
        hue = f"h{n % len(LIGHT_HUES)}"
        styles[name] = Style(f"m{n}", hue, METHOD_SHAPES[n % len(METHOD_SHAPES)])
    return {**styles, **dict.fromkeys(random, RANDOM_STYLE)}
