"""The page: true to the report, one file with its pictures, and it fetches nothing."""

from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

import patchslim
from patchslim.measurement.measure import measure
from patchslim.report.charts import group_by_method
from patchslim.report.html import Picture, headline, render_page
from patchslim.report.patch_maps import trace_patches
from patchslim.report.patch_pictures import draw_patches, encode_png
from patchslim.report.row import Estimate
from patchslim.report.svg import Axis, Line, Point, draw_chart

VOID = {"meta", "img", "rect", "circle", "line", "polyline", "path"}


class Reader(HTMLParser):
    """Checks that all tags are closed; collects the text and all that a browser would load."""

    def __init__(self, text):
        super().__init__()
        self.open, self.loads, self.tags, self.text = [], [], [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [value for name, value in attrs if name in ("src", "href", "data")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


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


def test_page_is_one_whole_file(report, strip):
    text = render_page(report, [strip], notes=["take <care>"])
    read = Reader(text)
    assert not read.open
    assert all(load.startswith("data:image/png;base64,") for load in read.loads)
    assert len(read.loads) == 1
    assert "script" not in read.tags
    assert "http" not in text
    assert "@import" not in text
    assert "url(" not in text
    assert read.tags.count("svg") == 3 + 5  # charts, and keys of the legend


def test_page_shows_every_number_and_the_provenance(report):
    read = Reader(render_page(report))
    for row in report.rows:
        for cell in report.cells(row):
            assert cell in read.text
    for label, value in report.provenance.lines():
        assert label in read.text
        assert value in read.text
    assert "chance" in read.text
    assert "load average" in read.text


def test_notes_and_captions_are_text_not_markup(report, strip):
    text = render_page(replace(report, title="a <b> & c"), [strip], notes=["<script>x</script>"])
    assert "<script>" not in text
    assert "tome &lt;3&gt;" in text
    assert "a &lt;b&gt; &amp; c" in text


def test_page_of_costs_alone(host):
    report = measure(patchslim.slim(host, "tome", macs=0.7), repeats=2, batch=1)
    read = Reader(render_page(report))
    assert not read.open
    assert "costs alone" in read.text
    assert "Which patches survive" not in read.text
    bare = measure(patchslim.slim(host, "tome", macs=0.7), repeats=0)
    assert "What it costs" not in Reader(render_page(bare)).text


def test_lines_go_by_method_and_random_has_its_own(report):
    curves = group_by_method(report)
    assert set(curves) == {"tome", "topk", "random"}
    assert [row.name for row in curves["tome"]] == ["tome 0.8", "tome 0.6"]
    assert [row.name for row in curves["random"]] == ["random 0.8", "random 0.6"]


def test_lines_of_random_baselines_where_it_has_no_budgets(host):
    report = measure({"tome": patchslim.slim(host, "tome", macs=0.7)}, repeats=0)
    assert [row.name for row in group_by_method(report)["random"]] == ["random/tome"]


def test_headline_names_the_cheapest_that_is_close(report):
    right = {"dense": 0.95, "tome 0.8": 0.95, "tome 0.6": 0.945, "random/tome 0.6": 0.4}
    rows = tuple(
        replace(row, accuracy=Estimate(right.get(row.name, 0.5), 0.01)) for row in report.rows
    )
    text = headline(replace(report, rows=rows))
    assert "tome 0.6" in text
    assert "94.5%" in text
    assert "random 40.0%" in text
    rows = (rows[0], *(replace(row, accuracy=Estimate(0.5, 0.01)) for row in rows[1:]))
    assert "No model" in headline(replace(report, rows=rows))


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
