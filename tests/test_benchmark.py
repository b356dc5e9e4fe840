"""`benchmark`: one process a file, rounds that take turns, and what is said of them."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch

import patchslim
from patchslim.benchmarking import benchmark as verb
from patchslim.benchmarking.child import Opened, peak_memory, serve, time_calls
from patchslim.benchmarking.result import COLUMNS, Benchmark, BenchmarkRow, Ratio
from patchslim.benchmarking.worker import Worker
from patchslim.cli.main import main
from patchslim.deployment.nodes import NodeCounts
from patchslim.errors import BadFile, BadSetting, MissingExtra, PatchslimError, WrongInput
from patchslim.report.provenance import Provenance
from patchslim.report.row import Quartiles
from test_export import host, slim

slow = pytest.mark.slow


def save(folder: Path, name: str, method: str = "identity") -> Path:
    made = patchslim.slim(host(), "identity", keep=1.0) if method == "identity" else slim(method)
    made.save(folder / name)
    return folder / name


def row(**other: object) -> BenchmarkRow:
    fields = {
        "file": "a.onnx", "runtime": "onnx", "method": "topk", "precision": "float32",
        "macs": 600, "dense_macs": 1000, "parameters": 5_000_000, "batch": 8, "streams": None,
        "calls": 1, "seconds": (0.1, 0.2, 0.3), "step": Quartiles(200.0, 150.0, 250.0, 3),
        "throughput": Quartiles(40.0, 32.0, 53.0, 3), "speedup": Ratio(1.5, 1.4, 1.6),
        "beside": "d.onnx", "conversion": Ratio(0.9, 0.84, 0.96), "memory": 10_000_000,
        "disk": 20_000_000, "nodes": NodeCounts(99, 12, 10, 4, 30), "idle": 0.001,
    }  # fmt: skip
    return BenchmarkRow(**{**fields, **other})


def found(*rows: BenchmarkRow) -> Benchmark:
    provenance = Provenance.of(
        torch.device("cpu"), "float32", batch=8, image_size=(24, 24), images=0, seed=0, threads=2
    )
    return Benchmark(rows, provenance, 3, 1)


def test_a_benchmark_is_shown_as_table_and_as_csv(tmp_path):
    bare = row(
        runtime="eager", nodes=None, memory=None, speedup=None, conversion=None, parameters=None
    )
    both = found(row(), row(runtime="openvino", precision="int8", streams=4), bare)
    table = both.table()
    assert table.splitlines()[0].split("  ")[0] == COLUMNS[0]
    for text in (
        "10 of 12", "4, 30", "200.00 [150.00 250.00]", "1.50 [1.40 1.60]",
        "openvino int8, 4 streams",
    ):  # fmt: skip
        assert text in table
    lines = [*csv.DictReader(io.StringIO(both.csv()))]
    assert lines[0]["infer_samples_per_sec"] == "40.00"
    assert lines[0]["infer_step_time"] == "200.000"
    assert (lines[0]["infer_batch_size"], lines[0]["infer_img_size"]) == ("8", "24")
    assert (lines[0]["param_count"], lines[0]["infer_gmacs"]) == ("5.00", "6e-07")
    assert lines[2]["speedup"] == lines[2]["attention"] == lines[2]["peak_memory"] == ""
    both.save(tmp_path / "b.json")
    both.save_csv(tmp_path / "b.csv")
    read = json.loads((tmp_path / "b.json").read_text())
    assert read["rows"][0]["nodes"]["fused"] == 10
    assert read["rows"][0]["seconds"] == [0.1, 0.2, 0.3]
    assert (tmp_path / "b.csv").read_text() == both.csv()


def test_a_ratio_has_an_interval():
    assert Ratio.of([2.0] * 9, 0) == Ratio(2.0, 2.0, 2.0)
    values = [1.0 + number / 10 for number in range(11)]
    ratio = Ratio.of(values, 0)
    assert 1.0 < ratio.low < ratio.median == 1.5 < ratio.high < 2.0
    assert ratio == Ratio.of(values, 0)
    assert Ratio.of([3.0], 1) == Ratio(3.0, 3.0, 3.0)


def test_a_call_before_is_not_counted():
    asked = []
    opened = Opened(lambda images: asked.append(len(images)), {}, lambda: None)
    assert time_calls(opened, torch.zeros(2, 1), 1) >= 0
    assert asked == [2, 2]
    time_calls(opened, torch.zeros(3, 1), 4)
    assert asked == [2, 2, 3, 3, 3, 3, 3]


def test_a_child_answers_each_order_with_one_line(tmp_path):
    path, threads = save(tmp_path, "m", "topk"), torch.get_num_threads()
    orders = [
        {"do": "time", "batch": 1, "calls": 1, "seed": 0},
        {"do": "open", "path": str(tmp_path), "threads": threads, "streams": None},
        {"do": "open", "path": str(path), "threads": threads, "streams": None},
        {"do": "time", "batch": 2, "calls": 3, "seed": 0},
        {"do": "look back"},
    ]
    answers = io.StringIO()
    serve(io.StringIO("".join(json.dumps(each) + "\n" for each in orders)), answers)
    early, foreign, facts, timed, looked = map(json.loads, answers.getvalue().splitlines())
    assert early["error"] == "No file was opened."
    assert (foreign["kind"], "was not saved by patchslim" in foreign["error"]) == ("BadFile", True)
    assert (facts["runtime"], facts["method"]) == ("eager", "topk")
    assert facts["input"] == [3, 24, 24]
    assert 0 < facts["macs"] < facts["dense_macs"]
    assert timed["seconds"] > 0
    assert timed["idle"] >= 0
    assert looked["nodes"] is None
    assert looked["peak"] == peak_memory() > 1_000_000


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        ({"files": []}, BadSetting, "no file to benchmark"),
        ({"files": 3}, BadSetting, "files is the int 3"),
        ({"files": ["here", "./here"]}, BadSetting, "is given twice"),
        ({"files": "nowhere"}, BadFile, "nowhere is not there"),
        ({"files": "here", "batch": 0}, BadSetting, "batch=0"),
        ({"files": "here", "rounds": 0}, BadSetting, "rounds=0"),
        ({"files": "here", "threads": "2"}, BadSetting, "threads='2'"),
        ({"files": "here", "threads": 0}, BadSetting, "threads=0"),
        ({"files": "here", "streams": 0}, BadSetting, "streams=0"),
        ({"files": "here", "warmup": 0}, BadSetting, "warmup=0"),
    ],
)
def test_wrong_calls_say_what_is_needed(tmp_path, monkeypatch, call, error, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    with pytest.raises(error, match=says):
        patchslim.benchmark(**call)


@slow
def test_eager_and_runtimes_stand_side_by_side(tmp_path, capsys):
    files = []
    for method in ("identity", "evit"):
        saved = save(tmp_path, method, method)
        model = patchslim.load(saved)
        patchslim.export(model, tmp_path / f"{method}.onnx")
        patchslim.export(model, tmp_path / f"{method}-ov", to="openvino")
        files += [saved, tmp_path / f"{method}.onnx", tmp_path / f"{method}-ov"]
    out, table = tmp_path / "b.json", tmp_path / "b.csv"
    argv = [*map(str, files), *"--batch 2 --threads 1 --rounds 3 --warmup 1 --streams 2".split()]
    assert main(["benchmark", *argv, "--out", str(out), "--csv", str(table)]) == 0
    assert "3 of 3" in capsys.readouterr().out
    read = json.loads(out.read_text())
    rows = read["rows"]
    assert len(rows) == 16  # six files and two with streams, at two batches
    assert len(table.read_text().splitlines()) == 17
    for each in rows:
        assert len(each["seconds"]) == 3
        assert min(each["seconds"]) > 0
        assert each["idle"] < 0.2
        assert each["memory"] is None or each["memory"] > 0
        assert each["disk"] > 10_000
        assert (each["nodes"] is None) == (each["runtime"] == "eager")
        same = each["method"] == "identity"
        assert Path(each["beside"]).name.startswith("identity")
        assert (each["conversion"]["median"] == 1.0) == same
    assert {each["runtime"] for each in rows} == {"eager", "onnx", "openvino"}
    assert [each["streams"] for each in rows].count(2) == 4
    assert rows[0]["speedup"]["median"] == 1.0
    assert {"onnxruntime", "openvino"} <= set(read["provenance"]["versions"])
    assert read["provenance"]["threads"] == 1


@slow
def test_a_fixed_batch_is_timed_alone(tmp_path):
    patchslim.export(slim(), tmp_path / "four.onnx", batch=4)
    found = patchslim.benchmark(tmp_path / "four.onnx", batch=4, rounds=1, warmup=1)
    assert [each.batch for each in found.rows] == [4]
    with pytest.raises(WrongInput, match="takes 4 images in a call, and batches of 1 and 8"):
        patchslim.benchmark(tmp_path / "four.onnx", rounds=1)
    with pytest.raises(BadSetting, match="None of these files has streams"):
        patchslim.benchmark(tmp_path / "four.onnx", batch=4, streams=2)


@slow
def test_files_for_other_images_are_refused(tmp_path):
    import timm

    large = timm.create_model("test_vit", num_classes=5).eval()
    patchslim.slim(large, "identity", keep=1.0).save(tmp_path / "large")
    with pytest.raises(WrongInput, match="Times are compared at one image size"):
        patchslim.benchmark([save(tmp_path, "small"), tmp_path / "large"])


@slow
def test_what_runs_code_is_not_opened(tmp_path):
    patchslim.export(slim(), tmp_path / "m.pt2")
    with pytest.raises(BadFile, match="PyTorch runs code in such a file"):
        patchslim.benchmark(tmp_path / "m.pt2")


@slow
def test_a_missing_runtime_names_its_extra(tmp_path, monkeypatch):
    patchslim.export(slim(), tmp_path / "m.onnx")
    hides = tmp_path / "hides"
    hides.mkdir()
    # The child finds this file before any other of its name, and then no distribution at all.
    (hides / "sitecustomize.py").write_text(
        "import importlib.metadata as m\n"
        "def version(name, found=m.version):\n"
        "    if name == 'onnxruntime':\n"
        "        raise m.PackageNotFoundError(name)\n"
        "    return found(name)\n"
        "m.version = version\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(hides))
    with pytest.raises(MissingExtra, match=r"pip install 'patchslim\[onnx\]'"):
        patchslim.benchmark(tmp_path / "m.onnx")


@slow
@pytest.mark.skipif(os.name == "nt", reason="there are no such signals")
def test_a_process_that_dies_is_told_of_with_its_reason(tmp_path, monkeypatch):
    path = save(tmp_path, "m")
    worker = Worker(path, 1, None)
    worker.open()
    worker._process.send_signal(signal.SIGKILL)
    with pytest.raises(PatchslimError, match=r"ended by SIGKILL \(was there no memory left\?\)"):
        worker.time(1, 1, 0)
    worker.end()
    assert worker._process.returncode == -signal.SIGKILL
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "torch.py").write_text("raise SystemExit('no torch today')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "broken"))
    with pytest.raises(PatchslimError, match=r"ended with exit code 1.* no torch today"):
        patchslim.benchmark(path)


@slow
def test_no_process_is_left_after_an_error(tmp_path, monkeypatch):
    started: list[subprocess.Popen[str]] = []
    make = subprocess.Popen

    def remember(*given, **settings):
        started.append(make(*given, **settings))
        return started[-1]

    monkeypatch.setattr("patchslim.benchmarking.worker.subprocess.Popen", remember)

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(verb, "_check_alike", fail)
    with pytest.raises(KeyboardInterrupt):
        patchslim.benchmark([save(tmp_path, "a"), save(tmp_path, "b", "topk")])
    assert len(started) == 2
    assert all(each.returncode is not None for each in started)
