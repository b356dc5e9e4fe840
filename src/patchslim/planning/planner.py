"""`Planner`: searches schedules of several methods for one goal, and measures the answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from patchslim.benchmarking.result import Ratio
from patchslim.errors import ImpossibleBudget
from patchslim.measurement.latency import latency
from patchslim.measurement.sample import fill_batch
from patchslim.methods._method import Method
from patchslim.methods._registry import method_label
from patchslim.model.model import SlimModel
from patchslim.model.plan import Plan, plan_schedule
from patchslim.planning.damage import fit_damage, probe_damage
from patchslim.planning.finalists import (
    FINALISTS,
    USUAL_SHARE,
    choose_contenders,
    choose_finalists,
    slim_untouched,
)
from patchslim.planning.goal import PlanGoal
from patchslim.planning.judging import Jury
from patchslim.planning.latency_table import LatencyTable
from patchslim.planning.measuring import time_decisions
from patchslim.planning.method_search import MethodSearch
from patchslim.planning.result import Candidate, PlanResult
from patchslim.planning.runtimes import Runtime
from patchslim.runs.progress import Progress
from patchslim.schedules.budget import macs_target
from patchslim.schedules.schedule import Tail
from patchslim.tokens.shapes import dense_macs

PROBED = 48  # images on which single cuts are tried
JUDGED = 16  # of those, at a time
ATTEMPTS = 3  # to meet a target in time: each learns from what the one before measured
MARGIN = 1.03  # by how much a measured time may miss its target, before another attempt
MISSED = 1.05  # by how much at the end, before the target is refused
SPARE = 1.06  # by how much it may be reached, before another attempt
SURPRISE = 0.1  # by how much a measured time may differ from what was predicted, to be believed
BISECTIONS = 6  # of the time, for a tolerated divergence
TIMED_SECONDS = 6.0  # for the answer and the dense model, in turns
FEWEST_ROUNDS, MOST_ROUNDS = 9, 40
WARMUP = 2


@dataclass(frozen=True)
class Choice:
    """A plan that was considered, and what is known of it."""

    search: MethodSearch
    plan: Plan
    candidate: Candidate


class Attempt(NamedTuple):
    """A plan that was timed, best of the choices that there were.

    Attributes:
        choices: what was considered, best first; none for the dense model.
        model: the first of them.
        measured: its time, as a share of the dense model's.
        dense: seconds of the dense model.
    """

    choices: list[Choice]
    model: SlimModel
    measured: Ratio
    dense: float

    @property
    def seconds(self) -> float:
        """What it took."""
        return self.measured.median * self.dense


class Planner:
    """Plans for one host, goal and device."""

    def __init__(
        self,
        untouched: SlimModel,
        goal: PlanGoal,
        device: Runtime,
        batch: int,
        chosen: Tensor,
        show: Progress,
        tables: Callable[..., LatencyTable],
    ) -> None:
        self.untouched, self.goal, self.device, self.batch = untouched, goal, device, batch
        self.tables = tables
        self.chosen, self.show = chosen, show
        self.timed_images = fill_batch(chosen, batch)
        self.jury = Jury(untouched, chosen)
        self.dense_call = device.dense(untouched)

    def search(self, model: SlimModel, place: str = "") -> MethodSearch:
        """Learns what the blocks of a method take, and what its cuts change.

        `place` says which of several methods it is, where progress is shown.
        """
        show = self._show_for(model.method, place)
        table = self.tables(model, self.device, self.timed_images, show)
        probed = self.chosen[:PROBED].split(JUDGED)
        return MethodSearch(
            model, table, fit_damage(probe_damage(self.untouched, model, probed, show))
        )

    def answer(self, methods: Sequence[Method], reported: Tensor) -> PlanResult:
        """Returns the plan that reaches the goal with one of the methods, measured from end to end.

        Nothing is searched where the dense model is fast enough.
        """
        limit = self.goal.seconds(self.batch)
        if limit is not None:
            choices, model, measured, dense = self._meet_time(methods, limit)
        else:
            choices = self._without_time(methods)
            model = self._untouched("exact")
            if choices:
                model = SlimModel(self.untouched.host, choices[0].plan).eval()
            measured, dense = self._time(model)
        if choices and not is_faster(measured):
            choices, model = [], self._untouched("exact")
            measured, dense = self._time(model)
        if not choices and measured.low > 1:  # the loop itself costs more than it leaves out
            model = self._untouched("full")
            measured, dense = self._time(model)
        self.show("judging the answer on images that were not searched")
        verdict = Jury(self.untouched, reported).judge(model)
        errors = [
            abs(check.error) for choice in choices[:1] for check in choice.search.table.checks
        ]
        return PlanResult(
            model=model,
            goal=self.goal,
            device={
                "runtime": self.device.name,
                "precision": self.device.precision,
                "batch": self.batch,
                "threads": self.device.threads,
            },
            predicted=choices[0].candidate.predicted if choices else None,
            measured=measured,
            dense_ms=1000 * dense,
            kl=verdict.kl,
            agreement=verdict.agreement,
            images=len(reported),
            candidates=tuple(choice.candidate for choice in choices),
            check_error=max(errors, default=None),
        )

    def _meet_time(self, methods: Sequence[Method], limit: float) -> Attempt:
        """Returns what meets a limit of seconds: planned again with what was learned.

        The dense model is timed first; a limit that it meets already needs no plan.
        """
        untouched = self._untouched("exact")
        measured, dense = self._time(untouched)
        if dense <= limit:
            return Attempt([], untouched, measured, dense)
        models = self._rank(methods, limit / dense)
        searches = self._search_all(models[:FINALISTS])
        try:
            return self._try_to_meet(searches, limit, dense)
        except ImpossibleBudget:
            if len(models) <= FINALISTS:
                raise
        searches += self._search_all(models[FINALISTS:])
        return self._try_to_meet(searches, limit, dense)

    def _try_to_meet(self, searches: list[MethodSearch], limit: float, dense: float) -> Attempt:
        """Returns what meets a limit of seconds with the methods that were searched.

        Raises:
            ImpossibleBudget: none of them does.
        """
        off = {id(search): 1.0 for search in searches}
        attempts: list[Attempt] = []
        for _ in range(ATTEMPTS):
            choices = []
            for search in searches:
                choices += self._judge(
                    search, search.plans_for_time(limit / dense / off[id(search)])
                )
            if not choices:
                break
            choices.sort(key=lambda choice: choice.candidate.kl)
            best = choices[0]
            model = SlimModel(self.untouched.host, best.plan).eval()
            predicted = best.candidate.predicted
            measured, dense = self._time_again_if_surprising(model, predicted)
            self.show(f"takes {measured.median:.3f}, {predicted:.3f} was predicted")
            attempts.append(Attempt(choices, model, measured, dense))
            if limit / SPARE <= attempts[-1].seconds <= limit * MARGIN:
                break
            off[id(best.search)] = measured.median / predicted
        for allowed in MARGIN, MISSED:
            met = [each for each in attempts if each.seconds <= limit * allowed]
            if met:
                return min(met, key=lambda each: each.choices[0].candidate.kl)
        reached = attempts[-1].seconds if attempts else None
        raise self._unreachable(searches, dense, reached)

    def _rank(
        self, methods: Sequence[Method], share: float, *, of_time: bool = True
    ) -> list[SlimModel]:
        """Returns the methods that promise most for a share of the dense time, or operations."""
        models = [slim_untouched(self.untouched, method) for method in methods]
        if len(models) > FINALISTS:
            models = choose_contenders(self.untouched, models, self.chosen, share, self.show)
        if len(models) > FINALISTS and of_time:
            decisions = time_decisions(models, self.device, self.timed_images, self.show)
            models = choose_finalists(
                self.untouched, models, decisions, self.chosen, share, self.show
            )
        return models

    def _search_all(self, models: Sequence[SlimModel]) -> list[MethodSearch]:
        """Searches several methods, one after the other."""
        if len(models) == 1:
            return [self.search(models[0])]
        return [
            self.search(model, f"method {number} of {len(models)}, ")
            for number, model in enumerate(models, 1)
        ]

    def _without_time(self, methods: Sequence[Method]) -> list[Choice]:
        """Returns the plans for a goal in operations or in divergence, best first."""
        if self.goal.macs is not None:
            dense = dense_macs(self.untouched.plan.shape).total
            target = macs_target(self.goal.macs, dense)
            models = self._rank(methods, target / dense, of_time=False)
            searches = self._search_all(models[:FINALISTS])
            choices = [
                choice
                for search in searches
                for choice in self._judge(search, search.plans_for_macs(target))
            ]
            if not choices:
                raise ImpossibleBudget(
                    f"{self.goal}: no method can go so low here. Give more operations."
                )
            return sorted(choices, key=lambda choice: choice.candidate.kl)
        allowed = float(self.goal.max_kl or 0)
        searches = self._search_all(self._rank(methods, USUAL_SHARE)[:FINALISTS])
        choices = [each for search in searches for each in self._fastest(search, allowed)]
        return sorted(choices, key=lambda choice: choice.candidate.predicted)

    def _fastest(self, search: MethodSearch, allowed: float) -> list[Choice]:
        """Returns the fastest plan of a method within a divergence; none if all are beyond it."""
        low, high = search.shortest_time(), 1.0
        found: list[Choice] = []
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            tried = self._judge(search, search.plans_for_time(middle))
            good = [choice for choice in tried if choice.candidate.kl <= allowed]
            if good:
                found, high = [min(good, key=lambda choice: choice.candidate.kl)], middle
            else:
                low = middle
        return found

    def _judge(self, search: MethodSearch, plans: Iterator[tuple[str, Plan]]) -> list[Choice]:
        """Runs plans on the images that are searched."""
        choices = []
        for by, each in plans:
            name = method_label(search.model.method)
            self.show(f"{name}: judging the plan by {by}")
            kl = self.jury.judge(SlimModel(self.untouched.host, each).eval()).kl.value
            found = Candidate(name, by, search.predict(each), kl, each.counts)
            choices.append(Choice(search, each, found))
        return choices

    def _untouched(self, tail: Tail) -> SlimModel:
        """Returns the model that removes nothing: the host itself, or without rows nobody reads."""
        plan, host = self.untouched.plan, self.untouched.host
        tail = "full" if plan.shape.read is None else tail
        plan = plan_schedule(host, plan.adapter, plan.method, plan.schedule, tail)
        model = SlimModel(host, plan).eval()
        model.calibrated = {"planned": {}}
        return model

    def _time(self, model: SlimModel) -> tuple[Ratio, float]:
        """Times a model beside the dense one: their ratio, and seconds of the dense one."""
        calls = {"dense": self.dense_call, "answer": self.device.whole(model)}
        with torch.inference_mode():
            once = latency(calls, self.timed_images, 1, WARMUP)
        one_round = sum(each[0] for each in once.values())
        rounds = max(FEWEST_ROUNDS, min(MOST_ROUNDS, int(TIMED_SECONDS / one_round)))
        taken = latency(calls, self.timed_images, rounds, 0, progress=self.show)
        pairs = zip(taken["answer"], taken["dense"], strict=True)
        ratio = Ratio.of([slim / dense for slim, dense in pairs], 0)
        dense = sorted(taken["dense"])[rounds // 2]
        return ratio, dense

    def _time_again_if_surprising(self, model: SlimModel, predicted: float) -> tuple[Ratio, float]:
        """Times a model; twice if the time is far from what was predicted.

        If other work ran meanwhile, times are spread out. The steadier of both counts.
        """
        timed = self._time(model)
        if abs(timed[0].median / predicted - 1) > SURPRISE:
            timed = min(timed, self._time(model), key=lambda each: each[0].spread)
        return timed

    def _show_for(self, method: Method, place: str) -> Progress:
        """Shows progress with the place and the name of a method before it."""
        return lambda line: self.show(f"{place}{method_label(method)}: {line}")

    def _unreachable(
        self, searches: list[MethodSearch], dense: float, reached: float | None = None
    ) -> ImpossibleBudget:
        """Returns the error for a target in time that nothing reaches."""
        best = min(searches, key=lambda search: search.shortest_time())
        fastest = 1000 * dense * best.shortest_time()
        if reached is not None:
            fastest = max(fastest, 1000 * reached)
        rate = "" if self.goal.latency_ms else f", {1000 * self.batch / fastest:.4g} images/s"
        return ImpossibleBudget(
            f"{self.goal}: the fastest that is possible here is about {fastest:.4g} ms for a batch "
            f"of {self.batch}{rate} ({method_label(best.model.method)}, with an eighth of the "
            f"patches); the dense model takes {1000 * dense:.4g} ms. Give more time, another "
            "runtime, or a smaller model."
        )


def is_faster(measured: Ratio) -> bool:
    """Tells whether a model is faster than the dense one, beyond the noise of the measurement."""
    return measured.high < 1
