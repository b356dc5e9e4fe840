"""`Provenance`: where, when and how the numbers of a report were measured."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
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
        device, processor, threads: what the models ran on.
        dtype: the data type of the host's weights.
        batch, image_size: batch size, and height and width, of the images that were timed.
        images: how many images were scored for accuracy, agreement and KL.
        versions: the versions of Python and of the libraries.
        seed: the seed of the random baseline, and of the noise that stands in for missing images.
        commit: the commit of patchslim's own source; "none" outside its repository.
        date, command: when the report was measured, and the command line that did it.
        load: the machine's load average over the last 1, 5 and 15 minutes, taken when measuring
            ended; empty on a system that does not know it.
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
        """Records the provenance of what has just been measured with `host` in this process."""
        parameter = next(host.parameters())
        dtype = str(parameter.dtype).removeprefix("torch.")
        return cls.of(
            parameter.device, dtype, batch=batch, image_size=image_size, images=images, seed=seed
        )

    @classmethod
    def of(  # noqa: PLR0913 (each is told apart in what was measured)
        cls,
        device: torch.device,
        dtype: str,
        *,
        batch: int,
        image_size: tuple[int, int],
        images: int,
        seed: int,
        threads: int | None = None,
        versions: Mapping[str, str] | None = None,
    ) -> Provenance:
        """Records the provenance of what has just been measured on a device.

        `versions` are of further libraries; `threads` is by default how many PyTorch uses.
        """
        installed = {
            "torch": installed_version("torch") or "unknown",
            **installed_libraries(),
            **(versions or {}),
            "patchslim": installed_version("patchslim") or "source",
        }
        load = os.getloadavg() if hasattr(os, "getloadavg") else ()
        return cls(
            device=str(device),
            processor=processor_name(device),
            threads=threads or torch.get_num_threads(),
            dtype=dtype,
            batch=batch,
            image_size=image_size,
            images=images,
            versions={"python": platform.python_version(), **installed},
            seed=seed,
            commit=_commit(),
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            load=tuple(round(average, 2) for average in load),
        )

    def lines(self, batches: Sequence[int] = ()) -> list[tuple[str, str]]:
        """Returns what to print, as pairs of a label and a value; `batches` of several runs."""
        timed = ", ".join(map(str, batches or [self.batch]))
        height, width = self.image_size
        load = ", ".join(f"{average:.2f}" for average in self.load) or "unknown"
        threads = f"{self.threads} thread{'' if self.threads == 1 else 's'}"
        return [
            ("device", f"{self.device}: {self.processor}, {threads}, {self.dtype}"),
            ("images", f"{self.images} scored, batches of {timed} timed, {height}x{width} px"),
            ("versions", ", ".join(f"{name} {v}" for name, v in self.versions.items())),
            ("seed, commit", f"{self.seed}, {self.commit}"),
            ("date, load", f"{self.date}, load average {load}"),
            ("command", self.command),
        ]


def processor_name(device: torch.device) -> str:
    """Returns the name of the processor or GPU, as far as the system knows it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str:
    """Returns the short hash of patchslim's own commit, with "-dirty" after local changes."""
    here = Path(__file__)

    def git(*words: str) -> str:
        command = ["git", "-C", str(here.parent), *words]
        finished = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return finished.stdout.strip()

    try:
        # An installed copy may lie in somebody else's repository, whose commit would mean nothing.
        # There this file is not tracked, and git fails here.
        git("ls-files", "--error-unmatch", here.name)
        return git("describe", "--always", "--dirty", "--exclude=*") or "none"
    except (OSError, subprocess.SubprocessError):
        return "none"
