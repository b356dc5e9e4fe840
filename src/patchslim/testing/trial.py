"""What a law tries a method on: random tokens with signals, and tiny hosts of three kinds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from patchslim.hosts._registry import find_adapter
from patchslim.methods import LearnedMethod, Method, Place, Signals
from patchslim.methods._method import content_kind, method_settings, remembers
from patchslim.model.model import SlimModel
from patchslim.model.plan import plan_schedule
from patchslim.schedules.schedule import Constant, Counts, Schedule, Tail
from patchslim.tokens.attention import attention_bias
from patchslim.tokens.tokens import Tokens

Readout = Literal["class", "average", "query"]
READOUTS: tuple[Readout, ...] = get_args(Readout)
GRIDS = ((1, 2), (2, 3), (4, 4), (7, 5))
PREFIXES = (0, 1, 2, 5)
PATCHES = 16  # of the tiny host


@dataclass(frozen=True)
class Scene:
    """Tokens and signals: exactly what a method gets at its place in a block."""

    tokens: Tokens
    signals: Signals

    def select(self, images: list[int]) -> Scene:
        """Returns the scene of these images, in this order."""

        def some(t: Tensor | None) -> Tensor | None:
            return None if t is None else t[images]

        tokens, signals = self.tokens, self.signals
        readout, shown = signals.readout, tokens.content
        return Scene(
            replace(
                tokens,
                x=tokens.x[images],
                origin=some(tokens.origin),
                content=None if shown is None else lambda: shown()[images],
                memory=some(tokens.memory),
            ),
            replace(
                signals,
                q=some(signals.q),
                k=some(signals.k),
                v=some(signals.v),
                entered=some(signals.entered),
                readout=None if readout is None else lambda: readout()[images],
            ),
        )

    def pad(self, rows: int) -> Scene:
        """Returns the same scene with `rows` rows of padding after each image."""
        tokens, signals = self.tokens, self.signals
        after = torch.arange(tokens.x.shape[1] + rows).clamp(max=tokens.x.shape[1] - 1)

        def longer(t: Tensor | None) -> Tensor | None:
            return t if t is None or t.shape[2] != tokens.x.shape[1] else t[:, :, after]

        alive = torch.arange(tokens.patches + rows).expand(len(tokens.x), -1) < tokens.patches
        cells = torch.arange(tokens.patches + rows).clamp(max=tokens.patches - 1)
        more = replace(
            tokens,
            x=tokens.x[:, after],
            position=tokens.cells()[:, cells],
            alive=alive,
        )
        readout = signals.readout
        return Scene(
            more,
            replace(
                signals,
                q=longer(signals.q),
                k=longer(signals.k),
                v=longer(signals.v),
                entered=None,
                bias=attention_bias(more, proportional=False),
                readout=None if readout is None else lambda: readout()[:, cells] * alive,
            ),
        )


@dataclass(frozen=True)
class Trial:
    """A method under test, in evaluation mode, and the width of the tokens that it gets."""

    method: Method
    width: int
    _hosts: dict[tuple[Readout, int], nn.Module] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if isinstance(self.method, LearnedMethod):
            self.method.prepare(self.width, self.decision_blocks)

    @property
    def decision_blocks(self) -> tuple[int, int]:
        """Blocks of the tiny host in which the method chooses."""
        return (1, 2) if remembers(self.method) else (0, 2)

    def unprepared(self) -> Method:
        """Returns the method; if it learns, one without layers, that may choose in any block."""
        if not isinstance(self.method, LearnedMethod):
            return self.method
        return type(self.method)(**method_settings(self.method)).eval()

    def scene(
        self,
        grid: tuple[int, int] = (4, 4),
        *,
        prefix: int = 1,
        batch: int = 3,
        dtype: torch.dtype = torch.float32,
    ) -> Scene:
        """Makes random tokens and signals. Without prefix rows, a pooling query scores patches."""
        patches = grid[0] * grid[1]
        rows = prefix + patches
        noise = torch.Generator().manual_seed(patches + 100 * prefix)
        draw = partial(torch.randn, generator=noise)
        place, scored = self.method.place, self.method.needs_class_token
        heads: tuple[Tensor | None, ...] = tuple(
            draw(batch, 2, rows, self.width // 2).to(dtype) for _ in "qkv"
        )
        q, k, v = heads
        if place is Place.ON_QUERIES:
            q = q[:, :, :prefix] if q is not None and scored and prefix else None
        if place is Place.BEFORE_BLOCK:
            q = k = v = None
        if place is Place.ON_MAP:
            v = None
        pooled = draw(batch, patches).softmax(dim=1).to(dtype)
        kind = content_kind(self.method)
        content = None if kind is None else draw(batch, patches, 12).to(dtype)
        if kind == "pixels" and content is not None:  # some cells have the same pixels
            content = content[:, torch.arange(patches) * 2 // 3]
        x = draw(batch, rows, self.width).to(dtype)
        entered = draw(batch, rows, self.width).to(dtype) if place is Place.BEFORE_FEED else None
        return Scene(
            Tokens(
                x=x,
                prefix=prefix,
                grid=grid,
                content=None if content is None else lambda: content,
                memory=pooled if remembers(self.method) else None,
            ).with_origin(),
            Signals(
                prefix,
                scale=self.width**-0.5,
                q=q,
                k=k,
                v=v,
                readout=(lambda: pooled) if scored and not prefix else None,
                entered=entered,
            ),
        )

    def decide(self, scene: Scene, keep: int) -> Tokens:
        """Returns the tokens after one choice."""
        with torch.no_grad():
            reduction = self.method.choose(scene.tokens, scene.signals, keep)
            return reduction.apply(scene.tokens)

    def keep_counts(self, patches: int) -> list[int]:
        """Lists counts that one choice can leave: the fewest, the most, some between."""
        every = range(self.method.fewest(patches), patches)
        return (
            sorted({every[i] for i in (0, len(every) // 3, -2, -1)}) if len(every) > 1 else [*every]
        )

    def decisions(self) -> Sequence[tuple[Scene, int, Tokens]]:
        """Tries all grids and prefixes: lists the scene, the count asked for, and the result."""
        return self._decisions

    @cached_property
    def _decisions(self) -> tuple[tuple[Scene, int, Tokens], ...]:
        """All decisions, made once: several laws read them and none changes them."""
        made: list[tuple[Scene, int, Tokens]] = []
        for row, grid in enumerate(GRIDS):
            for column, prefix in enumerate(PREFIXES):
                batch = 1 if (row + column) % 2 else 3  # every grid and prefix meets both
                scene = self.scene(grid, prefix=prefix, batch=batch)
                made += [
                    (scene, keep, self.decide(scene, keep))
                    for keep in self.keep_counts(scene.tokens.patches)
                ]
        return tuple(made)

    def host(self, readout: Readout = "class", *, depth: int = 3) -> nn.Module:
        """Returns a tiny host whose head reads a class token, the mean of patches, or a query.

        It is made once, and shared by all models of this trial.
        """
        key = (readout, depth)
        if key not in self._hosts:
            self._hosts[key] = tiny_host(width=self.width, readout=readout, depth=depth)
        return self._hosts[key]

    def model(
        self, readout: Readout = "class", *, tail: Tail = "full", depth: int = 3
    ) -> SlimModel:
        """Slims a tiny host by the method, without the checks of `slim`."""
        host, prefix = self.host(readout, depth=depth), int(readout == "class")
        schedule = self.schedule(prefix, depth=depth)
        return SlimModel(host, plan_schedule(host, find_adapter(host), self.method, schedule, tail))

    def schedule(self, prefix: int = 1, *, depth: int = 3) -> Schedule:
        """Makes a schedule with two choices in three blocks, within what the method can remove."""
        first = max(10, self.method.fewest(PATCHES))
        if first == PATCHES:
            return Constant(0)
        last = max(6, self.method.fewest(first))
        early = PATCHES if self.decision_blocks[0] else first
        left = (early, first, last, last)[:depth]
        return Counts(tuple(rows + prefix for rows in left), PATCHES + prefix, prefix)


def tiny_host(*, width: int = 16, readout: Readout = "class", **changes: Any) -> nn.Module:
    """Makes a timm vision transformer of three blocks, with weights large enough to matter."""
    from timm.models.vision_transformer import VisionTransformer

    settings: dict[str, Any] = {
        "img_size": 16,
        "patch_size": 4,
        "embed_dim": width,
        "depth": 3,
        "num_heads": 2,
        "num_classes": 5,
        "class_token": readout == "class",
        "global_pool": {"class": "token", "average": "avg", "query": "map"}[readout],
    }
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed seeds accelerators too, and where none has started it notes its whole
        # call stack for each of them, which takes as long as making the host.
        torch.default_generator.manual_seed(0)
        host: nn.Module = VisionTransformer(**settings | changes)
        with torch.no_grad():
            for parameter in host.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return host.eval()


def uneven_images(batch: int, *, size: int = 16) -> Tensor:
    """Makes images from noise to a smooth slope, of which a method may keep different numbers."""
    noise = torch.linspace(1, 0.05, batch).view(-1, 1, 1, 1)
    slope = torch.linspace(-0.3, 0.3, size)
    return noise_images(batch, size=size) * noise + slope * (1 - noise)


def noise_images(batch: int = 3, *, size: int = 16) -> Tensor:
    """Makes random images for the tiny host."""
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))
