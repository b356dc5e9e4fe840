"""The command that asks every model: answers with reasons, and a run that was stopped goes on."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import transformers
from torch import nn

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def coverage() -> Any:
    """Imports the script of the benchmarks folder as a module."""
    path = ROOT / "benchmarks" / "coverage.py"
    spec = importlib.util.spec_from_file_location("coverage_benchmark", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


RESNET = (
    "ResNet is not slimmed: it has no attention over tokens, so there are none to remove. Take a "
    "vision transformer: `patchslim models` lists those that are served."
)


def fail() -> nn.Module:
    """Stands for a class that its library does not build."""
    raise ValueError("no such thing")


def some_models() -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """Lists one model for each kind of answer."""
    yield "vit", lambda: timm.create_model("test_vit")
    yield "resnet18", lambda: timm.create_model("resnet18")
    yield "clip", lambda: transformers.CLIPModel(transformers.CLIPConfig())
    yield "none", fail


def test_every_model_gets_an_answer_with_its_reason(coverage: Any, tmp_path: Path) -> None:
    found = coverage.ask_all("some", some_models(), coverage.Notes(tmp_path / "notes"))
    assert found["served"] == {"timm VisionTransformer": ["vit"]}
    assert found["counts"]["models"] == 4
    assert found["refused"] == {
        RESNET: ["resnet18"],
        "slim model.vision_model (CLIPVisionModel)": ["clip"],
        "the library does not build it here: ValueError": ["none"],
    }


def test_a_long_reason_is_whole_so_that_equal_ones_are_counted_together(coverage: Any) -> None:
    _, said = coverage.ask("xcit", lambda: timm.create_model("xcit_nano_12_p8_224"))
    _, other = coverage.ask("edgenext", lambda: timm.create_model("edgenext_xx_small"))
    sentences = {
        each.partition(" is not slimmed: ")[2].partition(". ")[0] for each in (said, other)
    }
    assert len(sentences) == 1
    assert sentences.pop().endswith("convolutions need every cell")


def test_an_error_that_is_none_of_ours_is_unclear(
    coverage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coverage.patchslim, "macs", lambda _: 1 // 0)
    kind, said = coverage.ask("vit", lambda: timm.create_model("test_vit"))
    assert (kind, said) == ("unclear", "ZeroDivisionError: integer division or modulo by zero")


def test_a_run_that_was_stopped_asks_the_others_alone(coverage: Any, tmp_path: Path) -> None:
    path = tmp_path / "notes"
    models = [*some_models()]
    coverage.ask_all("some", iter(models[:2]), coverage.Notes(path))
    with path.open("a", encoding="utf-8") as file:
        file.write('["some", "clip", "ref')  # the line at which it was stopped
    asked: list[str] = []

    def note(name: str, build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        def run() -> nn.Module:
            asked.append(name)
            return build()

        return run

    again = coverage.Notes(path)
    found = coverage.ask_all("some", ((name, note(name, it)) for name, it in models), again)
    assert asked == ["clip", "none"]
    assert found["counts"]["models"] == 4
    path.write_text("made by other versions\n" + path.read_text(encoding="utf-8"))
    assert not coverage.Notes(path).answers
