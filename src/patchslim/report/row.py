"""`Row`: what was measured of one model, and the spreads and errors of its numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Quartiles:
    """The median of repeated timings or ratios, with the quartiles beside it."""

    median: float
    low: float
    high: float
    repeats: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Quartiles:
        """Median and quartiles of `values`, between which neighbours are interpolated."""
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
        """The mean of one number an image; the error of a single one is not known."""
        error = float(values.std()) / len(values) ** 0.5 if len(values) > 1 else None
        return cls(float(values.mean()), error)

    @classmethod
    def share(cls, hits: Tensor) -> Estimate:
        """The share of images with a hit.

        The error is that of a share with half a hit and half a miss added, so that 400 hits of
        400 are not certain.
        """
        count = len(hits)
        smooth = (float(hits.sum()) + 0.5) / (count + 1)
        error = (smooth * (1 - smooth) / (count + 2)) ** 0.5
        return cls(float(hits.double().mean()), error)

    def show(self, *, percent: bool = False, signed: bool = False) -> str:
        """The mean with its error, as text."""
        if percent:
            error = "" if self.error is None else f" ±{100 * self.error:.1f}"
            return f"{100 * self.value:{'+' if signed else ''}.1f}{error}"
        error = "" if self.error is None else f" ±{self.error:.1g}"
        return f"{self.value:.2g}{error}"


@dataclass(frozen=True)
class CostDistribution:
    """What images cost where each keeps a number of patches of its own, as shares of dense.

    `cap` is what none can exceed, whatever it shows.
    """

    mean: float
    p50: float
    p99: float
    most: float
    cap: float

    @classmethod
    def of(cls, shares: Sequence[float], cap: float) -> CostDistribution:
        """The distribution of one share an image."""
        values = torch.tensor(shares, dtype=torch.float64)
        p50, p99 = values.quantile(torch.tensor([0.5, 0.99], dtype=torch.float64)).tolist()
        return cls(float(values.mean()), p50, p99, float(values.max()), cap)

    def show(self) -> str:
        """The mean, and how far images stray from it."""
        return f"{self.mean:.3f} (p99 {self.p99:.2f}, max {self.most:.2f}, cap {self.cap:.2f})"


@dataclass(frozen=True)
class Row:
    """What was measured of one model; None is what was not.

    Attributes:
        name, method: of the model; the first row's method is "dense".
        tokens: rows left after each block, prefix included.
        macs, macs_share: multiply-adds of an image, and as a share of the dense model's; where
            images keep different numbers of patches, the mean.
        spent: the distribution of that share, where it is one.
        choosing: multiply-adds that the method spends on deciding, not part of `macs`; at most.
        parameters: numbers that the model has learned, the method's own included.
        accuracy, agreement: shares of images, by label and by the dense model's answer.
        change: accuracy less the dense model's, with the standard error of the paired difference.
        top5: share of images whose label is among five answers; hosts of six classes or more.
        ece: expected calibration error, in 15 bins of the answer's probability.
        kl: KL(dense || this model) over the classes, in nats.
        latency: milliseconds an image.
        throughput: images a second, from the same times.
        speedup: the dense model's time over this model's, paired round by round of one run.
        conversion: speed-up times share of MACs; 1 where time falls as operations do.
        memory: peak bytes of activations in one forward pass of a batch.
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

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Row:
        """The row that `dataclasses.asdict` took apart; what it does not have was not measured."""
        fields = {**data, "tokens": tuple(data["tokens"])}
        for name in ("accuracy", "change", "top5", "agreement", "kl"):
            fields[name] = Estimate(**data[name]) if data.get(name) else None
        fields["spent"] = CostDistribution(**data["spent"]) if data.get("spent") else None
        for name in ("latency", "throughput", "speedup"):
            fields[name] = Quartiles(**data[name]) if data.get(name) else None
        return cls(**fields)
