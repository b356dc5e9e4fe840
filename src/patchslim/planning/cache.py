"""Keeps tables of latencies between runs, each under what it was measured for.

A table holds for one device and one set of versions. It lies in the user's cache folder as sealed
JSON; one that is of another device, or was edited, is not used and says so.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from patchslim.errors import BadFile, UnusedTable, warn_caller
from patchslim.files import read_json, write_atomically
from patchslim.hosts._registry import installed_libraries
from patchslim.report.provenance import processor_name
from patchslim.saving.seal import CHECKSUMS, changed_entries, seal_recipe
from patchslim.settings import show_value
from patchslim.versions import installed_version, package_version

FORMAT_VERSION = 1
FOLDER_VARIABLE = "PATCHSLIM_CACHE"
DIGITS = 20  # hexadecimal, of the name of a file


def cache_folder() -> Path:
    """Returns the folder of tables: PATCHSLIM_CACHE, or one in the user's own cache folder."""
    named = os.environ.get(FOLDER_VARIABLE)
    if named:
        return Path(named).expanduser()
    if sys.platform == "darwin":
        home = Path.home() / "Library" / "Caches"
    elif os.name == "nt":
        home = Path(os.environ.get("LOCALAPPDATA") or Path.home())
    else:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "patchslim" / "latencies"


def device_fingerprint(device: torch.device, libraries: Iterable[str]) -> dict[str, Any]:
    """Returns what times depend on besides the question: the machine, and versions.

    Args:
        device: what the model is on.
        libraries: the distributions of the runtime.
    """
    versions = {"torch": installed_version("torch"), **installed_libraries()}
    versions |= {name: installed_version(name) for name in libraries}
    return {
        "processor": processor_name(device),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "patchslim": package_version(),
        "versions": dict(sorted(versions.items())),
    }


def table_file(question: Mapping[str, Any]) -> Path:
    """Returns where the table lies that answers a question: model, method, batch, runtime."""
    text = json.dumps(question, sort_keys=True)
    return cache_folder() / f"{hashlib.sha256(text.encode()).hexdigest()[:DIGITS]}.json"


def read_table(question: Mapping[str, Any], device: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the table for a question that was measured on this device; None if there is none.

    One that was measured elsewhere, or is damaged, is refused with a warning.
    """
    file = table_file(question)
    if not file.exists():
        return None
    try:
        saved = read_json(file)
        reason = _find_fault(saved, question, device)
    except BadFile as error:
        reason = str(error)
    if reason is None:
        found: dict[str, Any] = saved["table"]
        return found
    warn_caller(f"{file} is not used: {reason} The latencies are measured anew.", UnusedTable)
    return None


def write_table(
    question: Mapping[str, Any], device: Mapping[str, Any], table: Mapping[str, Any]
) -> None:
    """Writes a table to the cache; warns if nobody can write there, and goes on."""
    entries = {
        "format": FORMAT_VERSION,
        "question": dict(question),
        "device": dict(device),
        "table": dict(table),
    }
    file = table_file(question)
    try:
        write_atomically(file, json.dumps(seal_recipe(entries), indent=1, allow_nan=False) + "\n")
    except BadFile as error:
        warn_caller(
            f"The latencies are not kept for the next time: {error} ({FOLDER_VARIABLE} names "
            "another folder.)",
            UnusedTable,
        )


def _find_fault(saved: Any, question: Mapping[str, Any], device: Mapping[str, Any]) -> str | None:
    """Says why a saved table cannot be used, or None."""
    if not isinstance(saved, dict) or not isinstance(saved.get(CHECKSUMS), dict):
        return "it is no table of latencies."
    changed = changed_entries(saved)
    if changed:
        return f"it was edited or damaged ({', '.join(changed[:3])})."
    asked = {"format": FORMAT_VERSION, "question": dict(question)}
    if any(saved.get(name) != json.loads(json.dumps(value)) for name, value in asked.items()):
        return "it was written for another question, or by another version of patchslim."
    there, here = saved.get("device"), json.loads(json.dumps(device))
    if there == here:
        return None
    there = there if isinstance(there, dict) else {}
    different = [
        f"{name} {show_value(there.get(name))}, and here {show_value(here[name])}"
        for name in here
        if there.get(name) != here[name]
    ]
    return f"it was measured elsewhere: {'; '.join(different)}."
