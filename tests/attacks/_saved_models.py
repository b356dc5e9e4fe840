"""Small saved models, runs and folders to attack: made once, and copied for each attack."""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import transformers
from torch import nn

import patchslim
from attacks.attack import SilentlyWrong
from patchslim.hosts._answers import relative_difference
from patchslim.report.report import Report

REFERENCE = Path(__file__).parents[1] / "reference" / "saved_0_6_1"
MARKER = "code-was-run"  # a file that hostile code makes where it is run
TINY = {
    "embed_dim": 16, "depth": 2, "num_heads": 2, "img_size": 16, "patch_size": 4, "num_classes": 3
}  # fmt: skip
SMALL_HF = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16,
    "image_size": 16, "patch_size": 4, "num_labels": 3,
}  # fmt: skip

SLIMMED: dict[str, Callable[[], patchslim.SlimModel]] = {
    "tome": lambda: patchslim.slim(timm_host(), "tome", r=2),
    "evit": lambda: patchslim.slim(timm_host(), "evit", keep_rate=0.6, at=(1,)),
    "similarity": lambda: patchslim.slim(timm_host(), "similarity", keep=[14, 10]),
    "hf": lambda: patchslim.slim(hf_host(), "topk", keep=0.5),
}


def timm_host(**more: Any) -> nn.Module:
    torch.manual_seed(0)
    host: nn.Module = timm.create_model("vit_tiny_patch16_224", **{**TINY, **more}).eval()
    return host


def hf_host() -> nn.Module:
    torch.manual_seed(0)
    host: nn.Module = transformers.ViTForImageClassification(transformers.ViTConfig(**SMALL_HF))
    return host.eval()


@functools.cache
def workshop() -> Path:
    """One folder for everything that is made once; it is gone when the suite ends."""
    path = Path(tempfile.mkdtemp(prefix="attacked"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)  # forked attacks end without it
    return path


@functools.cache
def saved(kind: str) -> Path:
    """A model that today's version saved."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        SLIMMED[kind]().save(workshop() / kind)
    return workshop() / kind


def old(kind: str) -> Path:
    """A model that 0.6.1 saved, whose recipe has no checksum."""
    return REFERENCE / "models" / kind


@functools.cache
def hf_folder() -> Path:
    """A folder of transformers', with how its images are prepared."""
    path = workshop() / "hf_folder"
    hf_host().save_pretrained(path)
    prepared = {
        "do_resize": True, "size": {"height": 16, "width": 16}, "resample": 2,
        "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
    }  # fmt: skip
    (path / "preprocessor_config.json").write_text(json.dumps(prepared))
    return path


@functools.cache
def report_file() -> Path:
    return REFERENCE / "report.json"


def copied(source: Path, folder: Path) -> Path:
    """A copy of a folder or a file that an attack may spoil."""
    target = folder / "copy"
    if source.is_dir():
        return Path(shutil.copytree(source, target))
    return Path(shutil.copy(source, target))


def read_json(file: Path) -> Any:
    return json.loads(file.read_text())


def images_for(host: nn.Module, adapter: Any) -> torch.Tensor:
    noise = torch.Generator().manual_seed(3)
    dtype = next(host.parameters()).dtype
    return torch.randn((2, *adapter.describe(host).image_shape), generator=noise).to(dtype)


def answers(model: patchslim.SlimModel) -> torch.Tensor:
    """Logits of a slimmed model on two noise images."""
    adapter = model.plan.adapter
    with torch.no_grad():
        return adapter.logits(model(images_for(model.host, adapter))).double()


def dense_answers(model: patchslim.SlimModel) -> torch.Tensor:
    """Logits of its host on the same images."""
    adapter = model.plan.adapter
    with torch.no_grad():
        return adapter.logits(model.host(images_for(model.host, adapter))).double()


@functools.cache
def saved_answers(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a model that nobody spoiled, and of its host."""
    model = patchslim.load(path)
    return answers(model), dense_answers(model)


def require_same(got: torch.Tensor, wanted: torch.Tensor, what: str) -> None:
    if got.shape != wanted.shape or not relative_difference(got, wanted) <= 1e-6:
        raise SilentlyWrong(f"{what}: accepted, and the answers are others")


def forbid_code(run: Callable[[Path], object]) -> Callable[[Path], None]:
    """The attack, and a verdict where code of its files was run, whatever else came of it."""

    def checked(folder: Path) -> None:
        try:
            run(folder)
        finally:
            if (folder / MARKER).exists():
                raise SilentlyWrong("code in the files was run")

    return checked


def open_report(path: Path) -> None:
    """Reads a report and shows it in every form."""
    report = Report.load(path)
    for text in (report.table(), report.markdown(), report.csv(), json.dumps(report.to_json())):
        if not text:
            raise SilentlyWrong("a report without a text")
