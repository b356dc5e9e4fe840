"""Says which row of a report one would choose, and why."""

from __future__ import annotations

from dataclasses import dataclass

from patchslim.report.report import Report
from patchslim.report.row import Row

CLOSE_TO_DENSE = 0.01  # loss of accuracy or agreement that is still called close
LOSSES = (0.005, 0.01, 0.02, 0.05)  # that a page offers


@dataclass(frozen=True)
class Choice:
    """The row that one would choose at a given loss.

    Attributes:
        row: the row; None if every row loses more, or none is faster than the dense model.
        close: rows within the loss, whatever their speed.
        tied: how many of them are as fast as `row`, as far as their quartiles can tell.
    """

    row: Row | None
    close: tuple[Row, ...]
    tied: int = 0


def choose_row(report: Report, loss: float = CLOSE_TO_DENSE) -> Choice:
    """Chooses among the rows that lose at most `loss` of accuracy; without labels, of agreement.

    Where times were measured, it is the fastest; if others are no slower than its lower quartile,
    the one of these that drifts least (KL). Without times, it has the fewest operations.
    """
    rows = [row for row in report.rows[1:] if row.method != "random"]
    close = tuple(row for row in rows if _loss(row, report.dense) <= loss + 1e-9)
    timed = [(row.speedup, row) for row in close if row.speedup is not None]
    if not timed:
        return Choice(min(close, key=lambda row: row.macs, default=None), close)
    timed = [(speedup, row) for speedup, row in timed if speedup.median > 1]
    if not timed:
        return Choice(None, close)
    fastest = max(timed, key=lambda each: each[0].median)[0]
    slowest = min(fastest.low, fastest.median)
    tied = [row for speedup, row in timed if speedup.median >= slowest]
    best = min(tied, key=lambda row: (row.kl.value if row.kl else 0.0, row.macs))
    return Choice(best, close, len(tied) - 1)


def headline(report: Report) -> str:
    """Says in a few sentences which row one would choose within a point of dense, and why."""
    if not _is_scored(report):
        return "No images were scored: this report is about costs alone."
    choice = choose_row(report)
    if not choice.close:
        return f"No model here stays within one point of the dense model. {_nearest(report)}"
    if choice.row is None:
        best = min(choice.close, key=lambda row: row.macs)
        return (
            f"The dense model. {_count(len(choice.close))} within one point of it, but none is "
            f"faster here, not even {best.name} with {best.macs_share:.0%} of the operations. "
            "A larger batch or another device may give another answer."
        )
    return f"{choice.row.name}: {_reason(choice)} {_numbers(report, choice.row)}{_doubt(choice)}"


def offers(report: Report) -> list[tuple[float, Row]]:
    """Returns what to choose if one may lose more or less than a point: each gains on the last."""
    found: list[tuple[float, Row]] = []
    for loss in LOSSES if _is_scored(report) else ():
        row = choose_row(report, loss).row
        if row and (not found or _gains_on(row, found[-1][1])):
            found.append((loss, row))
    return found


def _gains_on(row: Row, other: Row) -> bool:
    """Tells whether a row is faster than another; without times, whether it has less to do."""
    if row.speedup is not None and other.speedup is not None:
        return row.speedup.median > other.speedup.median
    return row.macs < other.macs


def _is_scored(report: Report) -> bool:
    """Tells whether any row can be compared with the dense model."""
    return any(_loss(row, report.dense) < 1 for row in report.rows[1:])


def _loss(row: Row, dense: Row) -> float:
    """Returns the loss of accuracy, or what agreement lacks without labels; 1 if neither is known.

    Compared is what was measured on the same images, so this is the difference of the two means.
    """
    if row.accuracy is not None and dense.accuracy is not None:
        return dense.accuracy.value - row.accuracy.value
    return 1.0 if row.agreement is None else 1.0 - row.agreement.value


def _count(models: int) -> str:
    """Writes how many models stay."""
    return "One model stays" if models == 1 else f"{models} models stay"


def _reason(choice: Choice) -> str:
    """Says why this row and no other."""
    if len(choice.close) == 1:
        return "the only model within one point of the dense model."
    among = f"{_count(len(choice.close))} within one point of the dense model, and this is"
    if choice.row is None or choice.row.speedup is None:
        return f"{among} the one with the fewest operations."
    if not choice.tied:
        return f"{among} the fastest."
    others = "another is" if choice.tied == 1 else f"{choice.tied} others are"
    return (
        f"{among} the fastest, as far as can be told: {others} within its quartiles, and "
        "this one drifts least."
    )


def _numbers(report: Report, row: Row) -> str:
    """Writes what the row costs and loses, beside dense and random."""
    text = f"{row.macs_share:.0%} of the operations"
    if row.speedup is not None:
        text += f", {row.speedup.median:.2f} times as fast"
    baseline = report.baseline(row)
    for name, verb in (("accuracy", "read right"), ("agreement", "answered like the dense model")):
        share, dense = getattr(row, name), getattr(report.dense, name)
        if share is None or (name == "agreement" and dense is None):
            continue
        beside = [f"dense {dense.value:.1%}"] if name == "accuracy" and dense else []
        by_chance = getattr(baseline, name) if baseline else None
        beside += [f"random {by_chance.value:.1%}"] if by_chance else []
        text += f", {share.value:.1%} {verb}" + (f" ({', '.join(beside)})" if beside else "")
        break
    if row.kl is not None:
        text += f", KL {row.kl.value:.2g} nats"
    return text + "."


def _doubt(choice: Choice) -> str:
    """Warns where there were too few images to tell a point."""
    change = choice.row.change if choice.row else None
    if change is None or change.error is None or change.error <= CLOSE_TO_DENSE:
        return ""
    error = 100 * change.error
    return f" With so few images a point cannot be told: the standard error is {error:.1f}."


def _nearest(report: Report) -> str:
    """Names the row that loses least."""
    rows = [row for row in report.rows[1:] if row.method != "random"]
    if not rows:
        return ""
    row = min(rows, key=lambda row: _loss(row, report.dense))
    loss = 100 * _loss(row, report.dense)
    cure = "Remove fewer tokens, or train (patchslim train)."
    return f"{row.name} loses least, {loss:.1f} points. {cure}"
