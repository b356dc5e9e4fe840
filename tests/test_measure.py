"""Laws of measuring: dense and random beside every number, and the host is left as it was."""

import csv
import json
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

import patchslim
from patchslim.errors import BadData, BadFile, UnknownName, UnsupportedModel, WrongInput
from patchslim.hosts._preprocessing import Preprocessing
from patchslim.measurement.latency import latency
from patchslim.measurement.measure import measure
from patchslim.measurement.memory import peak_memory
from patchslim.measurement.score import expected_calibration_error, is_in_top5, kl_divergence
from patchslim.methods.random import Random
from patchslim.report.columns import COLUMNS
from patchslim.report.provenance import Provenance
from patchslim.report.report import Report
from patchslim.report.row import Estimate, Quartiles, Row

DEPTH, CLASSES = 4, 5


@pytest.fixture(scope="module")
def host():
    torch.manual_seed(0)
    return VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=DEPTH, num_heads=2, num_classes=CLASSES
    )


@pytest.fixture(scope="module")
def tome(host):
    return patchslim.slim(host, "tome", macs=0.7)


@pytest.fixture(scope="module")
def data():
    torch.manual_seed(1)
    return [(torch.randn(6, 3, 32, 32), torch.randint(0, CLASSES, (6,))) for _ in range(2)]


@pytest.fixture(scope="module")
def report(host, tome, data):
    models = {"tome": tome, "topk": patchslim.slim(host, "topk", macs=0.6)}
    return measure(models, data, batch=3, repeats=3)


def test_dense_comes_first_and_random_follows_each_model(report):
    assert [row.name for row in report.rows] == [
        *("dense", "tome", "random/tome", "topk", "random/topk")
    ]
    for name in ("tome", "topk"):
        row = next(row for row in report.rows if row.name == name)
        other = report.baseline(row)
        assert (other.name, other.tokens) == (f"random/{name}", row.tokens)
        assert other.macs == row.macs
    assert report.baseline(report.dense) is None
    assert report.dense.macs_share == 1
    assert report.dense.conversion == 1


def test_scores_are_those_of_a_plain_loop(host, tome, data, report):
    images = torch.cat([pixels for pixels, _ in data])
    labels = torch.cat([labels for _, labels in data])
    host.eval()
    with torch.no_grad():
        dense, slim = host(images), tome(images)
    host.train()
    row = report.rows[1]
    assert row.accuracy.value == pytest.approx(float((slim.argmax(1) == labels).double().mean()))
    assert row.agreement.value == pytest.approx(
        float((slim.argmax(1) == dense.argmax(1)).double().mean())
    )
    wanted = torch.nn.functional.kl_div(
        slim.double().log_softmax(1), dense.double().softmax(1), reduction="batchmean"
    )
    assert row.kl.value == pytest.approx(float(wanted), rel=1e-4)
    assert report.dense.kl.value == 0
    assert report.dense.agreement.value == 1


def test_top5_and_calibration_are_those_of_a_plain_loop(data):
    torch.manual_seed(3)
    wide = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=7
    )
    slim = patchslim.slim(wide, "tome", r=3)
    report = measure(slim, data, repeats=0, baseline=False)
    images, labels = (torch.cat(each) for each in zip(*data, strict=True))
    wide.eval()
    with torch.no_grad():
        for row, model in zip(report.rows, (wide, slim), strict=True):
            logits = model(images).double()
            near = (logits.topk(5).indices == labels[:, None]).any(dim=1)
            assert row.top5.value == pytest.approx(float(near.double().mean()))
            assert row.top5.value >= row.accuracy.value
            sure, answer = logits.softmax(1).max(1)
            gap = 0.0
            for place in range(15):
                here = (sure > place / 15) & (sure <= (place + 1) / 15)
                if here.any():
                    right = (answer[here] == labels[here]).double()
                    gap += float(here.double().mean() * (right.mean() - sure[here].mean()).abs())
            assert row.ece == pytest.approx(gap, abs=1e-6)


def test_what_needs_labels_or_classes_is_none_without_them(report, tome, data):
    assert all(row.top5 is None for row in report.rows)  # five classes: all are among five
    assert all(0 <= row.ece <= 1 for row in report.rows)
    row = measure(tome, [(pixels, None) for pixels, _ in data], repeats=0).rows[1]
    assert (row.accuracy, row.top5, row.ece, row.throughput) == (None, None, None, None)


def test_throughput_is_of_the_same_times(report):
    for row in report.rows:
        assert row.throughput.repeats == 3
        assert row.throughput.median == pytest.approx(1000 / row.latency.median)
        assert row.throughput.low <= row.throughput.median <= row.throughput.high


def test_parameters_are_counted(host, report):
    whole = sum(each.numel() for each in host.parameters())
    assert {row.parameters for row in report.rows} == {whole}


def test_costs_are_the_models_own(tome, report):
    row = report.rows[1]
    assert row.macs == tome.macs().total
    assert row.tokens == tome.counts()
    assert report.dense.tokens == (17,) * DEPTH
    assert row.conversion == pytest.approx(row.speedup.median * row.macs_share)


def test_host_is_left_as_it_was(host, tome, data):
    host.train()
    host.blocks[1].eval()
    modes = [module.training for module in host.modules()]
    before = {name: value.clone() for name, value in host.state_dict().items()}
    measure(tome, data, repeats=1, batch=2)
    assert [module.training for module in host.modules()] == modes
    assert all(torch.equal(before[name], value) for name, value in host.state_dict().items())
    assert all(parameter.grad is None for parameter in host.parameters())
    host.train()
    host(data[0][0]).sum().backward()
    host.zero_grad(set_to_none=True)


def test_images_may_come_once_and_without_labels(tome, data):
    once = ((pixels, None) for pixels, _ in data)
    report = measure(tome, once, repeats=0)
    assert report.provenance.images == 12
    row = report.rows[1]
    assert row.accuracy is None
    assert row.latency is None
    assert row.agreement is not None
    assert row.kl is not None
    assert report.gain(row) is not None


def test_without_images_there_are_costs_alone(tome):
    report = measure(tome, batch=2, repeats=2, baseline=False)
    assert [row.method for row in report.rows] == ["dense", "tome"]
    row = report.rows[1]
    assert (row.accuracy, row.agreement, row.kl) == (None, None, None)
    assert row.latency.repeats == 2
    assert row.memory > 0
    assert report.provenance.images == 0


def test_random_is_not_measured_twice_at_the_same_counts(host):
    models = {"topk": patchslim.slim(host, "topk", macs=0.6)}
    models["chance"] = patchslim.slim(host, Random(), macs=0.6)
    report = measure(models, repeats=0)
    assert [row.name for row in report.rows] == ["dense", "topk", "chance"]
    assert report.baseline(report.rows[1]).name == "chance"


def test_a_fused_row_counts_for_random_too(host):
    report = measure(patchslim.slim(host, "evit", macs=0.7), repeats=0)
    assert report.baseline(report.rows[1]).tokens == report.rows[1].tokens


def test_same_seed_same_scores(tome, data):
    one, two = (measure(tome, data, repeats=0, seed=3) for _ in range(2))
    assert one.rows == two.rows


def test_progress_comes_line_by_line(tome, data):
    lines = []
    measure(tome, data, repeats=2, batch=2, progress=lines.append)
    assert any(line.startswith("dense: ") and "/12 images" in line for line in lines)
    assert "timing 3 models: round 2/2" in lines
    assert all("\n" not in line for line in lines)


def images(fill=0.0, count=2, side=32):
    return torch.full((count, 3, side, side), fill)


def images_with_nan(index):
    pixels = images(count=4)
    pixels[index, 0, 1, 1] = float("nan")
    return pixels


BAD = {
    "nan": ([(images(), None), (images_with_nan(2), None)], WrongInput, "Image 2 of batch 1"),
    "infinite": ([(images(float("inf")), None)], WrongInput, "Image 0 of batch 0"),
    "size": ([(images(side=40), None)], WrongInput, "40"),
    "size later": ([(images(), None), (images(side=40), None)], WrongInput, "one image size"),
    "type": ([(images().byte(), None)], WrongInput, "float"),
    "none": ([], BadData, "no images"),
    "empty batch": ([(images(count=0), None)], BadData, "holds no images"),
    "tensor": (images(), WrongInput, "batches"),
    "no pair": ([images()], WrongInput, "pair"),
    "no pair later": ([(images(), None), (images(), None, 3)], WrongInput, "pair"),
    "labels on and off": (
        [(images(), torch.tensor([0, 1])), (images(), None)],
        WrongInput,
        "labels with all",
    ),
    "label unknown": ([(images(), torch.tensor([0, CLASSES]))], WrongInput, "classes 0 to 4"),
    "label count": ([(images(), torch.tensor([0]))], WrongInput, "2 whole numbers"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_images_are_refused_by_name(tome, case):
    bad, error, says = BAD[case]
    with pytest.raises(error, match=says):
        measure(tome, bad, repeats=0)


def test_nan_answers_are_refused(host, data):
    sick = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=CLASSES
    )
    slim = patchslim.slim(sick, "tome", r=1)
    torch.nn.init.constant_(sick.head.bias, float("nan"))
    with pytest.raises(WrongInput, match="dense answers image 0 of batch 0 with NaN"):
        measure(slim, data, repeats=0)


@pytest.mark.parametrize("path", ["photos", Path("photos")], ids=["text", "path"])
def test_a_path_in_place_of_images_is_told_how_to_open_it(tome, path):
    with pytest.raises(WrongInput, match=r"Images\.for_host\(model, 'photos'\)"):
        measure(tome, path)


def test_models_that_cannot_be_compared_are_refused(host, tome):
    other = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)
    with pytest.raises(UnsupportedModel, match="another host"):
        measure({"a": tome, "b": patchslim.slim(other, "tome", r=1)})
    with pytest.raises(UnsupportedModel, match="not VisionTransformer: slim it first"):
        measure(host)
    with pytest.raises(UnsupportedModel, match=r"not DataParallel: give model\.module"):
        measure(torch.nn.DataParallel(tome))
    with pytest.raises(UnsupportedModel, match="takes slimmed models; 'a' is a VisionTransformer"):
        measure({"a": host})
    with pytest.raises(UnsupportedModel, match="at least one"):
        measure({})
    with pytest.raises(UnknownName, match="dense"):
        measure({"dense": tome})
    with pytest.raises(WrongInput, match="repeats=-1"):
        measure(tome, repeats=-1)


def test_divergence_by_hand():
    dense = torch.tensor([[0.0, 0.0], [0.0, 0.0]])
    slim = torch.tensor([[0.0, 0.0], [1.0, -1.0]])
    p = torch.tensor([1.0, -1.0], dtype=torch.float64).softmax(0)
    wanted = float((0.5 * (0.5 / p).log()).sum())
    assert kl_divergence(dense, slim).tolist() == pytest.approx([0.0, wanted])


def test_miscalibration_by_hand():
    right = torch.tensor([True, False, True, True])
    sure = torch.tensor([0.9, 0.91, 0.5, 0.2], dtype=torch.float64)
    wanted = (abs(1 - 0.9 - 0.91) + abs(1 - 0.5) + abs(1 - 0.2)) / 4  # 0.9 and 0.91 share a bin
    assert expected_calibration_error(sure, right) == pytest.approx(wanted)
    ends = torch.tensor([0.0, 1.0, 1.0 + 1e-12], dtype=torch.float64)
    assert expected_calibration_error(ends, ends > 0.5) == pytest.approx(0)
    sure = torch.full((100,), 0.75, dtype=torch.float64)
    assert expected_calibration_error(sure, torch.arange(100) < 75) == pytest.approx(0)


def test_equal_logits_are_near_by_class():
    logits = torch.zeros(7, 7)
    assert is_in_top5(logits, torch.arange(7)).tolist() == [True] * 5 + [False] * 2


def test_timing_calls_each_model_once_a_round_in_turning_order():
    calls = []
    models = OrderedDict((name, lambda _, name=name: calls.append(name)) for name in "abc")
    seconds = latency(models, torch.zeros(1), 3, 0)
    assert "".join(calls) == "abcbcacab"
    assert all(len(each) == 3 and min(each) >= 0 for each in seconds.values())
    calls.clear()
    seconds = latency(models, torch.zeros(1), 1, 2)
    assert len(calls) == 9
    assert len(seconds["a"]) == 1


def test_peak_memory_by_hand():
    def call():
        one = torch.ones(1000)  # 4000 bytes
        two = one + one  # 8000
        del one  # 4000
        three = two.repeat(3)  # 16000: the peak
        del two
        return three.sum()

    assert 16_000 <= peak_memory(call) <= 16_100


def test_peak_memory_leaves_out_what_was_there():
    there = torch.ones(100_000)
    assert peak_memory(lambda: there[:10] * 2) < 1000


def test_quartiles_by_hand():
    assert Quartiles.of([4.0, 1.0, 3.0, 2.0, 5.0]) == Quartiles(3.0, 2.0, 4.0, 5)


def test_estimates_have_errors_even_at_the_ends():
    every = Estimate.share(torch.ones(400, dtype=torch.bool))
    assert every.value == 1
    assert 0.001 < every.error < 0.005
    half = Estimate.share(torch.arange(400) % 2 == 0)
    assert half.error == pytest.approx(0.025, rel=0.01)
    assert Estimate.mean(torch.tensor([1.0])).error is None


def test_report_cannot_be_built_without_its_provenance(report):
    with pytest.raises(TypeError, match="provenance"):
        Report(rows=report.rows, title="no provenance")
    with pytest.raises(TypeError, match="provenance"):
        Report(report.rows, None, "no provenance")
    with pytest.raises(ValueError, match="dense"):
        replace(report, rows=report.rows[1:])


def test_provenance_says_what_matters(report):
    provenance = report.provenance
    assert provenance.device == "cpu"
    assert provenance.processor
    assert provenance.threads == torch.get_num_threads()
    assert provenance.dtype == "float32"
    assert (provenance.batch, provenance.image_size, provenance.images) == (3, (32, 32), 12)
    assert {"python", "torch", "timm", "patchslim"} <= set(provenance.versions)
    assert provenance.commit
    assert provenance.date.endswith("+00:00")


def test_commit_is_none_without_git(host, monkeypatch):
    monkeypatch.setenv("PATH", "")
    provenance = Provenance.now(host, batch=1, image_size=(32, 32), images=0, seed=0)
    assert provenance.commit == "none"


def test_reports_survive_their_file(report, tmp_path):
    path = tmp_path / "report.json"
    report.save(path)
    report.save(path)
    assert Report.load(path) == report
    assert [each.name for each in tmp_path.iterdir()] == ["report.json"]
    assert Report.from_json(report.to_json()) == report


def test_reports_from_before_top5_load(report):
    data = report.to_json()
    del data["prepared"]
    for row in data["rows"]:
        for name in ("parameters", "top5", "ece", "throughput"):
            del row[name]
    old = Report.from_json(data)
    assert [row.name for row in old.rows] == [row.name for row in report.rows]
    assert old.rows[1].latency == report.rows[1].latency
    assert {(row.top5, row.ece, row.throughput, row.parameters) for row in old.rows} == {
        (None, None, None, None)
    }
    assert len(old.table().splitlines()) == len(report.table().splitlines())
    assert next(csv.DictReader(old.csv().splitlines()))["infer_samples_per_sec"] == ""


TIMMS = "model,top1,top1_err,top5,top5_err,param_count,img_size,crop_pct,interpolation"
SPEEDS = "infer_samples_per_sec,infer_step_time,infer_batch_size,infer_img_size,infer_gmacs"
OURS = (
    "agreement,kl,ece,macs_share,speedup,conversion,peak_memory,lost,won,runtime,precision,tokens"
)


def test_csv_has_timms_columns_and_units(report):
    prepared = Preprocessing(image_size=(32, 32), crop_pct=0.9)
    row = replace(
        report.rows[1], name='tome, "0.7"', accuracy=Estimate(0.75, 0.1), top5=Estimate(0.9, 0.1),
        latency=Quartiles(2.0, 1.0, 3.0, 5), throughput=Quartiles(500.0, 1.0, 3.0, 5),
        macs=4_599_123_456,
        parameters=22_050_664, kl=Estimate(0.0123456, 0.1), ece=0.04321, macs_share=0.7,
        agreement=Estimate(0.5, None), speedup=Quartiles(1.25, 1, 2, 5), conversion=0.875,
        memory=1234, tokens=(9, 5),
    )  # fmt: skip
    text = replace(report, rows=(report.dense, row), prepared=prepared).csv()
    assert text.splitlines()[0] == f"{TIMMS},{SPEEDS},{OURS}"
    assert text.splitlines()[2] == (
        '"tome, ""0.7""",75.000,25.000,90.000,10.000,22.05,32,0.900,bicubic,'
        "500.00,6.000,3,32,4.599,50.000,0.01235,0.0432,0.7000,1.250,0.875,1234,0.000,0.000,,,9 5"
    )


def test_csv_is_empty_where_nothing_was_measured(report, tome, tmp_path):
    bare = measure(tome, repeats=0, baseline=False)
    bare.save_csv(tmp_path / "report.csv")
    bare.save_csv(tmp_path / "report.csv")
    assert [each.name for each in tmp_path.iterdir()] == ["report.csv"]
    rows = list(csv.DictReader((tmp_path / "report.csv").read_text().splitlines()))
    assert [row["model"] for row in rows] == ["dense", bare.rows[1].name]
    empty = {name for name, cell in rows[1].items() if not cell}
    assert empty == {
        *("top1", "top1_err", "top5", "top5_err", "crop_pct", "interpolation"),
        *("infer_samples_per_sec", "infer_step_time", "agreement", "kl", "ece"),
        *("speedup", "conversion", "lost", "won", "runtime", "precision"),
    }
    assert len(list(csv.DictReader(report.csv().splitlines()))) == len(report.rows)


def test_csv_gives_both_sides_where_they_differ(report):
    provenance = replace(report.provenance, image_size=(32, 48))
    row = next(csv.DictReader(replace(report, provenance=provenance).csv().splitlines()))
    assert (row["img_size"], row["infer_img_size"]) == ("32x48", "32x48")


def test_a_report_says_how_images_were_prepared(tome, data, tmp_path):
    class Prepared(list):
        prepared = Preprocessing(image_size=(32, 32), crop_pct=0.95)

    report = measure(tome, Prepared(data), repeats=0, baseline=False)
    assert report.prepared == Prepared.prepared
    report.save(tmp_path / "report.json")
    assert Report.load(tmp_path / "report.json") == report
    assert next(csv.DictReader(report.csv().splitlines()))["crop_pct"] == "0.950"


def test_broken_files_are_refused(report, tmp_path):
    path = tmp_path / "report.json"
    with pytest.raises(BadFile, match="not a saved report"):
        Report.load(path)
    text = json.dumps(report.to_json())
    for content in (text[:100], "[]", "{}", text.replace('"format": 1', '"format": 2')):
        path.write_text(content)
        with pytest.raises(BadFile):
            Report.load(path)
    for gone in ("birth", "rows", "title"):
        data = report.to_json()
        del data[gone]
        with pytest.raises(BadFile, match="not a whole report"):
            Report.from_json(data)


def test_an_interrupted_save_leaves_the_old_file(report, tmp_path):
    path = tmp_path / "report.json"
    report.save(path)
    before = path.read_text()
    row = replace(report.rows[1], conversion=float("nan"))
    with pytest.raises(ValueError, match="JSON"):
        replace(report, rows=(report.rows[0], row)).save(path)
    assert path.read_text() == before
    assert [each.name for each in tmp_path.iterdir()] == ["report.json"]


def test_tables_align_and_show_what_is_missing(report):
    bare = Row(name="bare | x", method="tome", tokens=(9,), macs=10, macs_share=0.5)
    shown = replace(report, rows=(*report.rows, bare))
    lines = shown.table().splitlines()
    rule = next(line for line in lines if line and set(line) == {"-"})
    assert max(len(line) for line in lines[2 : 3 + len(shown.rows)]) == len(rule) <= 100
    last = next(line for line in lines if line.startswith("bare"))
    assert last.split()[-4:] == ["-"] * 4
    table = [line for line in shown.markdown().splitlines() if line.startswith("|")]
    assert len(table) == len(shown.rows) + 2
    assert all(line.replace("\\|", "").count("|") == len(COLUMNS) + 1 for line in table)
    for label, value in shown.provenance.lines():
        assert f"{label}: {value}" in shown.table().replace("\n  ", " ")
