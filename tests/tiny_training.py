"""The smallest things that can be trained: a host, batches in memory, and class folders."""

import numpy as np
import timm
import torch
from PIL import Image

SIDE = 32


def trainable_vit(classes=3, **more):
    """Makes a tiny host that timm's own factory can rebuild."""
    settings = {"embed_dim": 32, "depth": 3, "num_heads": 2, "img_size": SIDE, "patch_size": 8}
    torch.default_generator.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", num_classes=classes, **settings, **more).eval()


def make_batches(labels=(0, 1, 2, 0), bad=()):
    """Makes one batch in memory; images at the places `bad` have NaN in them."""
    images = torch.randn(len(labels), 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    for place in bad:
        images[place, 0, 3, 3] = torch.nan
    known = None if labels[0] is None else torch.tensor(labels)
    return [(images, known)]


def write_images(folder, kinds=("ant", "bee", "cat"), count=2):
    """Writes class folders with a few pictures."""
    drawn = np.random.default_rng(0)
    for kind in kinds:
        (folder / kind).mkdir(parents=True)
        for number in range(count):
            pixels = drawn.integers(0, 256, (40, 48, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / kind / f"{number}.png")
    return folder
