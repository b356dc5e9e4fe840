"""Peak memory of one call: what PyTorch's allocators give out while it runs."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch


def peak_memory(call: Callable[[], object]) -> int:
    """Peak bytes of the tensors that are allocated during `call` and live at one time.

    What was there before, such as weights and the images, is not counted; nor is scratch space
    that kernels take without PyTorch's allocator.
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
    """Peak bytes of all CUDA devices above what they hold now."""
    devices = range(torch.cuda.device_count())
    for device in devices:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    before = sum(map(torch.cuda.memory_allocated, devices))
    call()
    return sum(map(torch.cuda.max_memory_allocated, devices)) - before


@contextlib.contextmanager
def _quiet_profiler() -> Iterator[None]:
    """Keeps the profiler's own log off the terminal; its level is read from the environment."""
    name = "KINETO_LOG_LEVEL"
    before = os.environ.get(name)
    os.environ.setdefault(name, "99")
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
