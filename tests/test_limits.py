"""Limits on images and archives, what is told of an image that is read, and the memory it takes."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from attacks.images import zeros_png
from child_process import run_in_process
from hostile_tars import make_tar, member
from hostile_zips import make_zip
from image_files import GREY, RGB, RGBA, chunk, exif, png, tiff
from patchslim.data.images import Images
from patchslim.data.limits import Limits
from patchslim.data.webdataset import Shards
from patchslim.errors import BadData, BadSetting, UnknownName
from patchslim.hosts._preprocessing import Preprocessing
from picture_judge import COLOURS, PLAIN, encode

MEASURE = """
import resource, sys, patchslim
from patchslim.example import digits
slimmed = patchslim.slim(digits.host(), "evit", keep=0.5)
images = patchslim.Images.for_host(slimmed, sys.argv[1], batch=8)
patchslim.measure(slimmed, images, repeats=0)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def write_images(folder: Path, **files: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / name.replace("_", ".")).write_bytes(data)
    return folder


def test_an_image_beyond_a_limit_is_named_and_the_rest_is_read(tmp_path):
    folder = write_images(tmp_path / "x", a_png=png(COLOURS, RGB), b_png=png(COLOURS[:8], RGB))
    for limits, reason in (
        (Limits(pixels=1000), "b.png: it has 32 x 32 pixels after resizing"),
        (Limits(file_bytes=1000), "a.png: it has 3,"),
    ):
        images = Images(folder, **PLAIN, limits=limits)
        if limits.pixels == 1000:
            with pytest.raises(BadData, match=r"a\.png: it has 32 x 32 pixels, and the limit"):
                list(images)
        else:
            assert sum(len(pixels) for pixels, _ in images) == 1
            assert images.unreadable[0].startswith(reason)


def test_an_archive_beyond_a_limit_is_refused(tmp_path):
    file = tmp_path / "a.zip"
    file.write_bytes(make_zip({"x.png": bytes(1 << 20)}, method=8))
    few = {"file_bytes": 10_000, "ratio": 2}
    with pytest.raises(BadData, match=r"a\.zip has .* unpacks to more than 2 times .*ratio"):
        Images(file, **PLAIN, limits=Limits(**few))
    with pytest.raises(BadData, match=r"more than 3 files.*members"):
        Images(file, **PLAIN, limits=Limits(members=3))
    assert Images(file, **PLAIN).count == 5


def test_a_pattern_of_more_shards_than_the_limit_is_refused_before_any_is_looked_for(tmp_path):
    with pytest.raises(BadData, match="more than 100,000 shards"):
        Shards(f"{tmp_path}/{{0..999999999999}}.tar", prepared=Preprocessing(**PLAIN))
    with pytest.raises(BadData, match="more than 3 shards"):
        Shards(f"{tmp_path}/{{0..3}}.tar", prepared=Preprocessing(**PLAIN), limits=Limits(shards=3))
    with pytest.raises(BadData, match="There is no shard"):
        Shards(f"{tmp_path}/{{0..3}}.tar", prepared=Preprocessing(**PLAIN))


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "9"])
def test_a_limit_is_a_whole_number(value):
    with pytest.raises(BadSetting, match="pixels="):
        Limits(pixels=value)


def test_limits_on_the_command_line(tmp_path):
    assert Limits.parse(["pixels=5", "ratio=7"]) == Limits(pixels=5, ratio=7)
    with pytest.raises(UnknownName, match="pixels"):
        Limits.parse(["pixel=5"])
    with pytest.raises(BadSetting, match="whole number"):
        Limits.parse(["pixels=many"])
    folder = write_images(tmp_path / "x", a_png=png(COLOURS, RGB))
    command = ["measure", "digits", "--method", "evit", "--keep", "0.5", "--repeats", "0"]
    ended = run_in_process(*command, "--data", str(folder), "--limits", "pixels=100")
    assert ended.code == 2
    assert "32 x 32 pixels, and the limit is 100 (pixels)" in ended.err


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (png(COLOURS, RGB, more=chunk(b"eXIf", exif(6))), "1 images are turned by an EXIF tag"),
        (png(np.dstack([COLOURS, COLOURS[..., 0]]), RGBA), "1 images have transparent parts"),
        (
            encode(
                Image.fromarray(COLOURS[..., 0]),
                "GIF",
                save_all=True,
                append_images=[Image.fromarray(COLOURS[..., 1])],
            ),
            "1 images have several frames",
        ),
    ],
)
def test_what_is_not_followed_is_told_once(tmp_path, data, words):
    images = Images(write_images(tmp_path / "x", a_png=data), **PLAIN)
    with pytest.warns(UserWarning, match=words):
        list(images)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(images)
    assert list(images.remarks.values()) == [["a.png"]]


OPAQUE = np.dstack([COLOURS, np.full((32, 32), 255)])


@pytest.mark.parametrize("data", [png(COLOURS, RGB), png(OPAQUE, RGBA)])
def test_of_a_plain_image_nothing_is_told(tmp_path, data):
    images = Images(write_images(tmp_path / "x", a_png=data), **PLAIN)
    list(images)
    assert images.remarks == {}


def test_16_bits_are_scaled_and_unclear_floats_are_named(tmp_path):
    ramp = np.linspace(0, 65535, 32 * 32).round().astype(np.uint16).reshape(32, 32)
    bad = tiff(np.full((32, 32), 7.5, np.float32))
    folder = write_images(tmp_path / "x", a_png=png(ramp, GREY, 16), b_tif=tiff(ramp), c_tif=bad)
    images = Images(folder, **PLAIN)
    ((pixels, _),) = images
    for one in pixels[:, 0].numpy():
        assert np.abs(one - ramp / 65535).max() < 0.6 / 255
    (line,) = images.unreadable
    assert line.startswith("c.tif: it holds floats from 7.5 to 7.5; only those from 0 to 1 are")


def test_names_that_stand_for_several_files_and_links_are_told(tmp_path):
    (tmp_path / "a.zip").write_bytes(make_zip(again=2))
    with pytest.warns(UserWarning, match="1 names that stand for several files each"):
        assert Images(tmp_path / "a.zip", **PLAIN).count == 4
    (tmp_path / "a.tar").write_bytes(make_tar([member("dog", kind=b"2", linkname="ant")]))
    with pytest.warns(UserWarning, match="1 links, such as dog, which are not followed"):
        assert Images(tmp_path / "a.tar", **PLAIN).count == 4


def test_a_folder_that_links_to_itself_is_read_once_and_told(tmp_path):
    folder = write_images(tmp_path / "x", a_png=png(COLOURS, RGB))
    (folder / "again").symlink_to(folder)
    with pytest.warns(UserWarning, match="1 folders lead back to a folder"):
        assert Images(folder, **PLAIN).names == ["a.png"]


@pytest.mark.slow
def test_hostile_images_take_at_most_half_more_memory_than_clean_ones(tmp_path):
    scenes = [png(np.roll(np.repeat(COLOURS, 3, 0), turn, 0), RGB) for turn in range(40)]
    clean = {f"{turn:02}_png": data for turn, data in enumerate(scenes)}
    side = 5090  # nearly as many pixels as the limit allows
    black = Image.new("RGB", (side, side))
    hostile = {
        "rgba_png": encode(Image.new("RGBA", (side, side)), "PNG"),
        "grey_png": encode(Image.new("I;16", (side, side)), "PNG"),
        "float_tif": encode(Image.new("F", (side, side)), "TIFF", compression="tiff_adobe_deflate"),
        "scans_jpg": encode(black, "JPEG", progressive=True),
        "cmyk_jpg": encode(Image.new("CMYK", (side, side)), "JPEG", progressive=True),
        "a_webp": encode(Image.new("RGB", (3600, 3600)), "WEBP", lossless=True, method=0),
        "b_webp": encode(black, "WEBP", lossless=True, method=0),
        "a_gif": encode(black, "GIF"),
        "narrow_png": zeros_png(1, 30_000),
        "long_png": zeros_png(1, 1_000_000),
        "huge_png": zeros_png(13_000, 13_400),
    }
    peaks = []
    for name, files in (("clean", clean), ("hostile", {**clean, **hostile})):
        folder = write_images(tmp_path / name, **files)
        command = [sys.executable, "-c", MEASURE, str(folder)]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
        peaks.append(int(ended.stdout))
    assert peaks[1] <= 1.5 * peaks[0], peaks
