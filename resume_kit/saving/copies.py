"""The verdict on a save's measurements: every weight is its master's cast, every copy equals what the owners hold."""

from __future__ import annotations

from typing import Any

from resume_kit.algebra import fingerprint
from resume_kit.engines.coordination import Coordinator
from resume_kit.engines.totals import UNCOVERED, Totals, guilty
from resume_kit.errors import InconsistentState, Problem
from resume_kit.saving.measure import Measured
from resume_kit.saving.plan import Holdings, SavePlan


def require_casts(holdings: Holdings, plan: SavePlan, measured: Measured, rank: int) -> None:
    """Raises `InconsistentState` unless each weight that is left to its master is its cast, bit for bit."""
    problems = [
        Problem(
            "cast of master",
            f"rank {rank}, {holdings.every[number].spec.key} [{holdings.every[number].box}]",
            "the weight is not its master's cast",
            "resume from the last commit; suspect this rank's memory, or code that writes to weights",
        )
        for number in sorted(measured.miscast & set(plan.saved))
    ]
    if problems:
        raise InconsistentState("low-precision weights and masters disagree; nothing was saved", problems)


def require_equal_copies(
    holdings: Holdings, plan: SavePlan, measured: Measured, found: Totals, coordinator: Coordinator
) -> None:
    """Every further copy of a tensor equals what its owners hold. A round, where one does not.

    Raises `InconsistentState` naming the ranks and boxes that drifted.
    """
    numel = dict(zip(plan.copied.keys, found.elements[0], strict=True))
    odd = [(str(key), copy) for key, copy in found.odd_copies(found.owned, numel)]
    if not odd:
        return
    wanted = {name for name, _ in odd}
    every = holdings.every

    def evidence() -> tuple[list[Any], list[str]]:
        rows = [
            (str(every[n].spec.key), str(every[n].box), every[n].copy, fingerprint.to_hex(measured.values[n]))
            for n in plan.measured
            if str(every[n].spec.key) in wanted
        ]
        miscast = [f"{every[n].spec.key} [{every[n].box}]" for n in sorted(measured.miscast)]
        return rows, miscast

    def blame(answers: list[tuple[list[Any], list[str]]]) -> None:
        """In a round, so that every rank has read the error before any ends. A weight that is not its master's cast
        is to blame wherever it is; only without one, the copies that have no sound twin are."""
        miscast = [(rank, where) for rank, (_, found) in enumerate(answers) for where in found]
        drifted = [(rank, f"{name} [{box}]") for rank, name, box in guilty([rows for rows, _ in answers], odd)]
        what = "is not its master's cast" if miscast else "is not the owners'"
        problems = [
            Problem(
                "replicas",
                f"rank {rank}, {where}",
                f"rank {rank}'s copy {what}: the replicas have drifted apart",
                "resume from the last commit; suspect that GPU",
            )
            for rank, where in miscast or drifted
        ]
        problems = problems or [Problem("replicas", name, f"copy {copy} {UNCOVERED}") for name, copy in odd]
        raise InconsistentState("replicas have drifted apart; nothing was saved", problems)

    coordinator.round("save: which copy", evidence, blame)
