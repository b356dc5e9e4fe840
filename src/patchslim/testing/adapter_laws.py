"""The laws of families: what the loop relies on when it takes a host apart with an adapter.

They are run on a host of yours with weights that matter: if all weights are zero, all laws hold.
"""

from __future__ import annotations

import copy
import functools
import inspect
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from patchslim.errors import BadSetting, UnsupportedModel
from patchslim.hosts._adapter import Adapter, Part
from patchslim.hosts._answers import TOLERANCE, eval_mode
from patchslim.hosts._registry import find_adapter
from patchslim.methods._registry import find_method
from patchslim.model.model import SlimModel
from patchslim.model.plan import plan_schedule
from patchslim.model.slim import slim
from patchslim.schedules.schedule import Constant, Rate, Schedule, Tail
from patchslim.testing.counting import count_macs
from patchslim.testing.law import Law, Violation, check_law, require, require_close
from patchslim.tokens.merging import Merge
from patchslim.tokens.reduction import Keep
from patchslim.tokens.rows import put, take
from patchslim.tokens.shapes import dense_macs
from patchslim.tokens.tokens import Tokens


def check_adapter(host: nn.Module, adapter: Adapter | None = None) -> None:
    """Raises `BrokenLaw` for the first law that an adapter does not keep on `host`.

    The guide to adding a family says, for each law, where to look first.

    Args:
        host: a small model of the family, in evaluation mode. It is not changed.
        adapter: an adapter of your own; by default the one that ships for this host.
    """
    if inspect.isclass(adapter):
        raise BadSetting(f"{adapter.__name__} is a class. Give an instance: {adapter.__name__}().")
    subject = AdapterTrial(host, adapter or find_adapter(host))
    with eval_mode(host):
        for law in FAMILY_LAWS:
            check_law(law, subject, type(subject.adapter).__name__)


@dataclass(frozen=True)
class AdapterTrial:
    """A host in evaluation mode, and the adapter on trial."""

    host: nn.Module
    adapter: Adapter

    @property
    def tolerance(self) -> float:
        """Largest difference that rounding may cause."""
        return TOLERANCE[next(self.host.parameters()).dtype]

    def images(self, batch: int = 2) -> Tensor:
        """Makes random images that fit the host."""
        noise = torch.Generator().manual_seed(1)
        shape = (batch, *self.adapter.describe(self.host).image_shape)
        return torch.randn(shape, generator=noise).to(next(self.host.parameters()))

    def model(
        self, method: str, schedule: Schedule, *, tail: Tail = "full", adapter: Any = None
    ) -> SlimModel:
        """Slims the host without the checks of `slim`."""
        return SlimModel(
            self.host,
            plan_schedule(
                self.host, adapter or self.adapter, find_method(method)(), schedule, tail
            ),
        )

    def half_model(self, *, tail: Tail = "full") -> SlimModel:
        """Returns the host slimmed by a random half of the patches after the first block."""
        return self._half_models[tail]

    @functools.cached_property
    def _half_models(self) -> Mapping[Tail, SlimModel]:
        """Both half models, made once: several laws run them and none changes them."""
        tails: tuple[Tail, ...] = ("full", "exact")
        return {tail: self.model("random", Rate(0.5, (0,)), tail=tail) for tail in tails}

    @functools.cached_property
    def dense_answer(self) -> Tensor:
        """The host's answer to `images()`."""
        return self.answer(self.host, self.images())

    def last_tokens(self) -> Tokens:
        """Computes the tokens after the last block, with nothing removed."""
        with torch.no_grad():
            return self.model("identity", Constant(0)).trace(self.images())[-1]

    def answer(self, model: nn.Module, images: Tensor) -> Tensor:
        """Picks the tensor to compare from a model's answer."""
        with torch.no_grad():
            return self.adapter.logits(model(images))


def the_host_is_of_its_classes(family: AdapterTrial) -> None:
    """`host_classes` names the host's class, or one that it derives from."""
    own = f"{type(family.host).__module__}.{type(family.host).__qualname__}"
    said = ", ".join(family.adapter.host_classes)
    require(family.adapter.serves(family.host), f"the host is a {own}; host_classes has {said}")


def keeping_everything_equals_the_host(family: AdapterTrial) -> None:
    """With nothing removed the answer is the host's own, with the full and the exact tail."""
    images = family.images()
    wanted = family.dense_answer
    tails: tuple[Tail, ...] = ("full", "exact")
    for tail in tails:
        got = family.answer(family.model("identity", Constant(0), tail=tail), images)
        require_close(got, wanted, family.tolerance, f"tail={tail!r}")


def parts_are_columns_of_the_whole(family: AdapterTrial) -> None:
    """Queries, keys and values are the same whether projected together or apart, in any order."""
    host, adapter = family.host, family.adapter
    parts: tuple[Part, ...] = ("qk", "kv", "q", "v")
    shape = adapter.shape(host)
    with torch.no_grad():
        tokens = _shuffle_patches(adapter.embed(host, family.images(), {}))
        for index, block in enumerate(shape.blocks):
            # Only blocks that take tokens of this grid and width, which is all but in a pyramid.
            if block.width != tokens.x.shape[2] or any(each <= index for each in shape.strided):
                continue
            whole = dict(zip("qkv", adapter.project(host, index, tokens, "qkv"), strict=True))
            for part in parts:
                for name, t in zip(part, adapter.project(host, index, tokens, part), strict=True):
                    what = f"{name} of {part!r} in block {index}"
                    require_close(t, whole[name], family.tolerance, what)


def rows_may_stand_in_any_order(family: AdapterTrial) -> None:
    """Positions travel with the tokens: the answer does not depend on the order of the rows."""
    images = family.images()
    shuffling = cast("Adapter", ShuffledAdapter(family.adapter))
    got = family.answer(family.model("identity", Constant(0), adapter=shuffling), images)
    require_close(got, family.dense_answer, family.tolerance, "another order of rows")


def the_exact_tail_gives_the_same_answer(family: AdapterTrial) -> None:
    """The rows that the head is said to read are all that it reads."""
    images = family.images()
    full = family.answer(family.half_model(tail="full"), images)
    exact = family.answer(family.half_model(tail="exact"), images)
    require_close(exact, full, family.tolerance, "exact tail")


def a_reduced_answer_has_the_shape_of_the_hosts(family: AdapterTrial) -> None:
    """With half of the patches the answer has the host's shape and type and is finite."""
    images = family.images()
    got, wanted = family.answer(family.half_model(), images), family.dense_answer
    require(got.shape == wanted.shape, f"shape {(*got.shape,)}, wanted {(*wanted.shape,)}")
    require(got.dtype == wanted.dtype, f"type {got.dtype}, wanted {wanted.dtype}")
    require(bool(got.isfinite().all()), "not finite")


def the_shape_says_which_rows_enter(family: AdapterTrial) -> None:
    """`shape()` says how many rows enter, how many are prefix, and the grid of the others."""
    shape = family.adapter.shape(family.host)
    with torch.no_grad():
        tokens = family.adapter.embed(family.host, family.images(), {})
    said, actual = (shape.entering, shape.prefix), (tokens.x.shape[1], tokens.prefix)
    require(said == actual, f"shape() says rows and prefix {said}, the tokens have {actual}")
    facts = family.adapter.describe(family.host)
    require(
        facts.prefix == tokens.prefix,
        f"describe() says prefix={facts.prefix}, the tokens have {tokens.prefix}",
    )
    same_grid = shape.grid == tokens.grid
    require(same_grid, f"shape() says grid {shape.grid}, the tokens have {tokens.grid}")
    blocks = len(family.adapter.blocks(family.host))
    require(shape.depth == blocks, f"shape() says {shape.depth} blocks, the host has {blocks}")


def the_head_counts_patches_and_not_rows(family: AdapterTrial) -> None:
    """To the head, a merged row is as many equal rows, and a row of padding is none.

    Rows that are made equal and then merged tell the head nothing new.
    """
    host, adapter = family.host, family.adapter

    def answer(tokens: Tokens) -> Tensor:
        with torch.no_grad():
            return adapter.logits(adapter.head(host, tokens, {}))

    tokens = family.last_tokens()
    lots = torch.rand(tokens.x.shape[0], tokens.patches, generator=torch.Generator().manual_seed(3))
    order = lots.argsort(dim=1).to(tokens.x.device)
    kept, gone = order.tensor_split([(tokens.patches + 1) // 2], dim=1)
    into = torch.zeros_like(gone)  # all of them into one, which weighs as much as half the image
    copies = take(tokens.x, kept.gather(1, into), tokens.prefix)
    equal = tokens.with_x(put(tokens.x, gone + tokens.prefix, copies))
    merged = answer(Merge(kept, gone, into).apply(equal))
    require_close(merged, answer(equal), family.tolerance, "with equal rows merged, the answer")
    if adapter.describe(host).returns_rows:
        return  # a row of padding has no place in the host's sequence
    real = torch.arange(tokens.patches, device=order.device).expand_as(order) < kept.shape[1]
    padded = answer(Keep(order, padding=real).apply(tokens))
    wanted = answer(Keep(kept).apply(tokens))
    require_close(padded, wanted, family.tolerance, "with rows of padding, the answer")


def macs_are_what_it_spends(family: AdapterTrial) -> None:
    """`shape()` gives what torch counts in the host and in half of it: rows exactly, all to 0.5 %.

    What a host computes once for all images, such as rotary positions, is products in some versions
    of a library and tables in others. So it is left to the 0.5 %.
    """
    images = family.images(1)
    dense = dense_macs(family.adapter.shape(family.host)).total
    counted_dense = count_macs(family.host, images)
    require_near(dense, counted_dense, "shape() of the host")
    tails: tuple[Tail, ...] = ("full", "exact")
    for tail in tails:
        half = family.half_model(tail=tail)
        expected, counted = half.macs().total, count_macs(half, images)
        require_near(expected, counted, f"macs(), tail={tail!r}")
        spared, saved = dense - expected, counted_dense - counted
        require(
            spared == saved,
            f"dropping half spares {spared} by shape(), and {saved} as counted, tail={tail!r}",
        )


def require_near(expected: int, counted: int, what: str) -> None:
    """Raises a violation where a count is more than 0.5 % off."""
    off = abs(expected / counted - 1)
    require(off <= 0.005, f"{what} gives {expected}, counted {counted}")


def the_host_stays_unchanged(family: AdapterTrial) -> None:
    """Slimming and running change no weight, mode, class, attribute or hook of the host."""
    host = copy.deepcopy(family.host)
    host.train()
    next(iter(family.adapter.blocks(host))).eval()
    before = _host_state(host)
    slimmed = slim(host, "random", adapter=family.adapter, keep=0.6)
    with eval_mode(host), torch.no_grad():
        slimmed(family.images())
    after = _host_state(host)
    changed = [key for key in before.keys() | after.keys() if before.get(key) != after.get(key)]
    require(not changed, f"changed: {sorted(changed)[:5]}")
    try:
        slim(slimmed, "random", adapter=family.adapter, keep=0.6)
    except UnsupportedModel:
        return
    raise Violation("a slimmed model was slimmed again")


def two_threads_get_the_answers_of_one(family: AdapterTrial) -> None:
    """Nothing about a forward pass is kept in the model: threads may share it."""
    model = family.half_model()
    batches = [family.images(1 + i % 3) + i for i in range(4)]
    wanted = [family.answer(model, images) for images in batches]
    with ThreadPoolExecutor(2) as pool:
        for got, want in zip(
            pool.map(lambda x: family.answer(model, x), batches), wanted, strict=True
        ):
            require_close(got, want, family.tolerance, "another thread's answer")


def a_recipe_rebuilds_the_architecture(family: AdapterTrial) -> None:
    """A host made from `recipe()`, after a trip through JSON, takes the same weights."""
    recipe = family.adapter.recipe(family.host)
    if recipe is None:
        return
    back: Mapping[str, Any] = json.loads(json.dumps(recipe))
    rebuilt = family.adapter.rebuild(back).to(next(family.host.parameters()).dtype).eval()
    rebuilt.load_state_dict(family.host.state_dict())
    images = family.images()
    wanted = family.dense_answer
    require_close(family.answer(rebuilt, images), wanted, family.tolerance, "rebuilt")


FAMILY_LAWS: tuple[Law[AdapterTrial], ...] = (
    the_host_is_of_its_classes,
    keeping_everything_equals_the_host,
    the_shape_says_which_rows_enter,
    parts_are_columns_of_the_whole,
    rows_may_stand_in_any_order,
    a_reduced_answer_has_the_shape_of_the_hosts,
    the_exact_tail_gives_the_same_answer,
    the_head_counts_patches_and_not_rows,
    macs_are_what_it_spends,
    the_host_stays_unchanged,
    two_threads_get_the_answers_of_one,
    a_recipe_rebuilds_the_architecture,
)


class ShuffledAdapter:
    """Adapter that returns its host's patch rows in another order."""

    def __init__(self, inner: Adapter) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def embed(self, host: nn.Module, images: Tensor, options: Mapping[str, Any]) -> Tokens:
        """Embeds images to the tokens that enter the first block, shuffled."""
        return _shuffle_patches(self._inner.embed(host, images, options))


def _shuffle_patches(tokens: Tokens) -> Tokens:
    """Reorders the patch rows of each image."""
    noise = torch.Generator().manual_seed(2)
    lots = torch.rand(tokens.x.shape[0], tokens.patches, generator=noise).to(tokens.x.device)
    return Keep(lots.argsort(dim=1)).apply(tokens.with_origin())


def _host_state(host: nn.Module) -> dict[str, object]:
    """Collects everything about a host that slimming could change."""
    state: dict[str, object] = {}
    for name, module in host.named_modules():
        hooks = sum(len(value) for key, value in vars(module).items() if key.endswith("_hooks"))
        state[f"module {name}"] = (type(module), module.training, sorted(vars(module)), hooks)
    for name, tensor in host.state_dict(keep_vars=True).items():
        checksum = tensor.detach().double().sum().item()
        state[f"weight {name}"] = (id(tensor), tensor.dtype, tensor.requires_grad, checksum)
    return state
