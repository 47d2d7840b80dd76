"""A fault of reading is no damage: it may pass, and what it hides may be good. So it is looked at again."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from resume_kit.checkpoint import canonical
from resume_kit.errors import CheckpointDamaged, Unreadable
from resume_kit.resuming.report import Report

T = TypeVar("T")

#: Seconds before each further look at a checkpoint that cannot be read.
PAUSES = (1.0, 5.0, 15.0, 30.0)


def patiently(take: Callable[[], T], checkpoint: str, report: Report) -> T:
    """What `take` returns, if need be after some tries. Collective: `take` must raise alike on all ranks.

    Raises `CheckpointDamaged` for bytes that are not those of the save, `Unreadable` for a fault that stays.
    """
    before = len(report.checks)
    for pause in (*PAUSES, None):
        try:
            return take()
        except CheckpointDamaged as error:
            faults = [problem for problem in error.problems if problem.check == canonical.UNREADABLE]
            if not faults:
                raise
            if pause is None:
                raise Unreadable(f"{checkpoint} cannot be read", faults) from error
            del report.checks[before:]
            report.warned("read", checkpoint, f"{faults[0].where}: {faults[0].what}; read once more after {pause:g} s")
            before += 1
            time.sleep(pause)
    raise AssertionError("the last look returns or raises")
