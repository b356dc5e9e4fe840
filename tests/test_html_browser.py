"""The page in a real browser: it renders from its one file, without an error."""

import shutil
import subprocess

import pytest
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

import patchslim
from patchslim.measurement.measure import measure
from patchslim.report.html import Picture, render_page
from patchslim.report.patch_maps import trace_patches
from patchslim.report.patch_pictures import draw_patches, encode_png

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
QUIET = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync
--disable-background-networking --disable-component-update --hide-scrollbars
--enable-logging=stderr --v=0""".split()


@pytest.fixture
def page_file(tmp_path):
    torch.manual_seed(0)
    host = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2)
    slimmed = patchslim.slim(host.eval(), "tome", macs=0.7)
    images = torch.randn(2, 3, 32, 32)
    report = measure(slimmed, [(images, None)], batch=1, repeats=1)
    pixels = (images[0].permute(1, 2, 0) * 60 + 128).clamp(0, 255).byte().numpy()
    picture = Picture("tome", encode_png(draw_patches(pixels, trace_patches(slimmed, images)[0])))
    file = tmp_path / "report.html"
    file.write_text(render_page(report, [picture]), encoding="utf-8")
    return file


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine")
def test_a_browser_shows_the_table_the_charts_and_the_pictures(page_file, tmp_path):
    shot = tmp_path / "shot.png"
    done = subprocess.run(
        [CHROMIUM, *QUIET, f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={shot}",
         "--window-size=1240,1600", page_file.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr
    with Image.open(shot) as seen:
        assert seen.size == (1240, 1600)
        assert len(seen.convert("RGB").quantize(64).getcolors()) > 16


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine")
def test_the_page_rendered_by_a_browser_has_every_row(page_file, tmp_path):
    done = subprocess.run(
        [CHROMIUM, *QUIET, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom",
         page_file.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "<svg" in done.stdout
    for name in ("dense", "tome", "random"):
        assert name in done.stdout
