"""The Hub's own client, with a cache filled by the test and an address where nobody answers."""

import subprocess
import sys
import textwrap

import pytest
import timm
import torch

import patchslim
from patchslim.errors import BadFile, UnknownName


@pytest.fixture
def slimmed():
    torch.manual_seed(0)
    host = timm.create_model("test_vit", num_classes=3).eval()
    return patchslim.slim(host, "tome", keep=0.5)


def test_save_pretrained_writes_what_load_reads(slimmed, tmp_path):
    slimmed.save_pretrained(tmp_path / "a")
    again = patchslim.load(tmp_path / "a")
    images = torch.randn(2, *slimmed.plan.adapter.describe(slimmed.host).image_shape)
    with torch.no_grad():
        assert torch.equal(again(images), slimmed(images))


def test_a_repository_in_the_clients_cache_is_loaded_offline(slimmed, tmp_path, monkeypatch):
    from huggingface_hub import constants

    commit = "0" * 40
    repository = tmp_path / "hub" / "models--someone--slim"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    slimmed.save(repository / "snapshots" / commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert patchslim.load("hf-hub:someone/slim").counts() == slimmed.counts()
    with pytest.raises(BadFile, match="someone/slim@v1"):
        patchslim.load("hf-hub:someone/slim@v1")
    (repository / "refs" / "v1").write_text(commit)
    assert patchslim.load("hf-hub:someone/slim@v1").counts() == slimmed.counts()
    assert patchslim.load(f"hf-hub:someone/slim@{commit}").counts() == slimmed.counts()


def test_a_setting_that_the_hub_does_not_have_is_named(slimmed):
    with pytest.raises(UnknownName, match="Unknown setting of push_to_hub 'commit_mesage'"):
        slimmed.push_to_hub("someone/slim", commit_mesage="smaller")


@pytest.mark.slow
@pytest.mark.parametrize("target", ["onnx", "openvino"])
def test_an_exported_model_in_a_repository_is_opened(tmp_path, monkeypatch, target):
    """The client keeps files under other names, and its folder holds links to them."""
    from huggingface_hub import constants

    commit = "0" * 40
    repository = tmp_path / "hub" / "models--someone--slim"
    snapshot, blobs = repository / "snapshots" / commit, repository / "blobs"
    for folder in (repository / "refs", snapshot, blobs):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    path = tmp_path / ("m.onnx" if target == "onnx" else "m")
    host = timm.create_model("vit_tiny_patch16_224", img_size=24, patch_size=4, depth=2).eval()
    exported = patchslim.export(patchslim.slim(host, "tome", keep=0.5), path, to=target)
    for number, file in enumerate([path] if path.is_file() else [*path.iterdir()]):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(blobs / str(number))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    images = torch.randn(2, 3, 24, 24)
    again = patchslim.load("hf-hub:someone/slim")
    assert torch.equal(again(images), exported(images))
    (snapshot / "another.onnx").write_text("x")
    if target == "onnx":
        with pytest.raises(BadFile, match="several exported models: another"):
            patchslim.load("hf-hub:someone/slim")


def test_an_empty_repository_is_one_clear_error(tmp_path, monkeypatch):
    from huggingface_hub import constants

    repository = tmp_path / "hub" / "models--someone--slim"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots" / ("0" * 40)).mkdir(parents=True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(BadFile, match=r"was not saved by patchslim: it has no recipe\.json"):
        patchslim.load("hf-hub:someone/slim")


def test_an_unknown_name_is_one_clear_error():
    with pytest.raises(BadFile, match="cannot be fetched from the Hub"):
        patchslim.load("hf-hub:not a name")


@pytest.mark.slow
def test_uploading_where_nobody_answers_is_one_clear_error(slimmed, tmp_path):
    slimmed.save(tmp_path / "a")
    patchslim.export(slimmed, tmp_path / "m.onnx")
    script = f"""
        import patchslim
        for path in ({str(tmp_path / "a")!r}, {str(tmp_path / "m.onnx")!r}):
            try:
                patchslim.load(path).push_to_hub(
                    "someone/slim", commit_message="smaller", revision="v1", token="hf_none"
                )
            except patchslim.PatchslimError as error:
                print(type(error).__name__, error)
    """
    done = _run(textwrap.dedent(script), HF_ENDPOINT="http://127.0.0.1:9", HF_TOKEN="hf_none")
    assert done.stdout.count("BadFile Could not upload to 'someone/slim'") == 2, done.stderr


def _run(script, **environment):
    import os

    extra = {name: str(value) for name, value in environment.items()}
    return subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, **extra},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
