"""Train the embedded digits example, or remake its copy of the handwritten digits.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/train_digits.py --work FOLDER
    python benchmarks/train_digits.py --make-digits

Training has three stages.  The first two use a network of half the final depth: first on the
28 patches nearest the digit, which cost a fifth of a scene, then on 28 near and 36 random ones.
Then every block becomes two blocks that each add half as much, and the last stage trains the
network at its final depth on all patches.  Two linear layers that only training uses tell the
tokens what to know: every patch token inside the digit's box names the digit, says where in
the box it lies and redraws the 8x8 digit (outside, it says "nothing"), and the class token
redraws the digit.  A run that is started again in the same folder is resumed.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import platform
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from safetensors.torch import save
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn import functional

from patchslim.example import digits

GRID = digits.SIDE // digits.PATCH
NEAR = 28
INK = 64
NOTHING = digits.CLASSES
DATA = Path(digits.__file__).parent
CHUNK = 512


@dataclass(frozen=True)
class Stage:
    """Stretch of training with one depth and one number of patches."""

    depth: int
    patches: int
    steps: int

    @property
    def step_cost(self) -> int:
        """Relative cost of one step."""
        return self.depth * (self.patches + 1)


@dataclass(frozen=True)
class Batch:
    """Normalised images, the patches that are read, and all that the loss compares with."""

    images: torch.Tensor
    places: torch.Tensor
    labels: torch.Tensor
    names: torch.Tensor
    offsets: torch.Tensor
    ink: torch.Tensor


@dataclass
class Progress:
    """Steps and cost of the training so far."""

    stage: int = 0
    step: int = 0
    images: int = 0
    seconds: float = 0.0
    runs: list[dict[str, Any]] = field(default_factory=list)


class Learner(nn.Module):
    """Vision transformer with the two linear layers that only training uses."""

    def __init__(self, depth: int) -> None:
        """Makes a learner of the given depth with random weights."""
        super().__init__()
        self.network = digits.untrained_host(depth)
        self.patch_reader = nn.Linear(self.network.embed_dim, NOTHING + 1 + 2 + INK)
        self.redrawer = nn.Linear(self.network.embed_dim, INK)
        table = self.network.pos_embed
        if not isinstance(table, nn.Parameter):
            raise TypeError("the network has no table of positions")
        with torch.no_grad():
            table[0, 1:] = sine_positions(self.network.embed_dim)

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns the digit's scores, its redrawn ink, and what every patch token says."""
        network = self.network
        tokens = final_tokens(network, batch.images, batch.places)
        read, patches = tokens[:, 0], tokens[:, 1:]
        return network.head(read), self.redrawer(read), self.patch_reader(patches)


def final_tokens(
    network: VisionTransformer, images: torch.Tensor, places: torch.Tensor
) -> torch.Tensor:
    """Returns the last normalised tokens if only the patches at ``places`` are read."""
    chosen = places[:, :, None].expand(-1, -1, network.embed_dim)
    tokens = network.patch_embed.proj(images).flatten(2).transpose(1, 2)
    tokens = (tokens + network.pos_embed[:, 1:]).gather(1, chosen)
    first = (network.cls_token + network.pos_embed[:, :1]).expand(len(tokens), 1, -1)
    final: torch.Tensor = network.norm(network.blocks(torch.cat((first, tokens), dim=1)))
    return final


def sine_positions(width: int) -> torch.Tensor:
    """Returns a (patches, width) table of sines of the patches' rows and columns."""
    rates = 1.0 / 100.0 ** (torch.arange(width // 4) / (width // 4))
    angles = torch.arange(GRID)[:, None] * rates
    waves = torch.cat((angles.sin(), angles.cos()), dim=1)
    rows = waves[:, None].expand(GRID, GRID, -1)
    columns = waves[None, :].expand(GRID, GRID, -1)
    # Small beside the patches' content, or the first steps would read little but positions.
    return 0.3 * torch.cat((rows, columns), dim=2).reshape(GRID * GRID, width)


def deepened(learner: Learner) -> Learner:
    """Makes a learner of twice the depth that computes nearly the same function."""
    grown = copy.deepcopy(learner)
    blocks: list[nn.Module] = []
    for block in grown.network.blocks:
        with torch.no_grad():
            for layer in (block.attn.proj, block.mlp.fc2):
                layer.weight.mul_(0.5)
                layer.bias.mul_(0.5)
        blocks += [block, copy.deepcopy(block)]
    grown.network.blocks = nn.Sequential(*blocks)
    return grown


def make_digits() -> None:
    """Writes the compact copy of the digits that scikit-learn ships."""
    from sklearn.datasets import load_digits

    loaded = load_digits()
    target = DATA / "digits.npz"
    np.savez_compressed(
        target, images=loaded.images.astype(np.uint8), labels=loaded.target.astype(np.uint8)
    )
    print(f"{target}: {len(loaded.target)} digits, {target.stat().st_size} bytes")


def write_atomically(target: Path, write: Callable[[Path], object]) -> None:
    """Lets ``write`` fill a file that replaces the target once complete."""
    partial = target.with_suffix(".partial")
    write(partial)
    partial.replace(target)


def _drawn(start: int, seed: int) -> digits.Scenes:
    """Draws one chunk of training scenes."""
    return digits.scenes_at("train", range(start, start + CHUNK), seed)


def drawn_pool(work: Path, count: int, seed: int) -> digits.Scenes:
    """Returns the training scenes, drawn once and kept in the work folder."""
    target = work / f"pool-{seed}-{count}.npz"
    if not target.exists():
        begun = time.monotonic()
        starts = range(0, count, CHUNK)
        with ProcessPoolExecutor(2) as workers:
            chunks = list(workers.map(_drawn, starts, [seed] * len(starts)))
        images = np.concatenate([chunk.images for chunk in chunks])[:count]
        labels = np.concatenate([chunk.labels for chunk in chunks])[:count]
        boxes = np.concatenate([chunk.boxes for chunk in chunks])[:count]
        sources = np.concatenate([chunk.sources for chunk in chunks])[:count]

        def write(partial: Path) -> None:
            with partial.open("wb") as stream:
                np.savez(stream, images=images, labels=labels, boxes=boxes, sources=sources)

        write_atomically(target, write)
        print(f"drew {count} scenes in {time.monotonic() - begun:.0f} s", flush=True)
    with np.load(target) as stored:
        return digits.Scenes(stored["images"], stored["labels"], stored["boxes"], stored["sources"])


def recoloured(images: digits.Bytes, rng: np.random.Generator) -> digits.Bytes:
    """Shuffles the colour channels of images."""
    return np.stack([image[:, :, rng.permutation(3)] for image in images])


def draw_batch(pool: digits.Scenes, stage: Stage, size: int, rng: np.random.Generator) -> Batch:
    """Draws a batch of scenes, each with some or all of its patches."""
    chosen = rng.integers(0, len(pool), size)
    labels, boxes = pool.labels[chosen], pool.boxes[chosen]
    centres = (np.arange(GRID * GRID)[:, None] // (1, GRID) % GRID + 0.5) * digits.PATCH
    middle = 0.5 * (boxes[:, None, :2] + boxes[:, None, 2:])
    half = 0.5 * (boxes[:, None, 2:] - boxes[:, None, :2])
    offsets = (centres - middle) / half
    inside = np.abs(offsets).max(axis=2) < 1.0
    away = np.abs(centres - middle).max(axis=2) + rng.uniform(0.0, 8.0, inside.shape)
    away[inside] -= digits.SIDE
    order = away.argsort(axis=1)
    # After the nearest patches any order is as good: the others are random.
    order[:, NEAR:] = rng.permuted(order[:, NEAR:], axis=1)
    places = np.sort(order[:, : stage.patches], axis=1)
    names = np.where(inside, labels[:, None], NOTHING)
    ink = digits.handwritten_digits()[0][pool.sources[chosen]].reshape(size, INK) / 16.0
    return Batch(
        images=digits.normalise(recoloured(pool.images[chosen], rng)),
        places=torch.from_numpy(places),
        labels=torch.from_numpy(labels),
        names=torch.from_numpy(np.take_along_axis(names, places, 1)),
        offsets=torch.from_numpy(np.take_along_axis(offsets, places[:, :, None], 1)).float(),
        ink=torch.from_numpy(ink).float(),
    )


def learning_rate(peak: float, stages: list[Stage], progress: Progress) -> float:
    """Returns the rate: a cosine over the whole cost, warmed up at the start of each stage."""
    total = sum(stage.steps * stage.step_cost for stage in stages)
    done = sum(stage.steps * stage.step_cost for stage in stages[: progress.stage])
    done += progress.step * stages[progress.stage].step_cost
    warm = min(1.0, (progress.step + 1) / (200 if progress.stage == 0 else 40))
    return peak * warm * 0.5 * (1.0 + math.cos(math.pi * done / total))


def fresh_optimiser(learner: Learner) -> torch.optim.AdamW:
    """Makes AdamW that decays matrices only."""
    matrices = [p for p in learner.parameters() if p.ndim in (2, 4)]
    others = [p for p in learner.parameters() if p.ndim not in (2, 4)]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)


def accuracy(network: VisionTransformer, unseen: digits.Scenes, drop: int = 0) -> float:
    """Returns the share of scenes read right, with ``drop`` random patch tokens removed."""
    generator = torch.Generator().manual_seed(0)
    network.eval()
    right = 0
    with torch.inference_mode():
        for start in range(0, len(unseen), 100):
            images = digits.normalise(unseen.images[start : start + 100])
            order = torch.rand(len(images), GRID * GRID, generator=generator).argsort(dim=1)
            kept = order[:, drop:].sort(dim=1).values
            scores = network.forward_head(final_tokens(network, images, kept))
            right += int((scores.argmax(1).numpy() == unseen.labels[start : start + 100]).sum())
    network.train()
    return right / len(unseen)


def save_checkpoint(
    target: Path, learner: Learner, optimiser: torch.optim.AdamW, progress: Progress
) -> None:
    """Stores all that a later run needs to continue."""
    state = {
        "learner": learner.state_dict(),
        "optimiser": optimiser.state_dict(),
        "progress": asdict(progress),
    }
    write_atomically(target, lambda partial: torch.save(state, partial))


def resumed(target: Path, stages: list[Stage]) -> tuple[Learner, torch.optim.AdamW, Progress]:
    """Reads the state of an earlier run, or of one that has not begun."""
    if not target.exists():
        learner = Learner(stages[0].depth)
        return learner, fresh_optimiser(learner), Progress()
    state = torch.load(target, weights_only=True)
    progress = Progress(**state["progress"])
    learner = Learner(stages[progress.stage].depth)
    learner.load_state_dict(state["learner"])
    optimiser = fresh_optimiser(learner)
    optimiser.load_state_dict(state["optimiser"])
    print(f"resuming at stage {progress.stage}, step {progress.step}", flush=True)
    return learner, optimiser, progress


def learn(
    learner: Learner, optimiser: torch.optim.AdamW, batch: Batch, auxiliary_weight: float
) -> tuple[float, float]:
    """Returns the loss and the training accuracy of one step."""
    scores, redrawn, said = learner(batch)
    loss = functional.cross_entropy(scores, batch.labels, label_smoothing=0.05)
    naming = functional.cross_entropy(said[:, :, : NOTHING + 1].transpose(1, 2), batch.names)
    inside = batch.names < NOTHING
    said_inside = said[inside][:, NOTHING + 1 :]
    where = functional.smooth_l1_loss(said_inside[:, :2], batch.offsets[inside])
    ink_inside = batch.ink[:, None].expand(-1, inside.shape[1], -1)[inside]
    ink = functional.binary_cross_entropy_with_logits(said_inside[:, 2:], ink_inside)
    ink = ink + functional.binary_cross_entropy_with_logits(redrawn, batch.ink)
    total = loss + auxiliary_weight * (naming + where + ink)
    optimiser.zero_grad(set_to_none=True)
    total.backward()
    nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
    optimiser.step()
    return float(loss.detach()), float((scores.argmax(1) == batch.labels).float().mean())


def train(options: argparse.Namespace, stages: list[Stage]) -> tuple[Learner, Progress, float]:
    """Returns the trained learner, what it took, and its last training loss."""
    checkpoint: Path = options.work / "checkpoint.pt"
    torch.manual_seed(options.seed)
    pool = drawn_pool(options.work, options.pool, options.seed)
    unseen = digits.scenes("test", 500, seed=1)
    learner, optimiser, progress = resumed(checkpoint, stages)
    place = {"stage": progress.stage, "step": progress.step}
    progress.runs.append({"command": full_command(options), "from": place})
    begun, loss, right = time.monotonic() - progress.seconds, math.nan, 0.0
    while progress.stage < len(stages):
        stage = stages[progress.stage]
        stage_begun, first_step = time.monotonic(), progress.step
        while progress.step < stage.steps:
            rate = learning_rate(options.lr, stages, progress)
            for group in optimiser.param_groups:
                group["lr"] = rate
            rng = np.random.default_rng((options.seed, 7, progress.stage, progress.step))
            batch = draw_batch(pool, stage, options.batch, rng)
            step_loss, step_right = learn(learner, optimiser, batch, options.auxiliary_weight)
            loss = step_loss if math.isnan(loss) else 0.97 * loss + 0.03 * step_loss
            right = 0.97 * right + 0.03 * step_right
            progress.step += 1
            progress.images += options.batch
            progress.seconds = time.monotonic() - begun
            if progress.step % 50 == 0:
                speed = (progress.step - first_step) / (time.monotonic() - stage_begun)
                print(
                    f"{progress.seconds:6.0f} s  stage {progress.stage} step {progress.step}"
                    f"/{stage.steps}  loss {loss:.3f}  right {right:.3f}  lr {rate:.1e}"
                    f"  {speed * options.batch:.0f} images/s"
                    f"  stage ends in {(stage.steps - progress.step) / speed:.0f} s",
                    flush=True,
                )
            if progress.step % 300 == 0 or progress.step == stage.steps:
                save_checkpoint(checkpoint, learner, optimiser, progress)
                print(f"  500 test scenes: {accuracy(learner.network, unseen):.4f}", flush=True)
        if progress.stage + 1 == len(stages):
            break
        progress.stage, progress.step = progress.stage + 1, 0
        if stages[progress.stage].depth != stage.depth:
            learner = deepened(learner)
            optimiser = fresh_optimiser(learner)
    return learner, progress, loss


def write_results(
    options: argparse.Namespace, stages: list[Stage], learner: Learner, took: Progress, loss: float
) -> None:
    """Stores the weights and the record of how they were made."""
    state = learner.network.state_dict()
    stored = save({name: tensor.to(torch.float16) for name, tensor in state.items()})
    weights = options.out / "digits_vit.safetensors"
    write_atomically(weights, lambda partial: partial.write_bytes(stored))
    network = digits.untrained_host()
    network.load_state_dict({name: tensor.half().float() for name, tensor in state.items()})
    unseen = digits.scenes("test", options.test_scenes, seed=0)
    record: dict[str, Any] = {
        "command": full_command(options),
        "runs": took.runs,
        "seed": options.seed,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "timm": timm.__version__,
            "numpy": np.__version__,
        },
        "threads": torch.get_num_threads(),
        "architecture": digits.ARCHITECTURE,
        "parameters": sum(tensor.numel() for tensor in state.values()),
        "training": {
            "stages": [asdict(stage) for stage in stages],
            "depth_growth": "before the last stage every block becomes two that add half each",
            "batch": options.batch,
            "steps": sum(stage.steps for stage in stages),
            "images_seen": took.images,
            "distinct_scenes": options.pool,
            "recolouring": "random order of the colour channels",
            "optimiser": "AdamW, betas 0.9 and 0.98, weight decay 0.05 on matrices, clip 1.0",
            "peak_learning_rate": options.lr,
            "schedule": "cosine to zero over the cost of all stages, warm-up per stage",
            "auxiliary_loss": "linear layers on the final tokens, discarded after training: "
            "patch tokens in the digit's box name it, say where in the box they lie and redraw "
            "its 8x8 ink, others say nothing; the class token redraws the ink",
            "auxiliary_loss_weight": options.auxiliary_weight,
            "label_smoothing": 0.05,
            "final_loss": round(loss, 4),
            "minutes": round(took.seconds / 60, 1),
            "device": "CPU, float32",
        },
        "test": {
            "scenes": len(unseen),
            "seed": 0,
            "accuracy": accuracy(network, unseen),
            "accuracy_random_half_of_patch_tokens": accuracy(network, unseen, GRID * GRID // 2),
        },
        "weights": {
            "file": weights.name,
            "dtype": "float16",
            "bytes": len(stored),
            "sha256": hashlib.sha256(stored).hexdigest(),
        },
    }
    text = json.dumps(record, indent=2) + "\n"
    write_atomically(options.out / "digits_vit.json", lambda partial: partial.write_text(text))
    print(text)


def full_command(options: argparse.Namespace) -> str:
    """Returns the command line that names every option the weights depend on."""
    words = ["python", "benchmarks/train_digits.py", "--work", "FOLDER"]
    for name in ("seed", "pool", "batch", "lr", "auxiliary_weight", "threads"):
        words += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    return " ".join([*words, "--steps", *map(str, options.steps)])


def parsed() -> argparse.Namespace:
    """Parses the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--make-digits", action="store_true", help="remake digits.npz and stop")
    parser.add_argument("--work", type=Path, help="folder for scenes and checkpoints")
    parser.add_argument("--out", type=Path, default=DATA, help="folder for weights and record")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pool", type=int, default=40960, help="distinct training scenes")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--auxiliary-weight", type=float, default=1.0)
    parser.add_argument(
        "--steps", type=int, nargs=3, default=(2000, 600, 330), help="steps of the three stages"
    )
    parser.add_argument("--test-scenes", type=int, default=3000)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def main() -> None:
    """Does what the command line asks."""
    options = parsed()
    if options.make_digits:
        make_digits()
        return
    if options.work is None:
        raise SystemExit("--work is needed: a folder for scenes and checkpoints")
    options.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    depth = digits.ARCHITECTURE["depth"]
    nearest, mixed, whole = options.steps
    stages = [
        Stage(depth // 2, NEAR, nearest),
        Stage(depth // 2, 64, mixed),
        Stage(depth, GRID * GRID, whole),
    ]
    write_results(options, stages, *train(options, stages))


if __name__ == "__main__":
    main()
