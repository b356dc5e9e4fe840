"""Times models against each other, round by round, in one process or in several."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from random import Random
from typing import TypeVar

import torch
from torch import Tensor

from patchslim.runs.progress import Progress

Key = TypeVar("Key", bound=Hashable)


@contextlib.contextmanager
def use_threads(count: int) -> Iterator[None]:
    """Lets PyTorch use so many threads inside the block, and as many as before after it."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def latency(
    models: Mapping[str, Callable[[Tensor], object]],
    images: Tensor,
    repeats: int,
    warmup: int,
    *,
    progress: Progress | None = None,
) -> dict[str, list[float]]:
    """Returns the seconds that each model took in each round.

    Every round calls each model once, and the order moves on by one from round to round. So other
    work on the machine slows all models alike. The `warmup` rounds are not counted.
    """
    wait: Callable[[], object] = torch.cuda.synchronize if images.is_cuda else (lambda: None)

    def time_call(name: str) -> float:
        wait()
        start = time.perf_counter()
        models[name](images)
        wait()
        return time.perf_counter() - start

    with torch.inference_mode():
        return interleave([*models], time_call, repeats, warmup, progress=progress)


def interleave(
    keys: Sequence[Key],
    time_one: Callable[[Key], float],
    repeats: int,
    warmup: int,
    *,
    draw: Random | None = None,
    progress: Progress | None = None,
) -> dict[Key, list[float]]:
    """Returns what `time_one` said of each key in each round, the `warmup` rounds left out.

    The order moves on by one from round to round. With `draw`, it is drawn anew in each round.
    """
    seconds: dict[Key, list[float]] = {key: [] for key in keys}
    for number in range(-warmup, repeats):
        if progress is not None:
            stage = f"round {number + 1}/{repeats}" if number >= 0 else "warming up"
            progress(f"timing {len(keys)} models: {stage}")
        first = number % len(keys)
        order = [*keys[first:], *keys[:first]] if draw is None else draw.sample(keys, len(keys))
        for key in order:
            taken = time_one(key)
            if number >= 0:
                seconds[key].append(taken)
    return seconds
