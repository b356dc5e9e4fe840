"""The Hub's own client, with a cache filled by the test and an address where nobody answers."""

import subprocess
import sys
import textwrap

import pytest
import timm
import torch

import patchslim
from patchslim.errors import BadFile


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


def test_an_unknown_name_is_one_clear_error():
    with pytest.raises(BadFile, match="cannot be fetched from the Hub"):
        patchslim.load("hf-hub:not a name")


@pytest.mark.slow
def test_uploading_where_nobody_answers_is_one_clear_error(slimmed, tmp_path):
    slimmed.save(tmp_path / "a")
    script = f"""
        import patchslim
        model = patchslim.load({str(tmp_path / "a")!r})
        try:
            model.push_to_hub("someone/slim")
        except patchslim.PatchslimError as error:
            print(type(error).__name__, error)
    """
    done = _run(textwrap.dedent(script), HF_ENDPOINT="http://127.0.0.1:9", HF_TOKEN="hf_none")
    assert done.stdout.startswith("BadFile Could not upload to 'someone/slim'"), done.stderr


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
