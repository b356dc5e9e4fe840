"""Times models against each other, round by round."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from patchslim.runs.progress import Progress


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
    names = list(models)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with torch.inference_mode():
        for number in range(-warmup, repeats):
            if progress is not None:
                stage = f"round {number + 1}/{repeats}" if number >= 0 else "warming up"
                progress(f"timing {len(names)} models: {stage}")
            first = number % len(names)
            for name in names[first:] + names[:first]:
                wait()
                start = time.perf_counter()
                models[name](images)
                wait()
                if number >= 0:
                    seconds[name].append(time.perf_counter() - start)
    return seconds
