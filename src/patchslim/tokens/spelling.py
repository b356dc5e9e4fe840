"""How a graph for another runtime is to spell what can be said in several ways.

Rows that join others can be added up one by one or by a matrix product, and the place of an extreme
be found by a search or by two comparisons. Both are exact; which is faster depends on the runtime.
An exporter says which, and methods ask here. Eager code and graphs for PyTorch have no products.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch

_by_product: ContextVar[bool] = ContextVar("by_product", default=False)


@contextlib.contextmanager
def spell_by_product() -> Iterator[None]:
    """Within the block, rows are added up and compared by matrix products."""
    before = _by_product.set(True)
    try:
        yield
    finally:
        _by_product.reset(before)


def is_by_product() -> bool:
    """Whether rows are to be added up and compared by matrix products."""
    # Older versions of the compiler cannot follow a context variable, and need not.
    return not torch.compiler.is_dynamo_compiling() and _by_product.get()
