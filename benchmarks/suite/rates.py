"""Single parts of the kit by themselves: fingerprints on the device, the gate, planning a resume elsewhere."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

from benchmarks.suite.results import Row
from benchmarks.suite.timing import Clock, SystemFailed
from benchmarks.suite.workloads import Workload
from resume_kit import ResumeKit
from resume_kit.cli.main import main  # rich draws from Python's RNG at its first import: before a kit watches that


def fingerprint_rate(workload: Workload, clock: Clock, row: Row, repeats: int) -> None:
    """Fingerprints of everything that a rank owns, the result on the host. `nbytes` are read once."""
    work: list[Callable[[], object]] = []
    nbytes: list[int] = []

    def prepare() -> None:
        from resume_kit.engines.choose import adapter_for
        from resume_kit.engines.fingerprint import as_unsigned, fingerprints

        owned = [(p.data, p.spec.shape, p.box) for p in adapter_for(workload.engine).pieces() if p.owned]
        nbytes.append(sum(data.numel() * data.element_size() for data, _, _ in owned))
        work.append(lambda: as_unsigned(fingerprints(owned)))
        work[0]()

    try:
        clock.attempt(prepare)
    except SystemFailed as failed:
        row.failure = str(failed)
        return
    row.nbytes = int(clock.slowest(nbytes)[0]) * clock.world_size
    for number in range(repeats + 1):
        row.add({"seconds": clock.timed(work[0])}, first=number == 0)


def gate_time(kit: ResumeKit, clock: Clock, row: Row, repeats: int) -> None:
    """The gate's forward and backward, as a save runs it before it captures the state."""
    for number in range(repeats + 1):
        seconds: list[float] = []
        try:
            clock.attempt(lambda: seconds.append(clock.timed(kit._run_gate)))  # noqa: B023 -- used within the turn
        except SystemFailed as failed:
            row.failure = str(failed)
            return
        row.add({"seconds": seconds[0]}, first=number == 0)


def planning_time(checkpoint: Callable[[], Path], target: str, clock: Clock, row: Row, repeats: int) -> None:
    """`resume-kit plan CHECKPOINT --target …`, in this process, without imports, on rank 0."""
    codes: list[int] = []

    def plan() -> None:
        if clock.rank == 0:
            with redirect_stdout(io.StringIO()):
                codes.append(main(["plan", str(checkpoint()), "--target", target, "--json"]))

    for number in range(repeats + 1):
        seconds: list[float] = []
        try:
            clock.attempt(lambda: seconds.append(clock.timed(plan)))  # noqa: B023 -- used within the turn
        except SystemFailed as failed:
            row.failure = str(failed)
            return
        row.add({"seconds": seconds[0]}, first=number == 0)
    row.note = f"{target}; exit code {codes[-1]}" if codes else target
