"""`bench`: cells and their keys, a sweep that was stopped, a cell that fails, and what is saved."""

from __future__ import annotations

import contextlib
import copy
import csv
import importlib.util
import json
import linecache
import re
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from PIL import Image

import patchslim
from patchslim.cli.main import main
from patchslim.errors import (
    BadData,
    BadFile,
    BadSetting,
    PatchslimError,
    UnknownName,
    UnsupportedModel,
)
from patchslim.hosts._catalog import find_host
from patchslim.hosts._preprocessing import Preprocessing
from patchslim.measurement.score import FEWEST_OF_CLASS, Tally, find_worst_class
from patchslim.methods.topk import TopK
from patchslim.report.report import Report
from patchslim.sweep.cell import DENSE, Cell, Variant, describe_method, make_cells, make_key
from patchslim.sweep.corruption import CORRUPTIONS, CorruptedImages
from patchslim.sweep.result import Sweep
from patchslim.testing.trial import noise_images, tiny_host


class Failing(TopK):
    """Fails like a library beneath."""

    def choose(self, tokens, signals, keep):
        raise RuntimeError("out of luck")


class Patience(TopK):
    """Has something to learn."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(3))


@pytest.fixture(scope="module")
def host():
    return tiny_host()


@pytest.fixture(scope="module")
def images(host):
    pixels = noise_images(6)
    labels = host(pixels).argmax(dim=1)
    labels[0] = (labels[0] + 1) % 2
    return [(pixels[:4], labels[:4]), (pixels[4:], labels[4:])]


def run(host, images, out, **changes):
    """Runs a sweep of two methods at one budget."""
    asked = {"methods": ["topk", "tome"], "budgets": [0.7], "rounds": 2, "threads": 1, **changes}
    return patchslim.bench(host, images, asked.pop("methods"), out=out, **asked)


def test_every_cell_has_its_rows_beside_dense_and_random(host, images, tmp_path):
    found = run(host, images, tmp_path, batches=[1, 2])
    names = [row.name for row in found.rows]
    assert names == [
        f"{name} ({batch})"
        for pair in [("dense",), ("topk 0.7", "random/topk 0.7"), ("tome 0.7", "random/tome 0.7")]
        for batch in (1, 2)
        for name in pair
    ]
    assert found.measured == len(found.cells) == 6
    assert not found.refused
    dense, row = found.rows[0], found.rows[2]
    assert (dense.method, dense.accuracy.value, dense.kl.value) == ("dense", 5 / 6, 0.0)
    assert row.place[1:] == ("eager", "float32", 1)
    assert row.latency.repeats == 2
    assert row.speedup is not None
    assert row.memory > 0
    assert ("images", "6 scored, batches of 1, 2 timed, 16x16 px") in found.report.provenance.lines(
        found.report.batches
    )
    assert "batches of 1, 2" in found.report.table()
    # The same numbers as by `measure`, for one of them.
    alone = patchslim.measure(
        {"topk 0.7": patchslim.slim(host, "topk", macs=0.7)}, images, repeats=0
    )
    for got, want in zip(found.rows[2:4], alone.rows[1:], strict=True):
        assert (got.kl, got.accuracy, got.change) == (want.kl, want.accuracy, want.change)
        assert (got.agreement, got.tokens, got.macs) == (want.agreement, want.tokens, want.macs)


def test_what_is_there_is_not_measured_again(host, images, tmp_path):
    first = run(host, images, tmp_path / "a")
    saved = (tmp_path / "a/rows.jsonl").read_bytes()
    again = run(host, images, tmp_path / "a")
    assert again.measured == 0
    assert again.rows == first.rows
    assert (tmp_path / "a/rows.jsonl").read_bytes() == saved
    # More cells: only those are measured; answers of a model serve all its batches.
    answers = {file.name for file in (tmp_path / "a/answers").iterdir()}
    assert run(host, images, tmp_path / "a", batches=[8, 1]).measured == 3
    assert {file.name for file in (tmp_path / "a/answers").iterdir()} == answers
    other = tiny_host()
    torch.nn.init.normal_(other.head.weight)
    for changed in ({"seed": 1}, {"rounds": 3}, {"images": images[:1]}, {"host": other}):
        asked = {"host": host, "images": images, "out": tmp_path / "a", **changed}
        assert run(**asked).measured == 3, changed


def test_the_report_names_each_command_that_measured_some_of_it(
    host, images, tmp_path, monkeypatch
):
    monkeypatch.setattr("sys.argv", ["patchslim", "bench", "a"])
    run(host, images, tmp_path, methods=["topk"], rounds=0)
    monkeypatch.setattr("sys.argv", ["patchslim", "bench", "b"])
    found = run(host, images, tmp_path, methods=["topk", "tome"], rounds=0)
    assert found.report.provenance.command == "patchslim bench a; patchslim bench b"


def test_a_stopped_sweep_goes_on_where_it_was(host, images, tmp_path):
    whole = run(host, images, tmp_path / "whole")

    def stop(line):
        if line.startswith("cell 3"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(host, images, tmp_path / "stopped", progress=stop)
    assert len(list((tmp_path / "stopped/cells").iterdir())) == 2
    again = run(host, images, tmp_path / "stopped")
    assert again.measured == 1
    for got, want in zip(again.rows, whole.rows, strict=True):
        timed = ("latency", "throughput", "speedup", "conversion")
        assert replace(got, **dict.fromkeys(timed)) == replace(want, **dict.fromkeys(timed))


def test_a_damaged_file_is_measured_again(host, images, tmp_path):
    run(host, images, tmp_path)
    cells, answers = sorted((tmp_path / "cells").iterdir()), (tmp_path / "answers").iterdir()
    cells[0].write_text("{")
    entries = json.loads(cells[1].read_text())
    entries["rows"][0]["kl"] = "none"
    cells[1].write_text(json.dumps(entries))
    for file in answers:
        file.write_bytes(b"no tensors")
    assert run(host, images, tmp_path).measured == 2


def test_a_cell_that_fails_is_recorded_and_the_others_go_on(host, images, tmp_path):
    methods = {"unlucky": Failing(), "topk": "topk", "dynamicvit": "dynamicvit"}
    found = run(host, images, tmp_path, methods=methods, budgets=[0.7, 0.6])
    reasons = {cell.variant.name: reason for cell, reason in found.refused.items()}
    assert set(reasons) == {"unlucky 0.7", "unlucky 0.6", "dynamicvit 0.7", "dynamicvit 0.6"}
    assert reasons["unlucky 0.7"] == "RuntimeError: out of luck"
    assert "not trained" in reasons["dynamicvit 0.7"]
    assert "not trained" in reasons["dynamicvit 0.6"]
    assert [row.name for row in found.rows][::2] == ["dense", "random/topk 0.7", "random/topk 0.6"]
    assert "unlucky 0.7, eager float32, batch 8 and 1 more: RuntimeError" in found.lines()[0]
    lines = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert sum("refused" in line for line in lines) == 4
    assert "out of luck" in (tmp_path / "report.html").read_text()
    # A refusal stands, an accident is tried again.
    assert run(host, images, tmp_path, methods=methods, budgets=[0.7, 0.6]).measured == 2


def test_two_rows_are_compared_image_by_image(host, images, tmp_path):
    found = run(host, images, tmp_path)
    same = found.compare("tome 0.7", "tome 0.7")
    assert (same.kl.value, same.kl.error, same.accuracy.value) == (0, 0, 0)
    topk, tome = (next(r for r in found.rows if r.name == f"{n} 0.7") for n in ("topk", "tome"))
    other = found.compare("topk 0.7", "tome 0.7")
    assert other.kl.value == pytest.approx(topk.kl.value - tome.kl.value)
    assert other.agreement.value == pytest.approx(topk.agreement.value - tome.agreement.value)
    against = found.compare("topk 0.7", "dense")
    assert against.accuracy.value == topk.change.value
    with pytest.raises(UnknownName, match=r"tome 0\.7"):
        found.compare("tome 0.8", "dense")


def test_what_is_saved_holds_the_rows(host, images, tmp_path):
    found = run(host, images, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [line["name"] for line in lines] == [row.name for row in found.rows]
    assert lines[1]["kl"]["value"] == found.rows[1].kl.value
    assert lines[1]["measured"]["threads"] == 1
    assert lines[1]["budget"] == 0.7
    table = list(csv.DictReader((tmp_path / "rows.csv").read_text().splitlines()))
    assert [line["infer_batch_size"] for line in table] == ["8"] * len(found.rows)
    assert {line["runtime"] for line in table} == {"eager"}
    assert Report.load(tmp_path / "report.json").rows == found.report.rows


def test_several_models_prepare_their_own_images(images, tmp_path):
    hosts = {"a": tiny_host(), "b": tiny_host(depth=2)}
    asked = []

    def open_images(host):
        asked.append(host)
        return images

    found = run(hosts, open_images, tmp_path, methods=["topk"])
    assert asked == [*hosts.values()]
    assert [row.name for row in found.rows if row.method == "dense"] == ["dense (a)", "dense (b)"]


def test_images_may_be_a_path_and_cost_distributions_are_kept(tmp_path):
    host = tiny_host()
    host.pretrained_cfg = {}

    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(3):
        Image.new("RGB", (40, 40), (80 * number, 90, 30)).save(folder / f"{number}.png")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = run(host, folder, tmp_path / "out", methods=["ats"])
        again = run(host, folder, tmp_path / "out", methods=["ats"], batches=[2])
    assert isinstance(found.prepared, Preprocessing)
    assert found.rows[1].spent is not None
    assert again.rows[1].spent == found.rows[1].spent
    assert found.rows[1].accuracy is None


def test_corrupted_copies_are_scored_and_are_the_same_each_time(host, images, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = run(host, images, tmp_path, methods=["topk"], rounds=0, corruptions=True)
        again = run(host, images, tmp_path / "b", methods=["topk"], rounds=0, corruptions=True)
    dense, row, twin = found.rows
    names = [each.name for each in CORRUPTIONS]
    assert [*dense.corrupted] == [*row.corrupted] == names
    assert len(names) == 12
    assert twin.corrupted is None
    assert again.rows[1].corrupted == row.corrupted
    assert Report.load(tmp_path / "report.json").rows[1] == found.report.rows[1]


@pytest.mark.parametrize("corruption", CORRUPTIONS, ids=lambda each: each.name)
def test_a_corruption_changes_pixels_more_where_it_is_stronger(corruption):
    prepared = Preprocessing(image_size=(32, 32), mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
    drawn = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(each)[:, None, None] for each in (prepared.mean, prepared.std))
    batches = [((drawn - mean) / std, torch.tensor([1]))]
    kind, _, severity = corruption.name.partition(" ")
    milder = [
        each for each in CORRUPTIONS if each.name.startswith(kind) and each.name[-1] < severity
    ]

    def change(each):
        ((pixels, labels),) = CorruptedImages(batches, each, prepared)
        assert pixels.shape == drawn.shape
        assert labels.tolist() == [1]
        assert pixels.isfinite().all()
        return float((pixels - batches[0][0]).abs().mean())

    assert change(corruption) > 0
    assert all(change(each) < change(corruption) for each in milder)


def test_the_dense_model_on_smaller_images_is_a_baseline(host, images, tmp_path):
    found = run(host, images, tmp_path, methods=["resolution"], budgets=[0.7, 0.4])
    rows = found.rows[1:]
    assert [row.name for row in rows] == ["resolution 0.7", "resolution 0.4"]
    assert [row.tokens[0] for row in rows] == [10, 5]  # 3x3 and 2x2 patches and the class token
    assert all(row.macs_share <= budget for row, budget in zip(rows, (0.7, 0.4), strict=True))
    assert all(row.kl.value > 0 for row in rows)
    assert all(row.speedup is not None for row in rows)
    refused = run(host, images, tmp_path, methods=["resolution"], budgets=[0.001]).refused
    assert "one patch" in next(iter(refused.values()))


def test_smaller_images_are_refused_where_a_host_cannot_be_resized(hf_vit, tmp_path):
    pixels = [(torch.randn(2, 3, *[hf_vit.config.image_size] * 2), None)]
    found = run(hf_vit, pixels, tmp_path, methods=["resolution"], rounds=0)
    assert "set_input_size" in next(iter(found.refused.values()))


def test_corrupted_copies_do_not_count_as_images_that_cost(host, images, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        both = run(host, images, tmp_path / "a", methods=["ats"], rounds=0, corruptions=True)
        alone = run(host, images, tmp_path / "b", methods=["ats"], rounds=0)
    assert both.rows[1].spent == alone.rows[1].spent
    assert both.rows[1].macs == alone.rows[1].macs


def test_a_method_that_was_edited_is_measured_again(host, images, tmp_path):
    """Its name and settings are the same; what it does is not."""

    def write(largest):
        path = tmp_path / "mine.py"
        path.write_text(
            "from patchslim.methods.topk import TopK\n"
            "from patchslim.tokens import Keep\n"
            "class Mine(TopK):\n"
            "    def choose(self, tokens, signals, keep):\n"
            f"        score = signals.class_attention()\n"
            f"        return Keep(score.topk(keep, dim=1, largest={largest}).indices)\n"
        )
        spec = importlib.util.spec_from_file_location("mine", path)
        module = importlib.util.module_from_spec(spec)
        linecache.checkcache()
        spec.loader.exec_module(module)
        return module.Mine()

    first = run(host, images, tmp_path / "out", methods={"mine": write(True)})
    assert run(host, images, tmp_path / "out", methods={"mine": write(True)}).measured == 0
    second = run(host, images, tmp_path / "out", methods={"mine": write(False)})
    assert second.measured == 1
    assert second.rows[1].kl != first.rows[1].kl


def test_what_a_method_has_learned_is_part_of_the_key():
    one, other = Patience(), Patience()
    assert describe_method(one) == describe_method(copy.deepcopy(one))
    with torch.no_grad():
        other.weight += 1
    assert describe_method(one) != describe_method(other)


@pytest.mark.slow
def test_the_number_of_threads_is_part_of_the_key(host, images, tmp_path):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        run(host, images, tmp_path, threads=None)
        assert run(host, images, tmp_path, threads=1).measured == 0
        torch.set_num_threads(2)
        assert run(host, images, tmp_path, threads=None).measured == 3
    finally:
        torch.set_num_threads(before)


def test_a_full_disk_ends_the_sweep_and_is_no_refusal(host, small_disk):
    """There is room for what is said of a cell, and none for its answers."""

    def fill(line):
        if line.startswith("cell 2"):
            with (small_disk / "others").open("wb", buffering=0) as file:
                with contextlib.suppress(OSError):
                    while file.write(bytes(4096)):
                        pass
                file.truncate(file.tell() // 4096 * 4096 - 2 * 4096)

    with pytest.raises(BadFile, match="No space left"):
        run(host, [(noise_images(1000), None)], small_disk / "out", rounds=0, progress=fill)
    results = [json.loads(file.read_text()) for file in (small_disk / "out/cells").glob("*.json")]
    assert [each["refused"] for each in results] == [None]
    assert not list((small_disk / "out").rglob("*.new"))
    (small_disk / "others").unlink()
    again = run(host, [(noise_images(1000), None)], small_disk / "out", rounds=0)
    assert again.measured == 2
    assert not again.refused


def test_a_folder_with_files_of_others_is_left_alone(host, images, tmp_path):
    (tmp_path / "report.html").write_text("mine")
    with pytest.raises(BadFile, match=r"report\.html"):
        run(host, images, tmp_path)
    assert (tmp_path / "report.html").read_text() == "mine"
    assert [each.name for each in tmp_path.iterdir()] == ["report.html"]


def test_a_second_sweep_into_the_folder_is_refused(host, images, tmp_path):
    refused = []

    def start_another(line):
        if line.startswith("cell 2"):
            with ThreadPoolExecutor(1) as pool:
                refused.append(pool.submit(run, host, images, tmp_path).exception())

    run(host, images, tmp_path, progress=start_another)
    assert isinstance(refused[0], BadFile)
    assert "is being written by" in str(refused[0])


def test_any_error_of_one_cell_leaves_the_others(host, images, tmp_path):
    class Asserting(TopK):
        def choose(self, tokens, signals, keep):
            raise AssertionError("no")

    found = run(host, images, tmp_path, methods={"broken": Asserting(), "topk": "topk"})
    assert [*found.refused.values()] == ["AssertionError: no"]
    assert len(found.rows) == 3


def test_a_quantised_host_is_compared(images, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised = torch.ao.quantization.quantize_dynamic(tiny_host(), {torch.nn.Linear})
        found = run(quantised, images, tmp_path, methods=["topk"], rounds=0)
        again = run(quantised, images, tmp_path, methods=["topk"], rounds=0)
        other = torch.ao.quantization.quantize_dynamic(tiny_host(depth=2), {torch.nn.Linear})
        changed = run(other, images, tmp_path, methods=["topk"], rounds=0)
    assert again.measured == 0
    assert changed.measured == 2
    assert found.rows


def test_methods_that_are_calibrated_ask_for_images(host, images, tmp_path):
    found = run(host, images, tmp_path, methods=["patch_slimming"], budgets=[0.8])
    assert "give `calibration`" in next(iter(found.refused.values()))
    others = [(noise_images(8), None)]
    found = run(
        host, images, tmp_path, methods=["patch_slimming"], budgets=[0.8], calibration=others
    )
    assert not found.refused
    assert found.rows[1].method == "patch_slimming"


@pytest.mark.parametrize(
    ("wrong", "error", "said"),
    [
        ({"budgets": 0.5}, BadSetting, r"Give a list, such as \[0.5\]"),
        ({"budgets": []}, BadSetting, "at least one"),
        ({"budgets": [1.5]}, BadSetting, "budgets=1.5"),
        ({"runtimes": ["opnvino"]}, PatchslimError, "openvino"),
        ({"precisions": "int8"}, BadSetting, r"Give a list, such as \['int8'\]"),
        ({"batches": [0]}, BadSetting, "batches=0"),
        ({"methods": ["tom"]}, UnknownName, "tome"),
        ({"methods": {"dense": "tome"}}, BadSetting, "there anyway"),
        ({"rounds": -1}, BadSetting, "rounds"),
        ({"models": {}}, BadSetting, "at least one"),
        ({"models": "deit"}, PatchslimError, "Give a dense model"),
        ({"precisions": ["int4"]}, PatchslimError, "int8"),
        ({"models": {"a": 3}}, UnsupportedModel, "models"),
        ({"budgets": [[0.5]]}, BadSetting, "unhashable"),
        ({"images": [1]}, PatchslimError, "pair"),
        ({"images": torch.nn.Identity()}, PatchslimError, "Identity"),
        ({"images": []}, PatchslimError, "no images"),
        ({"out": "/dev/null/x"}, PatchslimError, "/dev/null"),
    ],
    ids=str,
)
def test_wrong_arguments_are_told(host, images, tmp_path, wrong, error, said):
    asked = {"models": host, "images": images, "methods": ["topk"], "out": tmp_path, **wrong}
    with pytest.raises(error, match=said):
        patchslim.bench(**asked)
    assert not (tmp_path / "rows.jsonl").exists()


def test_a_slimmed_model_is_refused(host, images, tmp_path):
    with pytest.raises(UnsupportedModel, match=r"\.host"):
        run(patchslim.slim(host, "topk", macs=0.7), images, tmp_path)


def test_a_sweep_without_any_row_says_why(tmp_path):
    with pytest.raises(BadData, match="Nothing was measured"):
        _ = Sweep({}, 0, None, tmp_path).report


def test_cells_of_one_model_follow_each_other_and_free_methods_have_no_budget():
    methods = {name: patchslim.find_method(name)() for name in ("topk", "duplicates")}
    cells = list(make_cells("h", methods, [0.7, 0.5], ["eager"], ["float32"], [1, 8]))
    assert [(cell.variant.name, cell.batch) for cell in cells] == [
        (name, batch) for name in (DENSE, "topk 0.7", "topk 0.5", "duplicates") for batch in (1, 8)
    ]
    keys = {make_key(cell) for cell in cells}
    assert len(keys) == len(cells)
    assert make_key(cells[0]) == make_key(Cell(Variant("h", DENSE, None, "eager", "float32"), 1))


def test_parts_of_the_images_add_up_to_the_last_digit():
    drawn = torch.Generator().manual_seed(0)
    dense, slim = torch.randn(2, 60, 7, generator=drawn)
    labels = torch.randint(7, (60,), generator=drawn)
    whole, parts = Tally(), []
    whole.add(slim, dense, labels)
    for part in torch.arange(60).split([13, 40, 7]):
        tally = Tally()
        tally.add(slim[part], dense[part], labels[part])
        parts.append(tally.to_tensors())
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    base = Tally()
    base.add(dense, dense, labels)
    assert Tally.from_tensors(joined).score(base) == whole.score(base)


def test_the_worst_class_is_the_one_that_loses_most():
    many = FEWEST_OF_CLASS
    labels = torch.tensor([0] * many + [1] * many + [2] * (many - 1))
    dense = torch.ones(len(labels), dtype=torch.bool)
    correct = dense.clone()
    correct[0] = correct[many] = correct[many + 1] = False
    correct[2 * many :] = False  # too few images to say
    worst = find_worst_class(labels, dense, correct)
    assert (worst.label, worst.images, worst.dense) == (1, many, 1.0)
    assert worst.accuracy == pytest.approx(1 - 2 / many)
    assert find_worst_class(labels[:3], dense[:3], correct[:3]) is None


def test_lost_and_won_make_the_change():
    dense = torch.tensor([[2.0, 0], [2, 0], [0, 2], [0, 2]])
    slim = torch.tensor([[2.0, 0], [0, 2], [2, 0], [0, 2]])
    labels = torch.tensor([0, 0, 0, 1])
    tallies = [Tally(), Tally()]
    for tally, logits in zip(tallies, (dense, slim), strict=True):
        tally.add(logits, dense, labels)
    score = tallies[1].score(tallies[0])
    assert (score.lost.value, score.won.value, score.change.value) == (0.25, 0.25, 0.0)


def test_the_command_runs_and_goes_on(tmp_path, capsys):
    argv = ["bench", "digits", "--methods", "topk", "--budgets", "0.5", "--limit", "8"]
    argv += ["--rounds", "0", "--threads", "1", "--out", str(tmp_path / "out")]
    assert main(argv) == 0
    shown = capsys.readouterr().out
    assert "topk 0.5" in shown
    assert "2 cells measured. Saved to" in shown
    assert main([*argv, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["measured"] == 0


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["deit_tiny_patch16_224", "--out", "x"], "random weights|Give --data"),
        (["digits", "digits2", "--weights", "w.safetensors", "--out", "x"], "of one model"),
        (["digits", "--methods", "tom", "--out", "x"], "tome"),
        (["digits", "--methods", "a,,b", "--out", "x"], "not a list"),
        (["digits"], "--out"),
    ],
)
def test_wrong_words_are_told(argv, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        code = main(["bench", *argv])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert re.search(said, capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_two_processes_of_ray_find_the_same_to_the_last_digit(host, images, tmp_path):
    pytest.importorskip("ray")
    said = []
    asked = {"methods": ["topk", "tome", "ats", "dynamicvit"], "rounds": 0}
    alone = run(host, images, tmp_path / "a", **asked)
    found = run(host, images, tmp_path / "b", **asked, workers=2, progress=said.append)
    assert found.rows == alone.rows
    assert [*found.refused.values()] == [*alone.refused.values()]
    assert "answered by 2 processes: 5 of 5" in said
    names = [{file.name for file in (tmp_path / each / "answers").iterdir()} for each in "ab"]
    assert names[0] == names[1]
    again = run(host, images, tmp_path / "b", **asked, workers=2)
    assert again.measured == 0


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_exported_models_are_scored_and_timed_beside_their_dense_file(
    host, images, tmp_path, precision
):
    pytest.importorskip("openvino")
    found = run(
        host, images, tmp_path, methods=["topk", "ats"], runtimes=["openvino", "onnx"],
        precisions=[precision], batches=[1, 2],
    )  # fmt: skip
    refused = {cell.variant.runtime for cell in found.refused}
    assert refused == ({"onnx"} if precision == "bfloat16" else set())
    eager = run(host, images, tmp_path, methods=["topk", "ats"], rounds=0)
    tolerance = 1e-6 if precision == "float32" else 0.05
    wanted = {row.name: row.kl.value for row in eager.rows}
    for row in found.rows:
        kl = wanted[row.name.partition(" (")[0]]
        assert row.kl.value == pytest.approx(kl, abs=tolerance), row.name


def test_models_that_were_slimmed_before_are_compared_with_the_others(host, images, tmp_path):
    mine = patchslim.slim(copy.deepcopy(host), "topk", macs=0.6).train()
    with torch.no_grad():
        mine.host.head.bias += 0.5  # as training would
    found = run(host, images, tmp_path, methods={"mine": mine, "tome": "tome"})
    assert [row.name for row in found.rows] == [
        "dense",
        "mine",
        "random/mine",
        "tome 0.7",
        "random/tome 0.7",
    ]
    row = found.rows[1]
    with torch.no_grad():
        kl = [
            torch.nn.functional.kl_div(
                mine.eval()(batch).log_softmax(1),
                host(batch).log_softmax(1),
                log_target=True,
                reduction="none",
            ).sum(1)
            for batch, _ in images
        ]
    assert row.kl.value == pytest.approx(torch.cat(kl).mean().item(), rel=1e-3)
    assert mine.macs().total == row.macs
    assert run(host, images, tmp_path, methods={"mine": mine}).measured == 0
    with torch.no_grad():
        mine.host.head.bias += 0.5
    assert run(host, images, tmp_path, methods={"mine": mine}).measured == 1


def test_slimmed_models_need_a_name_and_one_dense_model(host, images, tmp_path):
    mine = patchslim.slim(host, "topk", macs=0.6)
    with pytest.raises(BadSetting, match="give a mapping"):
        run(host, images, tmp_path, methods=[mine])
    with pytest.raises(BadSetting, match="give that one alone"):
        run({"a": host, "b": host}, images, tmp_path, methods={"mine": mine})


@pytest.mark.slow
def test_a_saved_model_is_compared_on_the_command_line(tmp_path, capsys):
    patchslim.slim(find_host("digits"), "topk", macs=0.6).save(tmp_path / "mine")
    asked = ["bench", "digits", "--methods", f"{tmp_path / 'mine'},topk", "--limit", "8"]
    assert main([*asked, "--budgets", "0.6", "--rounds", "0", "--out", str(tmp_path / "out")]) == 0
    table = capsys.readouterr().out
    assert "mine" in table
    rows = json.loads((tmp_path / "out/report.json").read_text())["rows"]
    assert rows[1]["kl"] == rows[3]["kl"]  # the same model, by the name of its method
