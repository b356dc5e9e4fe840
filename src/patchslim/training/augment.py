"""Augments pictures and batches, with timm's own code.

It knows no files, no models and no order of images. Random numbers come from the global generators
of `random`, NumPy and PyTorch, which `temporary_seed` sets for one image or one batch.
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

# The parts of a policy that timm knows. It silently ignores any other.
POLICY_PARTS = re.compile(r"(mstd|mmax|inc|m|n|p)\d[\d.]*|t(weights|3aw?)")


@contextlib.contextmanager
def temporary_seed(*numbers: int) -> Iterator[None]:
    """Seeds all random generators within the block, and restores their states afterwards."""
    seed = np.random.SeedSequence(numbers).generate_state(3)
    # NPY002, here and below: timm draws from NumPy's global generator.
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    random.seed(int(seed[0]))
    np.random.seed(seed[1])  # noqa: NPY002
    # torch.manual_seed would seed the generators of all devices too.
    torch.default_generator.manual_seed(int(seed[2]))
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        torch.set_rng_state(before[2])


def augmentation(prepared: Preprocessing, config: TrainConfig) -> Augment:
    """Returns a function from a decoded picture to augmented, normalised pixels (C, H, W).

    It crops, flips, changes colours, applies RandAugment, and erases a rectangle, each as `config`
    says. With crop=1 the picture is resized and cropped as for evaluation.
    """
    from timm.data.transforms import RandomResizedCropAndInterpolation
    from torchvision.transforms import Compose

    shape, colours, pixels = _timm_transforms(prepared, config)
    if config.crop == 1:
        kept = [each for each in shape if not isinstance(each, RandomResizedCropAndInterpolation)]
        shape = [*_evaluation_transforms(prepared), *kept]
    whole: Augment = Compose([*shape, *colours, *pixels])
    return whole


def _timm_transforms(prepared: Preprocessing, config: TrainConfig) -> list[list[Any]]:
    """Returns timm's transforms in three lists: of shape, of colours, and to normalised pixels."""
    from timm.data.transforms_factory import transforms_imagenet_train

    _check_policy(config.randaugment)
    try:
        whole = transforms_imagenet_train(
            prepared.image_size,
            scale=(config.crop, 1.0),
            hflip=config.flip,
            color_jitter=config.jitter or None,
            # Otherwise timm ignores color_jitter where there is a policy.
            force_color_jitter=True,
            auto_augment=config.randaugment or None,
            interpolation=prepared.interpolation,
            mean=prepared.mean,
            std=prepared.std,
            re_prob=config.erasing,
            re_mode="pixel",
            separate=True,
        )
    except (AssertionError, ValueError, KeyError, IndexError, TypeError) as error:
        raise _policy_error(config.randaugment, str(error)) from error
    return [list(part.transforms) for part in whole]


def _evaluation_transforms(prepared: Preprocessing) -> list[Any]:
    """Returns the transforms that resize and crop a picture for evaluation."""
    from timm.data.transforms import MaybeToTensor
    from torchvision.transforms import Normalize

    whole: Any = prepared.transform()
    return [each for each in whole.transforms if not isinstance(each, MaybeToTensor | Normalize)]


def _check_policy(policy: str) -> None:
    """Refuses a policy with parts that timm would silently ignore."""
    kind, *parts = policy.split("-")
    unknown = [part for part in parts if not POLICY_PARTS.fullmatch(part)]
    if kind == "rand" and unknown:
        raise _policy_error(policy, f"{unknown[0]!r} is no part of one")


def _policy_error(policy: str, reason: str) -> BadSetting:
    """Returns the error for a policy that timm does not know."""
    return BadSetting(
        f"randaugment={policy!r} is not a policy of timm ({reason}). Give one such as "
        "'rand-m9-mstd0.5-inc1': rand, m magnitude, n layers, p probability, mstd spread, mmax "
        "largest magnitude, inc 0 or 1."
    )


def make_mixup(config: TrainConfig, classes: int) -> Mix | None:
    """Returns timm's mixup and cutmix, or None if the config asks for neither.

    It is a function from images and labels to mixed images and soft targets (B, C), which are
    smoothed as the config says. Its random numbers are NumPy's: seed them to repeat a result.
    """
    if not config.mixup and not config.cutmix:
        return None
    from timm.data import Mixup

    mixup = Mixup(
        mixup_alpha=config.mixup,
        cutmix_alpha=config.cutmix,
        label_smoothing=config.smoothing,
        num_classes=classes,
    )

    def mix_batch(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        check_even(config, len(images))
        mixed, targets = mixup(images.clone(), labels)  # timm changes its input in place
        return mixed, targets

    return mix_batch


def check_even(config: TrainConfig, part: int) -> None:
    """Refuses mixup and cutmix with an odd number of images in a part of a batch."""
    if (config.mixup or config.cutmix) and part % 2:
        raise BadSetting(
            f"mixup and cutmix mix pairs of images, and a part of a batch has {part}. Choose batch "
            "so that batch / (processes x accumulate) is even, or leave mixup and cutmix out."
        )
