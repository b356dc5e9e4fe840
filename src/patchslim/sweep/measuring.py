"""Measures one cell: builds its model, scores it, and times it beside dense and `random`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from patchslim.calibration.calibrate import calibrate, must_be_calibrated
from patchslim.errors import BadSetting, DeepCut, Untrained
from patchslim.measurement.latency import latency
from patchslim.measurement.measure import WARMUP
from patchslim.measurement.memory import peak_memory
from patchslim.measurement.models import add_random, mean_counts
from patchslim.measurement.rows import Costs, Measurements, make_row, slim_costs
from patchslim.measurement.sample import (
    count_images,
    draw_sample,
    fill_batch,
    move_to_host,
    read_first,
)
from patchslim.measurement.score import Tally, tally
from patchslim.methods._method import Method, needs_no_budget
from patchslim.model.model import SlimModel
from patchslim.model.slim import slim
from patchslim.report.provenance import Provenance
from patchslim.report.row import Estimate, Row
from patchslim.runs.progress import Progress
from patchslim.sweep.backend import EAGER, Backend, Opened
from patchslim.sweep.cell import DENSE, Cell, Variant
from patchslim.sweep.store import CellResult
from patchslim.sweep.subject import Subject
from patchslim.versions import installed_version


@dataclass(frozen=True)
class Answers:
    """What a model answered, with what its images cost.

    Attributes:
        tally: one number an image for each score.
        spent: operations of each image; empty where all images cost the same.
    """

    tally: Tally
    spent: list[int]

    def to_tensors(self) -> dict[str, Tensor]:
        """Returns tensors with one value an image."""
        return {**self.tally.to_tensors(), "spent": torch.tensor(self.spent, dtype=torch.int64)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Answers:
        """Makes the answers that `to_tensors` was called of."""
        spent = tensors.get("spent", torch.zeros(0))
        return cls(Tally.from_tensors(tensors), [int(each) for each in spent])


class Reference:
    """The dense model in PyTorch, which every model of a host is compared with.

    Attributes:
        untouched: the host with nothing removed, as a slimmed model.
        logits: its class scores for all images, in their order.
        tally: its own scores.
    """

    def __init__(self, untouched: SlimModel, logits: Tensor, labels: Tensor | None) -> None:
        self.untouched, self.logits = untouched, logits
        self.tally = Tally()
        self.tally.add(logits, logits, labels)

    @classmethod
    def answers(cls, subject: Subject, show: Progress) -> dict[str, Tensor]:
        """Asks the dense model for all images; returns its class scores, and labels if any."""
        found: list[Tensor] = []

        def ask(images: Tensor) -> Tensor:
            images = move_to_host(images, subject.host)
            found.append(subject.adapter.logits(subject.host(images)).float().cpu())
            return found[-1]

        with torch.inference_mode():
            # The dense answers are checked as those of every model are.
            total = count_images(subject.images)
            labels = tally({DENSE: ask}, subject.images, total=total, progress=show)[DENSE].labels
        logits = {"logits": torch.cat(found)}
        return {**logits, "labels": torch.cat(labels)} if labels else logits


def build_model(subject: Subject, variant: Variant, method: Method | SlimModel) -> SlimModel:
    """Slims the host as a variant says; calibrates what must be calibrated."""
    if isinstance(method, SlimModel):
        return method.to(next(subject.host.parameters()).device)
    if must_be_calibrated(method):
        if subject.calibration is None:
            raise BadSetting(
                f"{variant.label} has to be fitted to images first: give `calibration`, images "
                "without labels that are not among those to score."
            )
        return calibrate(subject.host, subject.calibration, method, macs=variant.budget).model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeepCut)  # the rows show what it costs
        warnings.simplefilter("error", Untrained)
        try:
            if needs_no_budget(method):
                return slim(subject.host, method, adapter=subject.adapter)
            return slim(subject.host, method, macs=variant.budget, adapter=subject.adapter)
        except Untrained:
            raise BadSetting(
                f"{variant.label} learns what to keep, and was not trained. Train it "
                "(`patchslim train`), and measure what comes out."
            ) from None


def add_twin(subject: Subject, name: str, model: SlimModel, seed: int) -> dict[str, SlimModel]:
    """Returns the model, and `random` at its token counts unless it is that itself."""
    sample = draw_sample(subject.images) if model.method.adaptive else None
    opening = read_first(subject.images)[0] if sample is None else sample
    with torch.inference_mode():
        return add_random({name: model}, opening, seed)


def answer(
    subject: Subject, reference: Reference, opened: Mapping[str, Opened], show: Progress
) -> dict[str, Answers]:
    """Asks models for all images, and compares each answer with the dense model's."""
    seen = 0

    def recall(images: Tensor) -> Tensor:
        nonlocal seen
        seen += len(images)
        return reference.logits[seen - len(images) : seen]

    def show_asked(line: str) -> None:
        if not line.startswith(f"{DENSE}: "):  # which is recalled, and not asked
            show(line)

    forwards = {DENSE: recall, **{name: each.logits for name, each in opened.items()}}
    for each in opened.values():
        each.spent.clear()
    total = count_images(subject.images)
    with torch.inference_mode():
        tallies = tally(forwards, subject.images, total=total, progress=show_asked)
    return {name: Answers(tallies[name], [*each.spent]) for name, each in opened.items()}


@dataclass(frozen=True)
class Built:
    """A variant that was built and opened on its backend.

    Attributes:
        models: the model and its random twin, by name; the untouched host for the dense variant.
        opened: the same as they run.
        answers: what each answered.
        kept_as: the key under which the answers are kept.
        costs: what a model costs that is no slimmed one.
        corrupted: scores on corrupted copies of the images, by kind, of the model itself.
    """

    models: Mapping[str, SlimModel]
    opened: Mapping[str, Opened]
    answers: Mapping[str, Answers]
    kept_as: str
    costs: Mapping[str, Costs]
    corrupted: Mapping[str, Estimate]


def measure_cell(  # noqa: PLR0913 (a cell, and what it is measured with)
    cell: Cell,
    subject: Subject,
    reference: Reference,
    built: Built,
    backend: Backend,
    dense: Opened,
    *,
    rounds: int,
    threads: int,
    seed: int,
    show: Progress,
) -> CellResult:
    """Times the models of a cell in turns with the dense model, and makes their rows."""
    opening = read_first(subject.images)[0]
    images = fill_batch(opening, cell.batch)
    size = (images.shape[-2], images.shape[-1])
    calls = {DENSE: dense, **{n: each for n, each in built.opened.items() if n != DENSE}}
    ready = {name: each.prepare(images) for name, each in calls.items()}
    runs = {name: _bind(each, ready[name]) for name, each in calls.items()}
    with torch.inference_mode():
        there = ready[DENSE]  # on the device, which is waited for
        seconds = latency(runs, there, rounds, WARMUP, progress=show) if rounds else {}
        memory = {}
        if backend.runtime == EAGER:
            memory = {name: peak_memory(partial(run, images)) for name, run in runs.items()}
        sample = draw_sample(subject.images) if _differs(built) else None
        counted = {DENSE, *built.costs}
        slimmed = {name: each for name, each in built.models.items() if name not in counted}
        measured = Measurements(
            scores={n: each.tally.score(reference.tally) for n, each in built.answers.items()},
            spent={name: built.answers[name].spent for name in slimmed},
            timed={name: _timed_macs(each, images, backend) for name, each in slimmed.items()},
            tokens={
                name: mean_counts(each, opening if sample is None else sample)
                for name, each in slimmed.items()
            },
            seconds=seconds,
            memory=memory,
            batch=cell.batch,
        )
    costs = {name: slim_costs(name, each, size, measured) for name, each in slimmed.items()}
    costs |= built.costs
    rows = [make_row(name, each, measured) for name, each in costs.items()]
    provenance = Provenance.of(
        next(subject.host.parameters()).device,
        backend.precision,
        batch=cell.batch,
        image_size=size,
        images=reference.tally.images,
        seed=seed,
        threads=threads,
        versions={name: installed_version(name) or "unknown" for name in backend.needs},
    )
    if built.corrupted:
        rows[0] = replace(rows[0], corrupted=built.corrupted)
    return CellResult(tuple(_say_where(row, cell) for row in rows), provenance, built.kept_as)


def _bind(opened: Opened, ready: Tensor) -> Callable[[Tensor], object]:
    """Returns a call on images that were prepared before the clock started."""
    return lambda _: opened.run(ready)


def _timed_macs(model: SlimModel, images: Tensor, backend: Backend) -> list[int]:
    """Returns the operations of the images that are timed.

    A file pads images to the most that any of them keeps, so that there all cost the same.
    """
    if model.method.adaptive and backend.runtime == EAGER:
        return [cost.total for cost in model.macs_of(images)]
    return [model.macs((images.shape[-2], images.shape[-1])).total]


def _differs(built: Built) -> bool:
    """Tells whether images cost different amounts in one of the models."""
    return any(each.method.adaptive for each in built.models.values())


def _say_where(row: Row, cell: Cell) -> Row:
    """Returns the row with what it ran on."""
    variant = cell.variant
    return replace(
        row,
        host=variant.host,
        runtime=variant.runtime,
        precision=variant.precision,
        batch=cell.batch,
    )
