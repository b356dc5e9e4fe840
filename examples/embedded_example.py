"""The embedded example: read a digit in clutter with fewer patches, measured beside random ones.

`patchslim demo` does this for every method at two budgets, with a page of pictures.
"""

import torch

import patchslim
from patchslim.example import digits
from patchslim.measurement.measure import measure

scenes = digits.scenes("test", 64)
images, labels = digits.normalise(scenes.images), torch.from_numpy(scenes.labels)

host = digits.host()
models = {
    "tome 0.6": patchslim.slim(host, "tome", macs=0.6),
    "evit 0.6": patchslim.slim(host, "evit", macs=0.6),
}
report = measure(models, [(images, labels)], repeats=3)
print(report.table())
