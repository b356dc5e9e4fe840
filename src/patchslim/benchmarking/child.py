"""The process that runs one file, and does nothing until it is told to.

It reads one JSON object a line from its input and answers each with one. Between two it waits in a
read, which takes no time of the processor from others. It ends when its input does.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from patchslim.deployment.artefact import Artefact, open_artefact
from patchslim.deployment.nodes import count_nodes
from patchslim.deployment.registry import find_target
from patchslim.errors import PatchslimError
from patchslim.methods._registry import method_label
from patchslim.model.load import load
from patchslim.model.model import SlimModel

EAGER = "eager"


class Opened:
    """A file, ready to run.

    Attributes:
        call: runs a batch of images.
        facts: what the file says of itself.
        count: counts the nodes of the graph that is run; None where there is no graph.
    """

    def __init__(
        self,
        call: Callable[[Tensor], object],
        facts: dict[str, Any],
        count: Callable[[], dict[str, int] | None],
    ) -> None:
        self.call, self.facts, self.count = call, facts, count


def open_file(path: Path, threads: int, streams: int | None) -> Opened:
    """Opens an artefact in its runtime, or a saved model in PyTorch."""
    torch.set_num_threads(threads)
    artefact = open_artefact(path, threads=threads)
    if artefact is not None:
        return _open_artefact(artefact, threads, streams)
    model = load(path)
    return Opened(model, _model_facts(model), lambda: None)


def _open_artefact(artefact: Artefact, threads: int, streams: int | None) -> Opened:
    """An artefact that is called with one batch, or with one for each stream."""
    card, path = artefact.card, artefact.path
    target = find_target(card["target"])
    call: Callable[[Tensor], object] = artefact
    if streams is not None:
        run = target.open_streams(path, threads, streams)
        call = lambda images: run(images.numpy())  # noqa: E731

    def count() -> dict[str, int] | None:
        return asdict(count_nodes(*target.read_nodes(path))) if target.shows_nodes else None

    names = "method precision macs dense_macs parameters batch input".split()
    facts = {name: card.get(name) for name in names}
    facts |= {"runtime": target.name, "method": facts["method"] or "own"}
    return Opened(call, facts, count)


def _model_facts(model: SlimModel) -> dict[str, Any]:
    """What the card of an artefact says, of a model in PyTorch."""
    first = next(model.parameters())
    return {
        "runtime": EAGER,
        "method": method_label(model.method),
        "precision": str(first.dtype).removeprefix("torch."),
        "macs": model.macs().total,
        "dense_macs": model.dense_macs().total,
        "parameters": sum(each.numel() for each in model.parameters()),
        "batch": None,
        "input": [*model.plan.adapter.describe(model.host).image_shape],
    }


def time_calls(opened: Opened, images: Tensor, calls: int) -> float:
    """Seconds of one call, as the mean of several, after one that is not counted.

    Caches hold what the processes before have left there, and a service calls one model again and
    again.
    """
    with torch.inference_mode():
        opened.call(images)
        start = time.perf_counter()
        for _ in range(calls):
            opened.call(images)
        return (time.perf_counter() - start) / calls


def peak_memory() -> int | None:
    """The most memory that this process held, in bytes; None where the system does not tell.

    Linux tells it for the program alone. `getrusage` would count what its parent held when it was
    started.
    """
    status = Path("/proc/self/status")
    if status.exists():
        found = re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(encoding="utf-8"), re.MULTILINE)
        return None if found is None else int(found[1]) << 10
    if os.name == "nt":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


def serve(orders: TextIO, answers: TextIO) -> None:
    """Answers every order until there are no more."""
    opened: Opened | None = None
    held = peak_memory()
    idle_from = time.process_time()
    noise = torch.Generator()
    for line in orders:
        idle = time.process_time() - idle_from
        order = json.loads(line)
        try:
            if order["do"] == "open":
                opened = open_file(Path(order["path"]), order["threads"], order["streams"])
                answer = opened.facts
            elif opened is None:
                raise PatchslimError("No file was opened.")
            elif order["do"] == "time":
                noise.manual_seed(order["seed"])
                images = torch.randn(order["batch"], *opened.facts["input"], generator=noise)
                answer = {"seconds": time_calls(opened, images, order["calls"]), "idle": idle}
            else:
                peak = peak_memory()
                answer = {"peak": peak, "held": held, "nodes": opened.count()}
        except PatchslimError as error:
            answer = {"error": str(error), "kind": type(error).__name__}
        print(json.dumps(answer), file=answers, flush=True)
        idle_from = time.process_time()


def main() -> None:
    """Serves on the pipes that it was started with; whatever libraries print goes elsewhere."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):
        serve(sys.stdin, answers)


if __name__ == "__main__":
    main()
