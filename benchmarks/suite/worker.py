"""One part of a preset on this rank of a process group: a workload with everything measured on it, or a leg."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.peers.peer import System
from benchmarks.peers.registry import PEERS
from benchmarks.suite.account import Account, Job, label_of, median_text, place_of
from benchmarks.suite.continuation import begin_run
from benchmarks.suite.effect import Effect
from benchmarks.suite.legs import measure_leg
from benchmarks.suite.ours import WAYS, Ours, Trainer
from benchmarks.suite.rates import fingerprint_rate, gate_time, planning_time
from benchmarks.suite.results import Row
from benchmarks.suite.tables import GATE
from benchmarks.suite.timing import Clock, SystemFailed, shortened
from benchmarks.suite.turns import Turns
from benchmarks.suite.workloads import Workload, build

#: What a part writes and deletes again, beside the run that its legs resume.
MEASURED = "measured"


def run(job: Job) -> None:
    """Measure the part. Collective; joins and leaves the default process group."""
    began = time.perf_counter()
    settings = [*job.spec.settings, *(job.leg.settings if job.leg else ()), f"run.dir={job.work[0]}"]
    workload = build(job.spec.engine, job.spec.config, settings, initial=job.leg is None)
    torch.use_deterministic_algorithms(False)  # what is measured trains as usual; `continuation` switches it on
    clock = Clock(workload.device)
    account = Account(
        job,
        clock,
        {
            "engine": job.spec.engine,
            "ranks": clock.world_size,
            "what": workload.describe(),
            "device": clock.device.type,
            "config": job.spec.config,
            "settings": settings[:-1],
            "seconds to build": time.perf_counter() - began,
            "targets": {},
        },
    )
    account.say(workload.describe())
    if clock.rank == 0:
        sweep(job)
    clock.barrier()
    try:
        if job.leg:
            measure_leg(account, workload, job.leg)
        else:
            labels = [label_of(account, folder) for folder in job.work]
            if job.spec.legs:
                begin_run(account, workload, labels[0])
            end = job.deadline
            for number, (folder, label) in enumerate(zip(job.work, labels, strict=True)):
                if end is not None:  # an equal share of the time that is left
                    job.deadline = time.time() + (end - time.time()) / (len(job.work) - number)
                _target(account, workload, folder, label)
    finally:
        account.publish()
    dist.barrier()
    dist.destroy_process_group()


def sweep(job: Job) -> None:
    """Delete what nobody needs of the parts before: what a killed one measured, workloads whose legs are over.

    At size, a memory file system has no room for it.
    """
    for folder in job.work:
        place = place_of(job, folder)
        for spec in job.preset.workloads:
            over = job.leg is None and spec.name != job.spec.name
            other = place.with_name(spec.name)
            shutil.rmtree(other if over else other / MEASURED, ignore_errors=True)


def _target(account: Account, workload: Workload, folder: Path, label: str) -> None:
    """Everything on one file system; what it writes there it deletes again."""
    job, clock, preset = account.job, account.clock, account.job.preset
    place = place_of(job, folder) / MEASURED
    if clock.rank == 0:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
    clock.barrier()
    trainer = Trainer(workload, place / "kit")

    def step() -> int:
        trainer.step()
        return trainer.kit.step_number

    step()  # the first makes the optimizer's state
    ours = [Ours(trainer, way) for way in WAYS]
    systems, rows = _systems(account, workload, ours, label, place)
    account.rows += rows
    turns = Turns(clock, step, systems, rows, place)
    for repeat in range(preset.repeats + 1):
        if repeat and account.out_of_time(f"{label}: {repeat - 1} of {preset.repeats} repeats"):
            break
        turns.take(first=repeat == 0, late=lambda peer: account.out_of_time(f"{label}: a repeat ended before {peer}"))
        account.facts["targets"][label] |= turns.ways
        if repeat == 0:
            account.rows += turns.floor_rows
        _tell(account, repeat, [*rows, *turns.floor_rows])
        account.publish()
        if repeat == 0:  # all is warm now, and a budget that ends repeats early leaves these whole
            _effect(account, turns, step, label)
            _parts_alone(account, trainer, ours[-1], label)
            account.publish()
    for system in systems:
        try:
            clock.attempt(system.close)
        except SystemFailed as failed:
            account.say(f"{system.name} does not close: {failed}")
    trainer.close()
    clock.barrier()
    if clock.rank == 0:
        shutil.rmtree(place, ignore_errors=True)
    clock.barrier()


def _systems(
    account: Account, workload: Workload, ours: Sequence[Ours], label: str, place: Path
) -> tuple[list[System], list[Row]]:
    """The kit's ways and the preset's peers, with their rows; one that cannot run has the reason in its row."""
    systems: list[System] = list(ours)
    rows = [Row(account.job.part, label, "ours", system.name) for system in ours]
    for key in account.job.spec.peers:
        peer = PEERS[key](workload, place)
        row = Row(account.job.part, label, "peer", peer.name, note=peer.note)
        try:
            row.failure = peer.available() or ""
        except Exception as error:
            row.failure = shortened(error)
        reasons: list[str] = [""] * account.clock.world_size
        dist.all_gather_object(reasons, row.failure)
        row.failure = next((reason for reason in reasons if reason), "")
        systems.append(peer)
        rows.append(row)
    return systems, rows


def _effect(account: Account, turns: Turns, step: Callable[[], int], label: str) -> None:
    """Training with saves and without, in alternating phases."""
    preset, clock, part = account.job.preset, account.clock, account.job.part
    names = [f"resume_kit, {name}" if name in WAYS else PEERS[name].name for name in preset.effect]
    savers = [system for system in turns.active if system.name in names]
    plain = Row(part, label, "training", "no saves")
    rows = [Row(part, label, "training", f"{s.name}, every {preset.save_every} steps") for s in savers]
    effect = Effect(clock, step, turns.discard, steps=preset.phase_steps, every=preset.save_every)
    account.rows += [plain, *rows]
    for phase in range(preset.phases):
        if account.out_of_time(f"{label}: {phase} of {preset.phases} phases of training"):
            break
        effect.take(plain, savers, rows)
        account.say(", ".join(f"{row.system}: {median_text(row, 'mean step')}" for row in (plain, *rows)))
        account.publish()


def _parts_alone(account: Account, trainer: Trainer, ours: Ours, label: str) -> None:
    preset, clock, part, spec = account.job.preset, account.clock, account.job.part, account.job.spec
    if account.out_of_time(f"{label}: fingerprints, gate and planning"):
        return
    account.facts["parameters"] = ours.parameters()
    rate = Row(part, label, "rate", "fingerprints on the device", note="every byte that the ranks own, read once")
    gate = Row(part, label, "rate", GATE)
    plan = Row(part, label, "planning", "resume-kit plan")
    account.rows += [rate, gate, plan]
    fingerprint_rate(trainer.workload, clock, rate, preset.repeats)
    gate_time(trainer.kit, clock, gate, preset.repeats)
    other = "stage=2" if spec.engine == "deepspeed" else f"tp={clock.world_size},pp=1"
    target = f"engine={spec.engine},world={clock.world_size},{other}"
    planning_time(ours.folder, target, clock, plan, preset.repeats)


def _tell(account: Account, repeat: int, rows: Sequence[Row]) -> None:
    """One line of each system's newest figures."""
    words = []
    for row in rows:
        newest = row.first if not repeat else {name: values[-1] for name, values in row.samples.items()}
        shown = [f"{name} {newest[name]:.3f}" for name in ("blocking", "durable", "load", "seconds") if name in newest]
        words.append(f"{row.system}: {', '.join(shown) or row.failure}")
    account.say("\n    ".join([f"repeat {repeat} of {account.job.preset.repeats}", *words]))
