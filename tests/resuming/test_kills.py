"""Killed at random instants, in the middle of saves too, a run ends as if nothing had happened."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import Ranks
from tests.jobs import Job, text_file, train
from tests.kills import run_with_kills


def check(ranks: Ranks, tmp_path: Path, *, world_size: int, stage: int, random_kills: int, save_kills: int) -> None:
    job = Job(
        run_dir=str(tmp_path / "reference"),
        data=text_file(tmp_path),
        stage=stage,
        steps=40,
        save_every=2,
        workers=1,
        layers=4,
    )
    reference = ranks.run(train, world_size, job.to_json(), timeout=180)
    killed = run_with_kills(
        world_size,
        job.but(run_dir=str(tmp_path / "killed")),
        random_kills=random_kills,
        save_kills=save_kills,
        seed=stage * 10 + world_size,
    )
    print(f"\nZeRO-{stage} × {world_size} ranks, {len(killed.kills)} kills: {killed.kills}")
    assert len(killed.kills) == random_kills + save_kills
    for before, after in zip(reference, killed.results, strict=True):
        later = [record for record in before["records"] if record["step"] > after["resumed_at"]]
        assert after["records"] == later
        assert after["state"] == before["state"]
    steps = every_step(Path(job.run_dir).with_name("killed"))
    assert steps == {record["step"]: record["loss"] for record in reference[0]["records"]}


def every_step(run: Path) -> dict[int, float]:
    """Loss of each step over all attempts; a step that came out twice must have come out the same."""
    from resume_kit.run.journal import read_journal

    found: dict[int, float] = {}
    for event in read_journal(run):
        if event["event"] == "step":
            assert found.setdefault(event["step"], event["loss"]) == event["loss"]
    return found


@pytest.mark.parametrize(("stage", "world_size"), [(3, 2)])
def test_killed_twice(stage: int, world_size: int, ranks: Ranks, tmp_path: Path) -> None:
    check(ranks, tmp_path, world_size=world_size, stage=stage, random_kills=1, save_kills=1)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_killed_four_times(stage: int, world_size: int, ranks: Ranks, tmp_path: Path) -> None:
    check(ranks, tmp_path, world_size=world_size, stage=stage, random_kills=3, save_kills=1)
