"""What all tests share: one thread a test, tiny models, and the data folder that may be absent."""

from __future__ import annotations

import gc
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.register_assert_rewrite("bad_input")  # a failed row says what was compared
# A shell lets what it starts in the background ignore interrupts. Children would, too, and a test
# that interrupts one would wait for ever.
signal.signal(signal.SIGINT, signal.default_int_handler)


def _share_processors() -> None:
    """Gives each of several processes that run tests its share of the processors.

    Runtimes and compilers take a thread for every processor that they see, and wait for each other
    where several of them do.
    """
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    count = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if not worker or not hasattr(os, "sched_setaffinity"):
        return
    own = sorted(os.sched_getaffinity(0))[int(worker.removeprefix("gw")) :: count]
    if own:
        os.sched_setaffinity(0, own)


_share_processors()
gc.disable()  # imports make millions of objects, and none of them is garbage

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds options: a random order, which shows tests that depend on others; fewer moments."""
    about = "run the files, and the tests within each file, in an order drawn with this seed"
    parser.addoption("--shuffle", type=int, metavar="SEED", help=about)
    about = "stop long commands at one in so many of the moments that are tried"
    parser.addoption("--every", type=int, default=1, metavar="N", help=about)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Shuffles files and the tests within each; what a file sets up is still set up once.

    Those that work in forked processes come first. PyTorch refuses to train there if the process
    has used its threads, as some libraries beneath do.
    """
    seed = config.getoption("--shuffle")
    if seed is not None:
        _shuffle(items, seed)
    _put_forks_first(items, int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
    left_out = [item for item in items if _moment(item) % config.getoption("--every")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def _put_forks_first(items: list[pytest.Item], workers: int) -> None:
    """Puts tests that fork before the others, in place; of several workers each has its part first.

    Each worker begins with an equal part of all tests in their order.
    """
    forks = [item for item in items if item.get_closest_marker("forks")]
    others = [item for item in items if not item.get_closest_marker("forks")]
    if not hasattr(os, "fork"):
        for item in forks:
            item.add_marker(pytest.mark.skip(reason="needs fork"))
    items.clear()
    for worker in range(workers):
        for part in forks, others:
            items += part[len(part) * worker // workers : len(part) * (worker + 1) // workers]


def _moment(item: pytest.Item) -> int:
    """Returns the number of the moment at which a test stops a command; 0 for other tests."""
    called = getattr(item, "callspec", None)
    return 0 if called is None else called.params.get("moment", 0)


def _shuffle(items: list[pytest.Item], seed: int) -> None:
    """Shuffles files, and the tests within each, in place."""
    by_file: dict[Path, list[pytest.Item]] = {}
    for item in items:
        by_file.setdefault(item.path, []).append(item)
    drawn = random.Random(seed)
    groups = list(by_file.values())
    drawn.shuffle(groups)
    for group in groups:
        drawn.shuffle(group)
    items[:] = [item for group in groups for item in group]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Gives each process one thread, since tests run side by side.

    It is imported here, because the process that only hands out tests does not need it.
    """
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keeps the latencies that plans measure in a folder of this run's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATCHSLIM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def pytest_collection_finish() -> None:
    """Freezes what the tests have imported, so that the garbage collector need not visit it."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.hookimpl(trylast=True)
def pytest_unconfigure() -> None:
    """Unfreezes it for libraries that count what is left when the interpreter ends.

    This is done last, since pytest collects garbage here once more.
    """
    gc.unfreeze()


@pytest.fixture(scope="session")
def shared() -> Path:
    """Finds the folder of measuring data beside the repository."""
    if not SHARED.is_dir():
        pytest.skip(f"no data at {SHARED}: these files are not part of the project")
    return SHARED


@pytest.fixture
def small_disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """Mounts a real file system of one megabyte, or of the size that is asked for."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount, size = shutil.which("mount"), getattr(request, "param", "1m")
    command = [str(mount), "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
    if mount is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a small disk cannot be mounted here (needs root)")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.fixture
def vit() -> Any:
    """Makes a tiny DeiT-like host with a class token, 21 rows."""
    from timm_variants import tiny_vit

    return tiny_vit()


@pytest.fixture
def hf_vit() -> Any:
    """Makes a tiny Hugging Face classifier, 21 rows."""
    from hf_hosts import tiny_hf

    return tiny_hf("ViTForImageClassification")
