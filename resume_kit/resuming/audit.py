"""Replay audit: steps trained before the crash and trained again are compared with the journal, for free. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from resume_kit.checkpoint import canonical
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


@dataclass(frozen=True)
class Lineage:
    """Which changes a run has come through: steps of the same number are the same step only in the same lineage.

    `figures` stands for all changes that move a step's loss, `samples` for those that move what it is trained on.
    Both are digests, empty for a run that nothing was changed in; the same change at the same step gives the same.
    """

    figures: str = ""
    samples: str = ""

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> Lineage:
        return cls(**state.get("lineage", {}))

    def to_plain(self) -> dict[str, str]:
        return asdict(self)

    def after(self, judgement: Judgement, step: int) -> Lineage:
        """The lineage of a run that a policy let change at `step`."""
        data = [change.to_json() for change in judgement.changes if change.part in _MOVES_DATA]
        other = [change.to_json() for change in judgement.changes if change.part in _MOVES_FIGURES]
        samples = canonical.value_digest([self.samples, step, data]) if data else self.samples
        figures = canonical.value_digest([self.figures, step, data, other]) if data or other else self.figures
        return Lineage(figures, samples)


def recorded_steps(events: Iterable[Mapping[str, Any]], after: int, lineage: Lineage) -> list[dict[str, Any]]:
    """What the journal holds of steps later than `after` that this lineage can be held against.

    All figures of the newest event of the same lineage; else batch and samples of the newest of the same samples.
    """
    of_attempt: dict[int, Lineage] = {}
    found: dict[int, tuple[bool, dict[str, Any]]] = {}
    for event in events:
        attempt = event["attempt"]
        if event["event"] in ("start", "resume"):
            of_attempt[attempt] = Lineage.of_state(event)
        if event["event"] != "step" or event["step"] <= after:
            continue
        theirs = of_attempt.get(attempt, Lineage())
        same = theirs == lineage
        if theirs.samples == lineage.samples and (same or not found.get(event["step"], (False,))[0]):
            names = (*_EXACT, *_FLOATS) if same else _EXACT
            found[event["step"]] = same, {"step": event["step"], **{name: event[name] for name in names}}
    return [recorded for _, recorded in found.values()]


@dataclass
class ReplayAudit:
    """Compares each step with what is recorded of it, as far as that goes. `checked` counts the steps compared."""

    recorded: Mapping[int, Mapping[str, Any]]
    tolerance: str
    stop: bool
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
            if name in before and before[name] != event[name]
        ]
        floats = [
            Problem(
                "replay",
                where,
                f"{name} was {before[name]!r} before the crash, now {event[name]!r} (tolerance: {self.tolerance})",
                "the run is not deterministic or the resume is wrong; see `tolerance` and `replay` of the policy",
            )
            for name in _FLOATS
            if name in before and not self._same(event[name], before[name])
        ]
        if data or (floats and self.stop):
            raise ReplayMismatch(f"{where}, trained again, is not the step of the journal", [*data, *floats])
        return floats

    def _same(self, now: float | None, before: float | None) -> bool:
        if now is None or before is None:
            return now is before
        both_nan = now != now and before != before
        return both_nan or agrees(now, before, self.tolerance)
