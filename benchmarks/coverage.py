"""Which models of timm, transformers and open_clip are served, and why the others are refused.

    python benchmarks/coverage.py
    python benchmarks/coverage.py --before earlier.json

Every timm name, every transformers model class that takes images or videos, and every open_clip
name is built on the meta device at its default configuration, and asked for its adapter and its
costs. An error that is none of ours is unclear: the command then fails and names it. `--before`
keeps the counts of an earlier result beside the new ones. Writes benchmarks/results/coverage.json.

It takes some minutes. Each answer is noted at once in a file beside the result, and a run
that was stopped goes on from there, as long as versions and families are the same.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import io
import json
import logging
import re
import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import patchslim
from patchslim.errors import PatchslimError
from patchslim.hosts._registry import installed_libraries, load_library

RESULT = Path(__file__).parent / "results" / "coverage.json"
# The lists of transformers by which its classes that take images are found.
MAPPINGS = """MODEL IMAGE_CLASSIFICATION BACKBONE ZERO_SHOT_IMAGE_CLASSIFICATION IMAGE PRETRAINING
    MASKED_IMAGE_MODELING SEMANTIC_SEGMENTATION OBJECT_DETECTION DEPTH_ESTIMATION MASK_GENERATION
    VIDEO_CLASSIFICATION IMAGE_TEXT_TO_TEXT ZERO_SHOT_OBJECT_DETECTION KEYPOINT_DETECTION""".split()


def main() -> None:
    """Asks every model and writes what was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--before", type=Path, help="an earlier result, whose counts are kept")
    parser.add_argument("--libraries", nargs="*", choices=LISTS, default=list(LISTS))
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    torch.set_grad_enabled(False)
    told: dict[str, Any] = {"versions": installed_libraries(), "libraries": {}}
    before = {} if options.before is None else json.loads(options.before.read_text())["libraries"]
    unclear = 0
    options.out.parent.mkdir(parents=True, exist_ok=True)
    notes = Notes(options.out.with_suffix(".partial.jsonl"))
    for library in options.libraries:
        found = ask_all(library, LISTS[library](), notes)
        found["distribution"] = load_library(library).distribution
        if library in before:
            found["before"] = before[library]["counts"]
        told["libraries"][library] = found
        unclear += found["counts"].get("unclear", 0)
        print(library, json.dumps(found["counts"], indent=1), flush=True)
    options.out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    notes.path.unlink()
    sys.exit(f"{unclear} models fail with an error that is none of ours." if unclear else 0)


class Notes:
    """Answers so far, one a line, kept for a run that goes on where another was stopped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.answers: dict[tuple[str, str], tuple[str, str]] = {}
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        asked = fingerprint()
        if lines[:1] == [asked]:
            for line in lines[1:]:
                with contextlib.suppress(ValueError):  # a line that was cut off
                    library, name, kind, said = json.loads(line)
                    self.answers[library, name] = (kind, said)
            print(f"{len(self.answers)} answers of a run that was stopped", flush=True)
        path.write_text(asked + "\n", encoding="utf-8")
        for (library, name), answer in self.answers.items():
            self._note(library, name, answer)

    def ask(self, library: str, name: str, build: Callable[[], nn.Module]) -> tuple[str, str]:
        """Gives the answer that was noted, or asks now and notes it."""
        if (library, name) not in self.answers:
            self.answers[library, name] = ask(name, build)
            self._note(library, name, self.answers[library, name])
        return self.answers[library, name]

    def _note(self, library: str, name: str, answer: tuple[str, str]) -> None:
        """Appends an answer to the file."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps([library, name, *answer]) + "\n")


def fingerprint() -> str:
    """Tells by what answers are made: the libraries' versions, and our families' source."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for path in sorted((Path(patchslim.__file__).parent / "hosts").rglob("*.py")):
        digest.update(path.read_bytes())
    return json.dumps({"versions": installed_libraries(), "source": digest.hexdigest()})


def ask_all(
    library: str, builders: Iterator[tuple[str, Callable[[], nn.Module]]], notes: Notes
) -> dict[str, Any]:
    """Asks each model for its adapter; sorts names by family, and the others by the reason."""
    served: dict[str, list[str]] = defaultdict(list)
    refused: dict[str, list[str]] = defaultdict(list)
    counts: Counter[str] = Counter()
    for name, build in builders:
        kind, said = notes.ask(library, name, build)
        counts["models"] += 1
        counts[kind] += 1
        (served if kind == "served" else refused)[said].append(name)
        if kind == "served":
            counts[f"served by {said}"] += 1
    return {
        "counts": dict(sorted(counts.items())),
        "served": dict(sorted(served.items())),
        "refused": dict(sorted(refused.items())),
    }


def ask(name: str, build: Callable[[], nn.Module]) -> tuple[str, str]:
    """Says whether a model is served, refused, not built here, or fails unclearly; and why."""
    try:
        with torch.device("meta"), contextlib.redirect_stderr(io.StringIO()):
            host = build().eval()
    except PatchslimError as error:
        return refusal(name, error)
    except Exception as error:  # noqa: BLE001 (a library may raise anything at its own defaults)
        return "not built", f"the library does not build it here: {type(error).__name__}"
    try:
        adapter = patchslim.find_adapter(host)
        patchslim.macs(host)
    except PatchslimError as error:
        return refusal(name, error)
    except Exception as error:  # noqa: BLE001 (what this command is there to find)
        return "unclear", f"{type(error).__name__}: {error}"[:200]
    return "served", adapter.family


def refusal(name: str, error: Exception) -> tuple[str, str]:
    """Shortens a refusal to its reason, so that equal ones are counted together."""
    said = str(error).partition(" Known families:")[0]
    part = re.search(r"(\w+), (model\.\S+) = patchslim\.slim", said)
    if part:
        return "refused, a part is served", f"slim {part[2]} ({part[1]})"
    reason = said.partition("cannot be slimmed: ")[2] or re.sub(r"\S*\.(\w+)$", r"\1", said)
    return "refused", reason.replace(name, "it")  # whole: a cut would tell equal ones apart


def timm_models() -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """Lists every name of timm's."""
    import timm

    for name in timm.list_models():
        yield name, lambda name=name: timm.create_model(name)  # type: ignore[misc]


def open_clip_models() -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """Lists every name of open_clip's, of each the image tower."""
    import open_clip
    from open_clip.model import _build_vision_tower

    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        yield (
            name,
            lambda config=config: _build_vision_tower(  # type: ignore[misc]
                config["embed_dim"], dict(config["vision_cfg"])
            ),
        )


def transformers_models() -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """Lists every class of transformers that takes images."""
    import transformers
    from transformers.models.auto import modeling_auto

    names: set[str] = set()
    for mapping in MAPPINGS:
        listed = getattr(modeling_auto, f"{mapping_name(mapping)}_NAMES", {})
        for classes in listed.values():
            names.update((classes,) if isinstance(classes, str) else classes)
    modules = {name: getattr(transformers, name, None) for name in sorted(names)}
    every = {name: cls for name, cls in modules.items() if cls is not None and takes_images(cls)}
    for cls in list(every.values()):  # bare vision towers are in no list
        module = importlib.import_module(cls.__module__)
        for name, found in vars(module).items():
            own = isinstance(found, type) and found.__module__ == module.__name__
            if own and "Vision" in name and issubclass(found, transformers.PreTrainedModel):
                every[name] = found
    for name, cls in sorted(every.items()):
        if hasattr(cls, "forward") and not name.endswith("PreTrainedModel"):
            yield name, lambda cls=cls: cls(cls.config_class())  # type: ignore[misc]


def mapping_name(task: str) -> str:
    """Says what transformers calls its list of the classes for a task."""
    return "MODEL_MAPPING" if task == "MODEL" else f"MODEL_FOR_{task}_MAPPING"


def takes_images(cls: Any) -> bool:
    """Tells whether a class of transformers takes images or videos, alone or beside text."""
    try:
        modalities = getattr(cls, "input_modalities", ()) or ()
        named = getattr(cls, "main_input_name", "") in ("pixel_values", "pixel_values_videos")
        return named or "image" in modalities or "video" in modalities
    except ImportError:  # a stand-in for a class whose libraries are not installed
        return False


LISTS: dict[str, Callable[[], Iterator[tuple[str, Callable[[], nn.Module]]]]] = {
    "open_clip": open_clip_models,
    "transformers": transformers_models,
    "timm": timm_models,
}

if __name__ == "__main__":
    main()
