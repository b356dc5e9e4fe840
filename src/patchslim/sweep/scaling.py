"""Several processes with Ray: they answer for the models of a sweep before any of them is timed.

Answers of a model are a file in the folder of the sweep, whoever writes it. So a process is given
a model to ask, and the sweep then finds the file and goes on as if it had written it itself. Times
are measured afterwards, by one process alone. On several machines the folder has to be one that
all of them share.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from patchslim.errors import BadSetting
from patchslim.runs.progress import Progress
from patchslim.versions import check_version

T = TypeVar("T")


def check_ray() -> None:
    """Refuses where Ray is not installed, or is too old."""
    check_version("ray", (2, 50), "scale")


def run_in_processes(
    task: Callable[[Any, T], None], shared: Any, items: Iterable[T], workers: int, show: Progress
) -> None:
    """Calls `task(shared, item)` for every item, `workers` of them at a time.

    `shared` is sent to each process once.

    Raises:
        BadSetting: a process ended before its time. That ends all of them.
    """
    import ray

    items = [*items]
    if not items:
        return
    with _ray_runs(workers):
        remote = ray.remote(num_cpus=1, max_retries=0)(task)
        reference = ray.put(shared)
        waiting = [remote.remote(reference, item) for item in items]
        while waiting:
            done, waiting = ray.wait(waiting)
            try:
                ray.get(done)
            except ray.exceptions.RayError as error:
                raise BadSetting(
                    f"A process of Ray ended: {str(error)[-300:]} Give fewer workers, or none. "
                    "What was answered is kept."
                ) from error
            show(f"answered by {workers} processes: {len(items) - len(waiting)} of {len(items)}")


@contextmanager
def _ray_runs(workers: int) -> Iterator[None]:
    """Uses the cluster that RAY_ADDRESS names, or starts processes on this machine for a while."""
    import ray

    begun = not ray.is_initialized()
    if begun and "RAY_ADDRESS" in os.environ:
        ray.init(log_to_driver=False)
    elif begun:
        ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False)
    try:
        yield
    finally:
        if begun:
            ray.shutdown()
