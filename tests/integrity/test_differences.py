"""Differences of nested values: every leaf that differs, with its path; nothing that is the same."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resume_kit.integrity.differences import ABSENT, brief, differences

NAN = float("nan")
LEAVES = st.none() | st.booleans() | st.integers(-5, 5) | st.floats() | st.text("ab", max_size=3)
NESTED = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", min_size=1, max_size=2), inner),
    max_leaves=12,
)


def of(old: Any, new: Any) -> list[tuple[str, Any, Any]]:
    return list(differences(old, new))


@given(NESTED)
@settings(max_examples=100, deadline=None)
def test_a_value_does_not_differ_from_itself_nor_from_its_way_through_json(value: Any) -> None:
    assert of(value, copy.deepcopy(value)) == []
    assert of(value, json.loads(json.dumps(value))) == []


@given(NESTED, NESTED)
@settings(max_examples=100, deadline=None)
def test_differences_are_the_same_from_both_sides(old: Any, new: Any) -> None:
    assert repr([(path, b, a) for path, a, b in of(old, new)]) == repr(of(new, old))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (NAN, NAN),
        ({"a": [NAN, 1]}, {"a": [math.nan, 1]}),
        ([1, 2], (1, 2)),
        ({"betas": (0.9, [1])}, {"betas": [0.9, (1,)]}),
        ([], ()),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        (0.0, -0.0),
    ],
)
def test_what_is_the_same(old: Any, new: Any) -> None:
    assert of(old, new) == []


@pytest.mark.parametrize(
    ("old", "new", "path"),
    [
        ({"a": 1}, {"a": 2}, "a"),
        ({"a": {"b": [0, {"c": 1}]}}, {"a": {"b": [0, {"c": 2}]}}, "a.b[1].c"),
        ({"a": NAN}, {"a": 1.0}, "a"),
        ({"a": 1.0}, {"a": NAN}, "a"),
        ({"a": 1}, {"a": 1.0}, "a"),
        ({"a": True}, {"a": 1}, "a"),
        ({"a": "1"}, {"a": 1}, "a"),
        ({"a": None}, {"a": 0}, "a"),
        ({"a": [1, 2]}, {"a": [1, 2, 3]}, "a"),
        ({"a": [1, 2]}, {"a": (1, 3)}, "a[1]"),
        ({"a": [1]}, {"a": {"0": 1}}, "a"),
        ({"a": {}}, {"a": []}, "a"),
        ({"a": []}, {"a": None}, "a"),
        ({3: 1}, {3: 2}, "3"),
    ],
)
def test_what_differs_is_named_with_its_path(old: Any, new: Any, path: str) -> None:
    ((found, _, _),) = of(old, new)
    assert found == path


def test_values_come_with_the_path() -> None:
    assert of({"a": {"b": 1, "c": 2}}, {"a": {"b": 5, "c": 6}}) == [("a.b", 1, 5), ("a.c", 2, 6)]
    assert of(1, 2) == [("", 1, 2)]


def test_absent_keys_are_told_on_either_side() -> None:
    assert of({"a": 1}, {}) == [("a", 1, ABSENT)]
    assert of({}, {"a": None}) == [("a", ABSENT, None)]
    assert of({"x": {"a": {"deep": 1}}}, {"x": {}}) == [("x.a", {"deep": 1}, ABSENT)]


def test_every_leaf_is_told_in_order_of_its_key() -> None:
    old = {"b": 1, "a": [1, 2, 3], "c": 0}
    new = {"b": 2, "a": [0, 2, 0], "d": 0}
    assert [path for path, _, _ in of(old, new)] == ["a[0]", "a[2]", "b", "c", "d"]


def test_brief_keeps_what_fits_and_cuts_the_rest() -> None:
    assert brief([1, 2]) == "[1, 2]" and brief("x" * 58) == repr("x" * 58)
    cut = brief("x" * 200)
    assert len(cut) == 60 and cut.endswith("…")
