"""The demo in a very short form; the whole of it where slow tests run."""

import time

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from patchslim.data import digits
from patchslim.demo import demo, present, slimmed
from patchslim.reducer import reducer_names
from patchslim.report import Report


@pytest.fixture(scope="module")
def host():
    torch.manual_seed(0)
    return digits.untrained_host(depth=2).eval()


def test_demo_writes_what_it_returns(host, tmp_path):
    out, lines = tmp_path / "new" / "folder", []
    report = present(
        host, digits.scenes("test", 4), out, budgets=(0.8,), repeats=1, progress=lines.append
    )
    assert sorted(each.name for each in out.iterdir()) == ["report.html", "report.json"]
    assert Report.load(out / "report.json") == report
    text = (out / "report.html").read_text(encoding="utf-8")
    assert text.count("data:image/png;base64,") == 2 * (len(reducer_names()) - 1)
    methods = {row.method for row in report.rows}
    assert methods == {"dense", *reducer_names()} - {"identity"}
    assert report.birth.images == 4
    assert all(report.baseline(row) for row in report.rows if row.method not in ("dense", "random"))
    assert lines[0].startswith("slimming: ")
    assert any("4/4 images" in line for line in lines)


def test_budgets_out_of_reach_are_said_not_swallowed(host):
    lines = []
    models, skipped = slimmed(host, (0.8, 0.001), lines.append)
    assert len(skipped) == len(reducer_names()) - 1
    assert all(name.endswith(" 0.8") for name in models)
    assert set(skipped) <= set(lines)
    assert all("Nearest possible" in line for line in skipped)


def test_methods_that_need_a_class_token_are_said_to_be_missing():
    host = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, class_token=False,
        global_pool="avg",
    )  # fmt: skip
    models, skipped = slimmed(host, (0.8,), lambda _: None)
    assert "tome 0.8" in models
    assert any(line.startswith("topk 0.8 is missing") for line in skipped)


@pytest.mark.slow
def test_whole_demo_reads_digits_and_beats_random(tmp_path):
    begun = time.monotonic()
    report = demo(tmp_path, scenes=200)
    assert time.monotonic() - begun < 300
    assert report.dense.accuracy.value > 0.94
    half = next(row for row in report.rows if row.name == "tome 0.5")
    assert report.gain(half) > 0.02
