"""Scans, forms and screenshots: patches with the same pixels become one before the first block.

Each page keeps as many patches as it has different ones, also within a batch. With windows, only
patches that are near each other merge: a white corner is not averaged with the other three.
"""

import timm
import torch
from PIL import Image, ImageDraw
from timm.data import create_transform

import patchslim

torch.manual_seed(0)
model = timm.create_model("deit_tiny_patch16_224", depth=2, img_size=448).eval()
slimmed = patchslim.slim(model, "duplicates", window=4)

letter, form = (Image.new("RGB", (448, 448), "white") for _ in range(2))
ImageDraw.Draw(letter).text((64, 64), "Dear reader,\nthis page is mostly paper.", "black")
for top in range(64, 400, 48):
    ImageDraw.Draw(form).rectangle((160, top, 400, top + 32), outline="grey")

transform = create_transform(448, crop_pct=1.0)
pages = torch.stack([transform(page) for page in (letter, form)])
with torch.inference_mode():
    answers, costs = slimmed.forward_with_costs(pages)

for name, cost in zip(("letter", "form"), costs, strict=True):
    share = cost.total / slimmed.dense_macs().total
    print(f"{name:6}: {cost.rows[0] - 1} of 784 patches, {share:.0%} of the operations")
print("answers:", tuple(answers.shape))
