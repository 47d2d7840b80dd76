"""Runs that are killed with SIGKILL, all ranks at once, at random instants and in a save beside training."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from resume_kit.checkpoint.names import ATTEMPTS, GROUND
from resume_kit.run.journal import read_journal
from tests.ranks import RankGroup, start_ranks


class KillableJob(Protocol):
    """A job of either engine."""

    @property
    def run_dir(self) -> str: ...

    @property
    def steps(self) -> int: ...

    def to_json(self) -> dict[str, Any]: ...


@dataclass
class Killed:
    """What became of a run: each rank's final result, and what was on disk at each kill."""

    results: list[dict[str, Any]]
    kills: list[str] = field(default_factory=list)


def run_with_kills(
    train: Callable[..., dict[str, Any]],
    world_size: int,
    job: KillableJob,
    *,
    random_kills: int,
    save_kills: int,
    seed: int,
) -> Killed:
    """Start the job again and again; kill the first attempts, let the last one end.

    A random instant is one of the start-up or the resume, or lies a random number of steps on; so that a run is
    never over before all has been done to it, however fast the machine.
    """
    rng = random.Random(seed)
    slow = ["slow-disk"]  # so that training goes on for a while beside a save
    plan = ["random"] * random_kills + ["save"] * save_kills
    rng.shuffle(plan)
    done = Killed([])
    run = Path(job.run_dir)
    while plan:
        before, old = steps_reached(run), torn_saves(run)
        more = rng.randint(0, (job.steps - before) // (len(plan) + 1))
        with start_ranks(train, world_size, job.to_json(), slow if plan[0] == "save" else []) as group:
            if plan[0] == "save":
                hit = _hit_save(group, run, old) and _wait(group, rng.uniform(0.0, 1.0))
            else:
                hit = _until(group, _has_come(run, before + more)) if more else True
                hit = hit and _wait(group, rng.uniform(0.0, 0.2) if more else rng.uniform(0.2, 2.0))
            group.kill()
            group.wait(timeout=30)
        torn = sorted(torn_saves(run) - old)
        if hit and (plan[0] != "save" or torn):
            at = f"{plan.pop(0)} after step {steps_reached(run)}"
            done.kills.append(f"{at}: {', '.join(torn) or 'nothing torn'}")
        elif not group.alive() and all(o.good for o in group.outcomes()):
            raise AssertionError(f"the run ended before {plan} could be done to it; make it longer")
    with start_ranks(train, world_size, job.to_json()) as group:
        done.results = group.results(timeout=180, grace=5)
    return done


def steps_reached(run: Path) -> int:
    """The last step that the run's journal holds, over all attempts."""
    return max((int(event["step"]) for event in read_journal(run) if event["event"] == "step"), default=0)


def torn_saves(run: Path) -> set[str]:
    """The directories of a save under way, or left behind by a dead attempt, as ``000002/ground/step-000000004``."""
    return {str(path.relative_to(run / ATTEMPTS)) for path in run.glob(f"{ATTEMPTS}/*/{GROUND}/step-*")}


def _has_come(run: Path, step: int) -> Callable[[], bool]:
    return lambda: steps_reached(run) >= step


def _wait(group: RankGroup, seconds: float) -> bool:
    """Wait; whether every rank was still alive at the end."""
    end = time.monotonic() + seconds
    return _until(group, lambda: time.monotonic() >= end)


def _until(group: RankGroup, reached: Callable[[], bool]) -> bool:
    """Wait until something is so; whether every rank was still alive then."""
    while not reached():
        if len(group.alive()) < group.world_size:
            return False
        time.sleep(0.005)
    return len(group.alive()) == group.world_size


def _hit_save(group: RankGroup, run: Path, old: set[str]) -> bool:
    """Return in the middle of a save with training gone on: its staging directory is there, and a later step."""

    def beside() -> bool:
        torn = torn_saves(run) - old
        return bool(torn) and steps_reached(run) > max(int(name.rpartition("-")[2]) for name in torn)

    return _until(group, beside)
