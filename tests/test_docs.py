"""The documents are true: their code runs, prints what they show, and their links are not broken.

A fenced `python` block runs, those of a page one after the other in one namespace; a `text` block
right below it is what it prints. A `console` block is commands of ours with what they print.
`<!-- no-test -->` above a block leaves it out.
"""

from __future__ import annotations

import doctest
import inspect
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image

import patchslim
import patchslim.methods
from patchslim import errors
from patchslim.cli.main import main, make_parser
from patchslim.example import digits
from patchslim.report.columns import COLUMNS, DETAILS
from patchslim.testing import check_method

ROOT = Path(__file__).resolve().parents[1]
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *DOCS]
FENCE = re.compile(r"(<!-- no-test -->\n)?^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
ERRORS = [
    name
    for name, error in vars(errors).items()
    if inspect.isclass(error) and issubclass(error, Exception)
]
MOST_README_BYTES = 8192
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    """One fenced block that is to be tested, and the line on which its content begins."""

    language: str
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    code_blocks = []
    for match in FENCE.finditer(text):
        skip, language, content = match.groups()
        if not skip:
            code_blocks.append(Block(language, content, text.count("\n", 0, match.start(3)) + 1))
    return code_blocks


def pages_with(language: str) -> list[Path]:
    return [page for page in PAGES if any(each.language == language for each in blocks(page))]


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def is_as_shown(shown: str, printed: str) -> bool:
    """Tells whether a page shows what was printed; lines may break elsewhere, `...` is anything."""
    lenient = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    return doctest.OutputChecker().check_output(shown, printed, lenient)


@pytest.fixture
def somewhere_else(tmp_path, monkeypatch):
    """Runs in another folder, where pages may write files; a seed makes their output repeatable."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(digits.scenes("test", 1).images[0]).save("scene.png")
    torch.manual_seed(0)


def pages_of_python():
    """By default README alone; the other pages take a second or more each, and are slow tests."""
    for page in pages_with("python"):
        quick = page.parent == ROOT
        yield pytest.param(page, id=name(page), marks=[] if quick else [pytest.mark.slow])


@pytest.mark.parametrize("page", list(pages_of_python()))
# A machine with other work on it is no fault of a page.
@pytest.mark.filterwarnings("ignore::patchslim.errors.UnsteadyTimes")
def test_python_runs_and_prints_what_the_page_shows(page, capsys, somewhere_else):
    space: dict[str, object] = {"__name__": "page"}
    printed = None
    for block in blocks(page):
        if block.language == "python":
            code = "\n" * (block.line - 1) + block.text
            exec(compile(code, name(page), "exec"), space)
            printed = capsys.readouterr().out
        elif block.language == "text" and printed is not None:
            assert is_as_shown(block.text, printed), f"{name(page)}, line {block.line}: {printed}"
            printed = None


@pytest.mark.parametrize("page", pages_with("console"), ids=name)
def test_commands_print_what_the_page_shows(page, capsys, somewhere_else):
    for block in blocks(page):
        if block.language != "console":
            continue
        for command in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
            line, _, shown = command.partition("\n")
            program, *arguments = shlex.split(line)
            assert program == "patchslim", f"{name(page)}, line {block.line}"
            main(arguments)
            printed = "".join(capsys.readouterr())
            assert is_as_shown(shown, printed), f"{name(page)}: {line}\n{printed}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in LINK.findall(text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{name(page)} links to {target}, which is not there"
        if anchor:
            assert anchor in headings(file), f"{name(page)} links to {target}: no such heading"


def headings(page: Path) -> set[str]:
    """Lists the anchors of a page's headings, as a repository's web page makes them."""
    lines = FENCE.sub("", page.read_text(encoding="utf-8")).splitlines()
    titles = [line.lstrip("#").strip().lower() for line in lines if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("method", patchslim.method_names())
def test_every_method_has_a_page(method):
    page = ROOT / "docs" / "methods" / f"{method}.md"
    assert page.is_file(), f"write {page}: what the method does, and when to use it"


def test_the_page_on_choosing_has_every_method():
    page = (ROOT / "docs" / "choosing.md").read_text(encoding="utf-8")
    rows = set(re.findall(r"^\| \[`(\w+)`\]", page, flags=re.MULTILINE))
    assert rows == set(patchslim.method_names()), "docs/choosing.md has one row for each method"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= MOST_README_BYTES


@pytest.mark.parametrize("family", patchslim.adapter_names())
def test_every_family_has_a_page(family):
    page = ROOT / "docs" / "families" / f"{family}.md"
    assert page.is_file(), f"write {page}: which models, from which version on, what is refused"


@pytest.mark.parametrize("public", patchslim.__all__)
def test_public_names_are_documented(public):
    assert inspect.getdoc(getattr(patchslim, public)), f"{public} has no docstring"
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert re.search(rf"\b{public}\b", text), f"no page mentions {public}"


@pytest.mark.parametrize("column", [each.name for each in (*COLUMNS[1:], *DETAILS)])
def test_every_column_of_a_report_is_explained(column):
    page = (ROOT / "docs" / "measuring.md").read_text(encoding="utf-8")
    assert f"\n| {column} | " in page


@pytest.mark.parametrize("error", ERRORS)
def test_every_error_is_on_its_page(error):
    assert error in (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")


def test_every_command_is_on_its_page_and_answers_to_help(capsys):
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    written = set(re.findall(r"^## `(\w+)`", page, flags=re.MULTILINE))
    (known,) = [action.choices for action in make_parser()._actions if action.dest == "command"]
    assert written == set(known)
    for command in written:
        with pytest.raises(SystemExit) as ended:
            main([command, "--help"])
        assert ended.value.code == 0
        assert "example:" in capsys.readouterr().out


@pytest.fixture
def keynorm(tmp_path, monkeypatch):
    """Writes the example of docs/adding-a-method.md as a file among the methods."""
    code = blocks(ROOT / "docs" / "adding-a-method.md")[0]
    (tmp_path / "keynorm.py").write_text(code.text, encoding="utf-8")
    monkeypatch.setattr(patchslim.methods, "__path__", [*patchslim.methods.__path__, str(tmp_path)])
    yield patchslim.find_method("keynorm")()
    sys.modules.pop("patchslim.methods.keynorm")


def test_the_example_method_is_one_file(keynorm):
    """Its laws are tried with those of all examples, in `test_method_laws.py`."""
    assert "keynorm" in patchslim.method_names()
    assert type(keynorm).__name__ == "KeyNorm"


@pytest.mark.slow
def test_the_example_method_keeps_all_laws(keynorm):
    check_method(keynorm)
