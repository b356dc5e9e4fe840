"""The shape of the package in figures: files, floors, circles, contracts, names, tests.

    python benchmarks/structure.py                    this checkout
    python benchmarks/structure.py BEFORE AFTER       two checkouts side by side
    python benchmarks/structure.py --run-tests ...    also how long the default tests take

How each figure is counted stands beside the function that counts it. A checkout may be of 0.6.1
(all modules loose, `Reducer`) or of today (rooms, `Method`). Checkouts share this interpreter and
its libraries.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

HERE = Path(__file__).resolve().parents[1]
REPEATS = 5  # of --help, whose median is reported
Graph: TypeAlias = Mapping[str, set[str]]
Function: TypeAlias = ast.FunctionDef | ast.AsyncFunctionDef

# Run inside of a checkout: its calls are counted while a tiny model is slimmed and asked.
PROBE = """
import inspect, json, os, sys, warnings
warnings.simplefilter("ignore")
import timm, torch
from torch import nn
import patchslim
ROOT = os.path.dirname(patchslim.__file__) + os.sep
torch.set_num_threads(1)

def trace(work):
    files, calls = set(), {}
    def note(frame, event, _):
        name = frame.f_code.co_filename
        if event == "call" and name.startswith(ROOT):
            files.add(name)
            calls[frame.f_code.co_name] = calls.get(frame.f_code.co_name, 0) + 1
    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return {"files": len(files), "calls": sum(calls.values()),
            "getattr": calls.get("__getattr__", 0)}

def members(cls):
    named = {name for each in cls.__mro__ if each.__module__.startswith("patchslim")
             for name in [*vars(each), *vars(each).get("__annotations__", {})]
             if not name.startswith("_")}
    abstract = {name for name in cls.__abstractmethods__ if not name.startswith("_")}
    return {"abstract": len(abstract), "optional": len(named - abstract)}

host = timm.create_model("vit_tiny_patch16_224", img_size=64, embed_dim=32, num_heads=2,
                         depth=12, num_classes=5).eval()
images = torch.randn(2, 3, 64, 64)
patchslim.slim(host, "tome", r=1)  # what is loaded once is loaded
slimmed = []
planned = trace(lambda: slimmed.append(patchslim.macs(host, "tome", macs=0.6).rows))
slimmed = patchslim.slim(host, "tome", macs=0.6)
with torch.inference_mode():
    slimmed(images)
    forward = trace(lambda: slimmed(images))
Method = getattr(patchslim, "Method", None) or patchslim.Reducer
public = {name for name in [*dir(slimmed), *slimmed._modules] if not name.startswith("_")}
print(json.dumps({
    "planned": planned, "forward": forward,
    "adapter": members(patchslim.Adapter), "method": members(Method),
    "slimmed": len(public - set(dir(nn.Module()))), "exported": len(patchslim.__all__),
}))
"""

# Words that are participles without ending in `ed`.
PARTICIPLES = set(
    """begun bound built chosen cut done drawn found given gone held kept known laid left lent lost
    made met put read run said seen sent set shown shrunk spent split sunk taken taught told thrown
    torn undone unseen won worn wound written""".split()
)


def find_modules(source: Path) -> dict[str, Path]:
    """Maps the files of the package by dotted name; a folder's `__init__` has the folder's name."""
    modules = {}
    for file in sorted(source.rglob("*.py")):
        parts = file.relative_to(source).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" and parts[:-1] else parts)] = file
    return modules


@cache
def parse(file: Path) -> ast.Module:
    """Parses the syntax tree of a file."""
    return ast.parse(file.read_text(encoding="utf-8"))


def imports(file: Path, modules: Mapping[str, Path]) -> set[str]:
    """Lists modules of the package that a file imports: at its top, in functions, for types."""
    names: list[str] = []
    for node in ast.walk(parse(file)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    imported = set()
    for name in names:
        if name.startswith("patchslim."):
            name = name.removeprefix("patchslim.")
            while name and name not in modules:
                name = name.rpartition(".")[0]
            imported.add(name or "__init__")
    return imported


def find_circles(graph: Graph) -> list[set[str]]:
    """Finds groups of nodes that reach each other, single nodes too."""

    def reach(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            new = graph[waiting.pop()] - seen
            seen |= new
            waiting += new
        return seen

    reached = {node: reach(node) for node in graph}
    groups = {
        frozenset({node} | {other for other in reached[node] if node in reached[other]})
        for node in graph
    }
    return [set(group) for group in groups]


def count_floors(graph: Graph) -> int:
    """Counts the longest chain of rooms that import one another; a room in a circle counts, too."""
    groups = find_circles(graph)
    place = {node: number for number, group in enumerate(groups) for node in group}
    below = {
        number: {place[other] for node in group for other in graph[node]} - {number}
        for number, group in enumerate(groups)
    }

    @cache
    def height(number: int) -> int:
        return len(groups[number]) + max(map(height, below[number]), default=0)

    return max(map(height, below))


def import_figures(source: Path) -> dict[str, str]:
    """Counts loose files at the root, floors of rooms, circles of files.

    A room is a folder or a loose file at the root. The face of the package, `__init__` and
    `__main__`, is no floor.
    """
    modules = find_modules(source)
    graph = {name: imports(file, modules) - {name} for name, file in modules.items()}
    rooms: dict[str, set[str]] = {}
    for name, others in graph.items():
        room = name.partition(".")[0]
        rooms.setdefault(room, set()).update(other.partition(".")[0] for other in others)
        rooms[room].discard(room)
    faces = {"__init__", "__main__"}
    floors = count_floors({name: rooms[name] - faces for name in rooms.keys() - faces})
    circles = [group for group in find_circles(graph) if len(group) > 1]
    return {
        "files in all": str(len(modules)),
        "loose files at the root": str(len(list(source.glob("*.py")))),
        "floors": str(floors),
        "circles of files": f"{len(circles)} ({sum(map(len, circles))} files)",
    }


def is_participle(name: str) -> bool:
    """Tells whether a name is one word and that a participle; `need` and the like are none."""
    return name in PARTICIPLES or bool(re.fullmatch(r"[a-z]{2,}[^e\W]ed", name))


def median_and_longest(functions: Iterable[Function]) -> str:
    """Counts lines from `def` to the last, signature and docstring included."""
    lengths = {each: (each.end_lineno or each.lineno) - each.lineno + 1 for each in functions}
    longest = max(lengths, key=lengths.__getitem__)
    return f"{statistics.median(lengths.values()):g}, {lengths[longest]} ({longest.name})"


def name_figures(source: Path) -> dict[str, str]:
    """Counts public definitions, names of functions, docstrings, lengths of functions."""
    modules = find_modules(source)
    functions: list[Function] = []
    documented: list[str] = []
    public = 0
    for name, file in modules.items():
        tree = parse(file)
        if not any(part.startswith("_") and part != "__init__" for part in name.split(".")):
            kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
            public += sum(
                isinstance(node, kinds) and not node.name.startswith("_") for node in tree.body
            )
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                functions.append(node)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module):
                documented.append(ast.get_docstring(node) or "")
    docstrings = [text for text in documented if text]
    bare = sum(is_participle(each.name.strip("_")) for each in functions)
    articles = sum(text.startswith("The ") for text in docstrings)
    return {
        "public definitions": str(public),
        "functions that are bare participles": f"{bare} of {len(functions)}",
        "docstrings that begin with The": f"{articles} of {len(docstrings)}",
        "lines of a function: median, longest": median_and_longest(functions),
    }


def run_inside(checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs Python with the package of a checkout, in the checkout."""
    environment = {**os.environ, "PYTHONPATH": str(checkout / "src")}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=checkout,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def traced_figures(checkout: Path) -> dict[str, str]:
    """Counts what a forward pass and `macs=0.6` cross, and the members of the classes users meet.

    Members are public attributes that a class and its bases in the package have; abstract ones
    must be given.
    """
    done = run_inside(checkout, "-c", PROBE)
    if done.returncode:
        raise SystemExit(f"{checkout} cannot be traced:\n{done.stderr}")
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    forward, planned = figures["forward"], figures["planned"]
    return {
        "files that a forward pass crosses": str(forward["files"]),
        "calls in it, of them __getattr__": f"{forward['calls']}, {forward['getattr']}",
        "files from macs=0.6 to counts": str(planned["files"]),
        **{
            f"members of {name}: abstract, optional": "{abstract}, {optional}".format_map(
                figures[kind]
            )
            for kind, name in (("adapter", "Adapter"), ("method", "Method"))
        },
        "public names of SlimModel beside Module's": str(figures["slimmed"]),
        "names exported by patchslim": str(figures["exported"]),
    }


def time_help(checkout: Path) -> str:
    """Measures the median of seconds that `python -m patchslim --help` takes."""
    seconds = []
    for _ in range(REPEATS):
        begun = time.perf_counter()
        done = run_inside(checkout, "-m", "patchslim", "--help")
        seconds.append(time.perf_counter() - begun)
        if done.returncode:
            raise SystemExit(f"{checkout}: --help fails:\n{done.stderr}")
    return f"{statistics.median(seconds):.2f}"


def count_tests(checkout: Path) -> dict[str, str]:
    """Counts tests that pytest collects, and those in files of laws (a law on one subject)."""
    options = ("-o", "addopts=", "-p", "no:cacheprovider", "--collect-only", "-q", "-q", "-m")
    figures = {}
    for kind, marked in (("default", "not slow and not gpu"), ("slow", "slow")):
        done = run_inside(checkout, "-m", "pytest", *options, marked)
        counts = re.findall(r"^tests/(\S+): (\d+)$", done.stdout, flags=re.MULTILINE)
        if done.returncode or not counts:
            raise SystemExit(f"{checkout}: tests are not collected:\n{done.stdout[-2000:]}")
        laws = sum(int(count) for file, count in counts if file.endswith("laws.py"))
        figures[f"tests, {kind}; in test_*laws.py"] = (
            f"{sum(int(count) for _, count in counts)}; {laws}"
        )
    return figures


def time_tests(checkout: Path) -> str:
    """Reads the line with which the default tests end, on two processes."""
    done = run_inside(checkout, "-m", "pytest", "-n", "2", "--dist", "worksteal")
    return done.stdout.strip().rpartition("\n")[2]


def measure_checkout(checkout: Path, *, run_tests: bool) -> dict[str, str]:
    """Measures all figures of one checkout, as text by label."""
    source = checkout / "src" / "patchslim"
    if not source.is_dir():
        raise SystemExit(f"{checkout} is no checkout: there is no src/patchslim in it.")
    figures = {
        **import_figures(source),
        **traced_figures(checkout),
        **name_figures(source),
        "seconds of --help": time_help(checkout),
        "bytes of README.md": f"{(checkout / 'README.md').stat().st_size:,}",
        **count_tests(checkout),
    }
    return figures | ({"default tests": time_tests(checkout)} if run_tests else {})


def name_checkout(checkout: Path) -> str:
    """Names the commit of a checkout, else its folder."""
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=7"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or checkout.name


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkouts", nargs="*", type=Path, default=[HERE], metavar="CHECKOUT")
    parser.add_argument("--run-tests", action="store_true", help="time the default tests, too")
    given = parser.parse_args()
    checkouts = [checkout.resolve() for checkout in given.checkouts]
    columns = [measure_checkout(each, run_tests=given.run_tests) for each in checkouts]
    rows = [["", *map(name_checkout, checkouts)]]
    rows += [[label, *(column[label] for column in columns)] for label in columns[0]]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )


if __name__ == "__main__":
    main()
