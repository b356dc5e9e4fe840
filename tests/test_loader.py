"""The loader of training: order, resume, processes, workers, augmentation, unreadable images."""

import os
import pickle
import random
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from patchslim.data.images import Images
from patchslim.errors import BadData, BadSetting, WrongInput
from patchslim.hosts._preprocessing import Preprocessing
from patchslim.training.augment import augmentation, make_mixup, temporary_seed
from patchslim.training.config import TrainConfig
from patchslim.training.loader import TrainingLoader

COUNT = 11
PLAIN = Preprocessing(image_size=(16, 16), mean=(0.5,) * 3, std=(0.5,) * 3)
GREY = Preprocessing(image_size=(16, 16), mean=(0.5,), std=(0.5,))
STRONG = {"randaugment": "rand-m9-mstd0.5-inc1", "jitter": 0.4, "erasing": 0.5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("train")
    for number in range(COUNT):
        pixels = np.random.default_rng(number).integers(0, 256, (24, 28, 3), dtype=np.uint8)
        file = path / "ab"[number % 2] / f"{number:02}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(file)
    return path


def images(path, prepared=PLAIN):
    return Images(path, **prepared.to_json())


def make_config(**settings):
    return TrainConfig(**{"batch": 4, "steps": 5, "workers": 0, **settings})


def rows(count=10, batch=4, *, labels=True):
    """Makes batches in memory in which each image is its number."""
    pixels = torch.arange(count).float()[:, None, None, None].expand(count, 3, 2, 2)
    numbers = torch.arange(count)
    cut = range(0, count, batch)
    return [(pixels[a : a + batch], numbers[a : a + batch] if labels else None) for a in cut]


def load_all(loader, start=0):
    """Loads all parts of all steps: names, pixels and labels."""
    parts = [part for step in loader.steps(start) for part in step]
    labels = None if parts[0].labels is None else torch.cat([part.labels for part in parts])
    return (
        [name for part in parts for name in part.names],
        torch.cat([part.images for part in parts]),
        labels,
    )


def same(one, other):
    return one[0] == other[0] and torch.equal(one[1], other[1]) and torch.equal(one[2], other[2])


def test_epochs_run_on_without_gaps_each_in_its_own_order(folder):
    loader = TrainingLoader(images(folder), make_config(steps=11))
    assert (loader.count, loader.total_steps) == (COUNT, 11)
    names = load_all(loader)[0]
    epochs = [names[a : a + COUNT] for a in range(0, 4 * COUNT, COUNT)]
    assert all(sorted(epoch) == sorted(images(folder).names) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert load_all(TrainingLoader(images(folder), make_config(steps=11, seed=1)))[0] != names


def test_the_run_is_as_long_as_the_config_says(folder):
    loader = TrainingLoader(images(folder), make_config(steps=0, epochs=2.0))
    assert loader.total_steps == 6
    assert len(list(loader.steps())) == 6
    assert list(loader.steps(6)) == []


def test_labels_belong_to_their_images(folder):
    names, pixels, labels = load_all(TrainingLoader(images(folder), make_config()))
    assert [name[0] for name in names] == ["ab"[label] for label in labels.tolist()]
    assert pixels.shape == (20, 3, 16, 16)
    assert pixels.dtype == torch.float32


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_workers_change_nothing(folder):
    wanted = load_all(TrainingLoader(images(folder), make_config(**STRONG)))
    for workers in (1, 2):
        loader = TrainingLoader(images(folder), make_config(workers=workers, **STRONG))
        assert same(load_all(loader), wanted)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_resume_at_any_step_changes_nothing(folder, workers):
    names, pixels, _ = load_all(TrainingLoader(images(folder), make_config(**STRONG)))
    for start in (1, 3) if workers else range(5):
        resumed = load_all(
            TrainingLoader(images(folder), make_config(workers=workers, **STRONG)), start
        )
        assert resumed[0] == names[4 * start :]
        assert torch.equal(resumed[1], pixels[4 * start :])


@pytest.mark.parametrize(("world", "accumulate"), [(2, 1), (1, 2), (2, 2), (4, 1)])
def test_processes_and_parts_share_the_same_images(folder, world, accumulate):
    whole = list(TrainingLoader(images(folder), make_config(**STRONG)).steps())
    settings = make_config(accumulate=accumulate, **STRONG)
    loaders = [
        TrainingLoader(images(folder), settings, rank=rank, world=world) for rank in range(world)
    ]
    for (wanted,), *ranks in zip(whole, *(loader.steps() for loader in loaders), strict=True):
        assert all(len(parts) == accumulate for parts in ranks)
        parts = [part for rank in ranks for part in rank]
        assert sum((part.names for part in parts), ()) == wanted.names
        assert torch.equal(torch.cat([part.images for part in parts]), wanted.images)
        assert torch.equal(torch.cat([part.labels for part in parts]), wanted.labels)


def test_the_callers_generators_are_left_alone(folder):
    def numbers():
        return random.random(), np.random.rand(), torch.rand(()).item()  # noqa: NPY002

    def seeded():
        random.seed(3)
        np.random.seed(3)  # noqa: NPY002
        torch.manual_seed(3)

    seeded()
    wanted = [numbers(), numbers()]
    seeded()
    steps = TrainingLoader(images(folder), make_config(**STRONG)).steps()
    next(steps)
    first = numbers()
    next(steps)
    assert [first, numbers()] == wanted


def test_the_same_image_is_changed_otherwise_in_each_epoch(folder):
    names, pixels, _ = load_all(TrainingLoader(images(folder), make_config(steps=6)))
    again = names.index(names[0], 1)
    assert not torch.equal(pixels[0], pixels[again])


def test_memory_does_not_grow_with_the_length_of_the_run():
    loader = TrainingLoader(rows(), make_config(steps=10**9, batch=2))
    assert loader.total_steps == 10**9
    assert len(next(loader.steps(10**8))) == 1


def test_fewer_images_than_a_batch(folder):
    (step,) = TrainingLoader(images(folder), make_config(batch=32, steps=1)).steps()
    assert len(step[0].images) == 32
    assert len(set(step[0].names[:COUNT])) == COUNT


def test_a_batch_that_cannot_be_divided_is_refused_with_the_nearest(folder):
    with pytest.raises(BadSetting, match=r"batch=4 cannot be shared by 3 .*batch=6"):
        TrainingLoader(images(folder), make_config(), world=3)
    with pytest.raises(BadSetting, match=r"mix pairs of images, and a part of a batch has 1"):
        TrainingLoader(images(folder), make_config(mixup=0.8, accumulate=2), world=2)


# --- images that cannot be read


@pytest.fixture
def damaged(folder, tmp_path):
    for file in folder.rglob("*.png"):
        copy = tmp_path / file.relative_to(folder)
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(file.read_bytes())
    (tmp_path / "a" / "02.png").write_bytes(b"no image")
    (tmp_path / "b" / "03.png").write_bytes(b"")
    return tmp_path


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_counted_once_and_the_next_taken(damaged, workers):
    loader = TrainingLoader(images(damaged), make_config(steps=9, workers=workers))
    names, pixels, labels = load_all(loader)
    assert len(pixels) == 36
    assert sorted(line.split(":")[0] for line in loader.unreadable) == ["a/02.png", "b/03.png"]
    assert not {"a/02.png", "b/03.png"} & set(names)
    assert [name[0] for name in names] == ["ab"[label] for label in labels.tolist()]
    assert same(
        load_all(TrainingLoader(images(damaged), make_config(steps=9))), (names, pixels, labels)
    )


def test_other_images_stay_as_they_are(folder, damaged):
    whole, holed = (
        load_all(TrainingLoader(images(folder), make_config())),
        load_all(TrainingLoader(images(damaged), make_config())),
    )
    kept = [place for place, name in enumerate(whole[0]) if name[2:4] not in ("02", "03")]
    assert torch.equal(whole[1][kept], holed[1][kept])


@pytest.mark.parametrize("workers", [0, 1])
def test_none_readable(tmp_path, workers):
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(b"nothing")
    loader = TrainingLoader(images(tmp_path), make_config(workers=workers))
    with pytest.raises(BadData, match=r"^3 images one after the other cannot be read"):
        next(loader.steps())


def test_many_unreadable_in_a_row_end_it(tmp_path):
    for number in range(120):
        (tmp_path / f"{number}.png").write_bytes(b"nothing")
    with pytest.raises(BadData, match=r"^100 images one after the other"):
        next(TrainingLoader(images(tmp_path), make_config()).steps())


# --- archives and processes


def packed(folder, path):
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*.png")):
            archive.write(file, file.relative_to(folder).as_posix())
    return path


def test_an_open_archive_is_not_shared_with_workers(folder, tmp_path):
    source = images(packed(folder, tmp_path / "train.zip"))
    wanted = load_all(TrainingLoader(source, make_config()))  # and now it is open in this process
    both = [
        TrainingLoader(source, make_config(workers=1)).steps(),
        TrainingLoader(source, make_config()).steps(),
    ]
    for from_worker, from_here in zip(*both, strict=True):
        assert torch.equal(from_worker[0].images, from_here[0].images)
    copied = pickle.loads(pickle.dumps(source))
    assert same(load_all(TrainingLoader(copied, make_config())), wanted)


def run_alone(code, tmp_path):
    """Runs code in a process of its own, and returns the words that it prints.

    A worker that is forked from a process whose libraries have threads may wait for ever for a lock
    that one of these threads held. Other tests leave such threads behind.
    """
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(code))
    source = str(Path(__file__).resolve().parents[1] / "src")
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True, text=True, timeout=300, check=True,
        env={**os.environ, "PYTHONPATH": source},
    )  # fmt: skip
    return done.stdout.split()


@pytest.mark.slow
def test_workers_that_are_spawned_see_the_same(folder, tmp_path):
    archive = packed(folder, tmp_path / "train.zip")
    code = f"""
        import multiprocessing, torch
        from patchslim.training.config import TrainConfig
        from patchslim.training.loader import TrainingLoader
        from patchslim.data.images import Images
        if __name__ == "__main__":
            multiprocessing.set_start_method("spawn")
            torch.set_num_threads(1)
            images = Images({str(archive)!r}, **{PLAIN.to_json()!r})
            for workers in (0, 1):
                config = TrainConfig(batch=4, steps=3, workers=workers, **{STRONG!r})
                steps = TrainingLoader(images, config).steps()
                print(sum(float(step[0].images.double().sum()) for step in steps))
    """
    here, there = run_alone(code, tmp_path)
    assert here == there


@pytest.mark.slow
def test_a_worker_that_is_killed_ends_the_run_with_one_error(folder, tmp_path):
    """Killed between two steps, it is not noticed in the caller's code, where PyTorch raises."""
    code = f"""
        import multiprocessing, os, signal, time, torch
        from patchslim.errors import TrainingStopped
        from patchslim.training.config import TrainConfig
        from patchslim.training.loader import TrainingLoader
        from patchslim.data.images import Images

        class Deadly(Images):
            def read_file(self, place):
                if os.getpid() != here:
                    os.kill(os.getpid(), signal.SIGKILL)
                return super().read_file(place)

        def say(steps):
            try:
                for _ in steps:
                    pass
            except TrainingStopped as error:
                print("has died" in str(error) and "workers=0" in str(error))

        if __name__ == "__main__":
            torch.set_num_threads(1)
            here, given = os.getpid(), {PLAIN.to_json()!r}
            config = TrainConfig(batch=4, steps=10**6, workers=1, **{STRONG!r})
            say(TrainingLoader(Deadly({str(folder)!r}, **given), config).steps())
            steps = TrainingLoader(Images({str(folder)!r}, **given), config).steps()
            next(steps)
            (child,) = multiprocessing.active_children()
            os.kill(child.pid, signal.SIGKILL)
            time.sleep(0.5)
            print("quiet")
            say(steps)
    """
    assert run_alone(code, tmp_path) == ["True", "quiet", "True"]


def test_a_compressed_tar_is_refused(folder, tmp_path):
    with tarfile.open(tmp_path / "train.tar.gz", "w:gz") as archive:
        archive.add(folder / "a", "a")
    with pytest.raises(BadData, match=r"compressed tar.*Unpack it once"):
        TrainingLoader(images(tmp_path / "train.tar.gz"), make_config())


# --- batches in memory


def test_rows_in_memory_are_shuffled_the_same_way(folder):
    loader = TrainingLoader(rows(), make_config(workers=2, steps=5))
    names, pixels, labels = load_all(loader)
    assert loader.count == 10
    assert sorted(names[:10]) == sorted(f"image {place}" for place in range(10))
    assert [f"image {int(pixel)}" for pixel in pixels[:, 0, 0, 0]] == names
    assert labels.tolist() == pixels[:, 0, 0, 0].tolist()
    assert names == load_all(TrainingLoader(rows(batch=3), make_config()))[0]
    assert load_all(TrainingLoader(rows(labels=False), make_config()))[2] is None
    assert loader.name(3) == "image 3"
    assert TrainingLoader(images(folder), make_config()).name(0) == "a/00.png"


def test_the_given_rows_are_not_changed():
    batches = rows(4)
    (step,) = TrainingLoader(batches, make_config(steps=1)).steps()
    step[0].images.zero_()
    assert batches[0][0][3].mean() == 3


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (lambda: iter(rows()), WrongInput, r"list_iterator.*list\(it\)"),
        (lambda: (each for each in rows()), WrongInput, "Got a generator"),
        (lambda: torch.zeros(2, 3, 4, 4), WrongInput, "Got a Tensor"),
        (lambda: "images", WrongInput, "Got a str"),
        (lambda: [torch.zeros(2, 3, 4, 4)], WrongInput, r"Batch 0 is a Tensor; .* a pair"),
        (lambda: [*rows(2), (torch.zeros(2, 3, 4, 4), torch.arange(2))], WrongInput, "shape"),
        (lambda: [*rows(2), *rows(2, labels=False)], WrongInput, "Batch 1: give labels"),
        (lambda: [(torch.zeros(2, 3, 4, 4), torch.zeros(3).long())], WrongInput, "give 2 whole"),
        (list, BadData, "no images to train on"),
    ],
)
def test_what_cannot_be_read_again_and_in_any_order_is_refused(given, error, message):
    with pytest.raises(error, match=message):
        TrainingLoader(given(), make_config())


@pytest.mark.parametrize("setting", STRONG)
def test_changes_of_pictures_are_refused_for_prepared_images(setting):
    with pytest.raises(BadSetting, match=f"{setting}=.*prepared already"):
        TrainingLoader(rows(), make_config(**{setting: STRONG[setting]}))


# --- augmentation


def picture(mode="RGB", size=(40, 30)):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def test_without_a_random_crop_the_picture_is_as_it_is_evaluated():
    for mode in ("center", "squash", "border"):
        prepared = Preprocessing(image_size=(16, 20), crop_mode=mode, crop_pct=0.9)
        plain = augmentation(prepared, make_config(crop=1, flip=0))
        assert torch.equal(plain(picture()), prepared.transform()(picture()))
        mirrored = augmentation(prepared, make_config(crop=1, flip=1))
        assert torch.equal(mirrored(picture()), plain(picture()).flip(2))


@pytest.mark.parametrize("prepared", [PLAIN, GREY], ids=["colour", "grey"])
@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "rand-m15-n4-p1", "augmix-m5", "3a"])
def test_policies_of_timm_run_on_colour_and_grey(prepared, policy):
    changed = augmentation(prepared, make_config(randaugment=policy, jitter=0.4, erasing=1.0))
    shown = picture("L" if prepared.is_grey else "RGB")
    for seed in range(12):
        with temporary_seed(seed):
            pixels = changed(shown)
        assert pixels.shape == (len(prepared.mean), 16, 16)
        assert pixels.isfinite().all()


@pytest.mark.parametrize("name", ["crop", "flip", "jitter", "randaugment", "erasing"])
def test_each_setting_changes_something(name):
    still = {"crop": 1, "flip": 0}
    value = {**STRONG, "crop": 0.3, "flip": 1.0, "erasing": 1.0}[name]
    plain = augmentation(PLAIN, make_config(**still))(picture())
    changed = augmentation(PLAIN, make_config(**{**still, name: value}))
    with temporary_seed(1):
        one = changed(picture())
    with temporary_seed(1):
        assert torch.equal(changed(picture()), one)
    assert not torch.equal(one, plain)


def test_colours_change_beside_a_policy_too():
    changed = augmentation(PLAIN, make_config(jitter=0.4, randaugment="rand-m9"))
    assert "ColorJitter" in str(changed)


@pytest.mark.parametrize("policy", ["random", "rand-m9-foo", "rand-x3", "rand-tnothing", "rand-mx"])
def test_an_unknown_policy_is_refused(folder, policy):
    with pytest.raises(BadSetting, match=r"is not a policy of timm.*rand-m9-mstd0\.5-inc1"):
        TrainingLoader(images(folder), make_config(randaugment=policy))


# --- mixing


def test_mixing_is_timms_and_leaves_its_input_alone():
    assert make_mixup(make_config(smoothing=0.1), 3) is None
    for settings in ({"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}):
        mix = make_mixup(make_config(**settings, smoothing=0.1), 3)
        pixels, labels = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 1])
        before = pixels.clone()
        with temporary_seed(5):
            mixed, targets = mix(pixels, labels)
        assert torch.equal(pixels, before)
        assert not torch.equal(mixed, before)
        assert targets.shape == (4, 3)
        assert targets.sum(dim=1).allclose(torch.ones(4))
        with temporary_seed(5):
            assert torch.equal(mix(pixels, labels)[0], mixed)
    with pytest.raises(BadSetting, match="pairs of images"):
        mix(pixels[:3], labels[:3])
