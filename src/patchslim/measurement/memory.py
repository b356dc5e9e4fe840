"""Measures the peak memory of one call, as PyTorch's allocators see it."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch


def peak_memory(call: Callable[[], object]) -> int:
    """Returns the most bytes that tensors made during `call` hold at one time.

    Memory that was held before, by weights and images, is not counted. Nor is scratch space that
    kernels take without PyTorch's allocator.
    """
    if torch.cuda.is_initialized():
        peak = _cuda_peak(call)
        if peak:
            return peak
    from torch.autograd.profiler import profile

    with _quiet_profiler(), profile(profile_memory=True, use_kineto=True) as run:
        result = call()
    events: list[Any] = [e for e in run.kineto_results.events() if e.name() == "[memory]"]
    del result
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return int(max(itertools.accumulate(changes, initial=0)))


def _cuda_peak(call: Callable[[], object]) -> int:
    """Returns the peak bytes on all CUDA devices, less what they held before."""
    devices = range(torch.cuda.device_count())
    for device in devices:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    before = sum(map(torch.cuda.memory_allocated, devices))
    call()
    return sum(map(torch.cuda.max_memory_allocated, devices)) - before


@contextlib.contextmanager
def _quiet_profiler() -> Iterator[None]:
    """Keeps the profiler's log off the terminal; its level can be set in the environment only."""
    name = "KINETO_LOG_LEVEL"
    before = os.environ.get(name)
    os.environ.setdefault(name, "99")
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
