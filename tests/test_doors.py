"""The doors: arguments, images, places to write, the terminal, and hooks that never fire."""

from __future__ import annotations

import io
import math
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch

import patchslim
from patchslim.cli.terminal import Terminal, show_line, show_name, show_text, write_text
from patchslim.errors import BadFile, BadSetting, BypassedHook, UnknownName, WrongInput
from patchslim.files import check_writable, resolve_path, write_bytes_atomically
from patchslim.settings import Range, check_choice, check_value, show_value
from patchslim.testing.trial import noise_images, tiny_host

ADAPTIVE = {
    "ats": {"floor": 1},
    "duplicates": {"tolerance": 0.5},
    "similarity": {"threshold": 0.1},
    "tome": {"threshold": 0.5},
}


@pytest.mark.parametrize(
    ("value", "kind", "plain"),
    [
        (3, int, 3),
        (np.int64(3), int, 3),
        (3, float, 3),
        (np.float32(0.5), float, 0.5),
        (Fraction(1, 2), float, 0.5),
        (True, bool, True),
        ("a", str, "a"),
    ],
)
def test_a_value_comes_back_as_a_plain_one(value, kind, plain):
    got = check_value("it", value, kind)
    assert got == plain
    assert type(got) is type(plain)


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (True, int),
        (True, float),
        (1.0, int),
        ("3", int),
        (math.nan, float),
        (math.inf, float),
        pytest.param(10**400, int, id="400 digits"),
        pytest.param(10**5000, int, id="5,000 digits"),
        pytest.param(10**400, float, id="a float of 400 digits"),
        (1j, float),
        (None, float),
        (torch.tensor(1), int),
        (1, bool),
        (b"a", str),
    ],
)
def test_a_value_of_another_kind_is_refused_in_a_short_message(value, kind):
    with pytest.raises(BadSetting, match=r"^it=.*: it (takes|must be)") as refused:
        check_value("it", value, kind)
    assert len(str(refused.value)) < 700


def test_a_range_says_what_it_holds():
    assert str(Range(0, 1)) == "between 0 and 1"
    assert str(Range(0, 1, above=True)) == "above 0 and at most 1"
    assert str(Range(1, 65536)) == "at least 1 and at most 65,536"
    assert 0 not in Range(0, 1, above=True)
    assert 1 not in Range(0, 1, below=True)
    assert not any(number in Range(0, 1) for number in (math.nan, -math.inf, math.inf))


def test_a_choice_is_refused_with_the_nearest_and_shortened():
    with pytest.raises(UnknownName, match="Did you mean 'exact'"):
        check_choice("tail", "exakt", ("exact", "full"))
    with pytest.raises(UnknownName) as refused:
        check_choice("tail", "x" * 100_000, ("exact", "full"))
    assert len(str(refused.value)) < 1000
    assert show_value("x" * 1000).count("x") == 198


@pytest.mark.filterwarnings("ignore::patchslim.errors.Untrained")
@pytest.mark.filterwarnings("ignore::patchslim.errors.ShortSchedule")
@pytest.mark.parametrize("method", patchslim.method_names())
def test_an_empty_batch_gives_an_empty_answer(method):
    for settings in ({}, ADAPTIVE.get(method, {})):
        slimmed = patchslim.slim(tiny_host(), method, keep_rate=0.7, at=(1,), **settings)
        assert slimmed(noise_images(2)[:0]).shape == (0, 5)
        assert slimmed.macs_of(noise_images(2)[:0]) == []
        assert slimmed.forward_features(noise_images(2)[:0]).shape == (0, 17, 16)


def test_images_that_do_not_fit_the_weights_are_refused_with_the_cure():
    slimmed = patchslim.slim(tiny_host(), "tome", r=2)
    with pytest.raises(WrongInput, match=r"weights of the model are torch\.float32"):
        slimmed(noise_images().double())
    with pytest.raises(WrongInput, match="the model is on cpu"):
        slimmed(noise_images().to("meta"))
    with pytest.raises(WrongInput, match="to_dense"):
        slimmed(noise_images().to_sparse())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert slimmed(noise_images().bfloat16()).shape == (3, 5)


def test_a_place_is_tried_before_anything_is_written(tmp_path):
    (tmp_path / "file").write_text("mine")
    for place in ("", "a\0b", "~nobody-at-all/x", "n" * 300, tmp_path / "file" / "x", 3):
        with pytest.raises(BadFile):
            check_writable(place, folder=False)
    with pytest.raises(BadFile, match="a folder is needed"):
        check_writable(tmp_path / "file", folder=True)
    with pytest.raises(BadFile, match="a file is to be written"):
        check_writable(tmp_path, folder=False)
    with pytest.raises(BadFile, match="cannot be written"):
        check_writable("/proc/nothing/model", folder=True)
    deep = tmp_path / "new" / "deeper"
    assert check_writable(deep, folder=True) == deep
    assert resolve_path(str(deep)) == deep
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    target = tmp_path / "picture.png"
    target.write_bytes(b"old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("patchslim.files._sync_to_disk", fail)
    with pytest.raises(BadFile, match="No space left on device"):
        write_bytes_atomically(target, b"new")
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_every_character_of_a_name_can_be_seen():
    assert show_name("a\nerror: b\x1b[2J\u202e\udcff") == r"a\nerror: b\x1b[2J\u202e\udcff"
    assert show_name("über 图 😀") == "über 图 😀"
    assert show_text("a\nb\x07") == "a\nb\\x07"
    assert len(show_line("error: " + "x" * 100_000)) < 400
    assert len(show_line("error: " + "x " * 100_000)) < 2100


def test_a_terminal_of_another_encoding_gets_escapes():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    write_text(stream, "über\n")
    assert stream.buffer.getvalue() == b"\\xfcber\n"


def test_notes_and_answers_go_through_the_door(capsys):
    terminal = Terminal()
    terminal.note("warning: a\nerror: forged")
    terminal.answer("one\ntwo\x1b[2J")
    out, err = capsys.readouterr()
    assert err == "warning: a\\nerror: forged\n"
    assert out == "one\ntwo\\x1b[2J\n"


def test_hooks_that_never_fire_are_told_once():
    host = tiny_host()
    host.blocks[0].register_forward_hook(lambda *_: None)
    host.blocks[1].norm1.register_forward_hook(lambda *_: None)
    with pytest.warns(BypassedHook, match=r"on blocks\.0: it goes around") as told:
        patchslim.slim(host, "tome", r=2)
    assert len([each for each in told if each.category is BypassedHook]) == 1


def test_hooks_that_fire_are_no_reason_to_warn():
    host, seen = tiny_host(), []
    host.blocks[1].norm1.register_forward_hook(lambda *_: seen.append(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error", BypassedHook)
        slimmed = patchslim.slim(host, "tome", r=2)
    seen.clear()
    slimmed(noise_images())
    assert seen == [1]


@pytest.mark.parametrize("method", patchslim.method_names())
def test_a_setting_that_a_method_does_not_have_is_refused(method):
    with pytest.raises(BadSetting, match=r"Unknown setting of .* 'nonsense'"):
        patchslim.find_method(method)(nonsense=1)
    with pytest.raises(BadSetting, match="by name"):
        patchslim.find_method(method)(0.5)


def test_the_nearest_setting_is_named():
    with pytest.raises(BadSetting, match=r"'thresold'. Did you mean 'threshold'"):
        patchslim.find_method("similarity")(thresold=0.1)
