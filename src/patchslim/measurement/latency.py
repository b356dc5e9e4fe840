"""Times models against each other, round by round."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from patchslim.measurement.score import Progress


def latency(
    models: Mapping[str, Callable[[Tensor], object]],
    images: Tensor,
    repeats: int,
    warmup: int,
    *,
    progress: Progress | None = None,
) -> dict[str, list[float]]:
    """Seconds of each call of each model, one entry a round.

    Every round calls each model once, in an order that moves on by one from round to round, so
    that what else the machine does falls on all of them alike.
    """
    wait: Callable[[], object] = torch.cuda.synchronize if images.is_cuda else (lambda: None)
    names = list(models)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with torch.inference_mode():
        for number in range(-warmup, repeats):
            if progress is not None:
                what = f"round {number + 1}/{repeats}" if number >= 0 else "warming up"
                progress(f"timing {len(names)} models: {what}")
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                wait()
                begun = time.perf_counter()
                models[name](images)
                wait()
                if number >= 0:
                    seconds[name].append(time.perf_counter() - begun)
    return seconds
