"""Images from folders and archives: order, labels, preprocessing, and unreadable files."""

import copy
import os
import pickle
import shutil
import tarfile
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import transformers
from PIL import Image

import patchslim
from patchslim.data.images import Images
from patchslim.errors import BadData, BadFile
from patchslim.hosts._preprocessing import Preprocessing, find_preprocessing

PLAIN = {
    "image_size": (32, 32),
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "crop_pct": 0.875,
    "interpolation": "bicubic",
}
NAMES = ["ant/1.png", "ant/2.jpg", "bee/1.png", "bee/sub/2.JPEG", "cat/1.webp"]


def make_host(**more):
    settings = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", **settings, **more).eval()


def draw_image(path, seed=0, size=(48, 40), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "val"
    for seed, name in enumerate(NAMES):
        draw_image(path / name, seed)
    (path / "README.txt").write_text("not an image")
    (path / "ant" / ".hidden.png").write_bytes(b"")
    return path


def pack_folder(folder, path, inside=""):
    """Packs the folder as a zip or tar, with its files in reverse order."""
    files = sorted((f for f in folder.rglob("*") if f.is_file()), reverse=True)
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for file in files:
                archive.write(file, inside + file.relative_to(folder).as_posix())
            archive.writestr("__MACOSX/ant/._1.png", b"shadow")
    else:
        mode = "w:gz" if path.suffix == ".gz" else "w"
        with tarfile.open(path, mode) as archive:
            for file in files:
                archive.add(file, inside + file.relative_to(folder).as_posix())
    return path


def read_all(images):
    batches = list(images)
    pixels = torch.cat([each for each, _ in batches])
    labels = [each for _, each in batches]
    return pixels, None if labels[0] is None else torch.cat(labels).tolist()


def test_a_folder_gives_sorted_images_with_labels_of_sorted_folders(folder):
    images = Images(folder, **PLAIN, batch=2)
    assert images.names == NAMES
    assert images.folders == ["ant", "bee", "cat"]
    assert len(images) == 3
    batches = list(images)
    assert [tuple(each.shape) for each, _ in batches] == [(2, 3, 32, 32)] * 2 + [(1, 3, 32, 32)]
    assert torch.cat([labels for _, labels in batches]).tolist() == [0, 0, 1, 1, 2]
    assert batches[0][0].dtype == torch.float32


def test_a_second_pass_gives_the_same(folder):
    images = Images(folder, **PLAIN)
    assert torch.equal(read_all(images)[0], read_all(images)[0])


@pytest.mark.parametrize("name", ["val.zip", "val.tar", "val.tar.gz", "VAL.ZIP"])
@pytest.mark.parametrize("inside", ["", "imagenet/val/"])
def test_archives_give_what_the_folder_gives(folder, tmp_path, name, inside):
    archive = pack_folder(folder, tmp_path / name.replace("VAL.ZIP", "other.zip"), inside)
    if name == "VAL.ZIP":
        archive = archive.rename(tmp_path / name)
    wanted, labels = read_all(Images(folder, **PLAIN))
    got, got_labels = read_all(Images(archive, **PLAIN))
    assert torch.equal(got, wanted)
    assert got_labels == labels


def test_a_flat_folder_has_no_labels(folder, tmp_path):
    for number in range(3):
        shutil.copy(folder / "ant" / "1.png", tmp_path / f"{number}.png")
    images = Images(tmp_path, **PLAIN)
    assert not images.has_labels
    pixels, labels = read_all(images)
    assert (len(pixels), labels) == (3, None)


def test_a_single_image(folder):
    images = Images(folder / "ant" / "1.png", **PLAIN)
    pixels, labels = read_all(images)
    assert (tuple(pixels.shape), labels) == ((1, 3, 32, 32), None)
    assert torch.equal(pixels, read_all(Images(folder, **PLAIN))[0][:1])


def test_a_single_class_folder_stays_a_class(folder, tmp_path):
    shutil.copytree(folder / "cat", tmp_path / "val" / "cat")
    assert Images(tmp_path / "val", **PLAIN).folders == ["cat"]


def test_preprocessing_is_timms(folder):
    cfg = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "crop_pct": 0.9, "crop_mode": "center"}
    model = make_host(pretrained_cfg_overlay={**cfg, "interpolation": "bilinear"})
    config = {**timm.data.resolve_model_data_config(model), "input_size": (3, 32, 32)}
    transform = timm.data.create_transform(**config, is_training=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got, _ = read_all(Images.for_host(model, folder))
    wanted = torch.stack([transform(Image.open(folder / name).convert("RGB")) for name in NAMES])
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "CMYK", "1", "I;16"])
def test_every_kind_of_picture_becomes_three_channels(tmp_path, mode):
    path = tmp_path / ("a.tif" if mode in ("CMYK", "I;16") else "a.png")
    if mode == "I;16":
        Image.fromarray(np.zeros((40, 48), np.uint16)).save(path)
    else:
        draw_image(path, mode=mode)
    assert read_all(Images(path, **PLAIN))[0].shape == (1, 3, 32, 32)


def test_a_grey_host_gets_one_channel(folder):
    model = make_host(in_chans=1, num_classes=3)
    pixels, _ = read_all(Images.for_host(model, folder))
    assert pixels.shape == (5, 1, 32, 32)
    with torch.no_grad():
        assert model(pixels).shape == (5, 3)


def test_limit_is_spread_so_that_classes_stay_balanced(tmp_path):
    for label in "abcd":
        for number in range(10):
            path = tmp_path / label / f"{number}.png"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(b"")
    images = Images(tmp_path, **PLAIN, limit=8)
    assert [name[0] for name in images.names] == list("aabbccdd")
    assert len(Images(tmp_path, **PLAIN, limit=100).names) == 40
    assert Images(tmp_path, **PLAIN, limit=1).folders == list("abcd")
    with pytest.raises(BadData, match=r"limit=0.*1 or more"):
        Images(tmp_path, **PLAIN, limit=0)


def test_classes_file_gives_the_labels(folder, tmp_path):
    listed = tmp_path / "classes.txt"
    listed.write_text("cat\ndog\nant\n\nbee\n\n")
    assert read_all(Images(folder, **PLAIN, classes=listed))[1] == [2, 2, 4, 4, 0]


def test_a_folder_that_is_not_listed_is_named_with_the_nearest(folder, tmp_path):
    listed = tmp_path / "classes.txt"
    listed.write_text("ants\nbee\ncat\n")
    with pytest.raises(BadData, match=r"1 of 3 class folders.*'ant'\. Nearest: ants"):
        Images(folder, **PLAIN, classes=listed)
    with pytest.raises(BadData, match="not a list of class folders"):
        Images(folder, **PLAIN, classes=tmp_path / "nowhere.txt")
    with pytest.raises(BadData, match="has none"):
        Images(folder / "ant", **PLAIN, classes=listed)


def test_labels_that_cannot_be_the_hosts_are_left_out_with_a_warning(folder, tmp_path):
    model = make_host(num_classes=1000)
    with pytest.warns(UserWarning, match="3 class folders and the model 1000 classes.*--classes"):
        images = Images.for_host(model, folder)
    assert read_all(images)[1] is None
    listed = tmp_path / "classes.txt"
    listed.write_text("\n".join(["ant", "bee", "x", "y", "cat"]))
    assert read_all(Images.for_host(model, folder, classes=listed))[1] == [0, 0, 1, 1, 4]
    with pytest.raises(BadData, match="labels up to 4, and the model has 4 classes"):
        Images.for_host(make_host(num_classes=4), folder, classes=listed)


def test_unreadable_images_are_named_and_counted_and_the_rest_is_read(folder, tmp_path):
    path = Path(shutil.copytree(folder, tmp_path / "val"))
    whole = (path / "ant" / "2.jpg").read_bytes()
    (path / "ant" / "2.jpg").write_bytes(whole[: len(whole) // 2])
    (path / "bee" / "0.png").write_bytes(b"this is no image")
    (path / "cat" / "0.png").write_bytes(b"")
    images = Images(path, **PLAIN, batch=2)
    for _ in range(2):
        pixels, labels = read_all(images)
        assert (len(pixels), labels) == (4, [0, 1, 1, 2])
        assert [entry.split(":")[0] for entry in images.unreadable] == [
            "ant/2.jpg", "bee/0.png", "cat/0.png",
        ]  # fmt: skip


def test_a_damaged_member_of_an_archive_is_one_unreadable_image(folder, tmp_path):
    archive = pack_folder(folder, tmp_path / "val.zip")
    with zipfile.ZipFile(archive) as whole:
        at = whole.getinfo("bee/1.png").header_offset + 200
    data = bytearray(archive.read_bytes())
    data[at] ^= 255
    archive.write_bytes(data)
    images = Images(archive, **PLAIN)
    assert len(read_all(images)[0]) == 4
    assert images.unreadable[0].startswith("bee/1.png")


def test_none_readable(tmp_path):
    (tmp_path / "a.png").write_bytes(b"nothing")
    with pytest.raises(BadData, match=r"None of the 1 images.*a\.png"):
        list(Images(tmp_path, **PLAIN))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, r"There is no .*Give a folder"),
        (lambda path: path.mkdir(), r"No images in .*looked for \.jpg.*found nothing"),
        (lambda path: (path.mkdir(), (path / "a.txt").write_text("")), "found 1 other files"),
        (lambda path: path.write_bytes(b"x"), "No images in"),
    ],
)
def test_nothing_to_read(tmp_path, make, message):
    make(tmp_path / "data")
    with pytest.raises(BadData, match=message):
        Images(tmp_path / "data", **PLAIN)


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.gz"])
def test_a_truncated_archive(folder, tmp_path, name):
    archive = pack_folder(folder, tmp_path / name)
    data = archive.read_bytes()
    archive.write_bytes(data[: len(data) // 2])
    with pytest.raises(BadData, match=r"damaged or truncated archive"):
        read_all(Images(archive, **PLAIN))


def test_a_bad_header_in_a_tar_is_not_mistaken_for_its_end(folder, tmp_path):
    archive = pack_folder(folder, tmp_path / "a.tar")
    data = bytearray(archive.read_bytes())
    at = data.index(b"bee/1.png")
    data[at : at + 200] = b"x" * 200
    archive.write_bytes(data)
    with pytest.raises(BadData, match=r"damaged or truncated archive"):
        Images(archive, **PLAIN)


@pytest.mark.parametrize("name", ["", "val.zip", "val.tar", "val.tar.gz"])
def test_any_image_can_be_read_by_its_index_also_from_a_copy(folder, tmp_path, name):
    path = pack_folder(folder, tmp_path / name) if name else folder
    images = Images(path, **PLAIN)
    assert images.count == 5
    assert images.has_random_access == (name != "val.tar.gz")
    for each in (images, pickle.loads(pickle.dumps(images)), copy.deepcopy(images)):
        for place in (4, 0, 2):
            picture = each.load_image(place)
            with Image.open(folder / NAMES[place]) as file:
                assert picture.tobytes() == file.convert("RGB").tobytes()
            assert (each.name_of(place), each.label_of(place)) == (NAMES[place], place // 2)


def test_an_open_archive_is_opened_again_in_a_forked_process(folder, tmp_path):
    images = Images(pack_folder(folder, tmp_path / "val.zip"), **PLAIN)
    before = images.load_image(0).tobytes()
    child = os.fork()
    if child == 0:
        # Both read at once; with one position for both, neither would find its place.
        whole = all(images.load_image(0).tobytes() == before for _ in range(50))
        os._exit(0 if whole else 1)
    for _ in range(50):
        assert images.load_image(0).tobytes() == before
    assert os.waitpid(child, 0)[1] == 0


def test_the_message_about_an_unreadable_image_is_always_the_same(folder, tmp_path):
    (tmp_path / "a.png").write_bytes(b"no image")
    shutil.copy(folder / "ant" / "1.png", tmp_path / "b.png")
    images = Images(tmp_path, **PLAIN)
    read_all(images)
    assert images.unreadable == ["a.png: this is no image that Pillow knows"]


def test_a_slimmed_model_has_its_hosts_preprocessing(folder):
    model = make_host(num_classes=3)
    slimmed = patchslim.slim(model, "tome", r=2)
    assert torch.equal(
        read_all(Images.for_host(slimmed, folder))[0],
        read_all(Images.for_host(model, folder))[0],
    )


# --- what hosts say about preparation


def make_hf_host(path=None):
    settings = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 1}
    config = transformers.ViTConfig(
        **settings, num_attention_heads=2, intermediate_size=32, num_labels=3
    )
    model = transformers.ViTForImageClassification(config)
    if path is None:
        return model
    model.save_pretrained(path)
    return transformers.ViTForImageClassification.from_pretrained(path)


PROCESSORS = {
    "squash": ({"height": 32, "width": 32}, None, 1.0, "squash"),
    "crop": ({"shortest_edge": 40}, {"height": 32, "width": 32}, 0.8, "center"),
    "squash-then-crop": ({"height": 40, "width": 40}, {"height": 32, "width": 32}, 0.8, "squash"),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_a_local_hugging_face_folder_says_how_images_are_prepared(folder, tmp_path, name):
    size, crop, pct, mode = PROCESSORS[name]
    more = {} if crop is None else {"do_center_crop": True, "crop_size": crop}
    processor = transformers.ViTImageProcessor(
        size=size, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4], resample=2, **more
    )
    processor.save_pretrained(tmp_path)
    model = make_hf_host(tmp_path)
    preprocessing = find_preprocessing(model, patchslim.find_adapter(model))
    assert preprocessing == Preprocessing(
        image_size=(32, 32), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4), crop_pct=pct,
        interpolation="bilinear", crop_mode=mode,
    )  # fmt: skip
    pixels, labels = read_all(Images.for_host(model, folder))
    pictures = [Image.open(folder / file).convert("RGB") for file in NAMES]
    theirs = processor(pictures, return_tensors="pt")["pixel_values"]
    assert labels == [0, 0, 1, 1, 2]
    assert (pixels - theirs).abs().mean() < 0.02


def test_a_host_that_does_not_say_is_given_imagenets_with_a_warning(folder):
    with pytest.warns(UserWarning, match="does not say how its images are prepared"):
        images = Images.for_host(make_hf_host(), folder)
    assert images.mean == (0.485, 0.456, 0.406)
    said = Preprocessing(image_size=(32, 32), mean=(0.1, 0.1, 0.1))
    assert Images.for_host(make_hf_host(), folder, prepared=said).mean == (0.1, 0.1, 0.1)


def test_preprocessing_survives_json():
    said = Preprocessing(image_size=(32, 48), crop_mode="squash")
    assert Preprocessing.from_json(said.to_json()) == said
    with pytest.raises(BadFile, match="prepared"):
        Preprocessing.from_json({"speed": 1})


@pytest.mark.slow
def test_real_images_and_weights_give_the_known_accuracy(shared):
    from safetensors.torch import load_file

    model = timm.create_model("deit_tiny_patch16_224").eval()
    model.load_state_dict(load_file(shared / "deit_tiny_patch16_224.safetensors"))
    images = Images.for_host(
        model, shared / "imagenet-sample-500.zip", classes=shared / "imagenet-classes.txt"
    )
    assert images.crop_pct == 0.9
    right = 0
    with torch.inference_mode():
        for pixels, labels in images:
            right += int((model(pixels).argmax(dim=1) == labels).sum())
    assert not images.unreadable
    assert right / len(images.names) == 0.786
