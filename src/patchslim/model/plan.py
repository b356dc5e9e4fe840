"""`Plan`: what is done to a host, as one frozen value; how it is made, and what it costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack, get_args

from torch import nn

from patchslim.errors import (
    BadSetting,
    BrokenLaw,
    NeedsClassToken,
    UnsupportedModel,
    WrongInput,
)
from patchslim.hosts._adapter import Adapter, HostFacts
from patchslim.hosts._registry import find_adapter
from patchslim.methods._method import Method, Place, Setting, remembers
from patchslim.methods._registry import DEFAULT_METHOD, find_method, make_method, method_names
from patchslim.model.hooks import refuse_shards
from patchslim.model.images import check_image_size
from patchslim.model.step import BlockStep
from patchslim.schedules.budget import (
    Budget,
    blocks_always_decided,
    make_schedule,
    scheduled_counts,
)
from patchslim.schedules.macs import skips_last_decision, slim_macs
from patchslim.schedules.schedule import Schedule, Tail
from patchslim.settings import check_choice, show_value
from patchslim.tokens.shapes import Cost, HostShape, dense_macs


@dataclass(frozen=True)
class Plan:
    """An adapter, a method and a schedule, and their result for images of one size.

    Attributes:
        adapter: takes the host apart.
        method: decides which tokens stay.
        schedule: says how many stay after each block.
        tail: "exact" computes in the last block only the rows that the head reads.
        shape: the rows and operations of the host.
        steps: what happens in each block.
        cost: operations of one image: the most, if images keep different numbers of tokens.
    """

    adapter: Adapter
    method: Method
    schedule: Schedule
    tail: Tail
    shape: HostShape
    steps: tuple[BlockStep, ...]
    cost: Cost

    @property
    def counts(self) -> tuple[int, ...]:
        """Tokens left after each block, prefix included."""
        return tuple(step.left for step in self.steps)

    @property
    def decision_blocks(self) -> tuple[int, ...]:
        """Blocks in which the method decides."""
        return tuple(step.index for step in self.steps if step.place is not None)

    @property
    def dense_cost(self) -> Cost:
        """Operations of one image in the untouched host."""
        return dense_macs(self.shape)

    def for_size(self, host: nn.Module, image_size: tuple[int, int] | None) -> Plan:
        """Makes the plan for images of another size, and for the host as it is now."""
        if image_size is not None:
            image_size = check_image_size(image_size)
            reason = self.adapter.size_mismatch(host, image_size, {})
            if reason is not None:
                raise WrongInput(f"Asked for images of {image_size}: {reason}")
        return plan_schedule(
            host, self.adapter, self.method, self.schedule, self.tail, image_size=image_size
        )

    def cost_of(self, counts: Sequence[int]) -> Cost:
        """Counts the operations of an image that has these numbers of tokens after each block."""
        return slim_macs(
            self.shape,
            self.method,
            counts,
            tail=self.tail == "exact",
            named=blocks_always_decided(self.method, self.schedule, self.shape.depth),
        )


def make_plan(
    host: nn.Module,
    method: str | Method,
    schedule: Schedule | str | Path | None = None,
    *,
    tail: Tail | None = None,
    adapter: Adapter | None = None,
    settings: Mapping[str, Setting] | None = None,
    **budget: Unpack[Budget],
) -> Plan:
    """Makes the plan that `slim`, `macs` and the command line follow, from `slim`'s arguments."""
    if not isinstance(host, nn.Module):
        cure = f" Build it first: {_building_call(host)}." if isinstance(host, str) else ""
        raise UnsupportedModel(f"A host is a torch.nn.Module, not a {type(host).__name__}.{cure}")
    refuse_shards(host, host.modules())
    if adapter is not None:
        _check_adapter(adapter, host)
    if tail is not None:
        check_choice("tail", tail, get_args(Tail))
    adapter = adapter or find_adapter(host)
    made = make_method(method, settings or {})
    facts, shape = adapter.describe(host), adapter.shape(host)
    check_needs(facts, made)
    tail = tail or ("full" if budget.get("macs") is None else "exact")
    rule = make_schedule(shape, made, schedule, tail=tail, **budget)
    return _lay_out(adapter, facts, shape, made, rule, tail)


def _building_call(name: str) -> str:
    """The call that makes the model of this name: a name with an owner is one on the Hub."""
    if "/" not in name or name.startswith("hf-hub:"):
        return f"timm.create_model({show_value(name)})"
    if name.startswith("timm/"):
        return f"timm.create_model({show_value('hf-hub:' + name)})"
    return f"transformers.AutoModelForImageClassification.from_pretrained({show_value(name)})"


def _check_adapter(adapter: Adapter, host: nn.Module) -> None:
    """Refuses what is no adapter, and one for hosts of other classes."""
    if not isinstance(adapter, Adapter):
        raise BadSetting(
            f"adapter={show_value(adapter)}: give an instance of an Adapter, or leave it out."
        )
    if not adapter.serves(host):
        raise UnsupportedModel(
            f"{type(adapter).__name__} does not serve {type(host).__module__}."
            f"{type(host).__qualname__}. Leave adapter= out, or name the class in its host_classes."
        )


def macs(
    model: nn.Module,
    method: str | Method | None = None,
    schedule: Schedule | str | Path | None = None,
    *,
    tail: Tail | None = None,
    adapter: Adapter | None = None,
    **asked: Any,
) -> Cost:
    """Counts the multiply-adds of one image, from shapes alone: no forward pass, any device.

    Takes what `slim` takes; without a method and a budget, those of the untouched model.
    """
    budget, settings = split_budget(asked)
    if method is None:
        given = [schedule, *budget.values()]
        method = "identity" if all(each is None for each in given) else DEFAULT_METHOD
    return make_plan(
        model, method, schedule, tail=tail, adapter=adapter, settings=settings, **budget
    ).cost


def split_budget(asked: Mapping[str, Any]) -> tuple[Budget, dict[str, Setting]]:
    """Tells the budget from the method's own settings, which callers give side by side."""
    names = Budget.__annotations__
    budget: Any = {name: value for name, value in asked.items() if name in names}
    return budget, {name: value for name, value in asked.items() if name not in names}


def plan_schedule(
    host: nn.Module,
    adapter: Adapter,
    method: Method,
    schedule: Schedule,
    tail: Tail,
    *,
    image_size: tuple[int, int] | None = None,
) -> Plan:
    """Makes the plan with these parts, for images of one size: by default the host's own."""
    facts, shape = adapter.describe(host), adapter.shape(host, image_size)
    return _lay_out(adapter, facts, shape, method, schedule, tail)


def _lay_out(
    adapter: Adapter,
    facts: HostFacts,
    shape: HostShape,
    method: Method,
    schedule: Schedule,
    tail: Tail,
) -> Plan:
    """Makes the plan for a host of this shape."""
    check_facts(adapter, facts, shape)
    counts = scheduled_counts(schedule, shape, method)
    steps = make_steps(shape.entering, counts, facts, method, schedule, tail)
    for step in steps:
        if step.place is not None:
            method.check_step(step.index, step.entering - shape.prefix, step.left - shape.prefix)
    named = blocks_always_decided(method, schedule, shape.depth)
    cost = slim_macs(shape, method, counts, tail=tail == "exact", named=named)
    return Plan(adapter, method, schedule, tail, shape, steps, cost)


def make_steps(
    rows: int,
    counts: Sequence[int],
    facts: HostFacts,
    method: Method,
    schedule: Schedule,
    tail: Tail,
) -> tuple[BlockStep, ...]:
    """Lists what happens in each block, if `rows` enter the first and `counts` are left."""
    depth = len(counts)
    entering = (rows, *counts[:-1])
    scheduled = blocks_always_decided(method, schedule, depth)
    reads = [None] * (depth - 1) + [facts.rows_read if tail == "exact" else None]

    def decides(index: int) -> bool:
        """Tells whether the method decides here: the schedule says so, not the rows at hand."""
        if facts.stride(index) > 1 or skips_last_decision(method, reads[index]):
            return False
        return counts[index] < entering[index] or index in scheduled

    deciding = [index for index in range(depth) if decides(index)]
    last_decision = max(deciding, default=0) if remembers(method) else 0
    return tuple(
        [
            BlockStep(
                index=index,
                entering=entering[index],
                left=counts[index],
                read=reads[index],
                place=method.place if index in deciding else None,
                is_remembered=index < last_decision,
                stride=facts.stride(index),
            )
            for index in range(depth)
        ]
    )


def check_facts(adapter: Adapter, facts: HostFacts, shape: HostShape) -> None:
    """Refuses an adapter that does not give one scale, dropout and stride for each block."""
    for name in ("scales", "dropouts", "strides"):
        given = getattr(facts, name)
        if len(given) != shape.depth and (given or name != "strides"):
            raise BrokenLaw(
                f"{type(adapter).__name__}.describe() gives {len(given)} {name} for the "
                f"{shape.depth} blocks that shape() gives. HostFacts takes one for each block"
                f"{', or none in a flat host' if name == 'strides' else ''}."
            )


def check_needs(facts: HostFacts, method: Method) -> None:
    """Refuses a method that reads what the host does not have.

    That is attention maps, where the host mixes those of its heads, or a class token, where nothing
    can stand in for one.
    """
    if facts.mixes_heads and method.place is Place.ON_MAP:
        raise UnsupportedModel(
            f"{type(method).__name__} reads attention maps, and this model mixes those of its "
            "heads. Take a method that reads keys or features, such as tome or pitome."
        )
    if not method.needs_class_token or facts.has_class_token or facts.has_query_pooling:
        return
    free = [name for name in method_names() if not find_method(name).needs_class_token]
    raise NeedsClassToken(
        f"{type(method).__name__} scores patches by the class token, and this model has "
        "none, nor an attention-pooling head to lend its query. Methods that need none: "
        f"{', '.join(free)}; similarity, with weight='received' or 'size'."
    )
