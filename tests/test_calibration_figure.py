"""The figure of a calibration: one file that parses, and pictures that are true to the record."""

import json
import xml.etree.ElementTree as ElementTree
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

import patchslim
from patchslim.calibration.calibrate import calibrate
from patchslim.calibration.patch_slimming.figure import GRIDS_PER_ROW, draw_figure

SVG = "{http://www.w3.org/2000/svg}"
CELLS = "2x3 4 1 0 5 2 3"


def record(**other: Any) -> dict[str, Any]:
    """Writes what a calibration of three blocks on a grid of 2x3 records."""
    layers = [
        {"block": 1, "kept": 2, "error": 0.3, "scale": 2.0, "curve": [[1, 0.9], [2, 0.4], [6, 0]]},
        {"block": 0, "kept": 4, "error": 0.02, "scale": 1.0, "curve": [[4, 0.03], [5, 0.01]]},
    ]
    return {
        "method": "patch_slimming",
        "macs": 0.5,
        "tolerance": 0.05,
        "search": patchslim.PatchSlimmingConfig().to_json(),
        "images": 8,
        "schedule": {"kind": "counts", "kept": [5, 3, 3], "entering": 7, "prefix": 1},
        "order": CELLS,
        "layers": layers,
        "gates": {},
    } | other


def parsed(text: str) -> ElementTree.Element:
    return ElementTree.fromstring(text)


def texts(drawn: ElementTree.Element) -> list[str]:
    return ["".join(each.itertext()) for each in drawn.iter(f"{SVG}text")]


def pictures(drawn: ElementTree.Element) -> dict[str, str]:
    """Finds the path of each picture by its label."""
    paths = {}
    for group in drawn.iterfind(f".//{SVG}g[@transform]"):
        label, path = group.find(f"{SVG}text"), group.find(f"{SVG}path")
        assert label is not None
        assert path is not None
        paths[str(label.text)] = path.attrib["d"]
    return paths


def points(drawn: ElementTree.Element, kind: str) -> list[tuple[float, float]]:
    """Finds the ends of all lines of a class, or in a group of that class, across and down."""
    lines = [*drawn.iterfind(f".//{SVG}polyline[@class='{kind}']")]
    lines += drawn.iterfind(f".//{SVG}g[@class='{kind}']/{SVG}polyline")
    pairs = [pair.split(",") for each in lines for pair in each.attrib["points"].split()]
    return [(float(across), float(down)) for across, down in pairs]


def marks(drawn: ElementTree.Element, words: str) -> list[str]:
    titles = [each.findtext(f"{SVG}title") or "" for each in drawn.iter(f"{SVG}circle")]
    return [title for title in titles if title.startswith(words)]


def test_each_block_has_a_picture_with_its_kept_cells():
    drawn = pictures(parsed(draw_figure(record())))
    assert list(drawn) == ["block 0: 4 of 6", "block 1: 2 of 6"]  # the first block first
    assert [path.count("M") for path in drawn.values()] == [4, 2]


def test_the_cells_lie_where_the_grid_has_them():
    path = pictures(parsed(draw_figure(record())))["block 1: 2 of 6"]
    corners = [tuple(map(float, each.split("h")[0].split())) for each in path.split("M")[1:]]
    cell = 96 / 3
    assert [(int(x // cell), int(y // cell)) for x, y in corners] == [(1, 0), (1, 1)]  # cells 1, 4


def test_it_stands_alone():
    drawn = parsed(draw_figure(record()))
    assert drawn.tag == f"{SVG}svg"
    assert drawn.find(f"{SVG}style") is not None
    assert not [name for each in drawn.iter() for name in each.attrib if "href" in name]
    left, top, width, height = map(float, drawn.attrib["viewBox"].split())
    assert (left, top) == (0, 0)
    for each in drawn.iter(f"{SVG}svg"):
        reach = float(each.attrib.get("y", 0)) + float(each.attrib.get("height", 0))
        assert reach <= height
        assert float(each.attrib.get("width", 0)) <= width


def test_no_line_of_text_is_wider_than_the_file():
    search = patchslim.PatchSlimmingConfig(mode="paper", slack=12.5).to_json()
    changes = {"search": search, "gates": {"0": 0.5}, "tolerance": 0.00012, "images": 50_000}
    drawn = parsed(draw_figure(record(method="patch_slimming_dynamic", **changes)))
    assert max(map(len, texts(drawn))) * 7 < float(drawn.attrib["width"])  # a letter is 7 or less


def test_the_rule_is_the_tolerance_and_the_last_block_has_its_slack():
    drawn = parsed(draw_figure(record()))
    (_, rule), (_, end) = points(drawn, "rule")
    assert rule == end  # level
    # Chosen: 0.3 / 2 of 8 x 0.05 allowed in block 1, and 0.02 of 0.05 in block 0: 0.375 and 0.4.
    chosen = [group for group in drawn.iter(f"{SVG}g") if group.get("class", "").endswith("chosen")]
    one, two = (float(each.attrib["cy"]) for group in chosen for each in group.iter(f"{SVG}circle"))
    assert two - one == pytest.approx(_down(0.375, drawn) - _down(0.4, drawn), abs=0.2)
    assert one > rule  # further down is less


def _down(share: float, drawn: ElementTree.Element) -> float:
    """Finds where a share of what is allowed lies, from block 0's points: 0.03, 0.01 of 0.05."""
    (_, high), (_, low) = points(drawn, "block-0")
    per_decade = (low - high) / torch.log10(torch.tensor(3.0)).item()
    return high - per_decade * torch.log10(torch.tensor(share / 0.6)).item()


def test_errors_of_nothing_are_left_out_of_the_chart():
    drawn = parsed(draw_figure(record()))
    assert marks(drawn, "block 1, 2") == ["block 1, 2 patches: error 0.2"]
    assert not marks(drawn, "block 1, 6")


def test_absolute_errors_are_shown_as_they_are():
    search = patchslim.PatchSlimmingConfig(mode="paper").to_json()
    drawn = parsed(draw_figure(record(search=search)))
    assert marks(drawn, "block 1, 2") == ["block 1, 2 patches: error 0.4"]
    assert not any("times it" in each for each in texts(drawn))


@pytest.mark.parametrize("tolerance", [None, 0.0])
def test_without_a_tolerance_there_is_no_rule(tolerance):
    drawn = parsed(draw_figure(record(tolerance=tolerance)))
    assert not points(drawn, "rule")
    assert "error" in texts(drawn)
    assert not any("dashed" in each for each in texts(drawn))


def test_a_calibration_that_removes_nothing_has_no_chart():
    layers = [{"block": 0, "kept": 6, "error": 0.0, "scale": 1.0, "curve": [[6, 0.0]]}]
    drawn = parsed(draw_figure(record(layers=layers)))
    assert list(pictures(drawn)) == ["block 0: 6 of 6"]
    assert not [*drawn.iter(f"{SVG}circle")]


def test_many_blocks_go_in_rows():
    layers = [
        {"block": block, "kept": 6 - block // 4, "error": 0.1, "scale": 1.0, "curve": []}
        for block in reversed(range(2 * GRIDS_PER_ROW + 1))
    ]
    drawn = parsed(draw_figure(record(layers=layers)))
    groups = drawn.iterfind(f".//{SVG}g[@transform]")
    places = [each.attrib["transform"] for each in groups]
    assert len(set(places)) == len(layers)
    assert len({each.split()[1] for each in places}) == 3


def test_the_dynamic_form_says_that_each_image_chooses():
    fixed, chosen = (
        texts(parsed(draw_figure(record(gates=gates)))) for gates in ({}, {"0": 0.5, "1": 0.6})
    )
    assert not any("Each image" in each for each in fixed)
    assert any("Each image" in each for each in chosen)


def test_it_draws_what_calibrate_writes(tmp_path):
    torch.manual_seed(0)
    host = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2)
    images = [(torch.randn(2, 3, 32, 32), None)]
    config = patchslim.PatchSlimmingConfig(mode="free", images=2, probe=2)
    calibrate(host.eval(), images, macs=0.6, config=config, out=tmp_path)
    written = json.loads((tmp_path / "calibration.json").read_text(encoding="utf-8"))
    drawn = pictures(parsed((tmp_path / "pyramid.svg").read_text(encoding="utf-8")))
    kept = {layer["block"]: layer["kept"] for layer in written["layers"]}
    assert {label: path.count("M") for label, path in drawn.items()} == {
        f"block {block}: {count} of 16": count for block, count in kept.items()
    }
