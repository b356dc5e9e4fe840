"""Renders a report as one HTML file, which fetches nothing and can be mailed.

All that it shows is in the file as text and SVG. A script of its own (`page.js`) lets a reader
filter, sort, point at and pin rows; without it, the page is still whole. It measures nothing.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path

from patchslim.files import write_atomically
from patchslim.report.charts import draw_conversion, draw_tradeoffs
from patchslim.report.choice import choose_row, headline, offers
from patchslim.report.data import pack_report
from patchslim.report.report import Report
from patchslim.report.rows_table import (
    TableColumns,
    break_name,
    choose_columns,
    draw_key,
    draw_pyramid,
    write_rows_table,
)
from patchslim.report.styles import DARK_HUES, DENSE_STYLE, LIGHT_HUES, Style, style_series
from patchslim.report.svg import define_shapes


@dataclass(frozen=True)
class Picture:
    """A PNG and the caption under it."""

    caption: str
    png: bytes


def render_page(
    report: Report, pictures: Sequence[Picture] = (), *, intro: str = "", notes: Sequence[str] = ()
) -> str:
    """Returns the text of a self-contained HTML file that shows the report.

    Args:
        report: what was measured.
        pictures: which patches survive, in the order in which they are shown.
        intro: what was done, in a sentence or two; by default, what the report itself knows.
        notes: caveats for this report in particular, a sentence or two each.
    """
    columns = choose_columns(report)
    shown = {report.series(row) for group in report.by_budget()[1:] for row in group}
    styles = {name: style for name, style in style_series(report).items() if name in shown}
    tradeoffs, conversion = draw_tradeoffs(report), draw_conversion(report)
    parts = [
        f"<h1>{escape(report.title)}</h1>",
        f"<p>{escape(intro or _intro(report))}</p>",
        _choice(report),
        _toolbar(styles),
    ]
    if tradeoffs:
        parts += ["<h2>What it costs, what it wins</h2>", CHARTS_LEGEND, _charts(tradeoffs)]
    parts += ["<h2>Side by side</h2>", _switches(columns)]
    parts += [f'<div class="wide">{write_rows_table(report, columns)}</div>', _meanings(columns)]
    if conversion:
        parts += ["<h2>Does saved work become saved time?</h2>", _charts([conversion])]
    if pictures:
        parts += ["<h2>Which patches survive</h2>", STRIP_LEGEND, *map(_figure, pictures)]
    parts += ["<h2>Read this with care</h2>", _list([*notes, *_caveats(report)])]
    parts += [
        "<h2>Where, when and how it was measured</h2>",
        _definitions(report.provenance.lines(report.batches)),
    ]
    script = _read("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    return PAGE_TEMPLATE.format(
        title=escape(report.title),
        digest=digest,
        style=_read("page.css") + _generated_style(columns, styles.values()),
        shapes=define_shapes(),
        body="\n".join(parts),
        data=pack_report(report),
        script=script,
    )


def save_page(report: Report, path: str | Path) -> None:
    """Writes the page of a report to a file: all of it, or nothing."""
    write_atomically(path, render_page(report))


def _read(name: str) -> str:
    """Reads the style sheet or the script, which are installed with the package."""
    return (files("patchslim.report") / name).read_text(encoding="utf-8")


def _generated_style(columns: TableColumns, styles: Iterable[Style]) -> str:
    """Returns what of the style sheet depends on the report: hues, methods and columns."""
    light = "".join(f"--h{n}:{hue};" for n, hue in enumerate(LIGHT_HUES))
    dark = "".join(f"--h{n}:{hue};" for n, hue in enumerate(DARK_HUES))
    hidden = "main:not(:has(#all:checked)) #rows tr>:nth-child(n+{}){{display:none}}"
    rules = [
        f":root{{{light}}}",
        f"@media (prefers-color-scheme: dark){{:root{{{dark}}}}}",
        *(f".h{n}{{color:var(--h{n})}}" for n in range(len(LIGHT_HUES))),
        # So a method can be hidden without a script.
        *(f"main:has(#{s.key}:not(:checked)) .{s.key}{{display:none}}" for s in styles),
        hidden.format(columns.wide + 1),
        f"@media (max-width: 999px){{{hidden.format(columns.always + 1)}}}",
    ]
    return "\n".join(rules)


def _choice(report: Report) -> str:
    """Makes the box that says what one would choose, and what if one may lose less or more."""
    parts = ['<section class="choice">', "<h2>What we would choose, and why</h2>"]
    text, best = headline(report), choose_row(report).row
    name = best.name if best and text.startswith(best.name) else ""
    parts.append(f"<p><b>{escape(name)}</b>{escape(text.removeprefix(name))}</p>")
    offered = offers(report)
    if len(offered) > 1:
        parts.append('<ul class="offers">')
        for loss, row in offered:
            speed = "" if row.speedup is None else f", {row.speedup.median:.2f}×"
            parts.append(
                f"<li><span>lose at most {100 * loss:g} points</span><b>{break_name(row.name)}</b>"
                f"<span>{row.macs_share:.0%} of the operations{speed}</span>"
                f"{draw_pyramid(row, report.dense)}</li>"
            )
        parts.append("</ul>")
    return "\n".join([*parts, "</section>"])


def _toolbar(styles: Mapping[str, Style]) -> str:
    """Makes the filter: a field for text, which the script shows, and a switch for each method."""
    switches = [
        f'<label><input type="checkbox" id="{style.key}" checked>{draw_key(style)}'
        f"{break_name(method)}</label>"
        for method, style in styles.items()
    ]
    return TOOLBAR.format(key=draw_key(DENSE_STYLE), methods="\n".join(switches))


def _charts(figures: Sequence[str]) -> str:
    """Puts charts side by side."""
    return "\n".join(['<div class="charts">', *figures, "</div>"])


def _switches(columns: TableColumns) -> str:
    """Makes the switch that shows every column, if any is hidden anywhere."""
    if len(columns.columns) == columns.always:
        return ""
    return '<p class="switches"><label><input type="checkbox" id="all"> all columns</label></p>'


def _meanings(columns: TableColumns) -> str:
    """Says what each column is, folded away until asked for."""
    meanings = [(column.name, column.meaning) for column in columns.columns]
    return f"<details><summary>What the columns mean</summary>{_definitions(meanings)}</details>"


def _intro(report: Report) -> str:
    """Says what was done, as far as the report itself knows."""
    methods = sorted({row.method for row in report.rows[1:]} - {"dense", "random"})
    return (
        f"A vision transformer was given fewer patch tokens by {', '.join(methods) or 'random'}, "
        "and measured beside the untouched (dense) model in one run. Where there is a row random, "
        "it keeps patches drawn by lot: a method that does not beat it has chosen nothing."
    )


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
    choosing = max(row.choosing for row in report.rows) / max(1, report.dense.macs)
    caveats = []
    if any(row.choosing for row in report.rows):
        caveats.append(
            "MACs follow the convention of the literature: what a method spends on choosing is not "
            f"in them (here at most {choosing:.2%} of the dense model's). Measured times contain "
            "it."
        )
    if report.dense.latency is not None:
        repeats = report.dense.latency.repeats
        batches = ", ".join(map(str, report.batches))
        load = f", at a load average of {provenance.load[0]:.1f}" if provenance.load else ""
        caveats.append(
            f"Times are of this machine, threads: {provenance.threads}, batches of "
            f"{batches}, {repeats} interleaved rounds{load}. Other work on the machine "
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


def _definitions(entries: Sequence[tuple[str, str]]) -> str:
    """Makes an HTML list of terms and what is said of them."""
    lines = [f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>" for term, text in entries]
    return "<dl>\n" + "\n".join(lines) + "\n</dl>"


STRIP_LEGEND = """<p>
Each strip is one image: as it is, and after some of the blocks. Patches that a method drops
are dark; patches that became one token are outlined together in a colour of their own, with a dot
on the one that the others joined; patches that are fused into a single token for all the rest are
dimmed and show their mean colour. Where images keep numbers of their own, the number is this
image's, and the cap the most that any image keeps.</p>"""

CHARTS_LEGEND = """<p class="small">
Further left is cheaper. Each line is a method, from its gentlest budget to its hardest; the diamond
is the dense model and the dashed line its level; small grey rings are random at the counts of each
row. The broad pale line joins the rows that no cheaper one equals.</p>"""

TOOLBAR = """<div class="tools" role="group" aria-label="Filter">
<p class="script" hidden><input type="search" id="find" placeholder="filter rows: tome 0.5"
 aria-label="Filter rows by text"> <button type="button" id="every">all methods</button>
<button type="button" id="none">none</button> <span id="count" role="status"></span>
<span class="right"><button type="button" id="csv">CSV</button>
<button type="button" id="json">JSON</button></span></p>
<div class="legend">
<span>{key}dense</span>
{methods}
</div>
<p class="small script" hidden>Point at a mark to read its row. Click marks or rows to pin two and
compare them.</p>
</div>"""

# The policy lets the page fetch nothing, and run no script but its own, whatever stands in it.
PAGE_TEMPLATE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:;
 style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<svg width="0" height="0" class="shapes" aria-hidden="true">{shapes}</svg>
<main>
{body}
</main>
<div id="card" hidden></div>
<aside id="pins" aria-label="Pinned rows" hidden></aside>
<script type="text/plain" id="data">{data}</script>
<script>{script}</script>
</body>
</html>
"""
