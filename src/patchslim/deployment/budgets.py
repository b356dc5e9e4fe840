"""`Budgets`: exported models of one set of weights, each with another number of tokens.

On the disk they are a folder: the artefacts, an index, and one file with the weights, or a folder
for each as a server wants it (see `layout.py`). Each is an artefact like any other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Unpack

from patchslim.deployment.artefact import Artefact, open_artefact
from patchslim.deployment.layout import LAYOUTS, NAME, Layout, find_layout
from patchslim.deployment.registry import find_target, target_names
from patchslim.deployment.shared_weights import WEIGHTS_FILE
from patchslim.deployment.target import Target
from patchslim.errors import BadFile, BadSetting, UnknownName
from patchslim.files import read_json
from patchslim.hosts._preprocessing import Preprocessing
from patchslim.saving.hub import Upload, upload
from patchslim.settings import Range, check_value
from patchslim.versions import package_version, say_upgrade

INDEX_FILE = "budgets.json"
INDEX_VERSION = 1
OPERATIONS = Range(0, 1e18, above=True)


class Budgets(dict[str, Artefact]):
    """Exported models of one set of weights by name, from the cheapest to the costliest.

    Attributes:
        path: the folder.
        bytes_apart: how many bytes the models would take if each had its own weights.
    """

    def __init__(self, path: Path, members: Mapping[str, Artefact], bytes_apart: int) -> None:
        super().__init__(sorted(members.items(), key=lambda each: int(each[1].card["macs"])))
        self.path, self.bytes_apart = path, bytes_apart

    def __missing__(self, name: object) -> Artefact:
        """Refuses a name that is not there, and lists the nearest ones."""
        raise UnknownName.of("budget", str(name), self)

    def within(self, macs: float) -> Artefact:
        """The costliest model that takes at most so many operations.

        Args:
            macs: a share of the dense model's (0.6) or a number of multiply-adds (0.8e9).
        """
        macs = check_value("macs", macs, float, OPERATIONS)
        dense = next(iter(self.values())).card["dense_macs"]
        most = macs * dense if macs <= 1 else macs
        fitting = [each for each in self.values() if each.card["macs"] <= most]
        if not fitting:
            least = next(iter(self.values())).card["macs"]
            raise BadSetting(
                f"macs={macs:g}: the cheapest model in {self.path} takes {least:.3g} operations, "
                f"{least / dense:.2f} of the dense model's. Give at least as many."
            )
        return fitting[-1]

    @property
    def preprocessing(self) -> Preprocessing:
        """How images are prepared, which is the same for all."""
        return next(iter(self.values())).preprocessing

    @property
    def size(self) -> int:
        """How many bytes the folder takes."""
        return sum(each.stat().st_size for each in self.path.rglob("*") if each.is_file())

    def push_to_hub(self, repository: str, **how: Unpack[Upload]) -> str:
        """Uploads the folder, and returns the address."""
        return upload(self.path, repository, **how)

    def __repr__(self) -> str:
        """The path and the names."""
        return f"Budgets({str(self.path)!r}, {', '.join(self)})"


def write_index(
    folder: Path, target: Target, names: list[str], layout: Layout, bytes_apart: int
) -> None:
    """Writes which models are in a folder."""
    index = {
        "budgets": INDEX_VERSION,
        "package": package_version(),
        "target": target.name,
        "layout": layout.name,
        "names": names,
        "bytes_apart": bytes_apart,
    }
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def open_budgets(path: Path) -> Budgets | None:
    """The models in a folder; None if it has no index.

    Raises:
        BadFile: the index or a model is truncated, edited, foreign, or of a newer version.
    """
    if not (path / INDEX_FILE).exists():
        return None
    index = _read_index(path)
    target = find_target(index["target"])
    places = find_layout(index["layout"]).places(target, index["names"])
    members: dict[str, Artefact] = {}
    for name, place in places.items():
        member = open_artefact(path / place)
        if member is None:
            raise BadFile(f"{path} is incomplete: {place} is missing. Copy it again.")
        members[name] = member
    return Budgets(path, members, index["bytes_apart"])


def list_files(path: Path) -> list[str]:
    """Names of the files in a folder of several models, the index left out."""
    index = _read_index(path)
    target, layout = find_target(index["target"]), find_layout(index["layout"])
    files = [WEIGHTS_FILE, *layout.files]
    for place in layout.places(target, index["names"]).values():
        files += [f"{place}/{name}" for name in target.files] or [str(place)]
    return files


def _read_index(path: Path) -> dict[str, Any]:
    """The index of a folder, if it is one that an export writes."""
    index = read_json(path / INDEX_FILE)
    version = index.get("budgets") if isinstance(index, dict) else None
    if not isinstance(version, int) or isinstance(version, bool):
        raise BadFile(f"{path / INDEX_FILE} was edited: it has no version. Export it again.")
    if version > INDEX_VERSION:
        raise BadFile(
            f"{path} was written by patchslim {index.get('package')}, a newer version: "
            f"{say_upgrade(index.get('package'))}"
        )
    names, size = index.get("names"), index.get("bytes_apart")
    makes_sense = {
        "target": index.get("target") in [n for n in target_names() if not find_target(n).alone],
        "layout": index.get("layout", "") in [*LAYOUTS],
        "names": _are_names(names),
        "bytes_apart": isinstance(size, int) and not isinstance(size, bool) and size >= 0,
    }
    wrong = [name for name, right in makes_sense.items() if not right]
    if wrong:
        raise BadFile(f"{path / INDEX_FILE} was edited; look at: {', '.join(wrong)}.")
    checked: dict[str, Any] = index
    return checked


def _are_names(names: Any) -> bool:
    """Whether it is a list of different names that models can have, at least one."""
    if not isinstance(names, list) or not names or not all(map(is_name, names)):
        return False
    return len(set(names)) == len(names)


def is_name(name: object) -> bool:
    """Whether a model may be called so: its name is that of a file or folder, too."""
    return isinstance(name, str) and NAME.fullmatch(name) is not None
