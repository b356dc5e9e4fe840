"""The worst case: a thousand images made to keep everything, and what each of them costs.

    python benchmarks/worst_case.py --shared ../shared

DeiT-Ti with its ImageNet weights, and each method that lets images keep numbers of their own, under
a cap of 0.8 of the operations. 250 images each of uniform noise, of Gaussian noise of many scales
and frequencies, of flat areas, gradients and checkerboards, and of an attack: gradient ascent on
the image, from pictures and from noise, so that its patches are unlike each other in all that
methods compare and the class token attends to them evenly. Beside them, pictures. Stops where one
image costs more than the cap. Writes benchmarks/results/worst_case.json.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from train_deit_tiny import dense, load_test_images, print_now

import patchslim
from patchslim.data.images import Images
from patchslim.errors import DeepCut
from patchslim.methods import Method, Signals
from patchslim.methods.ats import ATS
from patchslim.methods.duplicates import Duplicates
from patchslim.methods.similarity import Similarity
from patchslim.methods.tome import ToMe
from patchslim.model.model import SlimModel
from patchslim.report.provenance import Provenance
from patchslim.tokens.reduction import Keep, Reduction
from patchslim.tokens.tokens import Tokens

RESULT = Path(__file__).parent / "results" / "worst_case.json"
CAP = 0.8
REAL = 100  # pictures that the others are compared with
BATCH = 25
STEP = 0.1  # by how much the attack first moves each value of the host's images
FAINT = 1e-9
FAR = 1e6
AT_CAP = 0.001  # of the dense model's operations: how near to the cap counts as at it

Goals = list[Tensor]
Range = tuple[Tensor, Tensor]


class Listener(Method):
    """Keeps every patch, and notes in `heard` how unlike each other the patches of a block are."""

    adaptive = True  # decides in every block that it gets, though it removes nothing
    needs_class_token = True

    def __init__(self) -> None:
        super().__init__()
        self.heard: Goals = []

    def choose(self, tokens: Tokens, signals: Signals, keep: int) -> Reduction:  # noqa: ARG002
        """Keeps all `keep` patches."""
        self.heard.append(unlikeness(tokens, signals))
        return Keep(tokens.rows())


def unlikeness(tokens: Tokens, signals: Signals) -> Tensor:
    """Computes what an image must raise to keep its patches, whatever method decides (B,).

    It is the sum of three: the logarithm of the least cost of joining each patch to another; that
    of how far its key is from the nearest other; the entropy of the sampling scores.
    """
    x = tokens.x[:, tokens.prefix :]
    attention = signals.class_attention()
    light = 1 / attention.clamp(min=FAINT)
    both = light.unsqueeze(2) + light.unsqueeze(1)
    joining = _apart(F.layer_norm(x, x.shape[2:])) / x.shape[2] / both
    keys = _apart(F.normalize(signals.keys(), dim=2))
    score = attention
    if signals.v is not None:
        score = score * signals.v[:, :, tokens.prefix :].transpose(1, 2).flatten(2).norm(dim=2)
    score = score / score.sum(dim=1, keepdim=True)
    entropy = -(score * score.clamp(min=FAINT).log()).sum(dim=1)
    nearest = [each.amin(dim=2).clamp(min=FAINT).log().mean(dim=1) for each in (joining, keys)]
    return nearest[0] + nearest[1] + entropy


def _apart(x: Tensor) -> Tensor:
    """Computes the squared distance of each row of x (B, n, C) from each other one (B, n, n).

    A row's distance from itself is FAR, not infinite, and there is no root: gradients stay finite.
    """
    square = x.square().sum(dim=2)
    distance = square.unsqueeze(2) + square.unsqueeze(1) - 2 * x @ x.transpose(1, 2)
    own = torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
    return distance.masked_fill(own, FAR)


def attacked(host: nn.Module, images: Tensor, blocks: Sequence[int], steps: int) -> Tensor:
    """Takes `steps` steps of gradient ascent on the images, on what `blocks` hear.

    Each step moves every pixel up or down by the same, and less from step to step. Values stay
    between the least and the greatest that the images have.
    """
    listener = Listener()
    model = patchslim.slim(host, listener, keep_rate=1.0, at=tuple(blocks))
    least, most = images.amin(), images.amax()
    for step in range(steps):
        listener.heard.clear()
        images = images.detach().requires_grad_()
        with torch.enable_grad():
            model.trace(images, blocks=max(blocks) + 1)
            goal = torch.stack(listener.heard).sum()
        (slope,) = torch.autograd.grad(goal, images)
        moved = images.detach() + STEP * (1 - step / steps) * slope.sign()
        images = moved.clamp(least, most)
    return images.detach()


def uniform(count: int, size: tuple[int, int], dark_light: Range) -> Tensor:
    """Draws every value at random between black and white."""
    dark, light = dark_light
    return dark + (light - dark) * torch.rand(count, len(dark), *size)


def gaussian(count: int, size: tuple[int, int], dark_light: Range) -> Tensor:
    """Draws noise of ten scales, from faint to far beyond white, in blobs of many sizes."""
    channels = len(dark_light[0])
    made = []
    for number in range(count):
        blob = min(2 ** (number % 7), size[0] // 2)
        small = torch.randn(1, channels, *(max(2, side // blob) for side in size))
        scale = 0.02 * 2.0 ** (number // 7 % 10)
        made.append(scale * F.interpolate(small, size, mode=("nearest", "bilinear")[number % 2]))
    return torch.cat(made)


def plain(count: int, size: tuple[int, int], dark_light: Range) -> Tensor:
    """Draws in turn flat areas, gradients in all directions, and checkerboards of all sizes."""
    dark, light = dark_light
    down = torch.linspace(0, 1, size[0]).view(-1, 1)
    right = torch.linspace(0, 1, size[1])
    made = []
    for number in range(count):
        turn = torch.tensor(number * 0.1)
        field = 1 + int(torch.randint(1, 40, ()))
        rows, columns = (torch.arange(side) // field for side in size)
        shapes = (
            torch.zeros(size),
            0.5 + 0.5 * (turn.cos() * (down - 0.5) + turn.sin() * (right - 0.5)),
            ((rows.view(-1, 1) + columns) % 2).to(down.dtype),
        )
        ends = dark + (light - dark) * torch.rand(2, len(dark), 1, 1)
        made.append(ends[0] + (ends[1] - ends[0]) * shapes[number % 3])
    return torch.stack(made)


def shares(model: SlimModel, images: Tensor) -> list[float]:
    """Computes what each image costs, as a share of the dense model's operations."""
    most = model.dense_macs((images.shape[2], images.shape[3])).total
    return [cost.total / most for batch in images.split(BATCH) for cost in model.macs_of(batch)]


def summarize_costs(spent: Sequence[float], cap: float) -> dict[str, float]:
    """Computes mean and maximum, and the share of images that cost nearly the cap."""
    there = sum(share >= cap - AT_CAP for share in spent)
    return {
        "images": len(spent),
        "mean": sum(spent) / len(spent),
        "max": max(spent),
        "at_cap": there / len(spent),
    }


def models(host: nn.Module, cap: float | None) -> dict[str, SlimModel]:
    """Slims by each method, at a threshold with which pictures cost about two thirds (not ATS)."""
    methods: dict[str, Method] = {
        "similarity threshold=0.0004": Similarity(threshold=0.0004),
        "tome threshold=0.9": ToMe(threshold=0.9),
        "ats": ATS(),
        "duplicates tolerance=0.2": Duplicates(tolerance=0.2),
    }
    return {
        name: patchslim.slim(host, method, macs=cap, tail="exact")
        for name, method in methods.items()
    }


def first(images: Images, count: int) -> Tensor:
    """Takes the first `count` images."""
    taken: list[Tensor] = []
    for batch, _ in images:
        taken += batch
        if len(taken) >= count:
            break
    return torch.stack(taken[:count])


def kinds(host: nn.Module, images: Images, count: int, steps: int) -> Iterator[tuple[str, Tensor]]:
    """Makes the pictures, and `count` images of each kind by its name."""
    mean, std = (torch.tensor(each).view(-1, 1, 1) for each in (images.mean, images.std))
    dark_light = (-mean / std, (1 - mean) / std)
    size = images.image_size
    pictures = first(images, max(REAL, count // 2))
    yield "pictures", pictures[:REAL]
    yield "uniform noise", uniform(count, size, dark_light)
    yield "Gaussian noise", gaussian(count, size, dark_light)
    yield "flat, gradients, checkerboards", plain(count, size, dark_light)
    begun = torch.cat([pictures[: count // 2], uniform(count - count // 2, size, dark_light)])
    depth = len(patchslim.find_adapter(host).blocks(host))
    heard = range(depth // 4, depth // 2)  # where the first decisions are made
    done = []
    for batch in begun.split(BATCH):
        done.append(attacked(host, batch, heard, steps))
        print_now(f"attacked {sum(map(len, done))} of {count}")
    moved = torch.cat(done)
    yield "attack on pictures", moved[: count // 2]
    yield "attack on noise", moved[count // 2 :]


def main() -> None:
    """Runs every model on every kind, writes the rows, and stops where a cap was exceeded."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--images", type=int, default=250, help="of each kind")
    parser.add_argument("--steps", type=int, default=6, help="of the attack")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    warnings.simplefilter("ignore", DeepCut)
    torch.manual_seed(0)
    host = dense(options.shared / "data").requires_grad_(False)
    images = load_test_images(host, options.shared / "data")
    capped, free = models(host, CAP), models(host, None)
    rows: list[dict[str, Any]] = []
    for kind, shown in kinds(host, images, options.images, options.steps):
        for name, model in capped.items():
            cap = model.macs().total / model.dense_macs().total
            with torch.inference_mode():
                row = {"method": name, "cap": cap, "kind": kind} | summarize_costs(
                    shares(model, shown), cap
                )
                row["max_without_cap"] = max(shares(free[name], shown[:BATCH]))
            rows.append(row)
            print_now(json.dumps(row))
    provenance = Provenance.now(
        host,
        batch=BATCH,
        image_size=images.image_size,
        images=sum(row["images"] for row in rows) // len(capped),
        seed=0,
    )
    result = {"rows": rows, "free": BATCH, "steps": options.steps, "birth": asdict(provenance)}
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    over = [row for row in rows if row["max"] > row["cap"]]
    if over:
        raise SystemExit(f"Above the cap: {over}")


if __name__ == "__main__":
    main()
