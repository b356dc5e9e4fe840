"""The token sequence of a vision transformer, and what a method may decide about it."""

from patchslim.tokens.merging import Merge
from patchslim.tokens.mixing import Mix
from patchslim.tokens.reduction import Defer, Fixed, Fuse, Keep, Mask, Reduction
from patchslim.tokens.rows import take
from patchslim.tokens.shapes import BlockShape
from patchslim.tokens.tokens import Tokens

__all__ = [
    "BlockShape",
    "Defer",
    "Fixed",
    "Fuse",
    "Keep",
    "Mask",
    "Merge",
    "Mix",
    "Reduction",
    "Tokens",
    "take",
]
