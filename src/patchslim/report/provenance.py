"""`Birth`: the certificate that every report carries: where, when and how it was measured."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import nn

from patchslim.hosts._registry import installed_libraries
from patchslim.versions import installed_version


@dataclass(frozen=True)
class Provenance:
    """Where, when and how a report was measured.

    Attributes:
        device, processor, threads: what it ran on.
        dtype: of the host's weights.
        batch, image_size: of the images that were timed.
        images: how many images accuracy, agreement and KL are over.
        versions: of Python and the libraries.
        seed: of the random baseline, and of noise images where none were given.
        commit: of patchslim's own source, or "none" outside of its repository.
        date, command: when and by what.
        load: the machine's load over the last 1, 5 and 15 minutes as measuring ended, where known.
    """

    device: str
    processor: str
    threads: int
    dtype: str
    batch: int
    image_size: tuple[int, int]
    images: int
    versions: Mapping[str, str]
    seed: int
    commit: str
    date: str
    command: str
    load: tuple[float, ...]

    @classmethod
    def now(
        cls, host: nn.Module, *, batch: int, image_size: tuple[int, int], images: int, seed: int
    ) -> Provenance:
        """The certificate of what has just been measured with `host` in this process."""
        parameter = next(host.parameters())
        found = {
            "torch": installed_version("torch") or "unknown",
            **installed_libraries(),
            "patchslim": installed_version("patchslim") or "source",
        }
        load = os.getloadavg() if hasattr(os, "getloadavg") else ()
        return cls(
            device=str(parameter.device),
            processor=_processor(parameter.device),
            threads=torch.get_num_threads(),
            dtype=str(parameter.dtype).removeprefix("torch."),
            batch=batch,
            image_size=image_size,
            images=images,
            versions={"python": platform.python_version(), **found},
            seed=seed,
            commit=_commit(),
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            load=tuple(round(each, 2) for each in load),
        )

    def lines(self) -> list[tuple[str, str]]:
        """What to print, as pairs of a label and a value."""
        height, width = self.image_size
        load = ", ".join(f"{each:.2f}" for each in self.load) or "unknown"
        return [
            (
                "device",
                f"{self.device}: {self.processor}, {_format_threads(self.threads)}, {self.dtype}",
            ),
            ("images", f"{self.images} scored, batches of {self.batch} timed, {height}x{width} px"),
            ("versions", ", ".join(f"{name} {v}" for name, v in self.versions.items())),
            ("seed, commit", f"{self.seed}, {self.commit}"),
            ("date, load", f"{self.date}, load average {load}"),
            ("command", self.command),
        ]


def _format_threads(count: int) -> str:
    """How many threads, in words."""
    return f"{count} thread{'' if count == 1 else 's'}"


def _processor(device: torch.device) -> str:
    """The name of the chip, as far as the system tells it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str:
    """The short hash of the commit that this file is tracked in, "-dirty" where changed since."""
    here = Path(__file__)

    def git(*words: str) -> str:
        # An installed copy may lie inside of somebody else's repository, whose commit says nothing.
        command = ["git", "-C", str(here.parent), *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)
        return git("describe", "--always", "--dirty", "--exclude=*") or "none"
    except (OSError, subprocess.SubprocessError):
        return "none"
