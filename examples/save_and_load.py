"""Saving a slimmed model: weights as safetensors, everything else as plain JSON, no code.

Loading builds the host, fills it, and makes the identity check again.
"""

import json
import tempfile
from pathlib import Path

import timm
import torch

import patchslim

torch.manual_seed(0)
model = timm.create_model("deit_tiny_patch16_224", depth=4).eval()
slimmed = patchslim.slim(model, "evit", keep_rate=0.7, at=(1, 2))

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "deit-evit"
    slimmed.save(path)
    for file in sorted(path.iterdir()):
        print(f"{file.name:18} {file.stat().st_size:>10,} bytes")
    recipe = json.loads((path / "recipe.json").read_text())
    print({name: recipe[name] for name in ("method", "settings", "schedule", "tail")})
    # From timm 1.0.31 on the recipe says how the host was built, and `model` may be left out.
    fresh = timm.create_model("deit_tiny_patch16_224", depth=4)
    again = patchslim.load(path, model=fresh)

images = torch.randn(1, 3, 224, 224)
with torch.inference_mode():
    print("same answer:", torch.equal(slimmed(images), again(images)))
