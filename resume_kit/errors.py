"""The errors of resume_kit.

::

    ResumeKitError
    ├── UsageError            (ValueError)    the caller's mistake: wrong argument, wrong config key
    ├── CheckpointDamaged     (OSError)       bytes on disk are not the bytes that were committed
    ├── Unreadable            (OSError)       a file cannot be read now; what is in it is not known
    ├── TooLittleMemory       (RuntimeError)  this host has too little memory now
    ├── ResumeRefused         (RuntimeError)  a check of the staged proof said no; nothing trains on
    │   ├── ReplayMismatch                    a step trained again differs from the journal
    │   └── GivenUp                           the run failed too often at the same step
    ├── RunTaken              (RuntimeError)  another attempt that is alive holds the run directory
    ├── Fenced                (RuntimeError)  a newer attempt took the run directory over; this one must end
    ├── SaveFailed            (RuntimeError)  a save did not commit; the last commit stands
    ├── InconsistentState     (RuntimeError)  the live state contradicts itself (drifted replicas, …)
    └── RanksFailed           (RuntimeError)  an error of one or more ranks, raised alike on all

Each message says what is wrong, where (rank, step, file, tensor) and what to do.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One finding of a check: which check, where, what is wrong, and the remedy."""

    check: str
    where: str
    what: str
    remedy: str = ""

    def __str__(self) -> str:
        line = f"[{self.check}] {self.where}: {self.what}" if self.where else f"[{self.check}] {self.what}"
        return f"{line}\n    → {self.remedy}" if self.remedy else line


#: Findings of one check that a message shows before it counts the rest.
SHOWN = 6


def block(headline: str, problems: Sequence[Problem]) -> str:
    """One readable block: problems by check, each remedy once, long lists cut short with their count."""
    lines = [headline]
    groups: dict[tuple[str, str], list[Problem]] = {}
    for problem in problems:
        groups.setdefault((problem.check, problem.remedy), []).append(problem)
    for (check, remedy), members in groups.items():
        for problem in members[:SHOWN]:
            lines.append(
                f"  [{check}] {problem.where}: {problem.what}" if problem.where else f"  [{check}] {problem.what}"
            )
        if len(members) > SHOWN:
            lines.append(f"  [{check}] … and {len(members) - SHOWN} more like these")
        if remedy:
            lines.append(f"    → {remedy}")
    return "\n".join(lines)


class ResumeKitError(Exception):
    """Base of every error that resume_kit raises on purpose.

    `problems` holds all findings behind the error, so that they can be shown and journaled together.
    """

    def __init__(self, message: str, problems: Iterable[Problem] = ()) -> None:
        self.problems: tuple[Problem, ...] = tuple(problems)
        self.headline = message
        super().__init__(block(message, self.problems))


class UsageError(ResumeKitError, ValueError):
    """A mistake of the caller: a wrong argument or configuration."""


class CheckpointDamaged(ResumeKitError, OSError):
    """Bytes on disk are missing or are not the bytes that were committed."""


class Unreadable(ResumeKitError, OSError):
    """A file cannot be read now, for a fault of the disk or of the way to it. What is in it is not known."""


class TooLittleMemory(ResumeKitError, RuntimeError):
    """The host has too little memory now; what holds it may be gone at the next start."""


class ResumeRefused(ResumeKitError, RuntimeError):
    """A check of the staged proof failed; training must not go on from this state."""


class ReplayMismatch(ResumeRefused):
    """A step that was trained before a crash came out different when trained again."""


class GivenUp(ResumeRefused):
    """The run failed several times at the same step; another start would only fail again."""


class RunTaken(ResumeKitError, RuntimeError):
    """Another attempt holds the run directory and is alive."""


class Fenced(ResumeKitError, RuntimeError):
    """A newer attempt took the run directory over: this one can neither commit nor delete, and must end."""


class SaveFailed(ResumeKitError, RuntimeError):
    """A save did not commit. The last committed checkpoint stands."""


class InconsistentState(ResumeKitError, RuntimeError):
    """The live state contradicts itself, so that a save of it would not be worth keeping."""


class RanksFailed(ResumeKitError, RuntimeError):
    """One or more ranks failed in a named step; every rank raises this same error."""

    def __init__(self, step: str, failures: Sequence[tuple[int, str]]) -> None:
        self.step = step
        self.failures = tuple(failures)
        problems = [Problem(step, f"rank {rank}", what) for rank, what in self.failures]
        super().__init__(f"{step} failed on {len(problems)} rank(s)", problems)
