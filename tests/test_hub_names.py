"""Names of the Hugging Face Hub, as users type them: an error says what to give instead."""

from __future__ import annotations

import pytest

import patchslim
from patchslim.errors import BadFile, UnsupportedModel
from patchslim.hosts._catalog import find_host

DOWNLOAD = r"hf download google/vit-base --local-dir vit-base`, and give the folder vit-base\."


@pytest.mark.parametrize(
    ("name", "cure"),
    [
        (
            "google/vit-base",
            rf"If it is a name on the Hugging Face Hub.*{DOWNLOAD} Otherwise: A mo",
        ),
        ("hf-hub:google/vit-base", rf"It is a name on the Hugging Face Hub.*{DOWNLOAD}$"),
        ("hf_hub:google/vit-base", rf"It is a name on the Hugging Face Hub.*{DOWNLOAD}$"),
        ("https://huggingface.co/google/vit-base", DOWNLOAD),
        (
            "timm/test_vit.r160_in1k",
            r"give test_vit\.r160_in1k, with --weights FILE, or with --pre",
        ),
        ("hf-hub:timm/test_vit", r"timm builds this model by its name: give test_vit, with"),
        ("timm/test_vti", "hf download timm/test_vti"),
        ("./google/vit-base", r"There is no folder \./google/vit-base\. A model is 'digits'"),
        ("a/b/c", r"There is no folder a/b/c\. A model is 'digits'"),
    ],
)
def test_a_name_on_the_hub_says_what_to_give(name: str, cure: str):
    with pytest.raises(BadFile, match=cure):
        find_host(name)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("test_vit", r"timm\.create_model\('test_vit'\)"),
        ("timm/test_vit", r"timm\.create_model\('hf-hub:timm/test_vit'\)"),
        ("hf-hub:timm/test_vit", r"timm\.create_model\('hf-hub:timm/test_vit'\)"),
        (
            "google/vit-base",
            r"AutoModelForImageClassification\.from_pretrained\('google/vit-base'\)",
        ),
    ],
)
def test_a_name_given_to_slim_says_how_to_build_the_model(name: str, call: str):
    with pytest.raises(UnsupportedModel, match=call):
        patchslim.slim(name, "tome", r=2)  # type: ignore[arg-type]


def test_a_name_given_to_load_says_how_the_hub_is_named():
    with pytest.raises(BadFile, match="hf-hub: before it"):
        patchslim.load("google/vit-base")
