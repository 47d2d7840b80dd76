"""A leg: a workload's checkpoint resumed in another topology, in a process group of its own."""

from __future__ import annotations

from benchmarks.suite import storage
from benchmarks.suite.account import Account, label_of, median_text, run_of_legs
from benchmarks.suite.continuation import continue_again
from benchmarks.suite.ours import WAYS, Ours, Trainer, topology_text
from benchmarks.suite.presets import Leg
from benchmarks.suite.results import Row
from benchmarks.suite.timing import SystemFailed
from benchmarks.suite.workloads import Workload
from resume_kit.checkpoint.names import committed_steps
from resume_kit.errors import UsageError


def measure_leg(account: Account, workload: Workload, leg: Leg) -> None:
    """Resume the workload's checkpoint in this topology, again and again; save it, where the leg says so.

    Raises `UsageError` where the workload has left none.
    """
    job, clock = account.job, account.clock
    label, home = label_of(account, job.work[0]), run_of_legs(job)
    if not committed_steps(home):
        raise UsageError(f"{home} holds no checkpoint for {leg.name}: measure {job.spec.name} before its legs")
    row = Row(job.part, label, "reshard", f"{job.spec.name} → {leg.name}")
    account.rows.append(row)
    trainers: list[Trainer] = []

    def first() -> None:
        trainers.append(Trainer(workload, home, global_batch="change", configuration="warn", replay="warn"))

    def resume() -> None:
        seconds = trainers[0].resume() if number else first_seconds
        row.add(clock.slowest_of(seconds), first=number == 0)

    try:
        clock.attempt(first)
        trainer = trainers[0]
        assert trainer.kit.report is not None
        first_seconds = dict(trainer.kit.report.seconds)
        saved = Ours(trainer, WAYS[-1])
        row.nbytes = saved.nbytes()
        row.system = f"{topology_text(saved.manifest().engine)} → {leg.name}"
        for number in range(job.preset.repeats + 1):
            if number and account.out_of_time(f"{number - 1} of {job.preset.repeats} repeats"):
                break
            if clock.rank == 0:
                storage.drop_cached(home)
            clock.barrier()
            clock.attempt(resume)
            account.publish()
        row.note = "; ".join(f"gate: {c.name} {c.figure}" for c in trainer.kit.report.checks if c.stage == "gate")
        if leg.continues:
            continue_again(account, trainer, label)
        if leg.saves:
            trainer.step()
            trainer.kit.save()
        trainer.close()
    except SystemFailed as failed:
        row.failure = str(failed)
    account.say(f"{row.system}: load {median_text(row, 'load')}, prove {median_text(row, 'prove')} {row.failure}")
