"""The policy: what may differ between the run that saved and the run that resumes. No torch.

The tolerance pairs (absolute, relative) for losses are those of the NeMo Automodel resume oracle.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args, get_type_hints

import yaml

from resume_kit.errors import Problem, UsageError

Tolerance: TypeAlias = Literal["auto", "exact", "strict", "standard", "relaxed"]

TOLERANCES: dict[str, tuple[float, float]] = {
    "exact": (0.0, 0.0),
    "strict": (1e-6, 0.0),
    "standard": (1e-5, 2e-3),
    "relaxed": (1e-4, 7.5e-3),
}

#: Name of a preset → the fields in which it is not the strict default.
PRESETS: dict[str, dict[str, Any]] = {
    "strict": {},
    "flexible": {"topology": "reshard", "rng": "derive", "versions": "warn"},
}


@dataclass(frozen=True)
class Offset:
    """The schedule is read `offset` steps further on; a negative number reads it further back."""

    offset: int


@dataclass(frozen=True)
class Rewarm:
    """A factor that rises from 0 to 1 over `rewarm` steps, on top of the saved schedule."""

    rewarm: int


@dataclass(frozen=True, kw_only=True)
class Policy:
    """The default is strict: everything equal, or the resume is refused with all differences listed.

    In a configuration `preset: strict` or `preset: flexible` may be said first; it sets the defaults of the rest.

    topology: engine layout: world size, ZeRO stage, parallel sizes, and how the global batch is made up. `reshard`
        takes any layout of the same engine.
    global_batch: samples per optimizer step (micro-batch × accumulation × data-parallel ranks). `change` takes
        another product and keeps the sample position.
    learning_rate: `keep` the saved LR and schedule; `override` them with the live ones, at the saved position;
        `{offset: N}` shifts the schedule by N steps, the live one where it differs; `{rewarm: N}` rises from 0 to
        the saved schedule over N steps.
    hyperparameters: weight decay, betas, clipping and their like. `live` takes the live values.
    optimizer_state: `keep` the moments, or `reset` them and Adam's step to zero. Needed for another optimizer class.
    rng: `restore` every rank's generators; `derive` streams from run seed, step and the rank's coordinates where a
        rank's place in the topology is new.
    data: `same` data set and order. `keep_position` and `restart` take another version of it, and go on at the saved
        sample position or at 0. Where the data is the same, the position is always kept.
    dtype: `cast` takes low-precision weights in another dtype, cast from the same masters. Masters never differ.
    configuration: all else that is pinned: model, engine and run configuration. `warn` goes on with the live values.
    versions: software versions and driver. `warn` and `any` go on, `any` without a word.
    fallback: go on from an older checkpoint when a newer one is damaged.
    tolerance: of the gate and of the replay audit. `auto` is exact on CPUs and in deterministic mode, else
        `standard`.
    gate: run the tiny forward/backward, both when saving (to record it) and when resuming.
    replay: what to do when a step that is trained again differs from the journal.
    """

    topology: Literal["equal", "reshard"] = "equal"
    global_batch: Literal["equal", "change"] = "equal"
    learning_rate: Literal["keep", "override"] | Offset | Rewarm = "keep"
    hyperparameters: Literal["equal", "live"] = "equal"
    optimizer_state: Literal["keep", "reset"] = "keep"
    rng: Literal["restore", "derive"] = "restore"
    data: Literal["same", "keep_position", "restart"] = "same"
    dtype: Literal["equal", "cast"] = "equal"
    configuration: Literal["equal", "warn"] = "equal"
    versions: Literal["equal", "warn", "any"] = "equal"
    fallback: bool = True
    tolerance: Tolerance = "auto"
    gate: bool = True
    replay: Literal["stop", "warn"] = "stop"

    def __post_init__(self) -> None:
        _refuse_if([*_value_problems(vars(self))])
        if isinstance(self.learning_rate, Mapping):
            object.__setattr__(self, "learning_rate", _nested(self.learning_rate))

    @classmethod
    def from_mapping(cls, given: Mapping[str, Any]) -> Policy:
        """A policy from configuration. Raises `UsageError` with every unknown key and every wrong value."""
        known = {field.name for field in fields(cls)}
        values = {key: value for key, value in given.items() if key in known}
        preset = given.get("preset", "strict")
        problems = []
        for key in given:
            if key not in known and key != "preset":
                near = get_close_matches(str(key), sorted({*known, "preset"}), n=1, cutoff=0.0)[0]
                problems.append(_problem(f"policy has no field {key!r}; did you mean {near!r}?"))
        if not isinstance(preset, str) or preset not in PRESETS:
            problems.append(_problem(f"policy.preset is {preset!r}; choose one of {', '.join(PRESETS)}"))
        _refuse_if([*problems, *_value_problems(values)])
        return cls(**{**PRESETS[preset], **values})

    @classmethod
    def preset(cls, name: str) -> Policy:
        """The policy of that name: `strict` or `flexible`."""
        return cls.from_mapping({"preset": name})

    @classmethod
    def from_file(cls, path: str | Path) -> Policy:
        """A policy from a YAML file, for instance `preset: flexible` and what it should say otherwise."""
        try:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise UsageError(f"cannot read the policy {path}: {error.strerror or error}") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UsageError(f"the policy {path} is not valid YAML: {error}") from error
        if not isinstance(content, dict | None):
            raise UsageError(f"the policy {path} must hold a mapping of fields, not a {type(content).__name__}")
        try:
            return cls.from_mapping(content or {})
        except UsageError as error:
            raise UsageError(f"the policy {path} cannot be used", error.problems) from None

    def to_mapping(self) -> dict[str, Any]:
        """Every field in plain values, as a configuration says it."""
        return asdict(self)


def agrees(actual: float, expected: float, tolerance: str) -> bool:
    """Whether two figures agree: |a−b| ≤ absolute + relative·|b|. Exact compares values, NaN equal to nothing."""
    absolute, relative = TOLERANCES[tolerance]
    near = abs(actual - expected) <= absolute + relative * abs(expected)
    return actual == expected or (math.isfinite(expected) and near)


def _value_problems(values: Mapping[str, Any]) -> Iterator[Problem]:
    hints = get_type_hints(Policy)
    for name, value in values.items():
        if name == "learning_rate":
            yield from _learning_rate_problems(value)
            continue
        allowed = get_args(hints[name]) or (True, False)
        if not any(type(value) is type(choice) and value == choice for choice in allowed):
            yield _problem(f"policy.{name} is {value!r}; choose one of {', '.join(map(str, allowed))}")


def _learning_rate_problems(value: Any) -> Iterator[Problem]:
    if value in ("keep", "override"):
        return
    where = "policy.learning_rate"
    form = asdict(value) if isinstance(value, Offset | Rewarm) else value
    if not isinstance(form, Mapping) or len(form) != 1:
        yield _problem(f"{where} is {value!r}; choose one of keep, override, {{offset: N}}, {{rewarm: N}}")
        return
    ((key, steps),) = form.items()
    if key not in ("offset", "rewarm"):
        near = get_close_matches(str(key), ("offset", "rewarm"), n=1, cutoff=0.0)[0]
        yield _problem(f"{where} has no form {key!r}; did you mean {near!r}?")
    elif type(steps) is not int or (steps < 1 if key == "rewarm" else steps == 0):
        wanted = "a whole number of steps, " + ("1 or more" if key == "rewarm" else "other than 0")
        yield _problem(f"{where}.{key} is {steps!r}; give {wanted}")


def _nested(form: Mapping[str, int]) -> Offset | Rewarm:
    return Offset(form["offset"]) if "offset" in form else Rewarm(form["rewarm"])


def _problem(what: str) -> Problem:
    return Problem("policy", "", what)


def _refuse_if(problems: list[Problem]) -> None:
    if problems:
        raise UsageError("the policy cannot be used", problems)
