"""Each image keeps its own number of patches: an empty one costs less than a crowded one.

A threshold says how much a merge of two patches may cost. The budget is a cap that no image
exceeds. The images of a batch are packed, so that the work follows the patches that are left.
"""

import numpy as np
import torch

import patchslim
from patchslim.example import digits

host = digits.host()
slimmed = patchslim.slim(host, "similarity", threshold=0.05, weight="size", macs=0.8)
dense = slimmed.dense_macs().total

scenes = digits.scenes("test", 6)
empty = np.full_like(scenes.images[:1], 128)
noise = np.random.default_rng(0).integers(0, 256, empty.shape, np.uint8)
images = digits.normalise(np.concatenate([empty, noise, scenes.images]))

with torch.inference_mode():
    answers, costs = slimmed.forward_with_costs(images)
    alone = torch.cat([slimmed(image[None]) for image in images])
    slimmed.packs = False  # side by side, padded and masked, as an exported graph has them
    masked = slimmed(images)

shares = [cost.total / dense for cost in costs]
print(f"operations of an empty image: {shares[0]:.0%} of the host's; of noise: {shares[1]:.0%}")
print(f"of scenes: {min(shares[2:]):.0%} to {max(shares[2:]):.0%}")
print(f"of any image at most: {slimmed.macs().total / dense:.0%}")
print(f"scenes read right: {(answers[2:].argmax(1) == torch.tensor(scenes.labels)).sum()} of 6")
print("the same alone:", torch.allclose(alone, answers, atol=1e-4))
print("the same padded and masked:", torch.allclose(masked, answers, atol=1e-4))
