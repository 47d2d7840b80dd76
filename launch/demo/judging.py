"""The comparison of the two runs, and the verdict. Pure: journal events and manifests in, findings out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from resume_kit.checkpoint.manifest import Manifest
from resume_kit.integrity.compare import compare
from resume_kit.run.journal import number

Event = dict[str, Any]

#: What is compared of every step: exactly, as the journal has it.
FIGURES = {
    "loss": "losses",
    "grad_norm": "grad norms",
    "lr": "learning rates",
    "samples": "data positions",
    "batch": "batch digests",
}


@dataclass(frozen=True)
class Kill:
    """A SIGKILL to a whole attempt. `torn_step`, `torn`: the save that it hit and the files left of it."""

    attempt: int
    processes: int
    last_step: int
    seconds_in: float
    torn_step: int | None = None
    torn: tuple[tuple[str, int], ...] = ()

    @property
    def label(self) -> str:
        milliseconds = f"{self.seconds_in * 1e3:.0f} ms"
        if self.torn_step is None:
            return f"{milliseconds} into step {self.last_step + 1}"
        return f"{milliseconds} into the save of step {self.torn_step}"


@dataclass(frozen=True)
class Attempt:
    """What the journal says of one start of a run."""

    number: int
    resumed_from: int | None
    steps: Mapping[int, Event]
    order: tuple[int, ...]
    saves: tuple[int, ...]
    commits: tuple[int, ...]
    ended: bool
    refusal: str | None
    last_event: str


@dataclass(frozen=True)
class Pair:
    """One step record of the resumed run beside the reference's; `differing`: the figures not equal."""

    step: int
    attempt: int
    reference: Event
    resumed: Event
    differing: tuple[str, ...]


@dataclass(frozen=True)
class CheckpointPair:
    """The checkpoints of one step of both runs, told from their manifests."""

    step: int
    attempt: int
    tensors: int
    ranks: int
    differing: tuple[str, ...]


@dataclass(frozen=True)
class Findings:
    """All that was looked at. No problems: PASS."""

    steps: int
    pairs: tuple[Pair, ...]
    attempts: tuple[Attempt, ...]
    kills: tuple[Kill, ...]
    checkpoints: tuple[CheckpointPair, ...]
    problems: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return not self.problems

    @property
    def last_checkpoint(self) -> CheckpointPair | None:
        return max(self.checkpoints, key=lambda pair: pair.step, default=None)

    @property
    def trained_twice(self) -> int:
        return len(self.pairs) - len({pair.step for pair in self.pairs})


def attempts_of(events: Iterable[Event]) -> list[Attempt]:
    """The starts of a run, in order."""
    by_number: dict[int, list[Event]] = {}
    for event in events:
        by_number.setdefault(int(event["attempt"]), []).append(event)
    return [_attempt(number, by_number[number]) for number in sorted(by_number)]


def _attempt(number: int, events: Sequence[Event]) -> Attempt:
    def steps(kind: str) -> tuple[int, ...]:
        return tuple(event["step"] for event in events if event["event"] == kind)

    return Attempt(
        number=number,
        resumed_from=next(iter(steps("resume")), None),
        steps={event["step"]: event for event in events if event["event"] == "step"},
        order=steps("step"),
        saves=steps("save"),
        commits=steps("commit"),
        ended=events[-1]["event"] == "end",
        refusal=next((str(event["reason"]) for event in events if event["event"] == "refuse"), None),
        last_event=str(events[-1]["event"]),
    )


def compare_steps(reference: Attempt, resumed: Iterable[Attempt]) -> list[Pair]:
    """Every step record of every attempt beside the reference's. Steps it lacks are left out."""
    return [
        Pair(step, attempt.number, reference.steps[step], record, _differing(reference.steps[step], record))
        for attempt in resumed
        for step, record in attempt.steps.items()
        if step in reference.steps
    ]


def _differing(a: Event, b: Event) -> tuple[str, ...]:
    # repr of a float is exact, and tells -0.0 from 0.0
    return tuple(name for name in FIGURES if name not in a or name not in b or repr(a[name]) != repr(b[name]))


def compare_checkpoints(a: Manifest, b: Manifest) -> CheckpointPair:
    """The reference's checkpoint `a` and the resumed run's `b`, down to every tensor's fingerprint."""
    found = compare(a, b)
    names = [str(key) for key in (*found.tensors.only_a, *found.tensors.only_b, *found.tensors.changed)]
    names += [str(old.key) for old, _ in found.tensors.respecified]
    names += [f"{part.name}: {value.path}" for part in found.sections for value in part.differences]
    return CheckpointPair(b.step, b.attempt, len(b.tensors), b.world_size, tuple(names))


def judge(
    steps: int,
    reference_events: Iterable[Event],
    resumed_events: Iterable[Event],
    kills: Sequence[Kill],
    checkpoints: Sequence[CheckpointPair],
) -> Findings:
    """All checks. Whatever could make the comparison empty is a problem too."""
    reference, resumed = attempts_of(reference_events), attempts_of(resumed_events)
    pairs = compare_steps(reference[0], resumed) if reference else []
    problems = [
        *_reference_problems(reference, steps),
        *_kill_problems(resumed, kills),
        *_course_problems(resumed, steps),
        *_figure_problems(pairs),
        *_checkpoint_problems(checkpoints, resumed),
    ]
    return Findings(steps, tuple(pairs), tuple(resumed), tuple(kills), tuple(checkpoints), tuple(problems))


def _reference_problems(reference: Sequence[Attempt], steps: int) -> list[str]:
    if len(reference) != 1 or reference[0].resumed_from is not None or not reference[0].ended:
        return ["the reference run did not go through in one start"]
    if reference[0].order != tuple(range(1, steps + 1)):
        return [f"the reference run's journal does not hold steps 1 to {steps} once each"]
    return [
        f"the reference run's {name} of step {step} is {record.get(name)}, not a finite number"
        for step, record in reference[0].steps.items()
        for name in ("loss", "grad_norm")
        if not _finite(record.get(name))
    ][:1]


def _finite(value: Any) -> bool:
    value = number(value)
    return isinstance(value, float | int) and math.isfinite(value)


def _kill_problems(resumed: Sequence[Attempt], kills: Sequence[Kill]) -> list[str]:
    problems = []
    if len(kills) < 2:
        problems.append(f"{len(kills)} kills, not 2")
    if not any(kill.torn_step is None for kill in kills):
        problems.append("no kill fell within a step")
    if not any(kill.torn_step is not None for kill in kills):
        problems.append("no kill fell into the middle of a save")
    by_number = {attempt.number: attempt for attempt in resumed}
    for kill in kills:
        attempt = by_number.get(kill.attempt)
        if attempt is None or attempt.ended:
            problems.append(f"attempt {kill.attempt} was not cut off by its kill")
        elif kill.torn_step is not None and (kill.torn_step not in attempt.saves or kill.torn_step in attempt.commits):
            problems.append(f"the journal does not say that the save of step {kill.torn_step} was cut off")
    return problems


def _course_problems(resumed: Sequence[Attempt], steps: int) -> list[str]:
    """Each attempt goes on from the newest commit, step by step, and the last one reaches the end."""
    problems = [f"attempt {a.number} refused to go on: {a.refusal}" for a in resumed if a.refusal]
    commits: set[int] = set()
    for attempt in resumed:
        newest = max(commits, default=None)
        if attempt.resumed_from != newest:
            problems.append(
                f"attempt {attempt.number} began with {_named(attempt.resumed_from)}, not with {_named(newest)}"
            )
        first = (attempt.resumed_from or 0) + 1
        if attempt.order != tuple(range(first, first + len(attempt.order))):
            problems.append(f"attempt {attempt.number} did not journal its steps one by one from step {first}")
        commits.update(attempt.commits)
    if not any(attempt.resumed_from for attempt in resumed):
        problems.append("no attempt resumed from a checkpoint")
    if not resumed or not resumed[-1].ended:
        problems.append("the resumed run did not come to its end")
    missing = sorted(set(range(1, steps + 1)) - {step for attempt in resumed for step in attempt.steps})
    if missing:
        problems.append(f"the resumed run's journal lacks step {', '.join(map(str, missing))}")
    beyond = sorted({step for attempt in resumed for step in attempt.steps if not 1 <= step <= steps})
    if beyond:
        problems.append(f"the resumed run's journal has step {', '.join(map(str, beyond))}, which the reference lacks")
    return problems


def _named(step: int | None) -> str:
    return "nothing" if step is None else f"the checkpoint of step {step}"


def _figure_problems(pairs: Sequence[Pair]) -> list[str]:
    if not pairs:
        return ["not a single step could be compared"]
    first = next((pair for pair in pairs if pair.differing), None)
    if first is None:
        return []
    name = first.differing[0]
    count = sum(bool(pair.differing) for pair in pairs)
    return [
        f"{name} of step {first.step} is {first.resumed.get(name)!r} in attempt {first.attempt} and "
        f"{first.reference.get(name)!r} in the reference; {count} of {len(pairs)} step records differ"
    ]


def _checkpoint_problems(checkpoints: Sequence[CheckpointPair], resumed: Sequence[Attempt]) -> list[str]:
    problems = [
        f"the checkpoints of step {pair.step} differ in {pair.differing[0]}"
        + (f" and {len(pair.differing) - 1} more" if len(pair.differing) > 1 else "")
        for pair in checkpoints
        if pair.differing
    ]
    last = max(checkpoints, key=lambda pair: pair.step, default=None)
    committed = max((step for attempt in resumed for step in attempt.commits), default=None)
    if last is None:
        problems.append("the two runs have no checkpoint of the same step to compare")
    elif last.step != committed or last.attempt != resumed[-1].number:
        problems.append(f"the last checkpoint compared, of step {last.step}, is not the last that the run committed")
    return problems
