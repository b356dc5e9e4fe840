"""What the adapter laws share: methods that shuffle rows, and comparison of answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import patchslim
from patchslim.hosts._answers import TOLERANCE, relative_difference
from patchslim.methods import Method, Place, Signals
from patchslim.model.model import SlimModel
from patchslim.model.plan import plan_schedule
from patchslim.schedules.schedule import Schedule, Tail
from patchslim.tokens.reduction import Keep, Reduction
from patchslim.tokens.tokens import Tokens

ZERO_GRADIENT = (
    "k_norm.bias",
    "k_proj.bias",
    "attention.key.bias",
    "ln_k.bias",
)  # the softmax cancels what all keys share
# A batch norm takes away what a whole channel has in common, so the bias of one before it may have
# no gradient but rounding.
ROUNDING = 1e-9


class Shuffle(Method):
    """Keeps random rows in shuffled order: nothing may depend on where a row stands."""

    place: ClassVar[Place] = Place.BEFORE_BLOCK

    def choose(self, tokens: Tokens, signals: Signals, keep: int) -> Reduction:
        lots = torch.rand(tokens.patches, generator=torch.Generator().manual_seed(tokens.patches))
        return Keep(lots.topk(keep).indices.expand(tokens.x.shape[0], -1))


class ShuffleQueries(Shuffle):
    """`Shuffle`, decided on the queries."""

    place: ClassVar[Place] = Place.ON_QUERIES


class ShuffleMap(Shuffle):
    """`Shuffle`, decided between the map and the values."""

    place: ClassVar[Place] = Place.ON_MAP


def sample_methods(host: Any) -> list[Method]:
    """One shipped method for each kind of reduction that this host can have."""
    adapter = patchslim.find_adapter(host)
    scored = adapter.describe(host).has_class_token or adapter.describe(host).has_query_pooling
    return [patchslim.find_method(name)() for name in (["tome", "evit"] if scored else ["tome"])]


def slim_unchecked(host: Any, method: Method, rule: Schedule, tail: Tail = "full") -> SlimModel:
    """Makes what slim() makes, without checking the host, which has a law of its own."""
    return SlimModel(host, plan_schedule(host, patchslim.find_adapter(host), method, rule, tail))


@torch.no_grad()
def is_close(got: Tensor, wanted: Tensor, factor: float = 1.0) -> bool:
    """Tells whether both are equal to rounding, for values of the size of one or their own."""
    same = got.shape == wanted.shape and got.dtype == wanted.dtype
    off = relative_difference(got.double(), wanted.double()) if same else float("inf")
    return off <= factor * TOLERANCE[wanted.dtype]


def gradients(run: Callable[[Tensor], Any], host: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
    """Computes the gradient of a random projection of the output, for the host's parameters."""
    host.zero_grad()
    torch.default_generator.manual_seed(0)
    out = run(x)
    out = torch.stack(out) if isinstance(out, tuple) else out
    noise = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    (out * noise.to(out.dtype)).sum().backward()  # type: ignore[no-untyped-call]
    return {name: p.grad for name, p in host.named_parameters() if p.requires_grad}


def assert_same_gradients(got: dict[str, Tensor | None], wanted: dict[str, Tensor | None]) -> None:
    """Asserts that gradients agree, and that every parameter has one that shows."""
    for name, gradient in wanted.items():
        mine = got[name]
        if (
            "mask_token" in name
            or name.endswith(ZERO_GRADIENT)
            or (mine is not None and not mine.numel())
        ):
            continue
        assert gradient is not None, name
        assert mine is not None, name
        scale = float(gradient.abs().max())
        if name.endswith(("bn.bias", "norm.bias")) and scale < ROUNDING:
            assert float(mine.abs().max()) < ROUNDING, name
            continue
        assert scale > 1e-4, f"{name} does not show in the output ({scale:.1g})"
        assert float((mine - gradient).abs().max()) <= 10 * TOLERANCE[mine.dtype] * scale, name


def host_state(host: nn.Module) -> list[Any]:
    """Collects everything about a host that slimming could change, except weights."""
    return [
        (name, type(module), module.training, sorted(vars(module)), count_hooks(module))
        for name, module in host.named_modules()
    ] + [(name, id(p), p.dtype, p.requires_grad) for name, p in host.named_parameters()]


def count_hooks(module: nn.Module) -> int:
    """Counts the hooks of a module."""
    return sum(len(value) for name, value in vars(module).items() if name.endswith("_hooks"))
