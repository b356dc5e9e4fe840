"""The columns of a report's tables: their names, what they mean, and how a row is written in them.

Every form of a report (terminal, Markdown, page) writes its numbers here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from patchslim.report.row import Estimate, Quartiles, Row

MISSING = "-"


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
        name: its heading.
        meaning: what it is, in a sentence without a full stop.
        write: writes the cell of a row, given the row of `random` at the same counts or None. What
            follows the first space is the spread: an error, quartiles or a distribution.
        best: "low" or "high"; which end is better, if any.
    """

    name: str
    meaning: str
    write: Callable[[Row, Row | None], str]
    best: str = ""

    def split(self, row: Row, baseline: Row | None) -> tuple[str, str]:
        """Writes the cell of a row as a value and its spread, which may be empty."""
        value, _, spread = self.write(row, baseline).partition(" ")
        return value, spread


def gain(row: Row, baseline: Row | None) -> float | None:
    """Returns accuracy less that of `random` at the same counts; without labels, agreement."""
    if baseline is None:
        return None
    if row.accuracy is not None and baseline.accuracy is not None:
        return row.accuracy.value - baseline.accuracy.value
    if row.agreement is not None and baseline.agreement is not None:
        return row.agreement.value - baseline.agreement.value
    return None


def _share(share: Estimate | None, *, signed: bool = False) -> str:
    """Writes a share in per cent with its standard error."""
    return MISSING if share is None else share.show(percent=True, signed=signed)


def _quartiles(quartiles: Quartiles | None, form: str = ".2f") -> str:
    """Writes the median with the quartiles."""
    if quartiles is None:
        return MISSING
    low, high = format(quartiles.low, form), format(quartiles.high, form)
    return f"{quartiles.median:{form}} [{low} {high}]"


def _number(value: float | None, form: str) -> str:
    """Writes a number that has no spread."""
    return MISSING if value is None else format(value, form)


def _mega(value: int | None, form: str) -> str:
    """Writes a number in millions."""
    return _number(None if value is None else value / 1e6, form)


MODEL = Column(
    "model",
    "method and budget; random/X is random at the very counts of X",
    lambda row, _: row.name,
)
LEFT = Column(
    "left",
    "tokens after the last block, prefix tokens included",
    lambda row, _: str(row.tokens[-1]),
    "low",
)
MACS = Column(
    "MACs",
    "multiply-adds, as a share of the dense model's",
    lambda row, _: f"{row.macs_share:.3f}" if row.spent is None else row.spent.show(),
    "low",
)
ACCURACY = Column(
    "accuracy %",
    "share of images read right, with one standard error",
    lambda row, _: _share(row.accuracy),
    "high",
)
CHANGE = Column(
    "vs dense",
    "accuracy less the dense model's in points, with the standard error of the paired difference",
    lambda row, _: _share(row.change, signed=True),
    "high",
)
GAIN = Column(
    "vs random",
    "accuracy above random at the same token counts, in points; without labels, agreement",
    lambda row, other: _number(
        None if (points := gain(row, other)) is None else 100 * points, "+.1f"
    ),
    "high",
)
AGREEMENT = Column(
    "agree %",
    "share of images with the dense model's answer",
    lambda row, _: _share(row.agreement),
    "high",
)
KL = Column(
    "KL (nats)",
    "Kullback-Leibler divergence of this model's answer from the dense model's",
    lambda row, _: MISSING if row.kl is None else row.kl.show(),
    "low",
)
LATENCY = Column(
    "ms/image",
    "milliseconds an image: median, and quartiles",
    lambda row, _: _quartiles(row.latency),
    "low",
)
SPEEDUP = Column(
    "speed-up",
    "dense time over this model's time, paired round by round: median, and quartiles",
    lambda row, _: _quartiles(row.speedup),
    "high",
)
CONVERSION = Column(
    "conv.",
    "conversion: speed-up times share of MACs; 1 where time falls as operations do",
    lambda row, _: _number(row.conversion, ".2f"),
    "high",
)
MEMORY = Column(
    "peak MB",
    "peak megabytes of activations in one forward pass of a batch",
    lambda row, _: _mega(row.memory, ".1f"),
    "low",
)
COLUMNS = (
    MODEL, LEFT, MACS, ACCURACY, CHANGE, GAIN, AGREEMENT, KL, LATENCY, SPEEDUP, CONVERSION, MEMORY,
)  # fmt: skip
# Of every row, but only where there is room for all: on the page.
DETAILS = (
    Column(
        "top-5 %",
        "share of images whose label is among the first five answers",
        lambda row, _: _share(row.top5),
        "high",
    ),
    Column(
        "ECE",
        "expected calibration error: the gap between confidence and accuracy, in 15 bins",
        lambda row, _: _number(row.ece, ".4f"),
        "low",
    ),
    Column(
        "images/s",
        "images per second, from the same times: median, and quartiles",
        lambda row, _: _quartiles(row.throughput, ".1f"),
        "high",
    ),
    Column(
        "params (M)",
        "millions of parameters, the method's own included",
        lambda row, _: _mega(row.parameters, ".2f"),
        "low",
    ),
    Column(
        "choosing (M)",
        "millions of multiply-adds that the method spends at most on its decisions; not in MACs",
        lambda row, _: _mega(row.choosing, ".3f"),
        "low",
    ),
)
