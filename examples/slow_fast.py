"""Evo-ViT from its first step, and LeViT: patches that wait come back, so the grid survives.

A small vision transformer learns to read the digit in a scene, with half of its patches on the slow
path. They are chosen again in every block at first, and once a stage later. The head reads the mean
of all patches; a second head, on the class token, is used in training only.

    python examples/slow_fast.py 2      a number of steps; 400 by default
"""

import sys
import tempfile
import warnings

import timm
import torch

import patchslim
from patchslim.architectures.evo_levit import evo_levit_128s
from patchslim.errors import Untrained
from patchslim.example import digits

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 400
scenes = digits.scenes("train", min(3000, 16 * steps))
images, labels = digits.normalise(scenes.images), torch.from_numpy(scenes.labels)
size = {"img_size": 96, "patch_size": 8, "embed_dim": 64, "depth": 6, "num_heads": 2}
host = timm.models.VisionTransformer(**size, num_classes=10, global_pool="avg")
slimmed = patchslim.slim(host, "evo", keep_rate=0.5)
print("tokens after each block:", *slimmed.counts())

recipe = {"steps": steps, "batch": 32, "lr": 1e-3, "distil": "none", "auxiliary": 0.5}
config = patchslim.TrainConfig.of(slimmed.method.training_defaults, recipe)
with tempfile.TemporaryDirectory() as folder:
    batches = list(zip(images.split(50), labels.split(50), strict=True))
    trained = patchslim.train(slimmed, batches, config, out=folder, progress=print)
maps = trained.model.forward_intermediates(images[:1], intermediates_only=True)
print("the whole grid after every block:", {tuple(each.shape[2:]) for each in maps})

warnings.simplefilter("ignore", Untrained)  # how old and new attention mix
slimmed = patchslim.slim(evo_levit_128s(), "evo", keep_rate=0.5, early=0.5, learned=True)
print("Evo-LeViT:", *slimmed.counts())
