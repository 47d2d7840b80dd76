"""Runs that are killed with SIGKILL, all ranks at once, at random instants and in the middle of a save."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.jobs import Job, train
from tests.ranks import RankGroup, start_ranks


@dataclass
class Killed:
    """What became of a run: each rank's final result, and what was on disk at each kill."""

    results: list[dict[str, Any]]
    kills: list[str] = field(default_factory=list)


def run_with_kills(world_size: int, job: Job, *, random_kills: int, save_kills: int, seed: int) -> Killed:
    """Start the job again and again; kill the first attempts, let the last one end."""
    rng = random.Random(seed)
    plan = ["random"] * random_kills + ["save"] * save_kills
    rng.shuffle(plan)
    done = Killed([])
    run = Path(job.run_dir)
    while plan:
        with start_ranks(train, world_size, job.to_json()) as group:
            instant = rng.uniform(0.5, 4.0 + 1.5 * world_size)
            hit = _hit_save(group, run) if plan[0] == "save" else _wait(group, instant)
            group.kill()
            group.wait(timeout=30)
        torn = sorted(p.name for p in run.glob(".staging-*")) if run.is_dir() else []
        if hit and (plan[0] != "save" or torn):
            done.kills.append(f"{plan.pop(0)}: {', '.join(torn) or 'nothing torn'}")
        elif not group.alive() and all(o.good for o in group.outcomes()):
            raise AssertionError(f"the run ended before {plan} could be done to it; make it longer")
    with start_ranks(train, world_size, job.to_json()) as group:
        done.results = group.results(timeout=180, grace=5)
    return done


def _wait(group: RankGroup, seconds: float) -> bool:
    """Wait; whether every rank was still alive at the end."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if len(group.alive()) < group.world_size:
            return False
        time.sleep(0.005)
    return len(group.alive()) == group.world_size


def _hit_save(group: RankGroup, run: Path) -> bool:
    """Return in the middle of a save: its staging directory is there, and not yet the checkpoint."""
    while group.alive():
        for _ in range(200):
            if next(run.glob(".staging-*"), None):
                return True
            time.sleep(0.0005)
    return False
