"""How a training process ends, as a number: what its launcher and scheduler see of it. No torch."""

from __future__ import annotations

from enum import IntEnum

from resume_kit.errors import Fenced, GivenUp, RunTaken, UsageError


class Exit(IntEnum):
    """Exit codes of a training process. torchrun hides them: what to do next, ask `resume-kit next RUN`.

    PREEMPTED is 75, the EX_TEMPFAIL of sysexits.h: saved, start it again. Under torchrun it is 0, since torchrun takes
    anything else for a failure and would start the ranks again.
    """

    FINISHED = 0
    FAILED = 1
    """Refused, damaged, or failed."""
    USAGE = 2
    PREEMPTED = 75
    FENCED = 76
    """Another attempt holds the run directory. Do not start again."""
    HUNG = 77
    """Ended by the watchdog."""
    GIVEN_UP = 78
    """Failed several times at the same step. A person must look."""


def exit_code(error: BaseException) -> Exit:
    """The code that a process ends with for an error."""
    if isinstance(error, UsageError):
        return Exit.USAGE
    if isinstance(error, Fenced | RunTaken):
        return Exit.FENCED
    return Exit.GIVEN_UP if isinstance(error, GivenUp) else Exit.FAILED
