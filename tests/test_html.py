"""The page: true to the report, one file with its pictures, and it fetches nothing."""

import base64
import gzip
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

import patchslim
from patchslim.measurement.measure import measure
from patchslim.report.charts import draw_conversion, draw_tradeoffs
from patchslim.report.choice import choose_row, headline, offers
from patchslim.report.columns import COLUMNS, DETAILS
from patchslim.report.html import Picture, _read, render_page, save_page
from patchslim.report.patch_maps import trace_patches
from patchslim.report.patch_pictures import draw_patches, encode_png
from patchslim.report.report import Report
from patchslim.report.row import Estimate, Quartiles
from patchslim.report.rows_table import choose_columns, write_rows_table
from patchslim.report.styles import DARK_HUES, LIGHT_HUES, style_series
from patchslim.report.svg import Axis, Line, Point, draw_chart
from report_rows import BLOCKS, BUDGETS, METHODS, make_report

MOST_BYTES = 300_000  # of a page without pictures
OPEN_ENDED = {"meta", "img", "input", "wbr", "td"}  # tags that HTML lets nobody close, or need not


class Reader(HTMLParser):
    """Checks that all tags are closed; collects the text, the table and what would be loaded."""

    def __init__(self, text):
        super().__init__()
        self.open, self.loads, self.tags, self.text = [], [], [], ""
        self.rows, self.cells, self.scripts = {}, [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag == "tr":
            self.cells = self.rows.setdefault(dict(attrs).get("data-r"), [])
            self.cells.clear()
        if tag in ("td", "th"):
            self.cells.append("")
        if tag not in OPEN_ENDED:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [value for name, value in attrs if name in ("src", "href", "data")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ["script"]:
            self.scripts.append(data)
            return
        self.text += data
        if "table" in self.open and "title" not in self.open and "label" not in self.open:
            self.cells[-1:] = ["".join([*self.cells[-1:], data])]


@pytest.fixture(scope="module")
def host():
    torch.manual_seed(0)
    return VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2, num_classes=5
    ).eval()


@pytest.fixture(scope="module")
def images():
    torch.manual_seed(2)
    return torch.randn(2, 3, 32, 32)


@pytest.fixture(scope="module")
def report(host, images):
    models = {}
    for method in ("tome", "topk", "random"):
        for budget in (0.8, 0.6):
            models[f"{method} {budget}"] = patchslim.slim(host, method, macs=budget)
    return measure(models, [(images, torch.tensor([0, 1]))], batch=1, repeats=2)


@pytest.fixture(scope="module")
def strip(host, images):
    slim = patchslim.slim(host, "tome", r=3)
    pixels = np.zeros((32, 32, 3), np.uint8)
    return Picture("tome <3>", encode_png(draw_patches(pixels, trace_patches(slim, images)[0])))


@pytest.fixture(scope="module")
def large():
    return make_report()


def unpack(text):
    """Makes a report of the data in a page, as its script does."""
    packed = json.loads(gzip.decompress(base64.b64decode(text)))
    rows = []
    for values in zip(*packed["columns"].values(), strict=True):
        row = {}
        for name, value in zip(packed["columns"], values, strict=True):
            field, _, part = name.partition(".")
            if value is not None or (part and field in row):
                row.update({field: {**row.get(field, {}), part: value} if part else value})
        rows.append(row)
    return Report.from_json({**packed["report"], "rows": rows})


def test_page_is_one_whole_file(report, strip, tmp_path):
    text = render_page(report, [strip], notes=["take <care>"])
    read = Reader(text)
    assert not read.open
    images = [load for load in read.loads if not load.startswith("#")]
    assert len(images) == 1
    assert images[0].startswith("data:image/png;base64,")
    assert not re.search(r"https?:|@import|url\(", text)
    save_page(report, tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == render_page(report)


def test_page_runs_its_own_script_alone(report):
    read = Reader(render_page(report))
    _, script = read.scripts
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = re.search(r"default-src 'none'.*?script-src ([^;]*);", render_page(report), re.DOTALL)
    assert policy[1] == f"'sha256-{digest}'"
    assert 10_000 < len(script) < 15_000


def test_page_of_many_methods_is_small(large):
    assert len(large.rows) == 1 + 2 * len(METHODS) * len(BUDGETS) == 251
    assert len(render_page(large).encode()) <= MOST_BYTES


def test_table_shows_every_number_and_the_page_the_provenance(report):
    read = Reader(render_page(report))
    columns = choose_columns(report).columns
    for place, row in enumerate(report.rows):
        written = [column.write(row, report.baseline(row)) for column in columns]
        beside = row.name.startswith("random/")
        kept = [column for column in columns if not (beside and column in DETAILS)]
        assert read.rows[str(place)] == written[: len(kept)]
    assert {column.name for column in columns} >= {
        column.name for column in COLUMNS if column.name != "top-5 %"
    }
    for label, value in report.provenance.lines():
        assert label in read.text
        assert value in read.text
    assert "chance" in read.text
    assert "load average" in read.text


def test_page_holds_the_whole_report(report, large):
    for each in (report, large):
        data, _ = Reader(render_page(each)).scripts
        assert unpack(data) == each


def test_notes_and_captions_are_text_not_markup(report, strip):
    evil = "a <b> & </script><script>x</script>"
    rows = (*report.rows[:-1], replace(report.rows[-1], name=evil))
    read = Reader(render_page(replace(report, title=evil, rows=rows), [strip], notes=[evil]))
    assert not read.open
    assert read.tags.count("script") == 2
    assert read.text.count(evil) >= 3
    assert "tome <3>" in read.text


def test_page_of_costs_alone(host):
    report = measure(patchslim.slim(host, "tome", macs=0.7), repeats=2, batch=1)
    read = Reader(render_page(report))
    assert not read.open
    assert "costs alone" in read.text
    assert "Which patches survive" not in read.text
    assert "KL (nats)" not in read.rows[None]
    bare = measure(patchslim.slim(host, "tome", macs=0.7), repeats=0)
    assert read.tags.count("figure") == 1
    assert "figure" not in Reader(render_page(bare)).tags


def test_random_is_folded_under_its_row(large):
    bodies = re.findall(r"<tbody.*?</tbody>", write_rows_table(large, choose_columns(large)))
    assert len(bodies) == 1 + len(METHODS) * len(BUDGETS)
    assert all(body.count("<tr") == 2 for body in bodies[1:])
    for body in bodies[1:]:
        row, twin = (int(number) for number in re.findall(r'data-r="(\d+)"', body))
        assert large.rows[twin].name == f"random/{large.rows[row].name}"


def test_budgets_go_down_and_the_best_row_is_first(large):
    dense, *groups = large.by_budget()
    assert dense == [large.dense]
    assert [group[0].name.split()[1] for group in groups] == [f"{each:g}" for each in BUDGETS]
    for group in groups:
        assert [row.kl.value for row in group] == sorted(row.kl.value for row in group)
        assert len(group) == len(METHODS)


def test_table_fits_a_terminal_and_says_what_is_missing(large):
    long = replace(large.rows[-2], name="a name that is longer than any column should be for it 1")
    for shown in (large, replace(large, rows=(*large.rows[:-2], long, large.rows[-1]))):
        lines = shown.table().splitlines()
        assert max(map(len, lines)) <= 100
        head = next(line for line in lines if line.startswith("model "))
        missing = [column.name for column in COLUMNS if column.name not in head]
        said = f"Not shown for want of width (see JSON or page): {', '.join(missing)}."
        assert said in lines
        assert [line.split()[0] for line in lines[4:6]] == ["dense", "adamerge"]
        assert not [line for line in lines if line.startswith("random/")]
    assert long.name in lines
    assert "adamerge 0.9: MACs 0.900 (p99 0.93, max 0.95, cap 0.97)" in lines


def test_headline_names_the_fastest_that_is_close(large):
    def change(row, *, right, speed, kl=0.1):
        return replace(
            row,
            accuracy=Estimate(right, 0.001),
            change=Estimate(right - 0.95, 0.001),
            speedup=Quartiles(speed, speed - 0.1, speed + 0.1, 9),
            kl=Estimate(kl, 0.01),
        )

    dense, one, chance, two, *_ = large.rows
    dense = change(dense, right=0.95, speed=1.0)
    chance = change(chance, right=0.4, speed=2.0)

    def said(*rows):
        return headline(replace(large, rows=(dense, *rows)))

    one, two = change(one, right=0.945, speed=1.5), change(two, right=0.95, speed=1.3)
    text = said(one, chance, two)
    assert text.startswith(f"{one.name}: 2 models stay within one point of the dense model")
    for words in ("the fastest.", "94.5%", "dense 95.0%", "random 40.0%", "1.50 times as fast"):
        assert words in text
    near = change(two, right=0.95, speed=1.45, kl=0.01)
    assert "another is within its quartiles, and this one drifts least" in said(one, chance, near)
    assert said(one, chance, near).startswith(near.name)
    assert "but none is faster here" in said(change(one, right=0.95, speed=0.9))
    assert "No model here stays within one point" in said(change(one, right=0.9, speed=2))
    assert "loses least, 5.0 points" in said(change(one, right=0.9, speed=2))
    assert "the only model within one point of the dense model." in said(one)
    unsure = replace(one, change=Estimate(-0.005, 0.02))
    assert "a point cannot be told: the standard error is 2.0." in said(unsure)
    cheapest = choose_row(make_report(times=False)).row
    assert cheapest.macs == min(row.macs for row in choose_row(make_report(times=False)).close)


def test_who_may_lose_more_is_offered_more_speed(large):
    offered = offers(large)
    assert len(offered) > 1
    losses = [loss for loss, _ in offered]
    speeds = [row.speedup.median for _, row in offered]
    assert losses == sorted(losses)
    assert speeds == sorted(speeds)
    for loss, row in offered:
        assert row.accuracy.value >= large.dense.accuracy.value - loss - 1e-9


def luminance(colour):
    colour = colour if len(colour) == 7 else "#" + "".join(2 * digit for digit in colour[1:])
    channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    high, low = sorted([luminance(one), luminance(other)], reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_methods_have_different_marks_that_stand_out_in_both_schemes(large):
    rows = [replace(large.rows[1], method=f"method {n:02}") for n in range(42)]
    rows.append(replace(large.rows[1], method="random"))
    styles = [*style_series(replace(large, rows=(large.dense, *rows))).values()]
    assert len({(style.hue, style.shape) for style in styles}) == len(styles) == 44
    schemes = re.findall(r":root \{(.*?)\}", _read("page.css"), re.DOTALL)
    for hues, scheme in zip((LIGHT_HUES, DARK_HUES), schemes, strict=True):
        named = dict(re.findall(r"--(\w+): (#\w+)", scheme))
        for paper in (named["paper"], named["card"]):
            for ink in (*hues, *(named[name] for name in ("ink", "soft", "grey", "accent"))):
                assert contrast(ink, paper) >= 3
        assert contrast(named["soft"], named["good"]) >= 4.5


def test_rows_of_different_places_are_lines_of_their_own(large):
    places = [("eager", 1), ("eager", 8)]
    rows = tuple(
        replace(row, name=f"{row.name} ({batch})", runtime=runtime, batch=batch)
        for runtime, batch in places
        for row in (large.dense, *(each for each in large.rows if each.method == "tome"))
    )
    report = replace(large, rows=rows)
    assert [*style_series(report)] == ["dense (1)", "dense (8)", "tome (1)", "tome (8)"]
    assert len({style.key for style in style_series(report).values()}) == 4
    one = replace(large, rows=tuple(replace(row, runtime="eager") for row in large.rows))
    assert [*style_series(one)] == [*style_series(large)]


def test_charts_have_a_mark_for_every_row_they_can_show(large):
    by_operations, by_time, *accuracy = draw_tradeoffs(large)
    for chart in (by_operations, by_time):
        assert len(set(re.findall(r'data-r="(\d+)"', chart))) == len(large.rows) - 1  # no dense
    assert len(accuracy) == 2
    for chart in (*accuracy, draw_conversion(large)):
        shown = {int(number) for number in re.findall(r'data-r="(\d+)"', chart)}
        assert {0, 1, 3} <= shown
    only_kl = make_report(labels=False, times=False)
    titles = re.findall("<h3>(.*?)</h3>", "".join(draw_tradeoffs(only_kl)))
    assert titles == ["KL over operations", "Agreement over operations"]
    assert draw_conversion(only_kl) == ""


def test_axes_have_round_ticks_inside():
    for values in ([0.35, 1.0], [0.9731, 0.9742], [1.0, 2.86], [5.0], [0.0, 0.0]):
        axis = Axis.linear("x", values)
        assert 2 <= len(axis.ticks) <= 11
        assert all(axis.low <= tick <= axis.high for tick in axis.ticks)
        assert 0 < axis.share(values[0]) < 1
    for values in ([0.01, 0.5], [1e-6, 1.0], [0.3, 0.3]):
        axis = Axis.logarithmic("y", values)
        assert len(axis.ticks) >= 1
        assert 0 < axis.share(values[0]) < 1


def test_chart_keeps_points_inside_its_frame():
    points = tuple(Point(x / 10, x * x, 0, 200, f"p{x}") for x in range(1, 10))
    x, y = Axis.linear("x", [p.x for p in points]), Axis.linear("y", [p.y for p in points])
    text = draw_chart("squares", x, y, [Line(f"c{n}", points) for n in range(8)])
    read = Reader(text)
    assert not read.open
    assert "p9" in read.text
    assert "nan" not in text


def test_pyramids_have_a_step_where_tokens_go(large):
    table = write_rows_table(large, choose_columns(large))
    pyramids = re.findall(r'<svg class="pyramid".*?<title>(.*?)</title><path d="(.*?)"', table)
    assert len(pyramids) == 1 + len(METHODS) * len(BUDGETS)
    assert all(path.startswith("M0 24H0V") and path.endswith("V24") for _, path in pyramids)
    flat, deep = "145 " * BLOCKS, " ".join(map(str, large.rows[-1].tokens))
    assert dict(pyramids)[flat.strip()].count("V") == 2
    assert dict(pyramids)[deep].count("V") == 1 + BLOCKS
    assert {counts for counts, _ in pyramids} == {
        " ".join(map(str, row.tokens)) for row in large.rows
    }


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("macs",), 0),
        (("macs_share",), 0),
        (("macs_share",), 5e-324),
        (("tokens", 0), 0),
        (("kl", "value"), -1e10),
        (("speedup", "low"), 1e17),
        (("latency", "median"), 0),
    ],
)
@pytest.mark.parametrize("place", [0, 3])
def test_numbers_that_nobody_can_have_measured_are_shown_all_the_same(large, place, path, value):
    """A report from somewhere else may hold them; its page shows them, and ends in no error."""
    data = json.loads(json.dumps(replace(large, rows=large.rows[:5]).to_json()))
    target = data["rows"][place]
    for name in path[:-1]:
        target = target[name]
    target[path[-1]] = value
    report = Report.from_json(data)
    assert not Reader(render_page(report)).open
    assert report.table()
