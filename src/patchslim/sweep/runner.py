"""`Runner`: walks through the cells of a sweep, and measures those that are not in its folder."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from patchslim.deployment.registry import find_target
from patchslim.errors import BadFile, PatchslimError
from patchslim.measurement.latency import use_threads
from patchslim.measurement.rows import Costs, dense_costs
from patchslim.model.slim import untouched_model
from patchslim.planning.cache import device_fingerprint
from patchslim.report.row import Estimate
from patchslim.runs.progress import Progress, ignore_progress
from patchslim.sweep.backend import EAGER, Backend, Opened, open_backend
from patchslim.sweep.cell import DENSE, Cell, Contestant, Variant, describe_method, make_key
from patchslim.sweep.corruption import Corruption
from patchslim.sweep.measuring import (
    Answers,
    Built,
    Reference,
    add_twin,
    answer,
    build_model,
    measure_cell,
)
from patchslim.sweep.resolution import (
    fit_resolution,
    resolution_costs,
    shrink_images,
)
from patchslim.sweep.scaling import run_in_processes
from patchslim.sweep.store import CellResult, Store
from patchslim.sweep.subject import Subject


class Runner:
    """Walks through the cells of a sweep, and measures those that are not in its folder.

    Attributes:
        measured: how many cells were measured.
    """

    def __init__(
        self,
        store: Store,
        methods: Mapping[str, Contestant],
        corruptions: Sequence[Corruption],
        rounds: int,
        threads: int,
        seed: int,
        show: Progress,
    ) -> None:
        self.store, self.methods, self.corruptions = store, methods, corruptions
        self.rounds, self.threads, self.seed, self.show = rounds, threads, seed, show
        self.measured = 0

    def run(self, subject: Subject, cells: Sequence[Cell]) -> dict[Cell, CellResult]:
        """Returns the results of all cells of a host."""
        results: dict[Cell, CellResult] = {}
        with contextlib.ExitStack() as opened:
            host = _HostRun(self, subject, opened)
            for number, cell in enumerate(cells):
                known = self._find(host, cell)
                if known is None:
                    host.open_reference(subject)  # without it no cell can be measured
                    self.show(f"cell {number + 1} of {len(cells)}: {cell}")
                    known = host.measure(cell)
                    asked = {**asdict(cell.variant), "batch": cell.batch}
                    self.store.write_cell(host.key_of(cell), asked, known)
                    self.measured += 1
                results[cell] = known
        return results

    def _find(self, host: _HostRun, cell: Cell) -> CellResult | None:
        """Finds the result of a cell that need not be measured again."""
        known = self.store.read_cell(host.key_of(cell))
        return None if known is None or known.failed else known

    def answer_ahead(self, subject: Subject, cells: Sequence[Cell], workers: int) -> None:
        """Has other processes ask the models of all cells that were not measured yet."""
        host = _HostRun(self, subject, contextlib.ExitStack())  # which opens no runtime here
        missing = [cell for cell in cells if self._find(host, cell) is None]
        models = list(dict.fromkeys(cell.variant for cell in missing))
        if not models:
            return
        for view in (subject, *map(subject.corrupt, self.corruptions)):
            host.open_reference(view)  # once, before all others need it
        there = Runner(
            self.store, self.methods, self.corruptions, self.rounds,
            self.threads, self.seed, ignore_progress,
        )  # fmt: skip
        run_in_processes(_answer_for, (there, subject), models, workers, self.show)


def _answer_for(shared: tuple[Runner, Subject], variant: Variant) -> None:
    """Asks one model, in a process of its own; what is refused is refused again, and recorded."""
    runner, subject = shared
    with use_threads(runner.threads), contextlib.ExitStack() as opened:
        _HostRun(runner, subject, opened).measure_answers(variant)


class _HostRun:
    """The cells of one host: what was opened for one of them is used for the next."""

    def __init__(self, runner: Runner, subject: Subject, opened: contextlib.ExitStack) -> None:
        self.runner, self.subject, self.opened = runner, subject, opened
        self._references: dict[str, Reference] = {}
        self._backends: dict[tuple[str, str], Backend] = {}
        self._dense: dict[tuple[str, str], Opened] = {}
        self._built: tuple[Variant, Built] | None = None
        self._unwritten: BadFile | None = None

    def key_of(self, cell: Cell) -> str:
        """Returns the key of a cell: all that its numbers depend on."""
        runner = self.runner
        times = {"rounds": runner.rounds, "threads": runner.threads}
        copies = [each.name for each in runner.corruptions]
        return make_key(cell, self._facts(cell.variant), times, *([copies] if copies else []))

    def measure(self, cell: Cell) -> CellResult:
        """Measures a cell; where that fails, the result says why, and the sweep goes on."""
        runner = self.runner
        try:
            backend = self._open_backend(cell.variant)
            reference = self.open_reference(self.subject)
            dense = self._open_dense(cell.variant, backend)
            built = self._build(cell.variant, backend)
            return measure_cell(
                cell, self.subject, reference, built, backend, dense,
                rounds=runner.rounds, threads=runner.threads, seed=runner.seed, show=runner.show,
            )  # fmt: skip
        except PatchslimError as error:
            if error is self._unwritten:  # that is the folder's fault, and not the model's
                raise
            return CellResult(refused=str(error))
        except Exception as error:  # noqa: BLE001 (of a library beneath, on one model of many)
            return CellResult(refused=f"{type(error).__name__}: {str(error)[:300]}", failed=True)

    def measure_answers(self, variant: Variant) -> None:
        """Asks a model and keeps its answers; does nothing where that fails."""
        with contextlib.suppress(Exception):  # the sweep meets it again, and records it
            self._build(variant, self._open_backend(variant))

    def _facts(self, variant: Variant) -> dict[str, Any]:
        """Returns what the answers of a variant depend on, besides its own names."""
        method = self.runner.methods.get(variant.label)
        device = next(self.subject.host.parameters()).device
        libraries = [] if variant.runtime == EAGER else [*find_target(variant.runtime).needs]
        return {
            **self.subject.facts,
            "method": describe_method(method),
            "seed": self.runner.seed,
            "device": device_fingerprint(device, libraries),
        }

    def _open_backend(self, variant: Variant) -> Backend:
        """Opens the backend of a variant, once for all that run on it."""
        place = (variant.runtime, variant.precision)
        if place not in self._backends:
            backend = open_backend(*place, self.runner.threads, self.subject.calibration)
            self._backends[place] = self.opened.enter_context(backend)
        return self._backends[place]

    def open_reference(self, view: Subject) -> Reference:
        """Asks the dense model for the images of a view, or reads what it answered before."""
        known = view.facts["images"]
        if known not in self._references:
            dense = Variant(view.name, DENSE, None, EAGER, "")
            key = make_key("reference", {**self._facts(dense), **view.facts})
            found = self.runner.store.read_answers(key)
            if found is None:
                found = {DENSE: Reference.answers(view, self.runner.show)}
                self.runner.store.write_answers(key, found)
            tensors = found[DENSE]
            self._references[known] = Reference(
                untouched_model(self.subject.host, self.subject.adapter),
                tensors["logits"],
                tensors.get("labels"),
            )
        return self._references[known]

    def _open_dense(self, variant: Variant, backend: Backend) -> Opened:
        """Opens the dense model on a backend, once for all that run on it."""
        place = (variant.runtime, variant.precision)
        if place not in self._dense:
            untouched = self.open_reference(self.subject).untouched
            self._dense[place] = backend.open_dense(untouched)
        return self._dense[place]

    def _build(self, variant: Variant, backend: Backend) -> Built:
        """Builds and scores a variant; the one before is used again for another batch."""
        if self._built is not None and self._built[0] == variant:
            return self._built[1]
        self._built = None
        runner, subject = self.runner, self.subject
        untouched = self.open_reference(subject).untouched
        costs: dict[str, Costs] = {}
        if variant.is_dense:
            models = {DENSE: untouched}
            opened = {DENSE: self._open_dense(variant, backend)}
            costs = {DENSE: dense_costs(untouched, None)}
        elif runner.methods[variant.label] is None:
            smaller = fit_resolution(untouched, variant.budget or 1.0)
            models = {variant.name: smaller}
            opened = {variant.name: shrink_images(backend.open_dense(smaller), smaller)}
            costs = {variant.name: resolution_costs(smaller, untouched)}
        else:
            # A copy: some methods learn, or grow with the host they are given.
            method: Any = copy.deepcopy(runner.methods[variant.label])
            model = build_model(subject, variant, method)
            models = add_twin(subject, variant.name, model.eval(), runner.seed)
            opened = {name: backend.open(each.eval()) for name, each in models.items()}
        answers = self._answers(variant, backend, subject, opened)
        own = {variant.name: opened[variant.name]}
        corrupted: dict[str, Estimate] = {}
        for corruption in runner.corruptions:
            view = subject.corrupt(corruption)
            tally = self._answers(variant, backend, view, own)[variant.name].tally
            score = tally.score(self.open_reference(view).tally)
            found = score.accuracy or score.agreement
            corrupted |= {} if found is None else {corruption.name: found}
        built = Built(
            models, opened, answers, self._answers_key(variant, subject), costs, corrupted
        )
        self._built = (variant, built)
        return built

    def _answers_key(self, variant: Variant, view: Subject) -> str:
        """Returns the key of what a variant answers to the images of a view."""
        return make_key("answers", variant, {**self._facts(variant), **view.facts})

    def _answers(
        self, variant: Variant, backend: Backend, view: Subject, opened: Mapping[str, Opened]
    ) -> dict[str, Answers]:
        """Scores models on the images of a view, or reads what they answered before."""
        reference = self.open_reference(view)
        key = self._answers_key(variant, view)
        found = self.runner.store.read_answers(key)
        if variant.is_dense and backend.runtime == EAGER and _is_own(backend, view):
            scored = {DENSE: Answers(reference.tally, [])}
        elif found is not None and set(found) == set(opened):
            return {name: Answers.from_tensors(each) for name, each in found.items()}
        else:
            scored = answer(view, reference, opened, self.runner.show)
        try:
            self.runner.store.write_answers(
                key, {name: each.to_tensors() for name, each in scored.items()}
            )
        except BadFile as error:
            self._unwritten = error
            raise
        return scored


def _is_own(backend: Backend, subject: Subject) -> bool:
    """Tells whether a precision is that of the host's own weights."""
    return str(next(subject.host.parameters()).dtype) == f"torch.{backend.precision}"
