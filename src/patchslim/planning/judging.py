"""The images of a plan: one half to choose with, the other to report on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from patchslim.data.source import Source
from patchslim.errors import BadData
from patchslim.measurement.sample import move_to_host
from patchslim.measurement.score import Batch, check_batch, kl_divergence
from patchslim.model.model import SlimModel
from patchslim.report.row import Estimate

MOST_IMAGES = 512
FEWEST_IMAGES = 4
JUDGED_AT_ONCE = 16


class Verdict(NamedTuple):
    """What changes in a model's answers."""

    kl: Estimate
    agreement: Estimate


class Jury:
    """Images with the dense model's answers to them."""

    def __init__(self, dense: SlimModel, images: Tensor) -> None:
        self.images = [*images.split(JUDGED_AT_ONCE)]
        with torch.inference_mode():
            self.wanted = [_logits(dense, batch) for batch in self.images]

    def judge(self, model: SlimModel) -> Verdict:
        """Compares the answers of a model with the dense ones."""
        divergences, same = [], []
        with torch.inference_mode():
            for batch, wanted in zip(self.images, self.wanted, strict=True):
                got = _logits(model, batch)
                divergences.append(kl_divergence(wanted, got))
                same.append(wanted.argmax(dim=1) == got.argmax(dim=1))
        return Verdict(Estimate.mean(torch.cat(divergences)), Estimate.share(torch.cat(same)))


def read_halves(images: Iterable[Batch], model: SlimModel) -> tuple[Tensor, Tensor]:
    """Reads images without their labels; every second one is to choose with, the rest to report.

    Raises:
        BadData: there are too few images.
    """
    batches = images.sample_batches(MOST_IMAGES) if isinstance(images, Source) else images
    read: list[Tensor] = []
    count = 0
    for number, batch in enumerate(batches):
        if count >= MOST_IMAGES:
            break
        read.append(check_batch(batch, number)[0])
        count += len(read[-1])
    if count < FEWEST_IMAGES:
        raise BadData(
            f"A plan needs images, and {count or 'none'} came: half of them to choose with, half "
            f"to report on. Give at least {FEWEST_IMAGES}, better some hundreds; they need no "
            "labels."
        )
    every = move_to_host(_join(read)[:MOST_IMAGES], model.host)
    return every[::2], every[1::2]


def _join(read: Sequence[Tensor]) -> Tensor:
    sizes = {tuple(each.shape[1:]) for each in read}
    if len(sizes) > 1:
        raise BadData(
            f"The images are of several shapes, {sorted(sizes)}. A plan is for one: resize them."
        )
    return torch.cat([*read])


def _logits(model: SlimModel, images: Tensor) -> Tensor:
    return model.plan.adapter.logits(model(images)).cpu()
