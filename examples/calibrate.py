"""The embedded example at half of its operations: positions found by calibration, beside others.

No labels are used and no weight is changed. What is written may be opened: the figure shows which
patches each block still gives out. Without a folder of your own it goes when the example ends.

    python examples/calibrate.py                    a minute on two cores
    python examples/calibrate.py 8 runs/calibrated  images to calibrate on, and where files go
"""

import sys
import tempfile
import warnings

import patchslim
