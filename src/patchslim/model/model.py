"""`SlimModel`: adapter, method and schedule around the untouched host.

The loop over the blocks is written here, once. The host's modules stay as they are and are called,
never copied or hooked. A forward pass keeps all it knows in values that it passes on, so that
threads may share one model.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from patchslim.errors import UnsupportedModel, WrongInput
from patchslim.hosts._adapter import Adapter
from patchslim.methods._method import Decision, Method
from patchslim.model.block import Blocks
from patchslim.model.recipe import make_recipe
from patchslim.model.step import BlockStep, TrainingOutput
from patchslim.saving.folder import Recipe, write_folder
from patchslim.saving.hub import upload
from patchslim.schedules.budget import scheduled_counts
from patchslim.schedules.macs import slim_macs
from patchslim.schedules.schedule import Schedule, Tail
from patchslim.tokens.packing import pad
from patchslim.tokens.shapes import Cost, HostShape, dense_macs
from patchslim.tokens.tokens import Tokens


class SlimModel(Blocks):
    """The host with fewer tokens: the same call, the same kind of output.

    Made by `patchslim.slim`. `host` is the model that was given, unchanged; dropping the SlimModel
    leaves nothing behind. `trained` says how the weights were trained for it, and `calibrated` how
    its method was fitted to images; None where they were not. `packs` may be switched off, to run
    images of different numbers of patches padded and masked, as an exported graph does.
    """

    def __init__(
        self, host: nn.Module, adapter: Adapter, method: Method, schedule: Schedule, tail: Tail
    ) -> None:
        super().__init__()
        self.host = host
        self.adapter = adapter
        self.method = method
        self.schedule = schedule
        self.tail: Tail = tail
        self.trained: dict[str, Any] | None = None
        self.calibrated: dict[str, Any] | None = None
        self.packs = True
        shape = adapter.shape(host)
        deciding = self._deciding_blocks(shape)
        widths = [shape.blocks[block].width for block in deciding or (0,)]
        method.prepare(widths[0], deciding)
        if len(set(widths)) > 1 and any(each.ndim > 1 for each in method.parameters()):
            raise UnsupportedModel(
                f"{type(method).__name__} has layers for one width, and is to decide in blocks "
                f"{deciding} of {sorted(set(widths))} channels. Give at= (--at) in one stage."
            )
        method.train(host.training)
        self.training = host.training

    def forward(self, images: Tensor | None = None, **options: Any) -> Any:
        """What the host returns for `images`; keyword arguments are the host's own."""
        if images is None:
            images = options.pop("pixel_values", None)
        return self._forward(images, self.adapter.options(self.host, options), None)

    def _forward(
        self, images: Tensor | None, options: Mapping[str, Any], left: list[list[int]] | None
    ) -> Any:
        """What the host returns; `left`, where given, is told the rows of each image."""
        tokens = self.embed(images, options, track=self.adapter.returns_rows(self.host))
        for step in self.block_steps(tokens, tail=self.tail):
            tokens = self.run_or_recompute(step, tokens)
            if left is not None:
                left.append(tokens.lengths())
        return self.adapter.head(self.host, pad(tokens.rejoin()), options)

    def forward_training(
        self,
        images: Tensor,
        *,
        tail: Tail,
        eased: float = 1.0,
        layered: bool = False,
        recompute: bool = False,
    ) -> TrainingOutput:
        """A forward pass for training: the answer, and what the losses look at.

        Args:
            images: as in a call.
            tail: "full" where a loss looks at the patch rows, else the model's own.
            eased: the share in (0, 1] of what the schedule removes that is removed now.
            layered: whether every block from the first place on decides anew.
            recompute: whether activations are computed again in the backward pass, not kept.
        """
        tokens = self.embed(images, {}, track=self.adapter.returns_rows(self.host))
        entered = tokens.patches
        decisions: list[Decision] = []
        steps = self.block_steps(tokens, tail=tail, eased=eased, layered=layered)
        if tail == "exact" and self.place(steps[-1]):  # a loss looks at what the last block decides
            steps = self.block_steps(tokens, tail="full", eased=eased, layered=layered)
        for step in steps:
            tokens = self.run_or_recompute(step, tokens, recompute=recompute)
            if self.place(step) is not None:
                share = (step.left - tokens.prefix) / entered
                decisions.append(Decision(step.index, share, tokens.alive))
        tokens = tokens.rejoin()
        output = self.adapter.head(self.host, tokens, {})
        normed = tokens.with_x(self.adapter.norm(self.host, tokens.x))
        return TrainingOutput(output, normed, tuple(decisions))

    def block_steps(
        self, tokens: Tokens, *, tail: Tail, eased: float = 1.0, layered: bool = False
    ) -> list[BlockStep]:
        """What will happen in each block to `tokens` that enter the first."""
        schedule, resets = self.schedule, self.resets
        rows, depth = tokens.x.shape[1], len(self.adapter.blocks(self.host))
        if eased != 1:
            schedule = schedule.ease(eased)
        if layered:
            schedule = schedule.in_every_block(depth, resets)
        counts = schedule.counts(rows, tokens.prefix, depth, self.method, resets)
        return self._block_steps(rows, counts, schedule, tail)

    def _block_steps(
        self, rows: int, counts: Sequence[int], schedule: Schedule, tail: Tail
    ) -> list[BlockStep]:
        """What happens in each block if so many rows are left after each."""
        depth = len(counts)
        named = schedule.decision_blocks(depth) if self.method.always_decides else ()
        reads = [None] * (depth - 1) + [
            self.adapter.rows_read(self.host) if tail == "exact" else None
        ]
        entering, strides = (rows, *counts[:-1]), self.strides

        def step(index: int, last: int) -> BlockStep:
            return BlockStep(
                index=index,
                entering=entering[index],
                left=counts[index],
                read=reads[index],
                is_scheduled=index in named,
                is_remembered=index < last,
                stride=strides[index],
            )

        every = [step(index, 0) for index in range(depth)]
        if not self.method.remembers:
            return every
        last = max((each.index for each in every if self.place(each)), default=0)
        return [step(index, last) for index in range(depth)]

    def trace(self, images: Tensor, blocks: int | None = None) -> list[Tokens]:
        """The tokens after each of the first `blocks` blocks, with the map from cells to rows."""
        tokens = self.embed(images, {}, track=True)
        every: list[Tokens] = []
        for step in self.block_steps(tokens, tail="full")[:blocks]:
            tokens = self.run_block(step, tokens)
            every.append(tokens)
        return every

    def shape(self, image_size: tuple[int, int] | None = None) -> HostShape:
        """Rows and costs of the host."""
        return self.adapter.shape(self.host, image_size)

    def counts(self, image_size: tuple[int, int] | None = None) -> tuple[int, ...]:
        """Rows left after each block, prefix included."""
        return scheduled_counts(self.schedule, self.shape(image_size), self.method)

    def deciding_blocks(self) -> tuple[int, ...]:
        """The blocks in which the method decides, for images of the host's own size."""
        return self._deciding_blocks(self.shape())

    def _deciding_blocks(self, shape: HostShape) -> tuple[int, ...]:
        """The blocks in which the method decides, on a host of this shape."""
        counts = scheduled_counts(self.schedule, shape, self.method)
        steps = self._block_steps(shape.entering, counts, self.schedule, self.tail)
        return tuple(step.index for step in steps if self.place(step) is not None)

    def scheduled_blocks(self, depth: int) -> tuple[int, ...]:
        """The blocks in which the method decides even where the schedule would leave all rows."""
        return self.schedule.decision_blocks(depth) if self.method.always_decides else ()

    @property
    def strides(self) -> tuple[int, ...]:
        """How many rows and columns become one in each block: 1 throughout in a flat host."""
        depth = len(self.adapter.blocks(self.host))
        return tuple(self.adapter.stride(self.host, index) for index in range(depth))

    @property
    def resets(self) -> dict[int, int]:
        """Patch rows after each block in which the host itself leaves fewer."""
        grids = self.adapter.grids_after_stride(self.host)
        return {block: height * width for block, (height, width) in grids.items()}

    def macs(self, image_size: tuple[int, int] | None = None) -> Cost:
        """Multiply-adds of one image through this model; of an adaptive method, the most."""
        return self._count_macs(self.shape(image_size), self.counts(image_size))

    def macs_of(self, images: Tensor) -> list[Cost]:
        """Multiply-adds of each of these images: what an adaptive method really spends on them."""
        return self.forward_with_costs(images)[1]

    def forward_with_costs(self, images: Tensor) -> tuple[Any, list[Cost]]:
        """What a call returns, and what each image costs."""
        left: list[list[int]] = []
        output = self._forward(images, {}, left)
        shape = self.shape((images.shape[2], images.shape[3]))
        return output, [self._count_macs(shape, counts) for counts in zip(*left, strict=True)]

    def count_rows(self, images: Tensor) -> list[tuple[int, ...]]:
        """The rows of each image after each block, prefix included."""
        left: list[list[int]] = []
        self._forward(images, {}, left)
        return list(zip(*left, strict=True))

    def _count_macs(self, shape: HostShape, counts: Sequence[int]) -> Cost:
        exact, named = self.tail == "exact", self.scheduled_blocks(shape.depth)
        return slim_macs(shape, self.method, counts, tail=exact, named=named)

    def dense_macs(self, image_size: tuple[int, int] | None = None) -> Cost:
        """Multiply-adds of one image through the untouched host."""
        return dense_macs(self.shape(image_size))

    def save(self, path: str | Path) -> None:
        """Writes weights and recipe to the folder `path`: all of it, or nothing."""
        write_folder(path, self.state_dict(), self.describe())

    def save_pretrained(self, path: str | Path) -> None:
        """The same as `save`, by Hugging Face's name."""
        self.save(path)

    def push_to_hub(self, repository: str, *, private: bool = False) -> str:
        """Uploads weights and recipe to a Hub repository and returns its address."""
        with tempfile.TemporaryDirectory() as folder:
            self.save(Path(folder) / "model")
            return upload(Path(folder) / "model", repository, private=private)

    def describe(self) -> Recipe:
        """What a saved folder says about this model, besides its weights."""
        return make_recipe(
            self.host,
            self.adapter,
            self.method,
            self.schedule,
            self.tail,
            self.trained,
            self.calibrated,
        )

    def unslim(self) -> nn.Module:
        """The host as it was given."""
        return self.host

    def extra_repr(self) -> str:
        """Schedule and costs, as shown by print()."""
        share = self.macs().total / self.dense_macs().total
        return f"{self.schedule}, tail={self.tail!r}, {self.macs()} ({share:.0%} of the host)"

    def embed(self, images: Tensor | None, options: Mapping[str, Any], *, track: bool) -> Tokens:
        """The tokens that enter the first block, or one clear error about the images."""
        channels, height, width = self.adapter.image_shape(self.host)
        made_for = f"this host takes float images of shape (batch, {channels}, {height}, {width})"
        if not isinstance(images, Tensor):
            raise WrongInput(f"Got {type(images).__name__} instead of images: {made_for}.")
        got = f"Got images of shape {tuple(images.shape)} and type {images.dtype}"
        if images.ndim != 4 or images.shape[1] != channels or not images.is_floating_point():
            raise WrongInput(f"{got}: {made_for}.")
        reason = self.adapter.size_mismatch(self.host, (images.shape[2], images.shape[3]), options)
        if reason is not None:
            raise WrongInput(f"{got}: {reason}")
        placed = self.calibrated is not None and "threshold" not in self.calibrated
        if placed and tuple(images.shape[2:]) != (height, width):
            raise WrongInput(
                f"{got}: this model was calibrated for {height}x{width} pixels, and its positions "
                "are of these. Resize the images, or calibrate the model at their size."
            )
        tokens = self.adapter.embed(self.host, images, options)
        if self.method.content_kind is not None:
            shows = self.method.content_kind
            shown = partial(self.adapter.patch_content, self.host, images, shows, tokens.grid)
            tokens = tokens.with_content(shown)
        return tokens.with_origin() if track or self.resets else tokens
