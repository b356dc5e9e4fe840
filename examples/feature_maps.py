"""Feature maps of a slimmed model: every grid cell in its place, whatever was removed.

A merged cell holds a copy of the token it was merged into; a dropped cell holds a copy of the
survivor that is nearest in the grid. So a decoder for the dense model works unchanged.
"""

import timm
import torch

import patchslim

torch.manual_seed(0)
model = timm.create_model("vit_small_patch14_dinov2", img_size=224, depth=6).eval()
slimmed = patchslim.slim(model, "tome", r=24)
images = torch.randn(1, 3, 224, 224)

with torch.inference_mode():
    maps = slimmed.forward_intermediates(images, indices=3, intermediates_only=True)
    dense = model.forward_intermediates(images, indices=3, intermediates_only=True)

print("tokens after each block:", *slimmed.counts())
for block, (mine, theirs) in enumerate(zip(maps, dense, strict=True), start=3):
    distinct = len(torch.unique(mine[0].flatten(1).T, dim=0))
    alike = torch.cosine_similarity(mine, theirs, dim=1).mean()
    print(f"block {block}: {tuple(mine.shape)}, {distinct} distinct vectors, cosine {alike:.3f}")
