"""Laws of measuring: every number beside dense and random, nothing of the host is left changed."""

import json
from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

import patchslim
from patchslim.errors import BadData, BadFile, UnknownName, UnsupportedModel, WrongInput
from patchslim.measure import latency, measure
from patchslim.memory import peak_memory
from patchslim.reducers.random import Random
from patchslim.report import COLUMNS, Birth, Estimate, Report, Row, Spread
from patchslim.score import divergence

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


def test_dense_comes_first_and_random_stands_beside_each_model(report):
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
    assert report.birth.images == 12
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
    assert report.birth.images == 0


def test_random_is_not_measured_twice_at_the_same_counts(host):
    models = {"topk": patchslim.slim(host, "topk", macs=0.6)}
    models["lots"] = patchslim.slim(host, Random(), macs=0.6)
    report = measure(models, repeats=0)
    assert [row.name for row in report.rows] == ["dense", "topk", "lots"]
    assert report.baseline(report.rows[1]).name == "lots"


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


def broken(place):
    pixels = images(count=4)
    pixels[place, 0, 1, 1] = float("nan")
    return pixels


BAD = {
    "nan": ([(images(), None), (broken(2), None)], WrongInput, "Image 2 of batch 1"),
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


def test_models_that_cannot_be_compared_are_refused(host, tome):
    other = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)
    with pytest.raises(UnsupportedModel, match="another host"):
        measure({"a": tome, "b": patchslim.slim(other, "tome", r=1)})
    with pytest.raises(UnsupportedModel, match="takes slimmed models"):
        measure(host)
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
    assert divergence(dense, slim).tolist() == pytest.approx([0.0, wanted])


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


def test_spread_is_median_and_quartiles():
    assert Spread.of([4.0, 1.0, 3.0, 2.0, 5.0]) == Spread(3.0, 2.0, 4.0, 5)


def test_estimates_have_errors_even_at_the_ends():
    every = Estimate.share(torch.ones(400, dtype=torch.bool))
    assert every.value == 1
    assert 0.001 < every.error < 0.005
    half = Estimate.share(torch.arange(400) % 2 == 0)
    assert half.error == pytest.approx(0.025, rel=0.01)
    assert Estimate.mean(torch.tensor([1.0])).error is None


def test_report_cannot_be_built_without_its_certificate(report):
    with pytest.raises(TypeError, match="birth"):
        Report(rows=report.rows, title="no birth")
    with pytest.raises(TypeError, match="birth certificate"):
        Report(report.rows, None, "no birth")
    with pytest.raises(ValueError, match="dense"):
        replace(report, rows=report.rows[1:])


def test_certificate_says_what_matters(report):
    birth = report.birth
    assert birth.device == "cpu"
    assert birth.processor
    assert birth.threads == torch.get_num_threads()
    assert birth.dtype == "float32"
    assert (birth.batch, birth.image_size, birth.images) == (3, (32, 32), 12)
    assert {"python", "torch", "timm", "patchslim"} <= set(birth.versions)
    assert birth.commit
    assert birth.date.endswith("+00:00")


def test_commit_is_none_without_git(host, monkeypatch):
    monkeypatch.setenv("PATH", "")
    birth = Birth.now(host, batch=1, image_size=(32, 32), images=0, seed=0)
    assert birth.commit == "none"


def test_reports_survive_their_file(report, tmp_path):
    path = tmp_path / "report.json"
    report.save(path)
    report.save(path)
    assert Report.load(path) == report
    assert [each.name for each in tmp_path.iterdir()] == ["report.json"]
    assert Report.from_json(report.to_json()) == report


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
    assert max(len(line) for line in lines[2 : 3 + len(shown.rows)]) == len(rule)
    last = next(line for line in lines if line.startswith("bare"))
    assert last.split()[-8:] == ["-"] * 8
    table = [line for line in shown.markdown().splitlines() if line.startswith("|")]
    assert len(table) == len(shown.rows) + 2
    assert all(line.replace("\\|", "").count("|") == len(COLUMNS) + 1 for line in table)
    for label, value in shown.birth.lines():
        assert f"{label}: {value}" in shown.table()
