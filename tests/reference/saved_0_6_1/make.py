"""Made the files beside it, with patchslim 0.6.1. It speaks that version's names and stays so.

    PYTHONPATH=<checkout of cda5b67>/src python make.py

Every host has random weights. Two runs are stopped half way: what is here is what a user has on
disk after pressing Ctrl-C.
"""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import patchslim.models.evo_levit  # registers evo_levit_128s with timm
import timm
import torch
import transformers
from safetensors.torch import save_file

from patchslim import Course, Search, calibrate, slim, train

HERE = Path(__file__).resolve().parent
SIZE = {"img_size": 16, "embed_dim": 8, "num_heads": 2, "num_classes": 3}
LEVIT = {"img_size": 64, "embed_dim": (8, 8, 8), "key_dim": 4, "num_heads": 2, "depth": (1, 1, 1)}


class Stop:
    """Interrupts at the first line of progress that begins with these words."""

    def __init__(self, words: str) -> None:
        self.words = words

    def __call__(self, line: str) -> None:
        if line.startswith(self.words):
            raise KeyboardInterrupt


def draw_weights(host: torch.nn.Module) -> torch.nn.Module:
    """Adds noise that matters to the weights, in half precision, so that they are exact."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in host.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_((parameter + 0.3 * noise).half().float())
    return host.eval()


def make_vit(depth: int = 2) -> torch.nn.Module:
    torch.manual_seed(0)
    return draw_weights(
        timm.create_model("vit_tiny_patch16_224", patch_size=4, depth=depth, **SIZE)
    )


def make_eva() -> torch.nn.Module:
    torch.manual_seed(0)
    settings = {**SIZE, "patch_size": 4, "depth": 2}
    return draw_weights(timm.create_model("eva02_tiny_patch14_224", **settings))


def make_levit(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return draw_weights(timm.create_model(name, num_classes=3, **LEVIT))


def make_hf_vit() -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=8,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=16,
        patch_size=4,
        num_labels=3,
    )
    return draw_weights(transformers.ViTForImageClassification(config))


def draw_images(count: int, size: int = 16, seed: int = 2) -> torch.Tensor:
    """Noise, exact in half precision."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, size, size, generator=generator).half().float()


def main() -> None:
    models = {
        "tome": slim(make_vit(depth=3), "tome", macs=0.6),
        "similarity": slim(make_vit(), "similarity", keep=[14, 6]),
        "dynamicvit": slim(make_vit(), "dynamicvit", keep_rate=0.7, at=(1,)),
        "eva": slim(make_eva(), "evit", keep_rate=0.7, at=(1,)),
        "evo_levit": slim(make_levit("evo_levit_128s"), "evo", keep_rate=0.5, at=(2,)),
        "hf": slim(make_hf_vit(), "evit", keep_rate=0.7, at=(1, 2)),
    }
    answers: dict[str, torch.Tensor] = {}

    def note_logits(name: str, folder: Path) -> None:
        """Saves the logits of the saved model in double precision, where no machine rounds."""
        model = patchslim.load(folder).double()
        size = 64 if "levit" in name else 16
        with torch.inference_mode():
            out = model(draw_images(4, size).double())
        answers[name] = getattr(out, "logits", out).clone()

    for name, model in models.items():
        model.save(HERE / "models" / name)
        note_logits(name, HERE / "models" / name)

    shown = [(draw_images(8, seed=3), torch.tensor([0, 1, 2, 0, 1, 2, 0, 1]))]
    course = Course(steps=4, batch=4, lr=1e-3, checkpoint=1, validate=2, workers=0)

    def run_training(out: Path, stop: Stop | None = None) -> None:
        train(models["dynamicvit"], shown, course, out=out, validation=shown, progress=stop)

    def run_calibration(out: Path, stop: Stop | None = None) -> None:
        search = Search(images=8, probe=4, batch=4, lr=1e-3, epochs=1, step=4)
        asked = {"tolerance": 0.05, "search": search}
        calibrate(
            make_vit(depth=3), shown, "patch_slimming_dynamic", **asked, out=out, progress=stop
        )

    runs = {"training": (run_training, "step 3/"), "calibration": (run_calibration, "block 0")}
    for name, (run, words) in runs.items():
        run(HERE / "whole" / name)
        with contextlib.suppress(KeyboardInterrupt):
            run(HERE / name, Stop(words))
        note_logits(name, HERE / "whole" / name / "model")
    shutil.move(HERE / "whole" / "training" / "report.json", HERE / "report.json")
    shutil.rmtree(HERE / "whole")
    save_file(answers, HERE / "logits.safetensors")


if __name__ == "__main__":
    main()
