"""Augmentation by timm's own parts: of one picture at a time, and of a batch with its labels.

It knows no files, no models and no order of images. What is drawn is drawn from the generators of
`random`, NumPy and PyTorch, which `drawn_from` sets for one image or one batch.
"""

from __future__ import annotations

import contextlib
import random
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from patchslim.errors import BadSetting
from patchslim.hosts._preprocessing import Preprocessing
from patchslim.training.config import TrainConfig

Augment = Callable[[Any], Tensor]
Mix = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

# What timm reads in a policy; other parts it would leave out without a word.
POLICY_PARTS = re.compile(r"(mstd|mmax|inc|m|n|p)\d[\d.]*|t(weights|3aw?)")


@contextlib.contextmanager
def temporary_seed(*numbers: int) -> Iterator[None]:
    """Within it, all that is drawn depends on these numbers alone; outside nothing has changed."""
    seed = np.random.SeedSequence(numbers).generate_state(3)
    # NPY002, four times: it is NumPy's global generator that timm draws from.
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    random.seed(int(seed[0]))
    np.random.seed(seed[1])  # noqa: NPY002
    # Not torch.manual_seed, which would seed the devices' generators too.
    torch.default_generator.manual_seed(int(seed[2]))
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        torch.set_rng_state(before[2])


def augmentation(prepared: Preprocessing, course: TrainConfig) -> Augment:
    """What turns a decoded picture into randomly changed pixels (C, H, W) for the host to learn.

    A crop, a mirror image, colours, a policy of RandAugment's kind, and an erased rectangle.
    crop=1 takes the picture as it is taken for evaluation, without any random crop.
    """
    from timm.data.transforms import RandomResizedCropAndInterpolation
    from torchvision.transforms import Compose

    shape, colours, pixels = _timm_transforms(prepared, course)
    if course.crop == 1:
        kept = [each for each in shape if not isinstance(each, RandomResizedCropAndInterpolation)]
        shape = [*_evaluation_transforms(prepared), *kept]
    whole: Augment = Compose([*shape, *colours, *pixels])
    return whole


def _timm_transforms(prepared: Preprocessing, course: TrainConfig) -> list[list[Any]]:
    """timm's random changes of shape and of colours, and what makes pixels of the picture."""
    from timm.data.transforms_factory import transforms_imagenet_train

    _check_policy(course.randaugment)
    try:
        whole = transforms_imagenet_train(
            prepared.image_size,
            scale=(course.crop, 1.0),
            hflip=course.flip,
            color_jitter=course.jitter or None,
            # Without it timm leaves colours alone where there is a policy, though both are asked.
            force_color_jitter=True,
            auto_augment=course.randaugment or None,
            interpolation=prepared.interpolation,
            mean=prepared.mean,
            std=prepared.std,
            re_prob=course.erasing,
            re_mode="pixel",
            separate=True,
        )
    except (AssertionError, ValueError, KeyError, IndexError, TypeError) as error:
        raise _policy_error(course.randaugment, str(error)) from error
    return [list(part.transforms) for part in whole]


def _evaluation_transforms(prepared: Preprocessing) -> list[Any]:
    """How a picture is resized and cropped for evaluation."""
    from timm.data.transforms import MaybeToTensor
    from torchvision.transforms import Normalize

    whole: Any = prepared.transform()
    return [each for each in whole.transforms if not isinstance(each, MaybeToTensor | Normalize)]


def _check_policy(policy: str) -> None:
    """Refuses what timm would take for a policy and leave out."""
    kind, *parts = policy.split("-")
    strange = [part for part in parts if not POLICY_PARTS.fullmatch(part)]
    if kind == "rand" and strange:
        raise _policy_error(policy, f"{strange[0]!r} is no part of one")


def _policy_error(policy: str, reason: str) -> BadSetting:
    """The error for a policy that timm does not know."""
    return BadSetting(
        f"randaugment={policy!r} is not a policy of timm ({reason}). Give one such as "
        "'rand-m9-mstd0.5-inc1': rand, m magnitude, n layers, p probability, mstd spread, mmax "
        "largest magnitude, inc 0 or 1."
    )


def make_mixup(course: TrainConfig, classes: int) -> Mix | None:
    """timm's mixup and cutmix, from images and labels to mixed images and soft targets (B, C).

    Targets are smoothed as the course says. None where the course has neither. What is drawn is
    NumPy's: call it within `drawn_from`, with the step and the part, and it can be repeated.
    """
    if not course.mixup and not course.cutmix:
        return None
    from timm.data import Mixup

    mix = Mixup(
        mixup_alpha=course.mixup,
        cutmix_alpha=course.cutmix,
        label_smoothing=course.smoothing,
        num_classes=classes,
    )

    def mixed(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        check_even(course, len(images))
        new, targets = mix(images.clone(), labels)  # timm writes into the images it is given
        return new, targets

    return mixed


def check_even(course: TrainConfig, part: int) -> None:
    """Refuses mixup and cutmix in parts of a batch that do not fall in pairs."""
    if (course.mixup or course.cutmix) and part % 2:
        raise BadSetting(
            f"mixup and cutmix mix pairs of images, and a part of a batch has {part}. Choose batch "
            "so that batch / (processes x accumulate) is even, or leave mixup and cutmix out."
        )
