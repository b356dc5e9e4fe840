"""What holds for every value: JSON, the door for numbers, and the checksums of recipes."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from patchslim.errors import BadFile, PatchslimError
from patchslim.files import parse_json
from patchslim.saving.seal import check_seal, seal_recipe
from patchslim.settings import Range, check_value

settings.register_profile("quick", derandomize=True, database=None, max_examples=40, deadline=None)
settings.load_profile("quick")

TEXT = some.text(max_size=8)
NUMBER = some.one_of(some.integers(), some.floats(allow_nan=False, allow_infinity=False))
FILE = Path("recipe.json")
LEAF = some.one_of(some.none(), some.booleans(), NUMBER, TEXT)
DOCUMENT = some.recursive(
    LEAF,
    lambda inner: some.lists(inner, max_size=3) | some.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
RECIPE = some.dictionaries(TEXT.filter(lambda name: name != "checksums"), DOCUMENT, min_size=1)
ANYTHING = some.one_of(
    LEAF, some.floats(), some.complex_numbers(), some.fractions(), some.decimals(), some.binary()
)


@given(DOCUMENT)
def test_json_comes_back_as_it_was_written(document: Any) -> None:
    assert parse_json(json.dumps(document).encode(), "here") == document


@given(some.binary(max_size=40) | TEXT.map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_bytes_are_json_or_one_error(data: bytes) -> None:
    try:
        parsed = parse_json(data, "here")
    except BadFile:
        return
    assert parse_json(json.dumps(parsed, allow_nan=False).encode(), "here") == parsed


@given(DOCUMENT, some.data())
def test_json_that_is_cut_short_is_never_another_document(document: Any, data: Any) -> None:
    whole = json.dumps({"document": document}).encode()
    cut = data.draw(some.integers(0, len(whole) - 1))
    with pytest.raises(BadFile):
        parse_json(whole[:cut], "here")


@given(ANYTHING, some.sampled_from([bool, int, float, str]), NUMBER, NUMBER)
def test_what_the_door_lets_in_is_what_was_given(
    value: Any, kind: type, low: float, high: float
) -> None:
    within = Range(min(low, high), max(low, high))
    try:
        plain = check_value("value", value, kind, within)
    except PatchslimError:
        return
    assert plain == (float(value) if kind is float else value)
    assert isinstance(plain, bool) == (kind is bool)
    assert type(plain) is kind or (kind is float and type(plain) is int)
    if kind in (int, float):
        assert math.isfinite(plain)
        assert within.low <= plain <= within.high


@given(RECIPE, some.data())
def test_every_edit_of_a_recipe_is_found(recipe: dict[str, Any], data: Any) -> None:
    sealed = seal_recipe(recipe)
    check_seal(FILE, json.loads(json.dumps(sealed)))
    edited = copy.deepcopy(sealed)
    name = data.draw(some.sampled_from(sorted(recipe)))
    edited[name] = data.draw(DOCUMENT)
    if json.dumps(edited[name], sort_keys=True) != json.dumps(recipe[name], sort_keys=True):
        with pytest.raises(BadFile, match="edited or damaged"):
            check_seal(FILE, edited)
    del edited[name]
    with pytest.raises(BadFile, match="edited or damaged"):
        check_seal(FILE, edited)
