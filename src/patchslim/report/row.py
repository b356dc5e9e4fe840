"""`Row`: what was measured of one model, each number with its quartiles or standard error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Quartiles:
    """Median and quartiles of repeated timings, or of ratios of them."""

    median: float
    low: float
    high: float
    repeats: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Quartiles:
        """Computes median and quartiles of `values`, with linear interpolation."""
        quarters = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
        low, median, high = torch.tensor(values, dtype=torch.float64).quantile(quarters).tolist()
        return cls(median, low, high, len(values))


@dataclass(frozen=True)
class Estimate:
    """A mean over images with its standard error."""

    value: float
    error: float | None

    @classmethod
    def mean(cls, values: Tensor) -> Estimate:
        """Returns the mean of one number for each image; a single image gives no error."""
        error = float(values.std()) / len(values) ** 0.5 if len(values) > 1 else None
        return cls(float(values.mean()), error)

    @classmethod
    def share(cls, hits: Tensor) -> Estimate:
        """Returns the share of images with a hit.

        For the error half a hit and half a miss are added: otherwise 400 hits in 400 images would
        have an error of 0, as if they proved a share of 1.
        """
        count = len(hits)
        smooth = (float(hits.sum()) + 0.5) / (count + 1)
        error = (smooth * (1 - smooth) / (count + 2)) ** 0.5
        return cls(float(hits.double().mean()), error)

    def show(self, *, percent: bool = False, signed: bool = False) -> str:
        """Writes the mean with its error."""
        if percent:
            error = "" if self.error is None else f" ±{100 * self.error:.1f}"
            return f"{100 * self.value:{'+' if signed else ''}.1f}{error}"
        error = "" if self.error is None else f" ±{self.error:.1g}"
        return f"{self.value:.2g}{error}"


@dataclass(frozen=True)
class WorstClass:
    """The class that loses most, with the shares of its images that are read right.

    Attributes:
        label: the number of the class.
        images: how many images of it there are.
        dense: the share that the dense model reads right.
        accuracy: the share that this model does.
    """

    label: int
    images: int
    dense: float
    accuracy: float


@dataclass(frozen=True)
class CostDistribution:
    """What images cost if each keeps a number of patches of its own, as shares of the dense MACs.

    Attributes:
        mean, p50, p99, most: mean, median, 99th percentile and maximum over the images.
        cap: the most that any image can cost, whatever it shows.
    """

    mean: float
    p50: float
    p99: float
    most: float
    cap: float

    @classmethod
    def of(cls, shares: Sequence[float], cap: float) -> CostDistribution:
        """Computes the distribution from the share that each image cost."""
        values = torch.tensor(shares, dtype=torch.float64)
        p50, p99 = values.quantile(torch.tensor([0.5, 0.99], dtype=torch.float64)).tolist()
        return cls(float(values.mean()), p50, p99, float(values.max()), cap)

    def show(self) -> str:
        """Writes the mean, and how far images go beyond it."""
        return f"{self.mean:.3f} (p99 {self.p99:.2f}, max {self.most:.2f}, cap {self.cap:.2f})"


@dataclass(frozen=True)
class Row:
    """What was measured of one model. A field is None if it was not measured.

    Attributes:
        name: the name of the model.
        method: the name of its method; "dense" for the untouched host.
        tokens: tokens left after each block, prefix tokens included.
        macs: multiply-adds per image; the mean if images keep different numbers of patches.
        macs_share: the same as a share of the dense model's.
        choosing: multiply-adds, at most, that the method spends on its decisions; not in `macs`.
        spent: the distribution of `macs_share` if images keep different numbers of patches.
        parameters: number of parameters, the method's own included.
        accuracy: share of images whose label comes first.
        change: accuracy less the dense model's, with the standard error of the paired difference.
        top5: share of images whose label is among the first five answers; for hosts of six
            classes or more.
        ece: expected calibration error, in 15 bins of the answer's probability.
        agreement: share of images whose first answer is the dense model's.
        kl: KL(dense || this model) over the classes, in nats.
        latency: milliseconds per image.
        throughput: images per second, from the same times.
        speedup: the dense model's time over this model's, paired round by round of one run.
        conversion: speed-up times share of MACs; 1 if time falls as operations do.
        memory: peak bytes of activations in one forward pass of a batch.
        lost, won: shares of images that the dense model reads right and this one wrong, and the
            other way round; of `change`, these are the two parts.
        worst: the class that loses most accuracy, among those with some images.
        corrupted: accuracy on corrupted copies of the images, by kind and strength; without labels
            agreement with the dense model on the same copies.
        host, runtime, precision, batch: the dense model it was made of and what it ran on, where
            the rows of a report differ in that.
    """

    name: str
    method: str
    tokens: tuple[int, ...]
    macs: int
    macs_share: float
    choosing: int = 0
    spent: CostDistribution | None = None
    parameters: int | None = None
    accuracy: Estimate | None = None
    change: Estimate | None = None
    top5: Estimate | None = None
    ece: float | None = None
    agreement: Estimate | None = None
    kl: Estimate | None = None
    latency: Quartiles | None = None
    throughput: Quartiles | None = None
    speedup: Quartiles | None = None
    conversion: float | None = None
    memory: int | None = None
    lost: Estimate | None = None
    won: Estimate | None = None
    worst: WorstClass | None = None
    corrupted: Mapping[str, Estimate] | None = None
    host: str | None = None
    runtime: str | None = None
    precision: str | None = None
    batch: int | None = None

    @property
    def place(self) -> tuple[str | None, str | None, str | None, int | None]:
        """The dense model it was made of, and what it ran on: times of one place compare."""
        return (self.host, self.runtime, self.precision, self.batch)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Row:
        """Makes a row from the data of `dataclasses.asdict`; a missing entry was not measured."""
        fields = {**data, "tokens": tuple(data["tokens"])}
        for name in ("accuracy", "change", "top5", "agreement", "kl", "lost", "won"):
            fields[name] = Estimate(**data[name]) if data.get(name) else None
        fields["spent"] = CostDistribution(**data["spent"]) if data.get("spent") else None
        if data.get("corrupted"):
            fields["corrupted"] = {k: Estimate(**each) for k, each in data["corrupted"].items()}
        fields["worst"] = WorstClass(**data["worst"]) if data.get("worst") else None
        for name in ("latency", "throughput", "speedup"):
            fields[name] = Quartiles(**data[name]) if data.get(name) else None
        return cls(**fields)
