"""A slimmed model that leaves PyTorch: one file, checked, with all that is needed to use it.

Here PyTorch's own exported program, which needs nothing more. For `deit.onnx` and OpenVINO install
patchslim[onnx] or patchslim[openvino]; nothing else changes.
"""

import tempfile
from pathlib import Path

import timm
import torch

import patchslim

torch.manual_seed(0)
model = timm.create_model("deit_tiny_patch16_224", depth=4).eval()
slimmed = patchslim.slim(model, "similarity", keep_rate=0.7, at=(1, 2))
images = torch.randn(3, 3, 224, 224)

with tempfile.TemporaryDirectory() as folder:
    exported = patchslim.export(slimmed, Path(folder) / "deit.pt2", images=images)
    print("checked:", exported.check)

print("method:", exported.card["method"], "tokens after each block:", exported.card["tokens"])
print("images:", exported.preprocessing.image_size, exported.preprocessing.interpolation)
with torch.inference_mode():
    print("same answer:", torch.allclose(exported(images), slimmed(images), atol=1e-5))
