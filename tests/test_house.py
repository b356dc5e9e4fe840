"""The rules of the house: where imports point, what an import may load, names, sizes, versions."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from torch import nn

import patchslim
from patchslim.hosts._registry import find_libraries
from patchslim.testing.trial import tiny_host
from patchslim.versions import OLDEST_VERSIONS, installed_version

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "patchslim"
FILES = sorted(SOURCE.rglob("*.py"))

# The rooms from the ground up. A file imports from its own room and from rooms before it, and no
# import is exempt: not a lazy one inside of a function, not one for type checkers alone.
ROOMS = """
    errors settings files versions guides
    tokens example
    methods architectures
    hosts schedules saving runs
    model
    data report
    measurement testing deployment
    benchmarking
    planning
    calibration training
    sweep
    cli
    __init__ __main__
""".split()
MOST_LOOSE = 6  # files at the root of the package

# What a method or a family may import: these rooms, and the private files of its own room.
KNOWN_TO_METHODS = {"errors", "settings", "tokens"}
KNOWN_TO_HOSTS = {"architectures", "errors", "tokens", "versions"}

HEAVY = """
    torch numpy
    timm transformers PIL safetensors huggingface_hub torchvision sklearn scipy matplotlib
"""
DUMPS = {"utils", "util", "helpers", "helper", "common", "base", "misc", "core", "tools", "shared"}
MOST_LINES = 400
MOST_PUBLIC = 20  # names of a SlimModel


def dotted(file: Path) -> str:
    """Names a module without the package's name: `hosts.timm_vit`; a room's own file is `hosts`."""
    parts = file.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


MODULES = {dotted(file): file for file in FILES}


def room(module: str) -> str:
    return module.partition(".")[0]


def imported(file: Path) -> set[str]:
    """Lists the modules of ours that a file imports anywhere, by their dotted names."""
    named: list[str] = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            named += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            named += [f"{node.module}.{alias.name}" for alias in node.names]
    ours = [name.removeprefix("patchslim.") for name in named if name.startswith("patchslim.")]
    ours += ["__init__" for name in named if name == "patchslim"]
    return {module for name in ours for module in [longest_module(name)] if module}


def longest_module(name: str) -> str:
    """Finds the module that a dotted name lies in: `tokens.rows` for `tokens.rows.take`."""
    while name and name not in MODULES:
        name = name.rpartition(".")[0]
    return name or "__init__"


def find_circle(graph: dict[str, set[str]]) -> list[str]:
    """Finds names of which each imports the next and the last the first; or none."""
    finished: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in finished:
            return []
        for other in sorted(graph.get(name, ())):
            circle = visit(other, [*path, name])
            if circle:
                return circle
        finished.add(name)
        return []

    return next(filter(None, (visit(name, []) for name in sorted(graph))), [])


def test_imports_point_down():
    wrong = [
        f"{module} imports {other}"
        for module, file in MODULES.items()
        for other in imported(file)
        if room(module) != room(other) and ROOMS.index(room(other)) > ROOMS.index(room(module))
    ]
    assert not wrong


def test_files_import_each_other_in_no_circle():
    graph = {module: imported(file) - {module} for module, file in MODULES.items()}
    assert not find_circle(graph)
    assert find_circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


def test_every_room_is_listed_and_few_files_are_loose():
    assert {room(module) for module in MODULES} == set(ROOMS)
    assert len(list(SOURCE.glob("*.py"))) <= MOST_LOOSE


@pytest.mark.parametrize(
    ("folder", "known"), [("methods", KNOWN_TO_METHODS), ("hosts", KNOWN_TO_HOSTS)]
)
def test_methods_and_families_know_neither_each_other_nor_what_is_above(folder, known):
    for file in sorted((SOURCE / folder).glob("[!_]*.py")):
        strange = {name for name in imported(file) if room(name) not in known}
        own = {name for name in strange if name == folder or name.startswith(f"{folder}._")}
        assert strange == own, f"{file.name} knows {strange - own}"


def test_importing_loads_nothing_heavy_and_asks_nobody():
    """Neither does what is known of libraries. One process shows it all, since torch takes long."""
    code = f"""
import sys
def refuse(event, _):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname"):
        raise SystemExit(f"importing asked the network: {{event}}")
sys.addaudithook(refuse)
import patchslim
print(*[name for name in {HEAVY.split()!r} if name in sys.modules])
from patchslim.hosts._registry import find_libraries
for library in find_libraries():
    library.hint, library.oldest, library.installed_version()
print(*[each.name for each in find_libraries() if each.name in sys.modules])
for name in patchslim.__all__:
    getattr(patchslim, name)
print(*[name for name in {HEAVY.split()[2:]!r} if name in sys.modules])
"""
    path = f"import sys; sys.path.insert(0, {str(SOURCE.parent)!r})\n"
    command = [sys.executable, "-W", "error", "-c", path + code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert (done.returncode, done.stdout.split()) == (0, []), done.stdout + done.stderr


def test_files_say_what_they_are_and_stay_short():
    for file in FILES:
        text, name = file.read_text(encoding="utf-8"), file.relative_to(SOURCE)
        assert not DUMPS & set(name.with_suffix("").parts), f"{name}: name it after an idea"
        assert text.count("\n") <= MOST_LINES, f"{name} is longer than {MOST_LINES} lines"
        assert ast.get_docstring(ast.parse(text)), f"{name} does not say what it is"


def by_case(name: str) -> tuple[bool, bool, str]:
    """Sorts constants first, then classes, then functions, as ruff does."""
    return not name.isupper(), not name[0].isupper(), name


@pytest.mark.parametrize("package", ["patchslim.testing", "patchslim.tokens"])
def test_all_is_sorted_and_complete(package):
    module = importlib.import_module(package)
    public = {
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert module.__all__ == sorted(module.__all__, key=by_case)
    assert set(module.__all__) == public


@pytest.mark.parametrize("package", ["patchslim", "patchslim.methods"])
def test_names_imported_on_first_use_are_sorted_and_type_checkers_see_the_same(package):
    module = importlib.import_module(package)
    assert module.__all__ == sorted(module.__all__, key=by_case)
    tree = ast.parse(inspect.getsource(module))
    typed = {
        alias.asname: node.module
        for branch in tree.body
        if isinstance(branch, ast.If)
        for node in branch.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname
    }
    assert typed == module._MODULES
    for name, home in typed.items():
        value = getattr(module, name)
        assert value is getattr(importlib.import_module(home), name)
        assert getattr(module, name) is value
    assert not hasattr(module, "nothing_of_this_name")


def test_the_package_finds_its_names_and_says_which_is_nearest():
    assert set(dir(patchslim)) == {*patchslim.__all__, "__version__"}
    assert patchslim.__version__ == (installed_version("patchslim") or "0+source")
    assert patchslim.errors.UnknownName.__module__ == "patchslim.errors"
    with pytest.raises(AttributeError, match=r"no attribute 'slimm'\. Did you mean 'slim'\?"):
        _ = patchslim.slimm
    with pytest.raises(ImportError, match="cannot import name 'TrainConfg'"):
        exec("from patchslim import TrainConfg")
    assert not hasattr(patchslim, "__path")


def tracked() -> list[Path]:
    """Lists the files that are, or are about to be, in the repository."""
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
    wrong_lines = []
    for file in tracked():
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        wrong_lines += [f"{file.relative_to(ROOT)}: {each}" for each in wrong.findall(text)]
    assert not wrong_lines


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
    assert installed_version("patchslim") in (None, version)


def test_supported_versions_are_the_ones_that_the_project_asks_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    for name, oldest in OLDEST_VERSIONS.items():
        assert requirement(name, oldest) in project["dependencies"]
    for library in find_libraries():
        assert library.extra in (None, *extras), (
            f"{library.name} is to be installed by patchslim[{library.extra}], and pyproject.toml "
            f"has no such extra. It has {', '.join(extras)}; add {library.extra} = "
            f'["{requirement(library.distribution, library.oldest)}"].'
        )
        asked = extras[library.extra] if library.extra else project["dependencies"]
        assert requirement(library.distribution, library.oldest) in asked


def requirement(distribution: str, oldest: tuple[int, ...]) -> str:
    return f"{distribution}>={'.'.join(map(str, oldest))}"


def test_a_slimmed_model_has_few_public_names():
    """A user has to find his way among them; the module's own and the host's are not counted."""
    slimmed = patchslim.slim(tiny_host(), "topk", keep_rate=0.5, at=(1,))
    names = {*dir(type(slimmed)), *vars(slimmed)} - {*dir(nn.Module)} - {*vars(nn.Module())}
    assert len({name for name in names if not name.startswith("_")}) <= MOST_PUBLIC
