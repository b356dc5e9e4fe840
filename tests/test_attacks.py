"""Hostile inputs end in an answer or in one clear error; nothing hangs, and nothing is lost.

A share of each kind runs by default, all of them by `make test-hostile` or `make attack`.
"""

from __future__ import annotations

import os

import pytest

from attacks.attack import (
    Attack,
    Lost,
    SilentlyWrong,
    Verdict,
    list_attacks,
    list_kinds,
    try_attack,
    try_attacks,
)
from child_process import needs_fork
from patchslim.errors import WrongInput

# Attacks train in forked processes. Marked, they come before others that use PyTorch's threads.
pytestmark = needs_fork

SHARE = 200  # by default every so-manieth attack runs
LEAST = {
    "images": 400,
    "archives": 150,
    "recipes": 600,
    "weights": 40,
    "commands": 900,
    "calls": 900,
    "artefacts": 600,
}


def check(kind: str, every: int) -> None:
    outcomes = list(try_attacks(list_attacks(kind, every)))
    faults = [outcome for outcome in outcomes if outcome.verdict.is_fault]
    assert not faults, "\n".join(f"{each.verdict}: {each.attack}\n{each.detail}" for each in faults)


# Attacks on recipes and artefacts need models to spoil, which takes seconds to make.
QUICK = [kind for kind in list_kinds() if kind not in ("recipes", "artefacts")]


@pytest.mark.parametrize("kind", QUICK)
def test_a_share_of_the_attacks_fails(kind: str) -> None:
    check(kind, SHARE)


@pytest.mark.hostile
@pytest.mark.parametrize("kind", list_kinds())
def test_every_attack_fails(kind: str) -> None:
    check(kind, 1)


@pytest.mark.hostile
@pytest.mark.parametrize("kind", list_kinds())
def test_there_are_many_attacks(kind: str) -> None:
    assert len(list_attacks(kind)) >= LEAST[kind]


def refuse(_):
    raise WrongInput("Given a brick, images are needed.")


def be_wrong(_):
    raise SilentlyWrong("The answer is another one.")


def lose(_):
    raise Lost("A file is gone.")


def hang(_):
    while True:
        pass


@pytest.mark.parametrize(
    ("run", "verdict"),
    [
        (lambda folder: folder.iterdir(), Verdict.ANSWERED),
        (refuse, Verdict.REFUSED),
        (lambda _: [][0], Verdict.FOREIGN),
        (lambda _: os._exit(0), Verdict.FOREIGN),
        (lambda _: bytearray(1 << 40), Verdict.FOREIGN),
        (hang, Verdict.HUNG),
        (be_wrong, Verdict.WRONG),
        (lose, Verdict.LOST),
    ],
)
def test_each_fault_has_its_verdict(run, verdict) -> None:
    assert try_attack(Attack("toy", run), seconds=0.3).verdict is verdict
