"""`SlimModel`: a host with fewer tokens, made of the untouched host and a plan.

The host's modules are called, never copied or hooked. What happens in a forward pass is written in
`forward_pass.py`; what a user can ask of a slimmed model is written here.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Unpack

import torch
import torch.fx
from torch import Tensor, nn

from patchslim.errors import UnsupportedModel, WrongInput
from patchslim.hosts._weights import check_plain
from patchslim.methods import LearnedMethod, Method
from patchslim.model.card import Results, write_texts
from patchslim.model.forward_pass import ForwardPass
from patchslim.model.hooks import HookWatch
from patchslim.model.host_api import (
    INSTEAD,
    OTHERWISE,
    check_names,
    forward_intermediates,
    host_attribute,
    refuse_fx,
    refuse_script,
)
from patchslim.model.plan import Plan
from patchslim.model.recipe import make_recipe
from patchslim.saving.folder import write_folder
from patchslim.saving.hub import Upload, upload
from patchslim.schedules.schedule import Schedule
from patchslim.settings import Range, check_value
from patchslim.tokens.shapes import Cost
from patchslim.tokens.tokens import Tokens

INPUT_NAMES = ("pixel_values", "pixel_values_videos", "input_values")  # of Hugging Face's models


class SlimModel(nn.Module):
    """Host with fewer tokens: the same call, the same kind of output.

    Made by `patchslim.slim`. Dropping the SlimModel leaves nothing behind in the host.

    Attributes:
        plan: the adapter, the method and the schedule, and what they cost.
        trained: how the weights were trained for fewer tokens; None if they were not.
        calibrated: how the method was fitted to images, or planned for a device; None if neither.
        packs: whether images of different numbers of tokens are packed into one sequence. Switch
            it off to run them padded and masked, as an exported graph does.
    """

    def __init__(self, host: nn.Module, plan: Plan) -> None:
        super().__init__()
        nn.Module.__setattr__(self, "host", host)
        nn.Module.__setattr__(self, "method", plan.method)
        self.plan = plan
        self.trained: dict[str, Any] | None = None
        self.calibrated: dict[str, Any] | None = None
        self.packs = True
        self._hook_watch = HookWatch([])
        self._prepare_method()
        plan.method.train(host.training)
        self.training = host.training

    @property
    def host(self) -> nn.Module:
        """Model that was given, unchanged."""
        host = self._modules["host"]
        assert host is not None  # noqa: S101 (for type checkers)
        return host

    @property
    def method(self) -> Method:
        """Method that decides which tokens stay."""
        method = self._modules["method"]
        assert isinstance(method, Method)  # noqa: S101 (for type checkers)
        return method

    @property
    def schedule(self) -> Schedule:
        """Schedule: how many tokens are left after each block."""
        return self.plan.schedule

    def forward(
        self,
        images: Tensor | None = None,
        *,
        pixel_values: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        input_values: Tensor | None = None,
        labels: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """Returns what the host returns for `images`; keyword arguments are the host's own.

        `pixel_values`, `pixel_values_videos` and `input_values` are Hugging Face's names for
        images, videos and spectrograms. They and `labels` are written out since
        `transformers.Trainer` gives a model the columns that its signature names.
        """
        if isinstance(images, torch.fx.Proxy):
            raise refuse_fx()
        named = {
            "pixel_values": pixel_values,
            "pixel_values_videos": pixel_values_videos,
            "input_values": input_values,
            "labels": labels,
        }
        options |= {name: value for name, value in named.items() if value is not None}
        for name in INPUT_NAMES:
            images = options.pop(name, None) if images is None else images
        if self._runs_host:
            return self.host(images, **options)
        if not torch.compiler.is_compiling():
            self._hook_watch.warn_of_new_hooks(self.host)
        honoured = self.plan.adapter.options(self.host, options)
        return self.start_pass().run(images, honoured)

    @property
    def _runs_host(self) -> bool:
        """Whether a call runs the host itself: a plan found nothing that is faster."""
        return (
            self.calibrated is not None
            and "planned" in self.calibrated
            and self.plan.tail == "full"
            and not self.plan.decision_blocks
        )

    def start_pass(self) -> ForwardPass:
        """Makes a forward pass through this model as it is now, to run whole or block by block."""
        host, plan = self.host, self.plan
        # Thresholds hold for any size, and a plan's schedule refuses other sizes by itself.
        calibrated = self.calibrated or {"threshold": None}
        fixed_size = not {"threshold", "planned"} & {*calibrated}
        facts = plan.adapter.describe(host)
        return ForwardPass(
            host, plan.adapter, self.method, plan, facts, self.training, self.packs, fixed_size
        )

    def trace(self, images: Tensor, blocks: int | None = None) -> list[Tokens]:
        """Returns the tokens after each of the first `blocks` blocks, with the map to the grid."""
        if blocks is not None:
            blocks = check_value("blocks", blocks, int, Range(0, self.plan.shape.depth), WrongInput)
        forward = self.start_pass()
        tokens = forward.embed(images, {}, track=True)
        every: list[Tokens] = []
        for step in forward.steps(tokens, tail="full")[:blocks]:
            tokens = forward.run_block(step, tokens)
            every.append(tokens)
        return every

    def counts(self, image_size: tuple[int, int] | None = None) -> tuple[int, ...]:
        """Lists the tokens left after each block, prefix included."""
        return self.plan.for_size(self.host, image_size).counts

    def macs(self, image_size: tuple[int, int] | None = None) -> Cost:
        """Counts the multiply-adds of one image; of the costliest, if they differ."""
        return self.plan.for_size(self.host, image_size).cost

    def dense_macs(self, image_size: tuple[int, int] | None = None) -> Cost:
        """Counts the multiply-adds of one image through the untouched host."""
        return self.plan.for_size(self.host, image_size).dense_cost

    def macs_of(self, images: Tensor) -> list[Cost]:
        """Counts the multiply-adds that each of these images really costs."""
        return self.forward_with_costs(images)[1]

    def forward_with_costs(self, images: Tensor) -> tuple[Any, list[Cost]]:
        """Returns what a call returns, and the multiply-adds of each image."""
        counts: list[list[int]] = []
        options = self.plan.adapter.options(self.host, {})
        output = self.start_pass().run(images, options, counts)
        plan = self.plan.for_size(self.host, (images.shape[-2], images.shape[-1]))
        return output, [plan.cost_of(each) for each in zip(*counts, strict=True)]

    def forward_features(self, images: Tensor) -> Tensor:
        """Computes features after the last norm, in the dense host's shape and order."""
        return self.plan.adapter.norm(self.host, self.trace(images)[-1].dense_features())

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:  # noqa: FBT001, FBT002
        """Applies the host's own head to features from `forward_features`."""
        head = self.host.get_submodule("").forward_head
        result: Tensor = head(x, pre_logits=pre_logits)  # type: ignore[operator]
        return result

    forward_intermediates = forward_intermediates

    def save(self, path: str | Path, *, results: Results | None = None) -> None:
        """Writes weights, recipe and a model card to the folder `path`: all of it, or nothing.

        Args:
            path: the folder.
            results: the Report of `measure`, which then stands in the card.
        """
        check_plain(self, "saved")
        recipe = make_recipe(self.host, self.plan, self.trained, self.calibrated)
        beside = write_texts(self.host, self.plan, recipe, results)
        write_folder(path, self.state_dict(keep_vars=True), recipe, beside)

    def save_pretrained(self, path: str | Path, *, results: Results | None = None) -> None:
        """Does the same as `save`, by Hugging Face's name."""
        self.save(path, results=results)

    def push_to_hub(
        self, repository: str, *, results: Results | None = None, **how: Unpack[Upload]
    ) -> str:
        """Uploads what `save` writes to a Hub repository, and returns its address.

        A card that somebody wrote or edited there stays. `how` takes `private`, `commit_message`,
        `revision` (a branch) and `token`.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save(Path(folder) / "model", results=results)
            return upload(Path(folder) / "model", repository, **how)

    def extra_repr(self) -> str:
        """Writes schedule and costs, as print() shows them."""
        share = self.macs().total / self.dense_macs().total
        tail = self.plan.tail
        return f"{self.schedule}, tail={tail!r}, {self.macs()} ({share:.0%} of the host)"

    def __getattr__(self, name: str) -> Any:
        """Looks up attributes of the host that its own library needs, such as `num_classes`.

        Called only for names that are not found otherwise, so no forward pass comes here.
        """
        try:
            return super().__getattr__(name)
        except AttributeError:
            plan = self.__dict__.get("plan")
            if plan is not None and name in plan.adapter.host_attributes:
                return host_attribute(self, name)
            raise AttributeError(
                f"SlimModel has no {name!r}. {INSTEAD.get(name, OTHERWISE)}"
            ) from None

    def __prepare_scriptable__(self) -> SlimModel:
        """Raises what `torch.jit.script`, which calls this first, cannot do."""
        raise refuse_script()

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """Refuses weights of the dense model, whose names lack the prefix of the host."""
        check_names(state_dict, prefix, self.host)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _prepare_method(self) -> None:
        """Makes the parameters of a method that learns, for the width of the deciding blocks."""
        method, shape = self.plan.method, self.plan.shape
        deciding = self.plan.decision_blocks
        widths = [shape.blocks[block].width for block in deciding or (0,)]
        if isinstance(method, LearnedMethod):
            method.prepare(widths[0], deciding)
        if len(set(widths)) > 1 and any(each.ndim > 1 for each in method.parameters()):
            raise UnsupportedModel(
                f"{type(method).__name__} has layers for one width, and is to decide in blocks "
                f"{deciding} of {sorted(set(widths))} channels. Give at= (--at) in one stage."
            )


def name_slimmed_part(model: Any) -> str:
    """Says where in a wrapper the slimmed model is ("model.module"); "" if there is none."""
    parts = model.named_modules() if isinstance(model, nn.Module) else ()
    return next((f"model.{name}" for name, part in parts if isinstance(part, SlimModel)), "")
