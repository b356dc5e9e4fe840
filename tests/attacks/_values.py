"""Values that nobody should give, by what is wrong with them; for arguments of every kind."""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import torch

HUGE = 10**400  # no float can hold it

NUMBERS: dict[str, Any] = {
    "zero": 0,
    "one": 1,
    "minus one": -1,
    "three": 3,
    "half": 0.5,
    "a little": 1e-300,
    "minus zero": -0.0,
    "below zero": -0.5,
    "huge": HUGE,
    "minus huge": -HUGE,
    "large": 1e308,
    "2**63": 2**63,
    "infinite": math.inf,
    "minus infinite": -math.inf,
    "nan": math.nan,
    "true": True,
    "false": False,
    "complex": 1j,
    "fraction": Fraction(1, 2),
    "decimal": Decimal("0.5"),
    "numpy float": np.float64(0.5),
    "numpy int": np.int64(3),
    "numpy nan": np.float32("nan"),
    "numpy bool": np.bool_(True),
}
TEXTS: dict[str, Any] = {
    "number as text": "0.6",
    "empty text": "",
    "long text": "x" * 100_000,
    "forged error": "a\nerror: forged\x1b[2J",
    "nul": "a\0b",
    "surrogate": "\udcff",
    "right to left": "\u202etxt.exe",
    "bytes": b"0.6",
}
OBJECTS: dict[str, Any] = {
    "list": [0.5],
    "empty list": [],
    "empty tuple": (),
    "list of text": ["a", "b"],
    "nested list": [[1], [2], [3]],
    "tuple of nan": (math.nan, math.nan, math.nan),
    "huge tuple": (HUGE, HUGE, HUGE),
    "true tuple": (True, True, True),
    "pair": (2, -1.0),
    "long list": [1] * 10_000,
    "dict": {"a": 1},
    "set": {1},
    "range": range(3),
    "object": object(),
    "class": int,
    "function": len,
    "tensor": torch.tensor(0.5),
    "tensor of three": torch.tensor([1, 2, 3]),
    "array": np.array([1, 2, 3]),
    "module": torch.nn.Identity(),
}
EVERY = NUMBERS | TEXTS | OBJECTS
