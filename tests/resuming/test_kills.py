"""Killed at random instants, in the middle of saves too, a run ends as if nothing had happened."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import jobs, megatron_jobs
from tests.conftest import Ranks
from tests.kills import run_with_kills

LENGTH = {"steps": 40, "save_every": 2, "workers": 1, "layers": 4}

MEGATRON: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, {"tp": 2}),
    "pp2": (2, {"pp": 2}),
    "tp2-pp2": (4, {"tp": 2, "pp": 2}),
    "dp2": (2, {}),
    "vpp2": (2, {"pp": 2, "vpp": 2}),
    "ep2": (2, {"ep": 2, "experts": 4}),
}


def check(
    ranks: Ranks,
    train: Callable[..., dict[str, Any]],
    world_size: int,
    job: Any,
    *,
    random_kills: int,
    save_kills: int,
    seed: int,
) -> None:
    """Kill a copy of `job`; all its records, over all attempts, and its end must be those of `job` itself."""
    reference = ranks.run(train, world_size, job.to_json(), timeout=180)
    run = Path(job.run_dir).with_name("killed")
    killed = run_with_kills(
        train,
        world_size,
        job.but(run_dir=str(run)),
        random_kills=random_kills,
        save_kills=save_kills,
        seed=seed,
    )
    print(f"\n{world_size} ranks, {len(killed.kills)} kills: {killed.kills}")
    assert len(killed.kills) == random_kills + save_kills
    for before, after in zip(reference, killed.results, strict=True):
        later = [record for record in before["records"] if record["step"] > after["resumed_at"]]
        assert after["records"] == later
        assert after["state"] == before["state"]
    assert every_step(run) == {record["step"]: record["loss"] for record in reference[0]["records"]}


def every_step(run: Path) -> dict[int, float]:
    """Loss of each step over all attempts; a step that came out twice must have come out the same."""
    from resume_kit.run.journal import read_journal

    found: dict[int, float] = {}
    for event in read_journal(run):
        if event["event"] == "step":
            assert found.setdefault(event["step"], event["loss"]) == event["loss"]
    return found


def zero_job(tmp_path: Path, stage: int) -> jobs.Job:
    return jobs.Job(run_dir=str(tmp_path / "reference"), data=jobs.text_file(tmp_path), stage=stage, **LENGTH)


def megatron_job(tmp_path: Path, options: dict[str, Any]) -> megatron_jobs.MegatronJob:
    data = jobs.text_file(tmp_path)
    return megatron_jobs.MegatronJob(run_dir=str(tmp_path / "reference"), data=data, **LENGTH, **options)


@pytest.mark.parametrize(("stage", "world_size"), [(3, 2)])
def test_killed_twice(stage: int, world_size: int, ranks: Ranks, tmp_path: Path) -> None:
    job = zero_job(tmp_path, stage).but(steps=24)
    check(ranks, jobs.train, world_size, job, random_kills=1, save_kills=1, seed=stage * 10 + world_size)


def test_megatron_killed_twice(ranks: Ranks, tmp_path: Path) -> None:
    world_size, options = MEGATRON["pp2"]
    job = megatron_job(tmp_path, options).but(steps=24)
    check(ranks, megatron_jobs.train, world_size, job, random_kills=1, save_kills=1, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_killed_four_times(stage: int, world_size: int, ranks: Ranks, tmp_path: Path) -> None:
    job = zero_job(tmp_path, stage)
    check(ranks, jobs.train, world_size, job, random_kills=3, save_kills=1, seed=stage * 10 + world_size)


@pytest.mark.slow
@pytest.mark.parametrize("topology", MEGATRON)
def test_megatron_killed_five_times(topology: str, ranks: Ranks, tmp_path: Path) -> None:
    world_size, options = MEGATRON[topology]
    job = megatron_job(tmp_path, options)
    seed = 10 + list(MEGATRON).index(topology)
    check(ranks, megatron_jobs.train, world_size, job, random_kills=4, save_kills=1, seed=seed)
