"""Replay audit: steps trained before the crash and trained again are compared with the journal, for free. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from resume_kit.errors import Problem, ReplayMismatch
from resume_kit.policy.judgement import Judgement
from resume_kit.policy.policy import agrees

_EXACT = ("batch", "samples")
_FLOATS = ("loss", "grad_norm", "lr")


#: Parts of a run whose change makes a step come out otherwise, or of other samples.
_MOVES_FIGURES = frozenset(
    {"topology", "rng", "learning rate", "hyperparameters", "optimizer state", "dtype", "configuration"}
)
_MOVES_DATA = frozenset({"global batch", "data"})


def compared_fields(judgement: Judgement | None) -> tuple[str, ...]:
    """What a step that is trained again can be held against, after what the policy let differ."""
    parts = {change.part for change in judgement.changes} if judgement is not None else set()
    if parts & _MOVES_DATA:
        return ()
    return _EXACT if parts & _MOVES_FIGURES else (*_EXACT, *_FLOATS)


@dataclass
class ReplayAudit:
    """Compares each step with what the journal holds of it. `checked` counts the steps compared."""

    recorded: Mapping[int, Mapping[str, Any]]
    tolerance: str
    stop: bool
    fields: tuple[str, ...] = (*_EXACT, *_FLOATS)
    checked: int = 0

    def compare(self, event: Mapping[str, Any]) -> list[Problem]:
        """Problems of one step's event; raises `ReplayMismatch` when the policy says stop.

        A batch or sample count that differs always raises: other data was trained, whatever the loss says.
        """
        before = self.recorded.get(event["step"])
        if before is None:
            return []
        self.checked += 1
        where = f"step {event['step']}"
        data = [
            Problem("replay", where, f"{name} was {before[name]}, now {event[name]}", "check the data and its position")
            for name in _EXACT
            if name in self.fields and before[name] != event[name]
        ]
        floats = [
            Problem(
                "replay",
                where,
                f"{name} was {before[name]!r} before the crash, now {event[name]!r} (tolerance: {self.tolerance})",
                "the run is not deterministic or the resume is wrong; see `tolerance` and `replay` of the policy",
            )
            for name in _FLOATS
            if name in self.fields and not self._same(event[name], before[name])
        ]
        if data or (floats and self.stop):
            raise ReplayMismatch(f"{where}, trained again, is not the step of the journal", [*data, *floats])
        return floats

    def _same(self, now: float | None, before: float | None) -> bool:
        if now is None or before is None:
            return now is before
        both_nan = now != now and before != before
        return both_nan or agrees(now, before, self.tolerance)
