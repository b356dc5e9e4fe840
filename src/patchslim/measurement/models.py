"""The models that `measure` compares: checks them, names them, and adds `random` to each."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from patchslim.errors import UnknownName, UnsupportedModel
from patchslim.measurement.sample import move_to_host
from patchslim.methods._registry import method_label
from patchslim.methods.random import Random
from patchslim.model.model import SlimModel, name_slimmed_part
from patchslim.model.plan import plan_schedule
from patchslim.schedules.schedule import Counts
from patchslim.settings import check_type


def check_models(
    model: SlimModel | Mapping[str, SlimModel], dense: nn.Module | None
) -> dict[str, SlimModel]:
    """Returns the models by name; refuses those that cannot be compared with one dense model.

    They are slimmed from the same host, or, if `dense` is given, from hosts of its architecture.
    """
    if isinstance(model, SlimModel):
        model = {_model_label(model): model}
    elif isinstance(model, nn.Module):
        inner = name_slimmed_part(model)
        cure = f"give {inner}" if inner else "slim it first, patchslim.slim(model, macs=0.6)"
        raise UnsupportedModel(
            f"measure() takes a slimmed model, not {type(model).__name__}: {cure}."
        )
    cure = "Give a slimmed model, or several by name: {'tome': ..., 'evit': ...}."
    check_type("model", model, Mapping, cure, UnsupportedModel)
    if dense is not None:
        check_type("dense", dense, nn.Module, "Give the dense torch.nn.Module.", UnsupportedModel)
    models = dict(model)
    if not models:
        raise UnsupportedModel("There is no model to measure: give at least one.")
    for name, slimmed in models.items():
        if not isinstance(slimmed, SlimModel):
            kind, inner = type(slimmed).__name__, name_slimmed_part(slimmed)
            cure = f" Give {inner}." if inner else ""
            raise UnsupportedModel(f"measure() takes slimmed models; {name!r} is a {kind}.{cure}")
        first = next(iter(models.values()))
        if dense is None and slimmed.host is not first.host:
            raise UnsupportedModel(
                f"{name!r} has another host than the models before it. Models are measured beside "
                "one dense model: slim the same object, say which one it is (dense=), or measure "
                "twice."
            )
        if dense is not None and slimmed.plan.shape != slimmed.plan.adapter.shape(dense):
            raise UnsupportedModel(
                f"{name!r} is of another architecture than dense=, a {type(dense).__name__}. Give "
                "the model that it was before it was trained."
            )
    if "dense" in models:
        raise UnknownName("'dense' is the untouched host; give the slimmed model another name.")
    return models


def _model_label(model: SlimModel) -> str:
    """Names a model by its method and its share of the dense MACs, which may be a maximum."""
    share = f"{model.macs().total / model.dense_macs().total:.2f}"
    return f"{method_label(model.method)} {'up to ' if model.method.adaptive else ''}{share}"


def add_random(models: Mapping[str, SlimModel], sample: Tensor, seed: int) -> dict[str, SlimModel]:
    """Returns the models, each followed by `random` at the same token counts.

    If a model leaves images different numbers of tokens, `random` runs at the mean of its counts
    on `sample`. `random` is not added twice at the same cost.
    """
    size = (sample.shape[2], sample.shape[3])
    # What decides on the cost of a model: its counts, how its last block is run, and where in a
    # block tokens are removed.
    costs_of_random = {
        (model.counts(size), model.plan.tail, model.method.place)
        for model in models.values()
        if isinstance(model.method, Random)
    }
    result: dict[str, SlimModel] = {}
    for name, model in models.items():
        result[name] = model
        counts = mean_counts(model, sample)
        cost = (counts, model.plan.tail, model.method.place)
        if cost in costs_of_random and not model.method.adaptive:
            continue
        costs_of_random.add(cost)
        shape = model.plan.for_size(model.host, size).shape
        schedule = Counts(counts, shape.entering, shape.prefix)
        method = Random(seed=seed)
        # Tokens are removed at the same place in each block, so that the cost is the same, too.
        method.place = model.method.place
        plan = plan_schedule(model.host, model.plan.adapter, method, schedule, model.plan.tail)
        result[f"random/{name}"] = SlimModel(model.host, plan)
    return result


def mean_counts(model: SlimModel, images: Tensor) -> tuple[int, ...]:
    """Returns how many tokens are left after each block; the mean if that differs by image."""
    if not model.method.adaptive:
        return model.counts((images.shape[-2], images.shape[-1]))
    rows_of_images = model.start_pass().count_rows(move_to_host(images, model.host))
    means = [round(sum(rows) / len(rows)) for rows in zip(*rows_of_images, strict=True)]
    return tuple(max(rows, model.plan.shape.prefix + 1) for rows in means)
