"""Tries every attack and prints five figures for each kind.

In `tests/`: `python -m attacks`, or `python -m attacks images archives`, or `--every 20`. It ends
with 1 where a fault was found, and prints each of them.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections import Counter

import torch

from attacks.attack import Outcome, Verdict, list_attacks, list_kinds, try_attacks

FAULTS = [verdict for verdict in Verdict if verdict.is_fault]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="*", help="all, if none is named")
    parser.add_argument("--every", type=int, default=1, help="try every so-manieth attack only")
    parser.add_argument("--refusals", action="store_true", help="print the refusals, too")
    options = parser.parse_args()
    torch.set_num_threads(1)  # a process with threads cannot be forked safely
    warnings.simplefilter("ignore")
    total: Counter[Verdict] = Counter()
    print("| kind | tried | " + " | ".join(verdict.value for verdict in FAULTS) + " | seconds |")
    print("|" + "---|" * (len(FAULTS) + 3))
    faults: list[Outcome] = []
    for kind in options.kinds or list_kinds():
        begun = time.monotonic()
        counted: Counter[Verdict] = Counter()
        for outcome in try_attacks(list_attacks(kind, options.every)):
            counted[outcome.verdict] += 1
            if outcome.verdict.is_fault or options.refusals:
                faults.append(outcome)
        print_row(kind, counted, time.monotonic() - begun)
        total += counted
    print_row("all", total, 0)
    for outcome in faults:
        print(f"\n{outcome.verdict.value}: {outcome.attack}\n{outcome.detail}")
    return int(any(total[verdict] for verdict in FAULTS))


def print_row(kind: str, counted: Counter[Verdict], seconds: float) -> None:
    figures = [counted.total(), *(counted[verdict] for verdict in FAULTS)]
    print(f"| {kind} | " + " | ".join(map(str, figures)) + f" | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
