"""The policy: strict by default, refuses what it does not know, and says when two figures agree."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resume_kit.errors import UsageError
from resume_kit.policy.policy import PRESETS, TOLERANCES, Offset, Policy, Rewarm, agrees

CONFIGS = Path(__file__).parents[2] / "configs" / "policies"
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
        ("learning-rate", "learning_rate"),
        ("global_batch_size", "global_batch"),
        ("presets", "preset"),
        ("optimizer", "optimizer_state"),
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
        ("versions", None, "equal, warn, any"),
        ("tolerance", 1e-5, "auto, exact, strict, standard, relaxed"),
        ("tolerance", "Exact", "auto, exact, strict, standard, relaxed"),
        ("fallback", "no", "True, False"),
        ("gate", "yes", "True, False"),
        ("gate", [], "True, False"),
        ("gate", 1, "True, False"),
        ("replay", "ignore", "stop, warn"),
        ("topology", "reshape", "equal, reshard"),
        ("global_batch", 8, "equal, change"),
        ("learning_rate", "keeps", "keep, override, {offset: N}, {rewarm: N}"),
        ("learning_rate", {}, "keep, override, {offset: N}, {rewarm: N}"),
        ("learning_rate", {"offset": 1, "rewarm": 2}, "keep, override, {offset: N}, {rewarm: N}"),
        ("hyperparameters", "equals", "equal, live"),
        ("optimizer_state", "zero", "keep, reset"),
        ("rng", None, "restore, derive"),
        ("data", "any", "same, keep_position, restart"),
        ("dtype", "bfloat16", "equal, cast"),
        ("versions", "ignore", "equal, warn, any"),
    ],
)
def test_a_bad_value_is_refused_with_the_choices(field: str, value: Any, choices: str) -> None:
    with pytest.raises(UsageError, match=f"policy.{field} is .*; choose one of {re.escape(choices)}"):
        Policy.from_mapping({field: value})
    with pytest.raises(UsageError, match=field):
        Policy(**{field: value})


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"ofset": 3}, "policy.learning_rate has no form 'ofset'; did you mean 'offset'?"),
        ({"warm": 3}, "policy.learning_rate has no form 'warm'; did you mean 'rewarm'?"),
        ({3: 3}, "policy.learning_rate has no form 3; did you mean '"),
        ({"offset": 0}, "policy.learning_rate.offset is 0; give a whole number of steps, other than 0"),
        ({"offset": 1.5}, "policy.learning_rate.offset is 1.5; give a whole number of steps"),
        ({"offset": True}, "policy.learning_rate.offset is True; give a whole number of steps"),
        ({"rewarm": 0}, "policy.learning_rate.rewarm is 0; give a whole number of steps, 1 or more"),
        ({"rewarm": -5}, "policy.learning_rate.rewarm is -5"),
        ({"rewarm": None}, "policy.learning_rate.rewarm is None"),
        ({"rewarm": "100"}, "policy.learning_rate.rewarm is '100'"),
    ],
)
def test_the_nested_forms_are_checked(form: Mapping[Any, Any], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        Policy.from_mapping({"learning_rate": form})
    with pytest.raises(UsageError, match=re.escape(message)):
        Policy(learning_rate=form)  # type: ignore[arg-type]


def test_a_wrong_nested_object_is_refused_too() -> None:
    with pytest.raises(UsageError, match="rewarm is 0"):
        Policy(learning_rate=Rewarm(0))


def test_all_problems_are_told_at_once() -> None:
    given = {"preset": "loose", "topolgy": "reshard", "gate": "no", "learning_rate": {"rewarm": 0}, "fallback": True}
    with pytest.raises(UsageError) as refusal:
        Policy.from_mapping(given)
    assert len(refusal.value.problems) == 4
    for text in ("choose one of strict, flexible", "'topology'", "policy.gate is 'no'", "rewarm is 0"):
        assert text in str(refusal.value)
    with pytest.raises(UsageError) as refusal:
        Policy(gate="no", replay="go")  # type: ignore[arg-type]
    assert len(refusal.value.problems) == 2


# -- presets, files, mappings


def test_the_flexible_preset() -> None:
    policy = Policy.preset("flexible")
    assert policy == Policy(topology="reshard", rng="derive", versions="warn")
    assert Policy.preset("strict") == Policy()


@pytest.mark.parametrize("name", ["Flexible", "", None, [], {}])
def test_an_unknown_preset_is_refused_with_the_choices(name: Any) -> None:
    with pytest.raises(UsageError, match=r"policy\.preset is .*; choose one of strict, flexible"):
        Policy.preset(name)


def test_what_is_said_wins_over_the_preset() -> None:
    policy = Policy.from_mapping({"rng": "restore", "dtype": "cast", "preset": "flexible"})
    assert policy == Policy(topology="reshard", versions="warn", dtype="cast")


@pytest.mark.parametrize("name", PRESETS)
def test_the_files_beside_the_configurations_are_the_presets(name: str) -> None:
    path = CONFIGS / f"{name}.yaml"
    assert Policy.from_file(path) == Policy.preset(name)
    text = path.read_text()
    assert all(re.search(rf"^{field}:", text, re.MULTILINE) for field in ["preset", *asdict(Policy())])


@pytest.mark.parametrize(
    "policy",
    [
        Policy(),
        Policy.preset("flexible"),
        Policy(learning_rate=Offset(-3), gate=False),
        Policy(learning_rate=Rewarm(10), data="restart"),
    ],
)
def test_a_policy_comes_back_from_its_mapping(policy: Policy) -> None:
    assert Policy.from_mapping(policy.to_mapping()) == policy
    assert Policy(**policy.to_mapping()) == policy


def test_policies_that_differ_only_in_the_nested_form_have_other_mappings() -> None:
    assert Policy(learning_rate=Offset(5)).to_mapping() != Policy(learning_rate=Rewarm(5)).to_mapping()


def from_text(folder: Path, text: str) -> Policy:
    (folder / "policy.yaml").write_text(text)
    return Policy.from_file(folder / "policy.yaml")


def test_a_file_with_a_preset_and_overrides(tmp_path: Path) -> None:
    policy = from_text(tmp_path, "preset: flexible\nlearning_rate: {rewarm: 100}\ngate: off\n")
    assert policy == Policy(topology="reshard", rng="derive", versions="warn", learning_rate=Rewarm(100), gate=False)
    assert from_text(tmp_path, "# nothing said\n") == Policy()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gate: [", "policy.yaml is not valid YAML"),
        ("- gate", "policy.yaml must hold a mapping of fields, not a list"),
        ("!!python/object/apply:os.getcwd []", "policy.yaml is not valid YAML"),
        ("gat: true", "policy.yaml cannot be used"),
        ("gat: true", "did you mean 'gate'"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        from_text(tmp_path, text)


def test_a_missing_file_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot read the policy .*nowhere\.yaml: No such file"):
        Policy.from_file(tmp_path / "nowhere.yaml")


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
