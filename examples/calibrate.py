"""Calibrates the embedded example for half of its operations, and measures it beside ToMe.

No labels are used, and no weight is changed. The column "vs random" compares with random positions,
as many in each block as calibration chose.

    python examples/calibrate.py                    a minute on two cores
    python examples/calibrate.py 64 runs/pyramid    images to calibrate on, and where files stay
"""

import sys
import tempfile
import warnings
from pathlib import Path

import torch

import patchslim
from patchslim.errors import DeepCut
from patchslim.example import digits
from patchslim.measurement.measure import measure

warnings.simplefilter("ignore", DeepCut)  # it says to measure, which is done here
count = int(sys.argv[1]) if len(sys.argv) > 1 else 64
unlabelled = [(digits.normalise(digits.scenes("train", count).images), None)]
scenes = digits.scenes("test", 4 * count)
test = (digits.normalise(scenes.images), torch.from_numpy(scenes.labels))
config = patchslim.PatchSlimmingConfig(mode="free", images=count, probe=min(8, count))

host = digits.host()
with tempfile.TemporaryDirectory() as away:
    out = Path(sys.argv[2] if len(sys.argv) > 2 else away)
    fixed = patchslim.calibrate(host, unlabelled, macs=0.5, config=config, out=out).model
    each = patchslim.calibrate(
        host, unlabelled, "patch_slimming_dynamic", schedule=fixed.schedule, config=config
    ).model
    tome = patchslim.slim(host, "tome", macs=0.5)
    models = {"patch_slimming": fixed, "patch_slimming_dynamic": each, "tome": tome}
    print(measure(models, [test], repeats=3).table())
    print("tokens after each block:", *fixed.counts())
    print("written:", *(out / name for name in ("model", "calibration.json", "pyramid.svg")))
