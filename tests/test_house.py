"""The rules of the house: where imports point, what an import may load, names, sizes, versions."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import patchslim
from patchslim.versions import installed

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "patchslim"
FILES = sorted(SOURCE.rglob("*.py"))

# A module imports only what stands before it: values, then methods, families, the loop, and what
# is built on the loop. `reducers`, `adapters`, `laws` and `data` are packages.
ORDER = """
    errors course versions order tokens reduction attention cost grouping tiles reducer schedule
    reducers budget
    adapter models adapters step ragged surface block model slim
    preparation folder reading images dataset shards recipe io hub
    birth results report score memory measure
    augment feed checkpoint log processes losses optim identity pace run train
    influence search walk gates bisection ledger chart pyramid threshold slimming
    calibrate
    curves page picture data demo laws
    hosts terminal arguments sequel answers commands options cli
""".split()

# Imports against the order, inside of a function: methods of SlimModel that are only front doors.
FRONT_DOORS = {("model", "io"), ("model", "hub")}

# What a method or a family may know, to the last module.
KNOWN_TO_REDUCERS = {
    "attention",
    "cost",
    "errors",
    "grouping",
    "order",
    "reducer",
    "reduction",
    "schedule",
    "tiles",
    "tokens",
}
KNOWN_TO_ADAPTERS = {"adapter", "attention", "cost", "errors", "models", "tokens", "versions"}

HEAVY = "timm transformers PIL safetensors huggingface_hub torchvision sklearn scipy matplotlib"
DUMPS = {"utils", "util", "helpers", "helper", "common", "base", "misc", "core", "tools", "shared"}
MOST_LINES = 400


@dataclass(frozen=True)
class Import:
    """One import of a module of ours, and whether it is inside of a function."""

    module: str
    deferred: bool


def dotted(file: Path) -> str:
    """The name of a module without the package's: `adapters.timm_vit`."""
    return ".".join(file.relative_to(SOURCE).with_suffix("").parts)


def imports(node: ast.AST, *, deferred: bool = False) -> Iterator[Import]:
    """What a module imports of ours when it runs; imports for type checkers alone are left out."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        if isinstance(child, ast.ImportFrom) and child.module == "patchslim":
            yield from (Import(alias.name, deferred) for alias in child.names)
        elif isinstance(child, ast.ImportFrom) and (child.module or "").startswith("patchslim."):
            yield Import(str(child.module).removeprefix("patchslim."), deferred)
        elif isinstance(child, ast.Import):
            names = [alias.name for alias in child.names]
            ours = [name for name in names if name.startswith("patchslim.")]
            yield from (Import(name.removeprefix("patchslim."), deferred) for name in ours)
        inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
        yield from imports(child, deferred=deferred or inside)


def imported(file: Path) -> list[Import]:
    return list(imports(ast.parse(file.read_text(encoding="utf-8"))))


def layer(module: str) -> int:
    """The place of a module, or of the package that it is in."""
    top = module.partition(".")[0]
    assert top in ORDER, f"{module} has no place in the order of imports: give it one in {__file__}"
    return ORDER.index(top)


@pytest.mark.parametrize("file", FILES, ids=dotted)
def test_imports_point_one_way(file):
    name = dotted(file)
    if name in ("__init__", "__main__"):
        return
    top = name.partition(".")[0]
    for each in imported(file):
        other = each.module.partition(".")[0]
        within = other == top and "." in name
        if within or (each.deferred and (top, other) in FRONT_DOORS):
            continue
        assert layer(each.module) < layer(name), f"{name} imports {each.module}, which is above it"


@pytest.mark.parametrize("file", [f for f in FILES if f.parent.name == "reducers"], ids=dotted)
def test_methods_know_neither_hosts_nor_each_other(file):
    strange = {each.module for each in imported(file)} - KNOWN_TO_REDUCERS
    assert not strange


@pytest.mark.parametrize("file", [f for f in FILES if f.parent.name == "adapters"], ids=dotted)
def test_families_know_neither_methods_nor_each_other(file):
    known = {each.module for each in imported(file)}
    shared = {module for module in known if module.startswith("adapters._")}
    known = {module.removesuffix(".evo_levit") for module in known}
    assert not known - KNOWN_TO_ADAPTERS - shared


def test_importing_loads_nothing_heavy_and_asks_nobody():
    code = f"""
import sys
def refuse(event, _):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname"):
        raise SystemExit(f"importing asked the network: {{event}}")
sys.addaudithook(refuse)
import patchslim
print(*[name for name in {HEAVY.split()!r} if name in sys.modules])
"""
    path = f"import sys; sys.path.insert(0, {str(SOURCE.parent)!r})\n"
    command = [sys.executable, "-W", "error", "-c", path + code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert (done.returncode, done.stdout.split()) == (0, []), done.stdout + done.stderr


@pytest.mark.parametrize("file", FILES, ids=dotted)
def test_files_say_what_they_are_and_stay_short(file):
    text = file.read_text(encoding="utf-8")
    assert not DUMPS & set(file.relative_to(SOURCE).with_suffix("").parts), "name it after an idea"
    assert text.count("\n") <= MOST_LINES
    assert ast.get_docstring(ast.parse(text))


def by_case(name: str) -> tuple[bool, bool, str]:
    """Constants first, then classes, then functions, as ruff has it."""
    return not name.isupper(), not name[0].isupper(), name


@pytest.mark.parametrize("package", ["patchslim", "patchslim.laws"])
def test_all_is_sorted_and_complete(package):
    module = importlib.import_module(package)
    public = {
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert module.__all__ == sorted(module.__all__, key=by_case)
    assert set(module.__all__) == public


def tracked() -> list[Path]:
    """The files that are, or are about to be, in the repository."""
    command = ["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard", "-z"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        pytest.skip("not in a git repository")
    files = [ROOT / name for name in listed.stdout.split("\0") if name]
    return [file for file in files if file.is_file()]


def test_no_file_names_a_registry_or_a_place_on_somebodys_machine():
    registries = ["py" + "pi.", "python" + "hosted", "ana" + "conda", "download.py" + "torch"]
    places = ["/ro" + "ot/", "/ho" + "me/", "/wo" + "rk/", "/Use" + "rs/", "C:\\" + "Users"]
    wrong = re.compile("|".join(map(re.escape, registries + places)))
    found = []
    for file in tracked():
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{file.relative_to(ROOT)}: {each}" for each in wrong.findall(text)]
    assert not found


@pytest.mark.parametrize("name", ["constraints.txt", "constraints-oldest.txt"])
def test_constraints_name_versions_and_no_place(name):
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    for line in filter(None, lines):
        assert re.match(r"[a-z0-9._-]+==[\w.+!-]+( ; .+)?$", line), f"{name}: {line}"


def test_one_version_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    version = project["project"]["version"]
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (\S+)", changes, flags=re.MULTILINE)[0] == version
    assert installed("patchslim") in (None, version)


def test_supported_versions_are_the_ones_that_the_project_asks_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = [*project["dependencies"], *project["optional-dependencies"]["hf"]]
    for library, oldest in patchslim.versions.OLDEST.items():
        assert f"{library}>={'.'.join(map(str, oldest))}" in asked
