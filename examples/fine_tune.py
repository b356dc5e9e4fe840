"""Fine-tunes the embedded example at 0.4 of its operations, with the untouched model as teacher.

Labels are not used. There are few handwritten digits, so images are mixed, and the teacher says
what lies between them.

    python examples/fine_tune.py        two minutes on two cores
    python examples/fine_tune.py 2      a number of steps
"""

import sys
import tempfile
import warnings

import torch

import patchslim
from patchslim.errors import DeepCut
from patchslim.example import digits

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 240
warnings.simplefilter("ignore", DeepCut)  # it says that training is needed


def batches(split, count):
    scenes = digits.scenes(split, count)
    images, labels = digits.normalise(scenes.images), torch.from_numpy(scenes.labels)
    return list(zip(images.split(50), labels.split(50), strict=True))


images, validation = batches("train", min(2000, 8 * steps)), batches("test", min(600, 8 * steps))
slimmed = patchslim.slim(digits.host(), "tome", macs=0.4)
config = patchslim.TrainConfig(steps=steps, batch=32, lr=1e-4, mixup=0.8, labels=0, validate=steps)
with tempfile.TemporaryDirectory() as folder:
    trained = patchslim.train(slimmed, images, config, out=folder, validation=validation)

for row in trained.report.rows:
    print(f"{row.name:17} accuracy {row.accuracy.show(percent=True)} %, KL {row.kl.show()}")
