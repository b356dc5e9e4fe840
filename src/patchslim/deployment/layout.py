"""Where several exported models lie in a folder: by name, or as a server of models wants them.

OpenVINO Model Server and Triton serve a folder a model, with a folder for each version of it. So
each budget is a version: 1 is the cheapest, and the last one, which clients get that ask for none,
the costliest. What a server has to be told stands beside the versions.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import torch

from patchslim.deployment.artefact import Artefact
from patchslim.deployment.graph import INPUT
from patchslim.deployment.target import Target
from patchslim.deployment.targets.openvino import find_hint
from patchslim.errors import UnknownName, WrongExport

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
MOST_BATCH = 64  # images that Triton puts together, where an artefact takes any number
TYPES = {
    torch.float32: "TYPE_FP32", torch.int64: "TYPE_INT64", torch.int32: "TYPE_INT32",
    torch.bool: "TYPE_BOOL",
}  # fmt: skip


class Layout(ABC):
    """An order of several models in a folder.

    Attributes:
        name: what `layout=` takes; None for ours.
        shares: whether the models have their weights in common in one file.
        files: names of the files beside the models.
    """

    name: ClassVar[str | None]
    shares: ClassVar[bool] = False
    files: ClassVar[Sequence[str]] = ()

    @abstractmethod
    def check(self, target: Target, precision: str) -> None:
        """Refuses what cannot be laid out so."""

    def places(self, target: Target, names: Sequence[str]) -> dict[str, PurePosixPath]:
        """The place of each model in the folder. Names are in the order of their operations."""
        model = f"model{target.suffix}" if target.suffix else ""
        numbered = zip(names, range(1, len(names) + 1), strict=True)
        return {name: PurePosixPath(str(number), model) for name, number in numbered}

    @abstractmethod
    def write(self, folder: Path, name: str, members: Sequence[Artefact]) -> None:
        """Writes what a server has to know of the models in a folder, which it calls `name`."""


class ByName(Layout):
    """Each model under its name, and the weights in one file beside them."""

    name = None
    shares = True

    def check(self, target: Target, precision: str) -> None:
        """Refuses targets that cannot share weights."""
        if target.alone:
            raise WrongExport(
                f"{target.name} cannot hold several models with their weights in common: "
                f"{target.alone}. Export each by itself, or give to='onnx' or 'openvino'."
            )

    def places(self, target: Target, names: Sequence[str]) -> dict[str, PurePosixPath]:
        """Each under its name, with the ending of the target."""
        return {name: PurePosixPath(f"{name}{target.suffix}") for name in names}

    def write(self, folder: Path, name: str, members: Sequence[Artefact]) -> None:
        """Writes nothing."""


class Ovms(Layout):
    """A model for OpenVINO Model Server: versions, and a `config.json` to start it with."""

    name = "ovms"
    files = ("config.json",)

    def check(self, target: Target, precision: str) -> None:
        """Refuses all targets but its own."""
        if target.name != "openvino":
            raise WrongExport(
                f"layout='ovms': OpenVINO Model Server runs models in OpenVINO, and what was "
                f"checked for {target.name} was checked in another runtime. Give to='openvino'."
            )

    def write(self, folder: Path, name: str, members: Sequence[Artefact]) -> None:
        """Has it serve all versions, in the precision in which they were checked."""
        served = {
            "name": name,
            "base_path": ".",
            "model_version_policy": {"all": {}},
            "plugin_config": {"INFERENCE_PRECISION_HINT": find_hint(members[0].card["precision"])},
        }
        config = {"model_config_list": [{"config": served}]}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


class Triton(Layout):
    """A model in a repository of Triton: versions, and a `config.pbtxt`."""

    name = "triton"
    files = ("config.pbtxt",)
    backends: ClassVar[Mapping[str, str]] = {"onnx": "onnxruntime", "openvino": "openvino"}

    def check(self, target: Target, precision: str) -> None:
        """Refuses targets without a backend, and precisions that its backend cannot be told."""
        if target.name not in self.backends:
            raise WrongExport(
                f"layout='triton': Triton has no backend for {target.name}. Give to='onnx', or "
                "'openvino' with precision='bfloat16'."
            )
        if target.name == "openvino" and find_hint(precision) != "bf16":
            raise WrongExport(
                f"layout='triton': its backend for OpenVINO cannot be told to compute in float32, "
                f"and on many CPUs computes in bfloat16, so that {precision} would be another "
                "model there. Give precision='bfloat16', to='onnx', or layout='ovms'."
            )

    def write(self, folder: Path, name: str, members: Sequence[Artefact]) -> None:
        """Writes names, types and shapes of inputs and outputs, and how requests are put together.

        The models were checked on a CPU, so that is where they are to run.
        """
        card = members[0].card
        any_batch = card["batch"] is None
        lead = [] if any_batch else [card["batch"]]
        lines = [
            f'name: "{name}"',
            f'backend: "{self.backends[card["target"]]}"',
            f"max_batch_size: {MOST_BATCH if any_batch else 0}",
            _tensor("input", INPUT, "TYPE_FP32", [*lead, *card["input"]]),
            *(
                _tensor("output", each, kind, [*lead, *shape])
                for each, kind, shape in _outputs(members)
            ),
            "instance_group [ { kind: KIND_CPU } ]",
            "version_policy { all { } }",
        ]
        if any_batch:
            lines.append("dynamic_batching { }")
        if card["target"] == "openvino":
            lines.append('parameters { key: "HINT_BF16" value { string_value: "YES" } }')
        (folder / "config.pbtxt").write_text("\n".join(lines) + "\n", encoding="utf-8")


LAYOUTS: dict[str | None, Layout] = {each.name: each for each in (ByName(), Ovms(), Triton())}


def layout_names() -> list[str]:
    """What `layout=` takes."""
    return sorted(name for name in LAYOUTS if name is not None)


def find_layout(name: str | None) -> Layout:
    """The layout of that name; ours for None."""
    if name not in [*LAYOUTS]:  # which may be of any type
        raise UnknownName.of("layout", str(name), layout_names())
    return LAYOUTS[name]


def _outputs(members: Sequence[Artefact]) -> list[tuple[str, str, list[int]]]:
    """Name, type and shape of each output, without the batch; -1 where the models differ."""
    card = members[0].card
    black = torch.zeros(card["batch"] or 1, *card["input"])
    answers = [each.run(black) for each in members]
    found = []
    for number, name in enumerate(card["outputs"]["names"]):
        given: list[Any] = [answer[number] for answer in answers]
        shapes = zip(*(each.shape[1:] for each in given), strict=True)
        shape = [sizes[0] if len(set(sizes)) == 1 else -1 for sizes in shapes]
        found.append((name, TYPES[given[0].dtype], shape))
    return found


def _tensor(kind: str, name: str, data_type: str, shape: Sequence[int]) -> str:
    """An input or output in the text form of protocol buffers."""
    return (
        f'{kind} [ {{ name: "{name}" data_type: {data_type} dims: '
        f"[ {', '.join(map(str, shape))} ] }} ]"
    )
