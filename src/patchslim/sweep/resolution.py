"""The dense model on smaller images: what anybody can do without this library, as a baseline."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from patchslim.errors import ImpossibleBudget, UnsupportedModel
from patchslim.measurement.rows import Costs
from patchslim.model.model import SlimModel
from patchslim.model.slim import untouched_model
from patchslim.sweep.backend import Opened

RESOLUTION = "resolution"  # the name of this baseline, beside those of methods


def can_resize(host: Any) -> bool:
    """Tells whether the host's own library can give it another image size."""
    return callable(getattr(host, "set_input_size", None))


def fit_resolution(untouched: SlimModel, share: float) -> SlimModel:
    """Returns a copy of the dense model for the largest images that cost at most `share` of it.

    Positions are interpolated by the host's own library.

    Raises:
        UnsupportedModel: the host cannot be given another image size.
        ImpossibleBudget: images of one patch cost more.
    """
    host, adapter = untouched.host, untouched.plan.adapter
    if not can_resize(host):
        raise UnsupportedModel(
            f"{type(host).__name__} has no set_input_size, so it cannot be given smaller images."
        )
    height, width = adapter.describe(host).image_size
    rows, columns = untouched.plan.shape.grid
    dense = untouched.dense_macs().total
    for count in range(rows - 1, 0, -1):
        size = (height // rows * count, width // columns * max(1, round(columns * count / rows)))
        smaller: Any = copy.deepcopy(host)
        smaller.set_input_size(img_size=size)
        model = untouched_model(smaller.eval(), adapter)
        if model.dense_macs().total <= share * dense:
            return model
    raise ImpossibleBudget(f"Images of one patch cost more than {share:g} of the dense model.")


def resolution_costs(smaller: SlimModel, untouched: SlimModel) -> Costs:
    """Returns what the smaller images cost, beside what the usual ones do."""
    cost = smaller.dense_macs()
    parameters = sum(each.numel() for each in smaller.host.parameters())
    dense = untouched.dense_macs().total
    return Costs(RESOLUTION, cost.rows, cost.total, cost.total, dense, parameters=parameters)


def shrink_images(opened: Opened, smaller: SlimModel) -> Opened:
    """Returns the model with its images made smaller first; making them smaller is not timed."""
    size = smaller.plan.adapter.describe(smaller.host).image_size

    def shrink(images: Tensor) -> Tensor:
        return F.interpolate(images, size=size, mode="bicubic", antialias=True, align_corners=False)

    return replace(
        opened,
        prepare=lambda images: opened.prepare(shrink(images)),
        logits=lambda images: opened.logits(shrink(images)),
    )
