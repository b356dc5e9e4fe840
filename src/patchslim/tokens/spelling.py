"""How a graph for another runtime is to spell what can be said in several ways.

Rows can be moved by lookups or by matrix products, and extremes be found by sorting or by two
comparisons. Both are exact; which is faster depends on the runtime. An exporter says which, and
methods ask here. In eager code and in graphs for PyTorch it is always lookups.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch

_by_product: ContextVar[bool] = ContextVar("by_product", default=False)


@contextlib.contextmanager
def spell_by_product() -> Iterator[None]:
    """Within the block, rows are moved by matrix products, and nothing is looked up or sorted."""
    before = _by_product.set(True)
    try:
        yield
    finally:
        _by_product.reset(before)


def is_by_product() -> bool:
    """Whether rows are to be moved by matrix products."""
    # Older versions of the compiler cannot follow a context variable, and need not.
    return not torch.compiler.is_dynamo_compiling() and _by_product.get()
