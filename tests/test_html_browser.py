"""The page in a real browser: what it shows is the report, it fits, and its script works."""

import csv
import json
from pathlib import Path

import pytest
from PIL import Image

from browser import CHROMIUM, Browser
from patchslim.report.html import render_page
from patchslim.report.report import Report
from patchslim.report.rows_table import choose_columns
from report_rows import BUDGETS, METHODS, make_report

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine")
SIZES = [pytest.param((1280, 900), id="desk"), pytest.param((390, 844), id="phone")]
TABLE = """[...document.querySelectorAll("#rows tbody tr")].map(tr => [tr.dataset.r,
  [...tr.cells].map(td => [td.querySelector("b") ?? td].map(e => {
    const copy = e.cloneNode(true);
    copy.querySelectorAll("title").forEach(t => t.remove());
    return copy.textContent;
  })[0])])"""
# What sticks out of the window, but for what a reader may scroll.
TOO_WIDE = """[document.documentElement.scrollWidth > innerWidth, ...[...document.querySelectorAll("body *")]
  .filter(e => !e.closest(".wide") && !e.closest("svg") && e.getBoundingClientRect().right > innerWidth + 1)
  .map(e => e.outerHTML.slice(0, 80))]"""  # noqa: E501
NAMES = """[...document.querySelectorAll("#rows tbody:not(.dense)")]
  .filter(e => e.getClientRects().length).map(e => e.querySelector("b").textContent)"""
MARKS = """[...new Set([...document.querySelectorAll(".charts [data-r]")]
  .filter(e => e.getClientRects().length).map(e => Number(e.dataset.r)))]"""
IMPORTANT = 6  # columns: model, MACs, accuracy, KL, ms, speed-up


@pytest.fixture(scope="module")
def large() -> Report:
    return make_report()


@pytest.fixture(scope="module")
def page(large, tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("page") / "report.html"
    file.write_text(render_page(large), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("profile")) as one:
        yield one


def check_quiet(browser: Browser, page: Path) -> None:
    """Checks that nothing but the page was asked for, and that nobody complained."""
    assert browser.requests() == [page.as_uri()]
    assert browser.complaints() == []


def test_a_browser_shows_the_numbers_of_the_rows_and_all_fits(browser, page, large):
    browser.open(page)
    seen = browser.run(TABLE)
    assert len(seen) == len(large.rows)
    columns = choose_columns(large).columns
    for number, cells in seen:
        row = large.rows[int(number)]
        wanted = [column.write(row, large.baseline(row)) for column in columns]
        assert cells == wanted[: len(cells)]
    assert browser.run(TOO_WIDE) == [False]
    check_quiet(browser, page)


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_nothing_is_wider_than_the_window_and_what_matters_is_in_it(
    browser, page, size, dark, tmp_path
):
    width, height = size
    browser.open(page, width=width, height=height, dark=dark)
    assert browser.run(TOO_WIDE) == [False]
    ends = browser.run(
        '[...document.querySelectorAll("#rows thead th")].map(e => e.getBoundingClientRect().right)'
    )
    assert max(ends[:IMPORTANT]) <= width
    assert browser.run('document.querySelector("#rows").offsetWidth') <= width
    head = browser.run('[...document.querySelectorAll("#rows thead th")].map(e => e.textContent)')
    assert head[:IMPORTANT] == [
        "model", "MACs", "accuracy %", "KL (nats)", "ms/image", "speed-up"
    ]  # fmt: skip
    browser.screenshot(tmp_path / "shot.png")
    with Image.open(tmp_path / "shot.png") as shot:
        corner = shot.convert("L").getpixel((2, 2))
        assert (corner < 60) == dark
        assert len(shot.convert("RGB").quantize(64).getcolors()) > 16
    # A card and the pinned rows fit, too.
    browser.run("document.querySelector('.charts').scrollIntoView()")
    for number in (1, 7):
        browser.click(*browser.centre(f'.charts [data-r="{number}"]'))
    assert browser.run(TOO_WIDE) == [False]
    assert browser.run("document.querySelectorAll('#pins thead th').length") == 3
    check_quiet(browser, page)


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_all_columns_and_random_are_shown_when_asked_for(browser, page, large, size):
    width, height = size
    browser.open(page, width=width, height=height)
    shown = "[...document.querySelectorAll('#rows thead th')].filter(e => e.offsetWidth).length"
    chosen = choose_columns(large)
    assert browser.run(shown) == (chosen.wide if width > 1000 else chosen.always)
    browser.click(*browser.centre("#all"))
    assert browser.run(shown) == len(chosen.columns)
    assert browser.run(TOO_WIDE) == [False]
    twins = "[...document.querySelectorAll('.twin[data-r]')].filter(e => e.offsetHeight).length"
    assert browser.run(twins) == 0
    browser.click(*browser.centre("#rows label input"))
    assert browser.run(twins) == 1
    assert browser.run("document.querySelector('#pins').hidden")  # a switch pins nothing


@pytest.mark.slow
def test_rows_are_filtered_by_text_and_by_method(browser, page, large):
    browser.open(page)
    every = [row.name for group in large.by_budget()[1:] for row in group]
    assert browser.run(NAMES) == every
    browser.click(*browser.centre("#find"))
    browser.type("tome 0.5")
    wanted = ["pitome 0.5", "tome 0.5", "tome_threshold 0.5"]
    assert browser.run(NAMES) == wanted
    names = {*wanted, *(f"random/{name}" for name in wanted)}
    marked = {large.rows[number].name for number in browser.run(MARKS)} - {"dense"}
    assert marked == names
    assert browser.run("document.querySelector('#count').textContent") == "3 of 125 rows"
    browser.run("document.querySelector('#find').value = ''")
    browser.type(" ")
    assert browser.run(NAMES) == every
    methods = sorted(METHODS)
    browser.click(*browser.centre(f"#m{methods.index('tome')}"))
    left = [name for name in every if not name.startswith("tome ")]
    assert browser.run(NAMES) == left
    marked = {large.rows[number].method for number in browser.run(MARKS)}
    assert marked == {"dense", "random", *methods} - {"tome"}
    assert "random/tome 0.5" not in {large.rows[number].name for number in browser.run(MARKS)}
    assert browser.run("document.querySelector('#count').textContent") == "120 of 125 rows"
    browser.click(*browser.centre("#none"))
    assert browser.run(NAMES) == []
    browser.click(*browser.centre("#every"))
    assert browser.run(NAMES) == every
    check_quiet(browser, page)


@pytest.mark.slow
def test_columns_are_sorted_the_best_first_and_then_the_worst(browser, page, large):
    browser.open(page)
    rows = [row for group in large.by_budget()[1:] for row in group]

    def click(place: int) -> list[str]:
        browser.click(*browser.centre(f"#rows thead th:nth-child({place}) button"))
        first = browser.run("document.querySelector('#rows tbody tr').dataset.r")
        assert first == "0"  # dense stays above all
        return browser.run(NAMES)

    def shown(row, place):
        column = choose_columns(large).columns[place - 1]
        return float(column.split(row, large.baseline(row))[0])

    for place, sign in ((2, 1), (3, -1), (4, 1), (6, -1), (7, 1)):
        best = [row.name for row in sorted(rows, key=lambda row: sign * shown(row, place))]
        assert click(place) == best
        worst = [row.name for row in sorted(rows, key=lambda row: -sign * shown(row, place))]
        assert click(place) == worst
    assert click(1)[: len(BUDGETS)] == [f"adamerge {budget:g}" for budget in sorted(BUDGETS)]
    sorts = browser.run(
        "[...document.querySelectorAll('[aria-sort]')].map(e => e.getAttribute('aria-sort'))"
    )
    assert sorts == ["ascending"]


@pytest.mark.slow
def test_pointing_at_a_mark_shows_all_numbers_of_its_row(browser, page, large):
    browser.open(page)
    number = next(n for n, row in enumerate(large.rows) if row.name == "topk 0.4")
    row, twin = large.rows[number : number + 2]
    browser.move(*browser.centre(f'.charts [data-r="{number}"]'))
    card = browser.run("document.querySelector('#card').innerText")
    for each in (row, twin):
        assert each.name in card
        for column in (c for c in choose_columns(large).columns[1:] if c.name != "left"):
            if each is row or column.name in ("accuracy %", "KL (nats)", "ms/image", "speed-up"):
                assert column.write(each, large.baseline(each)) in card
    assert " ".join(map(str, row.tokens)) in card
    lit = browser.run("document.querySelectorAll('.charts .marks .on').length")
    assert lit == browser.run(f"document.querySelectorAll('.charts [data-r=\"{number}\"]').length")
    browser.move(5, 5)
    assert browser.run("document.querySelector('#card').hidden")
    check_quiet(browser, page)


@pytest.mark.slow
def test_two_rows_are_pinned_and_compared(browser, page, large):
    browser.open(page)
    heads = "[...document.querySelectorAll('#pins thead th')].map(e => e.textContent.trim())"
    browser.click(*browser.centre('.charts [data-r="5"]'))
    assert browser.run(heads) == ["", large.rows[5].name]
    browser.click(*browser.centre('#rows [data-r="1"] td'))
    assert browser.run(heads) == ["", large.rows[5].name, large.rows[1].name]
    pinned = browser.run("document.querySelector('#pins').innerText")
    for row in (large.rows[5], large.rows[1]):
        for column in (c for c in choose_columns(large).columns[1:] if c.name != "left"):
            assert column.write(row, large.baseline(row)) in pinned
    browser.click(*browser.centre('#rows [data-r="3"] td'))  # the third replaces the first
    assert browser.run(heads) == ["", large.rows[1].name, large.rows[3].name]
    browser.click(*browser.centre('#rows [data-r="3"] td'))  # once more: no longer pinned
    assert browser.run(heads) == ["", large.rows[1].name]
    browser.click(*browser.centre("#pins button"))
    assert browser.run("document.querySelector('#pins').hidden")
    browser.run("document.querySelector('#rows [data-r=\"3\"]').focus()")
    for kind in ("keyDown", "keyUp"):
        browser.send("Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter")
    assert browser.run(heads) == ["", large.rows[3].name]
    check_quiet(browser, page)


@pytest.mark.slow
def test_the_report_is_saved_as_json_and_csv(browser, page, large):
    browser.open(page)
    # What the page would save is caught on its way to the disk.
    browser.run("""(() => { window.saved = [];
        URL.createObjectURL = blob => { saved.push(blob.text()); return "#"; }; })()""")
    for number, button in enumerate(("#json", "#csv"), 1):
        browser.click(*browser.centre(button))
        wait = "await new Promise(done => setTimeout(done, 10))"  # the data is unpacked first
        browser.run(f"(async () => {{ while (saved.length < {number}) {wait}; }})()")
    text, table = browser.run("Promise.all(saved)")
    assert Report.from_json(json.loads(text)) == large
    lines = list(csv.DictReader(table.splitlines()))
    assert [line["name"] for line in lines] == [row.name for row in large.rows]
    for line, row in zip(lines, large.rows, strict=True):
        assert float(line["kl.value"]) == row.kl.value
        assert float(line["speedup.high"]) == row.speedup.high
        assert line["tokens"] == " ".join(map(str, row.tokens))
    assert lines[2]["spent.mean"] == ""


@pytest.mark.slow
def test_a_browser_that_cannot_unpack_the_data_is_told_so(browser, page, large):
    old = browser.send(
        "Page.addScriptToEvaluateOnNewDocument", source="delete window.DecompressionStream"
    )
    try:
        browser.open(page)
        told = "[...document.querySelectorAll('#json, #csv')].map(e => [e.disabled, e.title])"
        assert all(off and "too old" in title for off, title in browser.run(told))
        assert browser.run(NAMES)
        check_quiet(browser, page)
    finally:
        browser.send("Page.removeScriptToEvaluateOnNewDocument", identifier=old["identifier"])


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_without_a_script_the_table_and_the_charts_are_there(browser, page, size):
    width, height = size
    browser.send("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(page, width=width, height=height)
        # The debugger still runs what it is given; the page's own script did not run.
        assert browser.run("document.documentElement.className") == ""
        assert len(browser.run(NAMES)) == len(METHODS) * len(BUDGETS)
        assert len(browser.run(MARKS)) > 100
        assert browser.run(TOO_WIDE) == [False]
        hidden = "[...document.querySelectorAll('.script')].every(e => !e.offsetHeight)"
        assert browser.run(hidden)
        browser.click(*browser.centre("#m0"))  # methods are hidden by the style sheet
        assert len(browser.run(NAMES)) == (len(METHODS) - 1) * len(BUDGETS)
    finally:
        browser.send("Emulation.setScriptExecutionDisabled", value=False)


@pytest.mark.slow
def test_what_slips_into_the_page_neither_runs_nor_asks_for_anything(browser, page, tmp_path):
    evil = """<script>window.ran = 1</script><img src="http://example.org/a.png"
      onerror="window.ran = 2"><link rel="stylesheet" href="http://example.org/a.css">"""
    bad = tmp_path / "bad.html"
    text = page.read_text(encoding="utf-8")
    bad.write_text(text.replace("<main>", f"<main>{evil}", 1), encoding="utf-8")
    browser.open(bad)
    assert browser.run("window.ran") is None
    assert browser.run("document.documentElement.className") == "js"  # its own script did run
    blocked = [each for each in browser.complaints() if "Content Security Policy" in each]
    assert len(blocked) >= 3
    assert not [each for each in browser.events if each.get("method") == "Network.responseReceived"
                and "example.org" in each["params"]["response"]["url"]]  # fmt: skip
