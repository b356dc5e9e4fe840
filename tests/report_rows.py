"""A large report with made-up numbers: every method at five budgets, each beside random."""

from __future__ import annotations

from dataclasses import replace
from random import Random

from patchslim.report.provenance import Provenance
from patchslim.report.report import Report
from patchslim.report.row import CostDistribution, Estimate, Quartiles, Row

METHODS = """adamerge algm atc ats cubistmerge dct diffrate dpcknn duplicates dynamicvit evit evo
gtp kmedoids mctf patch_slimming patch_slimming_dynamic pitome ppt similarity tofu tome
tome_threshold topk zerotprune""".split()
BUDGETS = (0.9, 0.75, 0.65, 0.5, 0.4)
BLOCKS, IMAGES, DENSE_MS = 12, 500, 7.7
GMACS = 243_526_848


def make_report(*, labels: bool = True, times: bool = True, methods: int = len(METHODS)) -> Report:
    """Makes a report of some methods at all budgets, with or without accuracy and times."""
    draw = Random(0)

    def quartiles(median: float) -> Quartiles:
        apart = median * draw.uniform(0.005, 0.05)
        return Quartiles(median, median - apart, median + apart, 20)

    def row(name: str, method: str, share: float, kl: float, tokens: tuple[int, ...]) -> Row:
        right = round(0.99 * IMAGES - min(300.0, 300 * kl)) / IMAGES
        speed = 1.0 if method == "dense" else draw.uniform(0.7, 1) / share
        estimate = Estimate(right, (right * (1 - right) / IMAGES) ** 0.5)
        return Row(
            name=name,
            method=method,
            tokens=tokens,
            macs=round(share * GMACS),
            macs_share=share,
            choosing=0 if method in ("dense", "random") else 24_480,
            parameters=1_375_786,
            accuracy=estimate if labels else None,
            change=Estimate(right - 0.99, 0.004) if labels and method != "dense" else None,
            top5=estimate if labels else None,
            ece=draw.uniform(0.01, 0.05) if labels else None,
            agreement=estimate,
            kl=Estimate(kl, kl / 9 or None),
            latency=quartiles(DENSE_MS / speed) if times else None,
            throughput=quartiles(1000 * speed / DENSE_MS) if times else None,
            speedup=quartiles(speed) if times else None,
            conversion=speed * share if times else None,
            memory=round(5.3e6 * (1 + share) / 2),
        )

    rows = [row("dense", "dense", 1.0, 0.0, (145,) * BLOCKS)]
    for place, method in enumerate(METHODS[:methods]):
        for budget in BUDGETS:
            share = budget - 0.0002 * place
            kl = 0.01 * 1.3**place * (1 / budget - 1) ** 2
            # Differs by method, or methods of one budget would share a baseline.
            fall = 1.7 * (1 - budget)
            tokens = (*(int(145 - 140 * fall * n / BLOCKS) for n in range(1, BLOCKS)), 100 - place)
            made = row(f"{method} {budget:g}", method, share, kl, tokens)
            beside = row(f"random/{made.name}", "random", share, 60 * kl / 1.3**place, tokens)
            rows += [made, beside]
    rows[1] = replace(rows[1], spent=CostDistribution(0.9, 0.89, 0.93, 0.95, 0.97))
    provenance = Provenance(
        device="cpu", processor="a processor", threads=1, dtype="float32", batch=8,
        image_size=(96, 96), images=IMAGES, versions={"python": "3.11.7", "torch": "2.15.0"},
        seed=0, commit="0123456", date="2026-11-29T08:00:00+00:00",
        command="patchslim measure digits --out report.json", load=(1.0, 1.1, 1.2),
    )  # fmt: skip
    return Report(tuple(rows), provenance, "Many methods </script> at many budgets")
