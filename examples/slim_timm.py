"""A timm model at 60 % of its operations: what is left of it, and how far its answers move.

Random weights keep the example offline; pass pretrained=True for a model whose answers mean
something.
"""

import timm
import torch

import patchslim

torch.manual_seed(0)
model = timm.create_model("deit_tiny_patch16_224").eval()
slimmed = patchslim.slim(model, "tome", macs=0.6)

images = torch.randn(2, 3, 224, 224)
with torch.inference_mode():
    dense, fewer = model(images), slimmed(images)

print("tokens after each block:", *slimmed.counts())
print("operations:", slimmed.macs(), "of", slimmed.dense_macs())
print("same shape of answer:", tuple(fewer.shape))
print(f"largest logit of the dense model: {dense.abs().max():.4f}")
print(f"largest difference:               {(dense - fewer).abs().max():.4f}")
