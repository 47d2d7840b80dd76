"""What may differ between the run that saved and the run that resumes. No torch.

The tolerance pairs (absolute, relative) for losses are those of the NeMo Automodel resume oracle.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any, Literal, get_args, get_type_hints

from resume_kit.errors import UsageError

Agreement = Literal["equal", "warn"]
Tolerance = Literal["auto", "exact", "strict", "standard", "relaxed"]

TOLERANCES: dict[str, tuple[float, float]] = {
    "exact": (0.0, 0.0),
    "strict": (1e-6, 0.0),
    "standard": (1e-5, 2e-3),
    "relaxed": (1e-4, 7.5e-3),
}


@dataclass(frozen=True, kw_only=True)
class Policy:
    """The default is strict: everything equal, or the resume is refused with all differences listed.

    configuration: model, optimizer, engine and run configuration. `warn` goes on with the live values; a scheduler's
        state, and what it holds of the learning rate, is still that of the save.
    versions: software versions and driver.
    fallback: go on from an older checkpoint when a newer one is damaged.
    tolerance: of the gate and of the replay audit. `auto` is exact on CPUs and in deterministic mode, else
        `standard`.
    gate: run the tiny forward/backward, both when saving (to record it) and when resuming.
    replay: what to do when a step that is trained again differs from the journal.
    """

    configuration: Agreement = "equal"
    versions: Agreement = "equal"
    fallback: bool = True
    tolerance: Tolerance = "auto"
    gate: bool = True
    replay: Literal["stop", "warn"] = "stop"

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            allowed = get_args(hint) or (True, False)
            if getattr(self, name) not in allowed:
                raise UsageError(
                    f"policy.{name} is {getattr(self, name)!r}; choose one of {', '.join(map(str, allowed))}"
                )

    @classmethod
    def from_mapping(cls, given: Mapping[str, Any]) -> Policy:
        """A policy from configuration; an unknown key is refused with the nearest valid one."""
        known = [field.name for field in fields(cls)]
        for key in given:
            if key not in known:
                near = get_close_matches(str(key), known, n=1, cutoff=0.0)
                raise UsageError(f"policy has no field {key!r}; did you mean {near[0]!r}?")
        return cls(**given)


def agrees(actual: float, expected: float, tolerance: str) -> bool:
    """Whether two figures agree: |a−b| ≤ absolute + relative·|b|. Exact compares values, NaN equal to nothing."""
    absolute, relative = TOLERANCES[tolerance]
    near = abs(actual - expected) <= absolute + relative * abs(expected)
    return actual == expected or (math.isfinite(expected) and near)
