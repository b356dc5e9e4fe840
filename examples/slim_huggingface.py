"""A Hugging Face classifier with fewer patches, inside transformers' own pipeline.

The model is small and has random weights, so that nothing is fetched; the labels mean nothing.
"""

import torch
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor, pipeline
from transformers.utils import logging

import patchslim

torch.manual_seed(0)
config = ViTConfig(
    image_size=96,
    patch_size=8,
    hidden_size=64,
    num_hidden_layers=6,
    num_attention_heads=4,
    intermediate_size=256,
    num_labels=5,
)
model = ViTForImageClassification(config).eval()
slimmed = patchslim.slim(model, "evit", keep_rate=0.7)

# The pipeline logs that SlimModel is not on its list of classes, but it works.
logging.set_verbosity(logging.CRITICAL)
processor = ViTImageProcessor(size={"height": 96, "width": 96})
classify = pipeline("image-classification", model=slimmed, image_processor=processor)
answers = classify(Image.new("RGB", (200, 120), "steelblue"), top_k=3)

print("tokens after each block:", *slimmed.counts())
for answer in answers:
    print(f"{answer['label']}  {answer['score']:.3f}")
print("output class:", type(slimmed(torch.zeros(1, 3, 96, 96))).__name__)
