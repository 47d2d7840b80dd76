"""The policy: strict by default, refuses what it does not know, and says when two figures agree."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resume_kit.errors import UsageError
from resume_kit.resuming.policy import TOLERANCES, Policy, agrees

FINITE = st.floats(allow_nan=False, allow_infinity=False)


def test_the_default_is_strict() -> None:
    policy = Policy.from_mapping({})
    assert policy == Policy()
    assert (policy.configuration, policy.versions, policy.replay) == ("equal", "equal", "stop")
    assert policy.gate and policy.fallback and policy.tolerance == "auto"


def test_known_keys_are_taken() -> None:
    given: dict[str, Any] = {"configuration": "warn", "versions": "warn", "fallback": False, "tolerance": "relaxed"}
    policy = Policy.from_mapping({**given, "gate": False, "replay": "warn"})
    assert {key: getattr(policy, key) for key in given} == given and not policy.gate and policy.replay == "warn"


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("tolerence", "tolerance"),
        ("Gate", "gate"),
        ("version", "versions"),
        ("config", "configuration"),
        ("fall_back", "fallback"),
        ("replays", "replay"),
    ],
)
def test_an_unknown_key_suggests_the_nearest(key: str, near: str) -> None:
    with pytest.raises(UsageError, match=f"policy has no field '{key}'; did you mean '{near}'\\?"):
        Policy.from_mapping({key: "warn"})


@pytest.mark.parametrize("key", ["zzz", "", "7", 7, None, True])
def test_even_a_key_like_nothing_is_a_usage_error(key: Any) -> None:
    with pytest.raises(UsageError, match=r"policy has no field .*; did you mean '"):
        Policy.from_mapping({key: 1})


@pytest.mark.parametrize(
    ("field", "value", "choices"),
    [
        ("configuration", "warning", "equal, warn"),
        ("configuration", True, "equal, warn"),
        ("versions", None, "equal, warn"),
        ("tolerance", 1e-5, "auto, exact, strict, standard, relaxed"),
        ("tolerance", "Exact", "auto, exact, strict, standard, relaxed"),
        ("fallback", "no", "True, False"),
        ("gate", "yes", "True, False"),
        ("gate", [], "True, False"),
        ("replay", "ignore", "stop, warn"),
    ],
)
def test_a_bad_value_is_refused_with_the_choices(field: str, value: Any, choices: str) -> None:
    with pytest.raises(UsageError, match=f"policy.{field} is .*; choose one of {choices}"):
        Policy.from_mapping({field: value})
    with pytest.raises(UsageError, match=field):
        Policy(**{field: value})


# -- agrees


@given(FINITE)
def test_a_figure_agrees_with_itself(value: float) -> None:
    assert all(agrees(value, value, tolerance) for tolerance in TOLERANCES)


@given(FINITE)
def test_the_next_float_is_not_exact(value: float) -> None:
    beside = math.nextafter(value, math.inf)
    assert agrees(value, beside, "exact") == (value == beside)


@given(FINITE, FINITE)
def test_what_agrees_agrees_with_every_wider_tolerance(actual: float, expected: float) -> None:
    verdicts = [agrees(actual, expected, tolerance) for tolerance in ("exact", "strict", "standard", "relaxed")]
    assert verdicts == sorted(verdicts)


@pytest.mark.parametrize(
    ("actual", "expected", "tolerance", "verdict"),
    [
        (1.0, 1.0 + 2**-52, "exact", False),
        (0.0, -0.0, "exact", True),
        (0.0, 0.9e-6, "strict", True),
        (0.0, 1.1e-6, "strict", False),
        (1000.0, 1000.001, "strict", False),
        (1.0019, 1.0, "standard", True),
        (1.0021, 1.0, "standard", False),
        (0.0, 0.9e-5, "standard", True),
        (0.0, 1.1e-5, "standard", False),
        (-1.0019, -1.0, "standard", True),
        (1.0, -1.0, "relaxed", False),
        (1.0074, 1.0, "relaxed", True),
        (1.0077, 1.0, "relaxed", False),
    ],
)
def test_the_bounds_of_each_tolerance(actual: float, expected: float, tolerance: str, verdict: bool) -> None:
    assert agrees(actual, expected, tolerance) is verdict


@pytest.mark.parametrize("tolerance", TOLERANCES)
@pytest.mark.parametrize("other", [0.0, 1.0, -1e308, math.inf, -math.inf, math.nan])
def test_nan_agrees_with_nothing(other: float, tolerance: str) -> None:
    assert not agrees(math.nan, other, tolerance) and not agrees(other, math.nan, tolerance)


@pytest.mark.parametrize("tolerance", TOLERANCES)
@pytest.mark.parametrize("expected", [math.inf, -math.inf])
@pytest.mark.parametrize("actual", [0.0, 5.0, -1e308, math.inf, -math.inf])
def test_an_infinite_figure_agrees_with_its_like_only(actual: float, expected: float, tolerance: str) -> None:
    assert agrees(actual, expected, tolerance) is (actual == expected)
    assert agrees(expected, actual, tolerance) is (actual == expected)


def test_an_unknown_tolerance_is_no_silent_yes() -> None:
    with pytest.raises(KeyError):
        agrees(1.0, 2.0, "auto")
