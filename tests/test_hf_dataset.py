"""Hugging Face datasets: the same pixels as `Images`, labels, columns, and unreadable rows."""

import csv
import io
import json
import pickle
import shutil
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import patchslim
from patchslim.cli.main import main
from patchslim.data.hf_dataset import Dataset, is_dataset
from patchslim.data.images import Images
from patchslim.errors import BadData, MissingExtra, WrongInput
from patchslim.hosts._preprocessing import Preprocessing
from patchslim.training.config import TrainConfig
from patchslim.training.loader import TrainingLoader

PREPARED = Preprocessing(image_size=(32, 32), mean=(0.5,) * 3, std=(0.5,) * 3)
LABELS = [2, 0, 1, 1, 0]


@pytest.fixture(scope="module")
def hf():
    return pytest.importorskip("datasets", reason="needs patchslim[hf]")


def encode_image(seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 48, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture(scope="module")
def rows(hf):
    features = hf.Features(
        {"image": hf.Image(), "label": hf.ClassLabel(names=["ant", "bee", "cat"])}
    )
    cells = [{"bytes": encode_image(seed), "path": None} for seed in range(len(LABELS))]
    return hf.Dataset.from_dict({"image": cells, "label": LABELS}, features=features)


@pytest.fixture(scope="module")
def saved(hf, rows, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved")
    rows.save_to_disk(path / "one")
    hf.DatasetDict({"train": rows.select([0]), "test": rows}).save_to_disk(path / "several")
    hf.DatasetDict({"test": rows}).save_to_disk(path / "single")
    return path


@pytest.fixture(autouse=True, scope="module")
def quiet(hf):
    hf.disable_progress_bars()
    yield
    hf.enable_progress_bars()


def make_host(classes=3):
    settings = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", num_classes=classes, **settings).eval()


def read_all(images):
    batches = list(images)
    labels = [each for _, each in batches]
    return torch.cat([each for each, _ in batches]), (
        None if labels[0] is None else torch.cat(labels).tolist()
    )


@pytest.fixture(scope="module")
def expected_pixels(tmp_path_factory):
    """Reads with `Images` the pixels of the same pictures in files."""
    path = tmp_path_factory.mktemp("files")
    for seed in range(len(LABELS)):
        (path / f"{seed}.png").write_bytes(encode_image(seed))
    return read_all(Images(path, **PREPARED.to_json()))[0]


@pytest.mark.parametrize("name", ["object", "one", "single", "several/test"])
def test_rows_give_what_files_give(rows, saved, expected_pixels, name):
    source = rows if name == "object" else saved / name
    images = Dataset(source, prepared=PREPARED, batch=2)
    assert len(images) == 3
    assert images.has_labels
    assert [len(pixels) for pixels, _ in images] == [2, 2, 1]
    for _ in range(2):
        pixels, labels = read_all(images)
        assert torch.equal(pixels, expected_pixels)
        assert labels == LABELS


@pytest.mark.parametrize("name", ["object", "one"])
def test_any_row_can_be_read_by_its_index_also_from_a_copy(rows, saved, name):
    images = Dataset(rows if name == "object" else saved / name, prepared=PREPARED, limit=3)
    assert images.count == 3
    for each in (images, pickle.loads(pickle.dumps(images))):
        picture = each.load_image(2)
        with Image.open(io.BytesIO(encode_image(3))) as expected_pixels:
            assert picture.tobytes() == expected_pixels.tobytes()
        assert (each.name_of(2), each.label_of(2)) == ("row 3", 1)
    assert Dataset(rows, prepared=PREPARED, label=None).label_of(2) is None


def test_a_loader_reads_rows_in_other_processes_too(rows):
    images = Dataset(rows, prepared=PREPARED)
    steps = [
        TrainingLoader(images, TrainConfig(batch=4, steps=3, workers=n)).steps() for n in (0, 1)
    ]
    for (here,), (there,) in zip(*steps, strict=True):
        assert torch.equal(here.images, there.images)
        assert [LABELS[int(name[-1])] for name in there.names] == there.labels.tolist()


def test_splits_are_named(hf, saved, rows):
    assert len(read_all(Dataset(saved / "several", prepared=PREPARED, split="test"))[0]) == 5
    both = hf.DatasetDict({"train": rows, "test": rows})
    for source, split in ((saved / "several", None), (both, "val")):
        with pytest.raises(BadData, match=r"splits train, test.*split='test'"):
            Dataset(source, prepared=PREPARED, split=split)
    with pytest.raises(BadData, match="single split"):
        Dataset(rows, prepared=PREPARED, split="test")


def test_limit_is_spread(rows, expected_pixels):
    pixels, labels = read_all(Dataset(rows, prepared=PREPARED, limit=2))
    assert torch.equal(pixels, expected_pixels[[0, 2]])
    assert labels == [2, 1]
    with pytest.raises(BadData, match="limit=0"):
        Dataset(rows, prepared=PREPARED, limit=0)


def test_unreadable_rows_are_named_by_their_place_and_left_out(hf, expected_pixels):
    cells = [{"bytes": encode_image(seed), "path": None} for seed in range(5)]
    cells[1] = {"bytes": encode_image(1)[:300], "path": None}
    cells[3] = None
    cells[4] = {"bytes": None, "path": "/nowhere/4.png"}
    features = hf.Features({"image": hf.Image(), "label": hf.Value("int64")})
    broken = hf.Dataset.from_dict({"image": cells, "label": LABELS}, features=features)
    images = Dataset(broken, prepared=PREPARED)
    for _ in range(2):
        pixels, labels = read_all(images)
        assert torch.equal(pixels, expected_pixels[[0, 2]])
        assert labels == [2, 1]
        assert [line.split(":")[0] for line in images.unreadable] == ["row 1", "row 3", "row 4"]
    fewer = Dataset(broken.select([0, 2, 1, 4, 3]), prepared=PREPARED, limit=2)
    assert len(read_all(fewer)[0]) == 1
    assert [line.split(":")[0] for line in fewer.unreadable] == ["row 2"]
    with pytest.raises(BadData, match=r"None of the 2 images in column 'image' .*row 0"):
        list(Dataset(broken.select([3, 4]), prepared=PREPARED))


def test_columns(rows):
    other = rows.rename_columns({"image": "img", "label": "fine"})
    with pytest.raises(BadData, match=r"no column 'image'; it has img, fine\."):
        Dataset(other, prepared=PREPARED)
    with pytest.raises(BadData, match=r"no column 'label'.*label=None"):
        Dataset(other, prepared=PREPARED, image="img")
    with pytest.raises(BadData, match=r"Column 'label' holds .*, not images"):
        Dataset(rows, prepared=PREPARED, image="label", label=None)
    named = Dataset(other, prepared=PREPARED, image="img", label="fine")
    assert read_all(named)[1] == LABELS
    assert read_all(Dataset(rows, prepared=PREPARED, label=None))[1] is None
    assert read_all(Dataset.for_host(make_host(), other, prepared=PREPARED))[1] == LABELS
    bare = Dataset.for_host(make_host(), rows.remove_columns("label"), prepared=PREPARED)
    assert not bare.has_labels


def test_labels_are_whole_numbers_or_none_are_known(hf, rows):
    words = rows.remove_columns("label").add_column("label", list("abcab"))
    with pytest.raises(BadData, match="class_encode_column"):
        Dataset(words, prepared=PREPARED)
    secret = rows.remove_columns("label").add_column("label", [-1] * 5)
    assert read_all(Dataset(secret, prepared=PREPARED))[1] is None


def test_encoded_bytes_in_a_plain_column(hf, expected_pixels):
    plain = hf.Dataset.from_dict({"image": [encode_image(0), encode_image(1)]})
    plain = plain.cast_column("image", hf.Value("binary"))
    assert torch.equal(
        read_all(Dataset(plain, prepared=PREPARED, label=None))[0], expected_pixels[:2]
    )


def test_a_format_of_the_owner_is_left_alone(rows, expected_pixels):
    shown = rows.with_format("numpy")
    assert torch.equal(read_all(Dataset(shown, prepared=PREPARED))[0], expected_pixels)
    assert shown.format["type"] == "numpy"


def test_labels_that_cannot_be_the_hosts_are_left_out_with_a_warning(rows):
    with pytest.warns(UserWarning, match="3 classes and the model 7"):
        images = Dataset.for_host(make_host(7), rows, prepared=PREPARED)
    assert not images.has_labels


def test_a_slimmed_model_is_measured_on_a_dataset(rows):
    slim = patchslim.slim(make_host(), "tome", r=3)
    images = Dataset.for_host(slim, rows, batch=2)
    lines = []
    report = patchslim.measure(slim, images, repeats=0, progress=lines.append)
    assert report.provenance.images == 5
    assert report.prepared == images.prepared
    assert any("/5 images" in line for line in lines)
    assert report.rows[1].accuracy is not None


def test_a_folder_that_is_no_dataset_is_refused(hf, rows, saved, tmp_path):
    with pytest.raises(BadData, match=r"not a dataset on this machine.*nothing is fetched"):
        Dataset("imagenet-1k", prepared=PREPARED)
    with pytest.raises(WrongInput, match="Got a list"):
        Dataset([1], prepared=PREPARED)
    with pytest.raises(BadData, match="no rows"):
        Dataset(rows.select([]), prepared=PREPARED)
    cut = shutil.copytree(saved / "one", tmp_path / "cut")
    file = next(cut.glob("*.arrow"))
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(BadData, match="damaged or truncated"):
        Dataset(cut, prepared=PREPARED)
    (cut / "state.json").write_text("{")
    with pytest.raises(BadData, match="damaged or truncated"):
        Dataset(cut, prepared=PREPARED)


def test_without_the_library_the_cure_is_named(monkeypatch, saved):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert is_dataset(saved / "one")
    with pytest.raises(MissingExtra, match=r"pip install 'patchslim\[hf\]'"):
        Dataset(saved / "one", prepared=PREPARED)


def test_only_a_saved_dataset_counts_as_one(saved, tmp_path):
    answers = {name: is_dataset(saved / name) for name in ("one", "several", "single", "one/x", "")}
    assert answers == {"one": True, "several": True, "single": True, "one/x": False, "": False}
    assert not is_dataset(tmp_path)


def test_the_command_measures_a_saved_dataset(saved, tmp_path, capsys):
    patchslim.slim(make_host(), "tome", r=3).save(tmp_path / "slim")
    model = str(tmp_path / "slim")
    table = tmp_path / "report.csv"
    options = ["--limit", "4", "--repeats", "0", "--batch", "2", "--csv", str(table), "--json"]
    assert main(["measure", model, "--data", str(saved / "single"), *options]) == 0
    assert json.loads(capsys.readouterr().out)["birth"]["images"] == 4
    lines = list(csv.DictReader(table.read_text().splitlines()))
    assert lines[0]["model"] == "dense"
    assert lines[0]["interpolation"] == "bicubic"
    assert lines[0]["top1"]
    assert main(["measure", model, "--data", str(saved / "several")]) == 2
    assert "splits train, test" in capsys.readouterr().err
    listed = tmp_path / "classes.txt"
    listed.write_text("ant\n")
    command = ["measure", model, "--data", str(saved / "one"), "--classes", str(listed)]
    assert main(command) == 2
    assert "leave --classes out" in capsys.readouterr().err
