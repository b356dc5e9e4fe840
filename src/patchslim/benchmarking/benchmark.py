"""`benchmark`: how fast files run on their runtimes, and what they take of memory and disk."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch

from patchslim.benchmarking.result import Benchmark, BenchmarkRow, Ratio
from patchslim.benchmarking.worker import Worker
from patchslim.deployment.nodes import NodeCounts
from patchslim.deployment.registry import find_target, target_names
from patchslim.errors import BadFile, BadSetting, WrongInput
from patchslim.files import resolve_path
from patchslim.measurement.latency import interleave
from patchslim.report.provenance import Provenance
from patchslim.report.row import Quartiles
from patchslim.runs.progress import Progress, check_progress
from patchslim.settings import BATCH, SEED, Range, check_type, check_value
from patchslim.versions import installed_version

THREADS = Range(1, 4096)
ROUNDS = Range(1, 1e6)
WARMUP = Range(1, 1e6)
SHORTEST_ROUND = 0.05  # seconds: shorter calls are made several times in a round
MOST_CALLS = 500
DENSE = "identity"
GIVE_FILES = "Give paths: ['dense.onnx', 'slim.onnx'], or folders of saved models or for OpenVINO."


@dataclass(frozen=True)
class Entry:
    """What becomes one row: a file at a batch, in a process of its own or of its file."""

    worker: int
    batch: int


def benchmark(  # noqa: PLR0913 (what is timed, on what, and how often)
    files: str | Path | Iterable[str | Path],
    *,
    batch: int = 8,
    threads: int | None = None,
    rounds: int = 20,
    warmup: int = 3,
    streams: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Benchmark:
    """Times exported and saved models on the CPU: one process a file, in rounds that take turns.

    Args:
        files: artefacts and folders of saved models, which PyTorch runs. The first one is what
            the others are compared with.
        batch: images in a call. A batch of 1 is timed, too.
        threads: how many threads each runtime has; by default as many as PyTorch has here.
        rounds: how often each file is timed at each batch.
        warmup: rounds before that, which are not counted.
        streams: also runs artefacts for OpenVINO with as many calls at a time, for throughput.
        seed: of the noise that stands in for images, of the order, and of the intervals.
        progress: is called with one line of text at a time.
    """
    batch = check_value("batch", batch, int, BATCH)
    threads = torch.get_num_threads() if threads is None else threads
    threads = check_value("threads", threads, int, THREADS)
    rounds = check_value("rounds", rounds, int, ROUNDS)
    warmup = check_value("warmup", warmup, int, WARMUP)
    seed = check_value("seed", seed, int, SEED)
    if streams is not None:
        streams = check_value("streams", streams, int, THREADS)
    show = check_progress(progress)
    paths = _check_files(files)
    with contextlib.ExitStack() as stack:
        workers = _start(stack, [*paths.values()], threads, None, show)
        if streams is not None:
            workers += _start(stack, _with_streams(workers), threads, streams, show)
        _check_alike(workers)
        entries = _entries(workers, batch)
        calls = dict.fromkeys(entries, 1)

        def time_one(entry: Entry) -> float:
            return workers[entry.worker].time(entry.batch, calls[entry], seed)

        def warm_up(entry: Entry) -> float:
            seconds = time_one(entry)
            calls[entry] = max(1, min(MOST_CALLS, math.ceil(SHORTEST_ROUND / seconds)))
            return seconds

        draw = Random(seed)
        interleave(entries, warm_up, 0, warmup, draw=draw, progress=show)
        seconds = interleave(entries, time_one, rounds, 0, draw=draw, progress=show)
        show("memory and graphs")
        looked = [worker.look_back() for worker in workers]
    given = {path: name for name, path in paths.items()}
    rows = _Rows(workers, looked, seconds, calls, given, seed)
    height, width = workers[0].facts["input"][-2:]
    provenance = Provenance.of(
        torch.device("cpu"),
        ", ".join(dict.fromkeys(str(worker.facts["precision"]) for worker in workers)),
        batch=batch,
        image_size=(height, width),
        images=0,
        seed=seed,
        threads=threads,
        versions=_versions(workers),
    )
    return Benchmark(tuple(map(rows.make, entries)), provenance, rounds, warmup)


def _check_files(files: Any) -> dict[str, Path]:
    """The files by the names that they were given by; refuses one that is given twice."""
    listed = [files] if isinstance(files, str | Path) else files
    check_type("files", listed, Iterable, GIVE_FILES)
    paths: dict[str, Path] = {}
    for each in listed:
        path = resolve_path(each)
        if path.resolve() in [other.resolve() for other in paths.values()]:
            raise BadSetting(
                f"{each} is given twice, and would be compared with itself. Leave one of them out."
            )
        if not path.exists():
            raise BadFile(f"{each} is not there. Give a file or folder that patchslim wrote.")
        paths[str(each)] = path
    if not paths:
        raise BadSetting(f"There is no file to benchmark. {GIVE_FILES}")
    return paths


def _start(
    stack: contextlib.ExitStack,
    paths: Sequence[Path],
    threads: int,
    streams: int | None,
    show: Progress,
) -> list[Worker]:
    """Starts a process for each file, and opens the file there."""
    show(f"starting {len(paths)} processes")
    workers = []
    for path in paths:
        workers.append(Worker(path, threads, streams))
        stack.callback(workers[-1].end)
    for worker in workers:
        show(f"opening {worker.path.name}")
        worker.open()
    return workers


def _check_alike(workers: Sequence[Worker]) -> None:
    """Refuses files for other images than the first one's."""
    first = workers[0]
    for worker in workers:
        if worker.facts["input"] != first.facts["input"]:
            raise WrongInput(
                f"{worker.path} takes images of shape {tuple(worker.facts['input'])}, and "
                f"{first.path} of {tuple(first.facts['input'])}. Times are compared at one image "
                "size: leave one of them out."
            )


def _with_streams(workers: Sequence[Worker]) -> list[Path]:
    """The files whose runtimes have streams; refuses to go on if there is none."""
    targets = {name: find_target(name) for name in target_names()}
    able = [
        worker.path
        for worker in workers
        if worker.facts["runtime"] in targets and targets[worker.facts["runtime"]].has_streams
    ]
    if not able:
        names = " or ".join(name for name, target in targets.items() if target.has_streams)
        raise BadSetting(
            f"None of these files has streams (--streams): give an artefact for {names}, or leave "
            "it out. Elsewhere one call runs on all threads."
        )
    return able


def _entries(workers: Sequence[Worker], batch: int) -> list[Entry]:
    """The rows: each file at batch 1 and at the batch that is given, as far as it takes them."""
    entries = []
    for number, worker in enumerate(workers):
        fixed = worker.facts["batch"]
        if fixed not in (None, 1, batch):
            raise WrongInput(
                f"{worker.path} takes {fixed} images in a call, and batches of 1 and {batch} are "
                f"to be timed. Give batch={fixed} (--batch {fixed}), or export it without a batch."
            )
        entries += [Entry(number, size) for size in sorted({1, batch}) if fixed in (None, size)]
    return sorted(entries, key=lambda entry: entry.batch)


def _versions(workers: Sequence[Worker]) -> dict[str, str]:
    """The versions of the runtimes that ran."""
    runtimes = {worker.facts["runtime"] for worker in workers} & {*target_names()}
    needed = {name for runtime in runtimes for name in find_target(runtime).needs}
    return {name: installed_version(name) or "unknown" for name in sorted(needed)}


@dataclass(frozen=True)
class _Rows:
    """Makes rows of what the workers said."""

    workers: Sequence[Worker]
    looked: Sequence[dict[str, Any]]
    seconds: dict[Entry, list[float]]
    calls: dict[Entry, int]
    given: dict[Path, str]
    seed: int

    def make(self, entry: Entry) -> BenchmarkRow:
        """The row of one entry."""
        worker, looked = self.workers[entry.worker], self.looked[entry.worker]
        facts, seconds = worker.facts, self.seconds[entry]
        images = entry.batch * (worker.streams or 1)
        dense = self._dense(entry)
        over_dense = None if dense is None else self._ratio(entry, dense)
        share = facts["macs"] / facts["dense_macs"]
        known = looked["peak"] is not None and looked["held"] is not None
        return BenchmarkRow(
            file=self.given[worker.path],
            **{name: facts[name] for name in ("runtime", "method", "precision", "parameters")},
            macs=facts["macs"],
            dense_macs=facts["dense_macs"],
            batch=entry.batch,
            streams=worker.streams,
            calls=self.calls[entry],
            seconds=tuple(seconds),
            step=Quartiles.of([1000 * each for each in seconds]),
            throughput=Quartiles.of([images / each for each in seconds]),
            speedup=self._ratio(entry, Entry(0, entry.batch)),
            beside=None if dense is None else self.given[self.workers[dense.worker].path],
            conversion=over_dense and Ratio(*(share * each for each in vars(over_dense).values())),
            memory=looked["peak"] - looked["held"] if known else None,
            disk=_disk(worker.path),
            nodes=None if looked["nodes"] is None else NodeCounts(**looked["nodes"]),
            idle=worker.idle / worker.waited if worker.waited else 0.0,
        )

    def _ratio(self, entry: Entry, other: Entry) -> Ratio | None:
        """Images a second over those of another entry, if that was timed."""
        if other not in self.seconds:
            return None
        ours, theirs = (self.workers[each.worker].streams or 1 for each in (entry, other))
        pairs = zip(self.seconds[other], self.seconds[entry], strict=True)
        return Ratio.of([ours * their / (theirs * our) for their, our in pairs], self.seed)

    def _dense(self, entry: Entry) -> Entry | None:
        """The entry with all tokens of the same runtime, precision, streams and batch."""
        mine = self.workers[entry.worker]
        for number, worker in enumerate(self.workers):
            facts = worker.facts
            same = [facts[name] == mine.facts[name] for name in ("runtime", "precision")]
            if all(same) and worker.streams == mine.streams and facts["method"] == DENSE:
                return Entry(number, entry.batch)
        return None


def _disk(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
    return sum(each.stat().st_size for each in files)
