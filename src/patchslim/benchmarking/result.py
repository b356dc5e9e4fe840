"""`Benchmark`: what was measured of files on their runtimes, as a table, JSON and CSV."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

from patchslim.deployment.nodes import NodeCounts
from patchslim.files import write_atomically
from patchslim.report.csv import (
    format_number,
    timing_cells,
    write_cells,
    write_parameters,
    write_side,
)
from patchslim.report.provenance import Provenance
from patchslim.report.row import Quartiles

FORMAT_VERSION = 1
DRAWS = 2000  # of the bootstrap
COLUMNS = (
    "file",
    "runtime",
    "method",
    "MACs",
    "batch",
    "ms a call",
    "images/s",
    "speed-up",
    "conv.",
    "peak MB",
    "disk MB",
    "attention fused",
    "decide, move",
)


@dataclass(frozen=True)
class Ratio:
    """The median over rounds of a ratio of two times, with its 95 % interval."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float], seed: int) -> Ratio:
        """The median, and the interval that the bootstrap finds by drawing rounds anew."""
        draw = Random(seed)
        medians = sorted(median(draw.choices(values, k=len(values))) for _ in range(DRAWS))
        return cls(median(values), medians[DRAWS // 40], medians[-1 - DRAWS // 40])

    @property
    def spread(self) -> float:
        """How wide the interval is, as a share of the median."""
        return (self.high - self.low) / self.median

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.low:.2f} {self.high:.2f}]"


@dataclass(frozen=True)
class BenchmarkRow:
    """What was measured of one file at one batch. A field is None if nobody knows it.

    Attributes:
        file: the path as it was given.
        runtime: "eager", or the target that the file is for.
        method, precision, parameters, macs, dense_macs: as the file says.
        batch: images in a call.
        streams: calls at a time; None for one.
        calls: how many calls a round had.
        seconds: of one call, in each round.
        step: milliseconds of one call (of all streams together).
        throughput: images a second.
        speedup: images a second over those of the first file at this batch, round by round.
        beside: the file of the same runtime and precision that keeps all tokens, if there is one.
        conversion: speed-up over that file times the share of operations; 1 if time falls as
            operations do.
        memory: bytes that the process of the file held at most, beyond what it held before it
            opened the file (Python and PyTorch).
        disk: bytes of the file or folder.
        nodes: what is left in the graph that the runtime runs.
        idle: share of one processor that the process took while it had nothing to do.
    """

    file: str
    runtime: str
    method: str
    precision: str
    macs: int
    dense_macs: int
    parameters: int | None
    batch: int
    streams: int | None
    calls: int
    seconds: tuple[float, ...]
    step: Quartiles
    throughput: Quartiles
    speedup: Ratio | None
    beside: str | None
    conversion: Ratio | None
    memory: int | None
    disk: int
    nodes: NodeCounts | None
    idle: float

    def cells(self) -> tuple[str, ...]:
        """Writes the row as text, one entry for each of COLUMNS."""
        nodes = self.nodes
        runtime = self.runtime + ("" if self.precision == "float32" else f" {self.precision}")
        return (
            self.file,
            runtime if self.streams is None else f"{runtime}, {self.streams} streams",
            self.method,
            f"{self.macs / self.dense_macs:.3f}",
            str(self.batch),
            f"{self.step.median:.2f} [{self.step.low:.2f} {self.step.high:.2f}]",
            f"{self.throughput.median:.1f}",
            "-" if self.speedup is None else str(self.speedup),
            "-" if self.conversion is None else f"{self.conversion.median:.2f}",
            "-" if self.memory is None else f"{self.memory / 1e6:.0f}",
            f"{self.disk / 1e6:.1f}",
            "-" if nodes is None else f"{nodes.fused} of {nodes.attention}",
            "-" if nodes is None else f"{nodes.decisions}, {nodes.movements}",
        )

    def csv_cells(self, side: str) -> dict[str, str]:
        """Writes the row as text, by timm's names of columns and some of ours."""
        nodes = self.nodes
        known = {} if nodes is None else asdict(nodes)
        speedup = (None, None, None) if self.speedup is None else (*vars(self.speedup).values(),)
        return {
            "model": self.file,
            **timing_cells(self.throughput.median, self.step.median, self.batch, side, self.macs),
            "param_count": write_parameters(self.parameters),
            "runtime": self.runtime,
            "precision": self.precision,
            "method": self.method,
            "macs_share": f"{self.macs / self.dense_macs:.4f}",
            "streams": "" if self.streams is None else str(self.streams),
            "step_time_low": format_number(self.step.low, ".3f"),
            "step_time_high": format_number(self.step.high, ".3f"),
            "speedup": format_number(speedup[0], ".3f"),
            "speedup_low": format_number(speedup[1], ".3f"),
            "speedup_high": format_number(speedup[2], ".3f"),
            "conversion": format_number(
                None if self.conversion is None else self.conversion.median, ".3f"
            ),
            "peak_memory": "" if self.memory is None else str(self.memory),
            "disk": str(self.disk),
            "attention": str(known.get("attention", "")),
            "attention_fused": str(known.get("fused", "")),
            "decisions": str(known.get("decisions", "")),
            "movements": str(known.get("movements", "")),
            "idle": f"{self.idle:.4f}",
        }


@dataclass(frozen=True)
class Benchmark:
    """Measured files, and where, when and how they were measured.

    Attributes:
        rows: one for each file, batch and number of streams; the first file is the reference.
        provenance: what the numbers were measured on, when, and by which command.
        rounds, warmup: how often each row was timed, and how often before that.
    """

    rows: tuple[BenchmarkRow, ...]
    provenance: Provenance
    rounds: int
    warmup: int

    def table(self) -> str:
        """Returns the benchmark as aligned plain text."""
        grid = [COLUMNS, *(row.cells() for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
        lines = []
        for cells in grid:
            aligned = [
                text.ljust(width) if number < 3 else text.rjust(width)
                for number, (text, width) in enumerate(zip(cells, widths, strict=True))
            ]
            lines.append("  ".join(aligned).rstrip())
        lines.insert(1, "-" * (sum(widths) + 2 * len(widths) - 2))
        facts = [f"{label}: {value}" for label, value in self.provenance.lines()]
        return "\n".join([*lines, "", self.notes(), *facts])

    def notes(self) -> str:
        """Says in a few sentences what the columns mean."""
        idle = max(row.idle for row in self.rows)
        return (
            f"One process a file; {self.rounds} rounds after {self.warmup}, in an order drawn anew "
            f"each round. [quartiles]; speed-up: over {self.rows[0].file} at the same batch "
            "[95 %]; conv.: speed-up over the dense file of the same runtime and precision, times "
            "MACs; peak MB: beyond Python and PyTorch; decide, move: nodes that choose, and that "
            f"gather or scatter. While others ran, a process took at most {idle:.1%} of a core."
        )

    def to_json(self) -> dict[str, Any]:
        """Returns everything as plain data."""
        return {"format": FORMAT_VERSION, **asdict(self)}

    def csv(self) -> str:
        """Returns a line for each row, in timm's columns and some of ours."""
        side = write_side(self.provenance.image_size)
        return write_cells([row.csv_cells(side) for row in self.rows])

    def save(self, path: str | Path) -> None:
        """Writes everything to a JSON file: all of it, or nothing."""
        write_atomically(path, json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n")

    def save_csv(self, path: str | Path) -> None:
        """Writes the CSV to a file: all of it, or nothing."""
        write_atomically(path, self.csv())
