"""WebDataset shards: patterns, labels, keys, damage, and the same pixels as `Images`."""

import gzip
import io
import json
import pickle
import shutil
import tarfile

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import patchslim
from patchslim.data.images import Images
from patchslim.data.webdataset import Shards, is_shards
from patchslim.errors import BadData
from patchslim.hosts._preprocessing import Preprocessing
from patchslim.training.config import TrainConfig
from patchslim.training.loader import TrainingLoader

PREPARED = Preprocessing(image_size=(32, 32), mean=(0.5,) * 3, std=(0.5,) * 3)
LABELS = [2, 0, 1, 1, 0]


def encode_image(seed, kind="PNG"):
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 48, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def write_tar(path, files):
    """Writes a tar of these files, in this order; a name may come twice."""
    with tarfile.open(path, "w") as tar:
        for name, data in files:
            data = data if isinstance(data, bytes) else str(data).encode()
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def sample_files(places, label="cls"):
    """Makes the files of samples, with their labels."""
    for place in places:
        yield f"{place:04}.png", encode_image(place)
        if label == "cls":
            yield f"{place:04}.cls", LABELS[place]
        elif label == "json":
            yield f"{place:04}.json", json.dumps({"label": LABELS[place], "more": "text"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("shards")
    write_tar(path / "train-000008.tar", sample_files([0, 1]))
    write_tar(path / "train-000009.tar", sample_files([2]))
    write_tar(path / "train-000010.tar", sample_files([3, 4], "json"))
    (path / ".hidden").write_text("")
    return path


@pytest.fixture(scope="module")
def expected_pixels(tmp_path_factory):
    """Reads with `Images` the pixels of the same pictures in files."""
    path = tmp_path_factory.mktemp("files")
    for seed in range(len(LABELS)):
        (path / f"{seed}.png").write_bytes(encode_image(seed))
    return read_all(Images(path, **PREPARED.to_json()))[0]


def make_host(classes=3):
    settings = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", num_classes=classes, **settings).eval()


def read_all(images):
    batches = list(images)
    labels = [each for _, each in batches]
    return torch.cat([each for each, _ in batches]), (
        None if labels[0] is None else torch.cat(labels).tolist()
    )


PATTERNS = {
    "": 5,
    "train-{000008..000010}.tar": 5,
    "train-*.tar": 5,
    "train-000008.tar": 2,
    "train-0000{08..09}.tar": 3,
    "*-00000?.tar": 3,
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_shards_give_what_files_give(folder, expected_pixels, pattern):
    images = Shards(folder / pattern, prepared=PREPARED, batch=2)
    count = PATTERNS[pattern]
    assert images.count == count
    assert images.names[0] == "train-000008.tar/0000.png"
    for _ in range(2):
        pixels, labels = read_all(images)
        assert torch.equal(pixels, expected_pixels[:count])
        assert labels == LABELS[:count]


def test_what_webdataset_writes_is_read(tmp_path, expected_pixels):
    webdataset = pytest.importorskip("webdataset", reason="webdataset is not installed")
    pattern = str(tmp_path / "out-%06d.tar")
    with webdataset.ShardWriter(pattern, maxcount=2, verbose=0) as sink:
        for place, label in enumerate(LABELS):
            sink.write({"__key__": f"sample{place}", "png": encode_image(place), "cls": label})
    assert len(list(tmp_path.iterdir())) == 3
    assert is_shards(tmp_path)
    for path in (tmp_path, tmp_path / "out-{000000..000002}.tar"):
        pixels, labels = read_all(Shards(path, prepared=PREPARED))
        assert torch.equal(pixels, expected_pixels)
        assert labels == LABELS


def test_any_image_can_be_read_by_its_index_in_any_process(folder):
    images = pickle.loads(pickle.dumps(Shards(folder, prepared=PREPARED)))
    assert images.load_image(3).tobytes() == Image.open(io.BytesIO(encode_image(3))).tobytes()
    assert (images.name_of(3), images.label_of(3)) == ("train-000010.tar/0003.png", 1)
    settings = {"batch": 4, "steps": 3, "randaugment": "rand-m9"}
    fed = [
        torch.cat(
            [
                step[0].images
                for step in TrainingLoader(images, TrainConfig(**settings, workers=n)).steps()
            ]
        )
        for n in (0, 1)
    ]
    assert torch.equal(*fed)


def test_extensions_and_keys_are_webdatasets(tmp_path, expected_pixels):
    files = [
        ("a/1.5.png", b"a mask: its extension is 5.png"),
        ("a/0.JPG", encode_image(0, "JPEG")),
        ("b/0.webp", encode_image(1, "WEBP")),
        ("a/0.seg.png", b"a mask"),
        ("a/0.txt", b"a caption"),
        ("README", b""),
        (".hidden/2.jpeg", encode_image(2, "JPEG")),
    ]
    images = Shards(write_tar(tmp_path / "0.tar", files), prepared=PREPARED)
    assert images.names == ["0.tar/a/0.JPG", "0.tar/b/0.webp", "0.tar/.hidden/2.jpeg"]
    assert not images.has_labels
    assert read_all(images)[1] is None


def test_limit_is_spread(folder, expected_pixels):
    pixels, labels = read_all(Shards(folder, prepared=PREPARED, limit=2))
    assert torch.equal(pixels, expected_pixels[[0, 2]])
    assert labels == [2, 1]
    with pytest.raises(BadData, match="limit=0"):
        Shards(folder, prepared=PREPARED, limit=0)


def test_the_same_key_in_two_shards_is_two_samples(tmp_path):
    for name in "ab":
        write_tar(tmp_path / f"{name}.tar", sample_files([0]))
    assert Shards(tmp_path, prepared=PREPARED).names == ["a.tar/0000.png", "b.tar/0000.png"]


def test_unreadable_images_are_named_and_left_out(tmp_path, expected_pixels):
    files = dict(sample_files(range(5)))
    files["0001.png"] = encode_image(1)[:300]
    del files["0003.png"]
    images = Shards(write_tar(tmp_path / "0.tar", files.items()), prepared=PREPARED)
    for _ in range(2):
        pixels, labels = read_all(images)
        assert torch.equal(pixels, expected_pixels[[0, 2, 4]])
        assert labels == [2, 1, 0]
        assert images.unreadable[0].startswith("0.tar/0001.png: ")
        assert images.unreadable[1:] == ["0.tar/0003: there is no image beside the label"]


def truncate(path):
    path.write_bytes(path.read_bytes()[:1500])


def break_header(path):
    data = bytearray(path.read_bytes())
    at = data.index(b"0000.cls")
    data[at : at + 200] = b"x" * 200
    path.write_bytes(data)


def compress(path):
    path.write_bytes(gzip.compress(path.read_bytes()))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (truncate, r"0\.tar is a damaged or truncated shard: .*Copy it again"),
        (break_header, r"0\.tar is a damaged or truncated shard: .*bad header"),
        (lambda path: path.write_bytes(b"x" * 2000), "damaged or truncated shard"),
        (compress, r"0\.tar is compressed.*gunzip"),
        (lambda path: write_tar(path, []), "No samples in the 1 shards"),
        (lambda path: write_tar(path, [("0.txt", b"")]), "No samples .* jpg, jpeg, png, webp"),
        (
            lambda path: write_tar(path, [*sample_files([0]), *sample_files([0])]),
            r"two files 0000\.png",
        ),
        (lambda path: write_tar(path, [("0.png", b""), ("0.jpg", b"")]), "two images of that key"),
        (
            lambda path: write_tar(path, [*sample_files([0, 1]), *sample_files([2], None)]),
            r"1 of 3 samples .*no label, such as 0\.tar/0002\.png",
        ),
        (
            lambda path: write_tar(path, [("0.png", b""), ("0.cls", "ant")]),
            r"0\.cls .*b'ant'; a label",
        ),
        (lambda path: write_tar(path, [("0.png", b""), ("0.cls", -1)]), "whole number from 0"),
        (lambda path: write_tar(path, [("0.png", b""), ("0.json", "{")]), r"0\.json .* a label is"),
        (
            lambda path: write_tar(path, [("0.png", b""), ("0.json", '{"label": 1.5}')]),
            "whole number",
        ),
        (
            lambda path: write_tar(path, [("0.png", b""), ("0.json", '{"label": true}')]),
            "whole number",
        ),
        (lambda path: path.unlink(), "No shards at"),
    ],
)
def test_shards_that_are_no_good_are_refused(tmp_path, harm, message):
    harm(write_tar(tmp_path / "0.tar", sample_files([0, 1])))
    with pytest.raises(BadData, match=message):
        Shards(tmp_path, prepared=PREPARED)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("train-{000008..000012}.tar", r"no shard .*train-000011\.tar"),
        ("test-*.tar", "No shards at"),
        ("nowhere.tar", r"no shard .*nowhere\.tar"),
    ],
)
def test_missing_shards_are_named(folder, path, message):
    with pytest.raises(BadData, match=message):
        Shards(folder / path, prepared=PREPARED)


@pytest.mark.parametrize("path", ["https://host/0.tar", "pipe:cat 0.tar", "s3://b/{0..9}.tar"])
def test_an_address_on_another_machine_is_refused(path):
    assert is_shards(path)
    with pytest.raises(BadData, match=r"not on this machine, and nothing is fetched\. Copy"):
        Shards(path, prepared=PREPARED)


def test_only_folders_and_patterns_of_shards_count_as_shards(folder, tmp_path):
    assert is_shards(folder)
    assert is_shards(folder / "train-{000008..000010}.tar")
    assert is_shards(f"{folder}/*.tar")
    classes = tmp_path / "classes"
    classes.mkdir()
    write_tar(classes / "ant.tar", [("ant_1.png", encode_image(0)), ("ant_2.png", encode_image(1))])
    mixed = tmp_path / "mixed"
    shutil.copytree(folder, mixed)
    (mixed / "a.png").write_bytes(encode_image(0))
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "0.tar").write_bytes(b"x" * 600)
    zipped = tmp_path / "zipped"
    zipped.mkdir()
    compress(write_tar(zipped / "0.tar", sample_files([0])))
    answers = {
        path.name: is_shards(path)
        for path in (classes, mixed, damaged, zipped, tmp_path, tmp_path / "no")
    }
    assert [name for name, is_folder_of_shards in answers.items() if is_folder_of_shards] == [
        "zipped"
    ]
    assert not is_shards(folder / "train-000008.tar")


def test_a_host_says_how_they_are_prepared_and_which_labels_it_has(folder, tmp_path):
    slim = patchslim.slim(make_host(), "tome", r=3)
    images = Shards.for_host(slim, folder, batch=2)
    assert images.has_labels
    report = patchslim.measure(slim, images, repeats=0)
    assert report.provenance.images == 5
    assert report.prepared == images.prepared
    assert report.rows[1].accuracy is not None
    assert Shards.for_host(make_host(9), folder).has_labels
    with pytest.warns(UserWarning, match="labels up to 2 and the model 2 classes"):
        assert not Shards.for_host(make_host(2), folder).has_labels
