"""`plan`: finds the method and schedule that reach a target on this device and lose least."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterable, Iterator

from torch import nn

from patchslim.data.source import Source
from patchslim.errors import BadSetting, DeepCut, UnsupportedModel, Untrained
from patchslim.hosts._adapter import Adapter
from patchslim.hosts._answers import eval_mode
from patchslim.measurement.score import Batch, check_batches
from patchslim.methods._method import Method
from patchslim.methods._registry import make_method, method_label
from patchslim.model.check import check_identity
from patchslim.model.model import SlimModel
from patchslim.model.recipe import to_plain_data
from patchslim.model.slim import untouched_model, warn_if_deep
from patchslim.planning.goal import PlanGoal
from patchslim.planning.judging import read_halves
from patchslim.planning.method_search import find_obstacle, plannable_methods
from patchslim.planning.planner import Planner
from patchslim.planning.result import PlanResult
from patchslim.planning.runtimes import EAGER, open_runtime
from patchslim.planning.tables import find_table
from patchslim.runs.progress import Progress, check_progress
from patchslim.settings import BATCH, Range, check_type, check_value, show_value

AUTO = "auto"
SECONDS = Range(0, 86400, above=True)
FEWEST_PATCHES = 8
THREADS = Range(1, 4096)


def plan(  # noqa: PLR0913 (the target by its name, and the device)
    model: nn.Module,
    images: Source | Iterable[Batch],
    method: str | Method = AUTO,
    *,
    latency_ms: float | None = None,
    images_per_second: float | None = None,
    macs: float | None = None,
    max_kl: float | None = None,
    batch: int = 8,
    runtime: str = EAGER,
    precision: str | None = None,
    threads: int | None = None,
    seconds: float = 30.0,
    fresh: bool = False,
    adapter: Adapter | None = None,
    progress: Progress | None = None,
) -> PlanResult:
    """Returns the model that reaches a target on this device and changes the answers least.

    Times are measured here and now, so let nothing else run. Where nothing is faster than the dense
    model, the answer is the dense model. Give one of `latency_ms`, `images_per_second`, `macs` and
    `max_kl`.

    Args:
        model: the dense model.
        images: unlabelled images, some hundreds: half of them to choose with, half to report on.
        method: "auto" for the best that needs no training, a name, or a Method.
        latency_ms: milliseconds that one call with a whole batch may take.
        images_per_second: how many images a second there have to be.
        macs: multiply-adds of an image: a share of the model's own, or a number.
        max_kl: mean KL divergence from the dense answers, in nats; the answer is the fastest.
        batch: images in a call.
        runtime: "eager" for PyTorch, or "openvino" or "onnx".
        precision: of an exported model; "float32" by default.
        threads: by default as many as PyTorch has here.
        seconds: how long the blocks of one method may be timed.
        fresh: whether to time blocks that were timed before on this device.
        adapter: an Adapter of your own, for a family that does not ship with this package.
        progress: is called with one line of text at a time.

    Raises:
        ImpossibleBudget: nothing reaches the target; the message has the fastest that is possible.
    """
    goal = PlanGoal(latency_ms, images_per_second, macs, max_kl)
    if isinstance(model, SlimModel):
        raise UnsupportedModel("This model is slimmed already; plan for its .host instead.")
    check_type("model", model, nn.Module, "Give the dense torch.nn.Module.", UnsupportedModel)
    check_batches("images", images)
    batch = check_value("batch", batch, int, BATCH)
    seconds = check_value("seconds", seconds, float, SECONDS)
    check_type("fresh", fresh, bool, "Give True or False.")
    if threads is not None:
        threads = check_value("threads", threads, int, THREADS)
    show = check_progress(progress)
    untouched = _untouched(model, adapter)
    methods = _find_methods(untouched, method)
    with eval_mode(model), open_runtime(runtime, precision, threads, batch, model) as device:
        chosen, reported = read_halves(images, untouched)
        tables = functools.partial(find_table, seconds=seconds, fresh=fresh)
        planner = Planner(untouched, goal, device, batch, chosen, show, tables)
        with _silence_advice():
            result = planner.answer(methods, reported)
    check_identity(result.model)
    warn_if_deep(result.model.plan.cost, result.model.plan.dense_cost)
    result.model.calibrated = {"planned": to_plain_data(result.to_json())}
    return result


def _untouched(host: nn.Module, adapter: Adapter | None) -> SlimModel:
    """Returns the host with nothing removed; refuses hosts that cannot be planned for."""
    untouched = untouched_model(host, adapter)
    shape = untouched.plan.shape
    if shape.entering - shape.prefix < FEWEST_PATCHES:
        raise UnsupportedModel(
            f"{type(host).__name__} has {shape.entering - shape.prefix} patches for an image, and "
            f"a plan needs {FEWEST_PATCHES} to choose among. Larger images have more."
        )
    if shape.strided or len(set(shape.blocks)) > 1:
        raise UnsupportedModel(
            f"{type(host).__name__} has blocks of several shapes, and plans are for models whose "
            "blocks are all alike. Slim it with a budget in operations: slim(model, macs=0.6)."
        )
    return untouched


def _find_methods(untouched: SlimModel, method: str | Method) -> list[Method]:
    """Returns the methods to consider; refuses one that cannot be planned for."""
    if method == AUTO:
        return plannable_methods(untouched)
    made = make_method(method, {})
    obstacle = find_obstacle(untouched, made)
    if obstacle is not None:
        names = ", ".join(method_label(each) for each in plannable_methods(untouched))
        raise BadSetting(
            f"{show_value(made)} cannot be planned for: {obstacle.removesuffix('.')}. Methods that "
            f"can: {names}; or 'auto' for the best of them."
        )
    return [made]


@contextlib.contextmanager
def _silence_advice() -> Iterator[None]:
    """Silences warnings that many schedules are tried for, and nobody uses most of them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeepCut)
        warnings.simplefilter("ignore", Untrained)
        yield
