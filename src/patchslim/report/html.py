"""Renders a report as one HTML file, which fetches nothing, runs no script and can be mailed.

It shows what a `Report` and pictures hold. It measures nothing.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from patchslim.report.charts import Curves, draw_charts, group_by_method
from patchslim.report.report import COLUMNS, Report
from patchslim.report.row import Row

COLUMN_MEANINGS = (
    "method and budget; random/X is random at the very counts of X",
    "tokens after the last block, prefix tokens included",
    "multiply-adds, as a share of the dense model's",
    "share of images read right, with one standard error",
    "accuracy less the dense model's in points, with the standard error of the paired difference",
    "accuracy above random at the same counts, in points",
    "share of images with the dense model's answer",
    "Kullback-Leibler divergence of this model's answer from the dense model's",
    "milliseconds an image: median, and quartiles",
    "dense time over this model's time, paired round by round: median, and quartiles",
    "conversion: speed-up times share of MACs; 1 where time falls as operations do",
    "peak megabytes of activations in one forward pass of a batch",
)
CLOSE_TO_DENSE = 0.01  # loss of accuracy or agreement that the headline still calls close


@dataclass(frozen=True)
class Picture:
    """A PNG and the caption under it."""

    caption: str
    png: bytes


def render_page(
    report: Report,
    pictures: Sequence[Picture] = (),
    curves: Curves | None = None,
    *,
    intro: str = "",
    notes: Sequence[str] = (),
) -> str:
    """Returns the text of a self-contained HTML file that shows the report.

    Args:
        report: what was measured.
        pictures: which patches survive, in the order in which they are shown.
        curves: the rows of each line of the charts, by its name; a line for each method by
            default.
        intro: what was done, in a sentence or two; by default, what the report itself knows.
        notes: caveats for this report in particular, a sentence or two each.
    """
    charts = draw_charts(report, group_by_method(report) if curves is None else curves)
    parts = [
        f"<h1>{escape(report.title)}</h1>",
        f"<p>{escape(intro or _intro(report))}</p>",
        f'<p class="headline">{escape(headline(report))}</p>',
        "<h2>Side by side</h2>",
        _table(report),
        f'<p class="small">{escape(report.column_notes())}</p>',
        _token_counts(report),
    ]
    if charts:
        parts += ["<h2>What it costs, what it wins</h2>", charts]
    if pictures:
        parts += ["<h2>Which patches survive</h2>", STRIP_LEGEND, *map(_figure, pictures)]
    parts += ["<h2>Read this with care</h2>", _list([*notes, *_caveats(report)])]
    parts += ["<h2>Where, when and how it was measured</h2>", _provenance_list(report)]
    return PAGE_TEMPLATE.format(title=escape(report.title), style=STYLE, body="\n".join(parts))


def headline(report: Report) -> str:
    """Names the cheapest model that still answers like the dense one, in a sentence."""
    dense = report.dense
    close = [row for row in report.rows[1:] if row.method != "random" and _is_close(row, dense)]
    if dense.agreement is None:
        return "No images were scored: this report is about costs alone."
    if not close:
        return "No model here stays within one point of the dense model."
    best = min(close, key=lambda row: row.macs)
    text = f"Cheapest within one point of the dense model: {best.name}, "
    text += f"with {best.macs_share:.0%} of the operations"
    if best.accuracy is not None and dense.accuracy is not None:
        text += f" and {best.accuracy.value:.1%} read right (dense {dense.accuracy.value:.1%}"
        baseline = report.baseline(best)
        by_chance = baseline.accuracy if baseline else None
        text += f", random {by_chance.value:.1%})" if by_chance else ")"
    if best.speedup is not None:
        text += f", {best.speedup.median:.2f} times as fast"
    return text + "."


def _is_close(row: Row, dense: Row) -> bool:
    """Tells whether accuracy, or agreement without labels, is within a point of the dense."""
    if row.accuracy is not None and dense.accuracy is not None:
        return row.accuracy.value >= dense.accuracy.value - CLOSE_TO_DENSE
    return row.agreement is not None and row.agreement.value >= 1 - CLOSE_TO_DENSE


def _intro(report: Report) -> str:
    """Says what was done, as far as the report itself knows."""
    methods = sorted({row.method for row in report.rows[1:]} - {"random"})
    return (
        f"A vision transformer was given fewer patch tokens by {', '.join(methods) or 'random'}, "
        "and measured beside the untouched (dense) model in one run. Where there is a row random, "
        "it keeps patches drawn by lot: a method that does not beat it has chosen nothing."
    )


def _table(report: Report) -> str:
    """Makes a table of all rows."""
    head = "".join(
        f'<th title="{escape(meaning)}">{escape(name)}</th>'
        for name, meaning in zip(COLUMNS, COLUMN_MEANINGS, strict=True)
    )
    lines = []
    for row in report.rows:
        name, *numbers = map(escape, report.cells(row))
        kind = row.method if row.method in ("dense", "random") else "method"
        cells = "".join(f"<td>{number}</td>" for number in numbers)
        lines.append(f'<tr class="{kind}"><th>{name}</th>{cells}</tr>')
    body = "\n".join(lines)
    return (
        '<div class="wide"><table>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"
    )


def _token_counts(report: Report) -> str:
    """Lists the tokens after each block, folded away until they are asked for."""
    lines = [f"{row.name}: {' '.join(map(str, row.tokens))}" for row in report.rows]
    text = escape("\n".join(lines))
    return f"<details><summary>Tokens after each block</summary><pre>{text}</pre></details>"


def _figure(picture: Picture) -> str:
    """Embeds one picture in the page."""
    data = base64.b64encode(picture.png).decode("ascii")
    caption = escape(picture.caption)
    return (
        f'<figure class="strip"><div class="wide"><img alt="{caption}" '
        f'src="data:image/png;base64,{data}"></div><figcaption>{caption}</figcaption></figure>'
    )


def _caveats(report: Report) -> list[str]:
    """Lists what the numbers do not show, as far as it applies to this report."""
    provenance = report.provenance
    choosing = max(row.choosing for row in report.rows) / report.dense.macs
    caveats = []
    if any(row.choosing for row in report.rows):
        caveats.append(
            "MACs follow the convention of the literature: what a method spends on choosing is not "
            f"in them (here at most {choosing:.2%} of the dense model's). Measured times contain "
            "it."
        )
    if report.dense.latency is not None:
        repeats = report.dense.latency.repeats
        load = f", at a load average of {provenance.load[0]:.1f}" if provenance.load else ""
        caveats.append(
            f"Times are of this machine, threads: {provenance.threads}, batches of "
            f"{provenance.batch}, {repeats} interleaved rounds{load}. Other work on the machine "
            "widens the quartiles; speed-ups are paired within a round and suffer less than "
            "milliseconds."
        )
    if provenance.images:
        caveats.append(
            f"Accuracy, agreement and KL are over {provenance.images} images; differences of a "
            "standard error or two may be chance."
        )
    return caveats


def _list(entries: Sequence[str]) -> str:
    """Makes an HTML list of the entries."""
    return "<ul>\n" + "\n".join(f"<li>{escape(entry)}</li>" for entry in entries) + "\n</ul>"


def _provenance_list(report: Report) -> str:
    """Lists where, when and how the numbers were measured."""
    lines = [
        f"<dt>{escape(label)}</dt><dd>{escape(value)}</dd>"
        for label, value in report.provenance.lines()
    ]
    return "<dl>\n" + "\n".join(lines) + "\n</dl>"


STRIP_LEGEND = """<p>
Each strip is one image: as it is, and after some of the blocks. Patches that a method drops
are dark; patches that became one token are outlined together in a colour of their own, with a dot
on the one that the others joined; patches that are fused into a single token for all the rest are
dimmed and show their mean colour. Where images keep numbers of their own, the number is this
image's, and the cap the most that any image keeps.</p>"""

PAGE_TEMPLATE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""

STYLE = """
:root { color-scheme: light dark; --paper: #fcfcfa; --card: #fff; --ink: #1d1f22; --soft: #5d636b;
  --rule: #dfe1e4; --good: #eef5ff; --c0: #0b63b0; --c1: #c8500a; --c2: #007a5a; --c3: #a83c8d;
  --c4: #7a6400; --c5: #5b4bc4; --c6: #a3172f; --c7: #2b7a8c; --rand: #7b8087; }
@media (prefers-color-scheme: dark) { :root { --paper: #15171a; --card: #1c1f23; --ink: #e8e9eb;
  --soft: #a3a9b1; --rule: #33383e; --good: #1b2838; --c0: #62b0f5; --c1: #ff9a56; --c2: #41c79b;
  --c3: #e68bd0; --c4: #d9bf4a; --c5: #a99cff; --c6: #ff7d8d; --c7: #6cc7da; --rand: #9aa0a8; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 24px 16px 64px; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .6em; }
h2 { font-size: 1.15rem; margin: 2.2em 0 .6em; }
p, li { max-width: 78ch; }
.headline { background: var(--good); border-left: 4px solid var(--c0); padding: .6em .9em; }
.small, figcaption, .legend, details { color: var(--soft); font-size: .85rem; }
.wide { overflow-x: auto; border: 1px solid var(--rule); border-radius: 8px;
  background: var(--card); }
table { border-collapse: collapse; width: 100%; font-size: .85rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .35em .65em; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--rule); }
thead th { color: var(--soft); font-weight: 600; }
tbody tr:last-child > * { border-bottom: 0; }
tbody th, thead th:first-child { text-align: left; font-weight: 600; position: sticky; left: 0;
  background: var(--card); }
tr.random > * { color: var(--soft); font-weight: 400; }
tr.dense > * { background: var(--good); }
pre { overflow-x: auto; }
.legend { display: flex; flex-wrap: wrap; gap: .3em 1.2em; }
.legend span { white-space: nowrap; }
.key { width: 16px; height: 16px; vertical-align: -3px; margin-right: .35em; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(340px, 100%), 1fr));
  gap: 20px; }
figure { margin: 0; }
.charts figure { background: var(--card); border: 1px solid var(--rule); border-radius: 8px;
  padding: 10px 10px 12px; }
.charts svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--soft); font-size: 12.5px; font-family: inherit; }
svg .name { fill: var(--ink); }
.grid { stroke: var(--rule); }
.rule { stroke: var(--soft); stroke-dasharray: 5 4; fill: none; }
.line { fill: none; stroke: currentColor; stroke-width: 2; }
.bar { fill: none; stroke: currentColor; stroke-width: 1.3; opacity: .6; }
.mark { fill: currentColor; stroke: var(--card); stroke-width: 1; }
.c0 { color: var(--c0); } .c1 { color: var(--c1); } .c2 { color: var(--c2); }
.c3 { color: var(--c3); } .c4 { color: var(--c4); } .c5 { color: var(--c5); }
.c6 { color: var(--c6); } .c7 { color: var(--c7); } .dense { color: var(--ink); }
.rand, .scattered { color: var(--rand); } .line.rand { stroke-dasharray: 2 3; }
.mark.scattered { fill: var(--card); stroke: currentColor; stroke-width: 1.5; }
.strip { margin: 0 0 18px; } .strip img { display: block; }
.strip .wide { background: #fafaf8; width: fit-content; max-width: 100%; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .3em 1.2em; font-size: .9rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
"""
