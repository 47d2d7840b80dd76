"""Saves beside training: the state is its step's, failures come to light, a busy disk is waited for or skipped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from resume_kit.checkpoint import names
from resume_kit.checkpoint.manifest import read_manifest
from tests.checkpoints import left_in
from tests.conftest import Ranks
from tests.jobs import Job, text_file, train
from tests.ranks import RankFailure
from tests.resuming.test_exact import differences

MIB = 1 << 20


def events(job: Job, *kinds: str) -> list[dict[str, Any]]:
    lines = (Path(job.run_dir) / "journal.jsonl").read_text().splitlines()
    return [event for line in lines if (event := json.loads(line))["event"] in kinds]


def job_in(folder: Path, **options: Any) -> Job:
    return Job(run_dir=str(folder / "run"), data=text_file(folder), **options)


@pytest.mark.parametrize(
    ("faults", "saving", "options"),
    [
        (["slow-copies"], {}, {"stage": 3}),
        (["slow-copies"], {"returns": "staged"}, {"stage": 1}),
        (["slow-copies"], {"staging": "bounded", "host_bytes": 32 * MIB}, {"stage": 2, "offload": True}),
        (["slow-disk"], {}, {"stage": 3, "buffers": True}),
        (["slow-copies", "unhooked"], {}, {"stage": 1}),
    ],
    ids=["overlapped", "staged", "bounded", "slow-disk", "no-hook-runs"],
)
def test_the_saved_state_is_that_of_its_step(
    faults: list[str], saving: dict[str, Any], options: dict[str, Any], ranks: Ranks, tmp_path: Path
) -> None:
    job = job_in(tmp_path, steps=5, save_every=3, saving=saving, **options)
    reference = ranks.run(train, 2, job.but(run_dir=str(tmp_path / "reference"), save_every=0).to_json())
    ranks.run(train, 2, job.to_json(), faults)
    assert names.committed_steps(Path(job.run_dir)) == [3]
    resumed = ranks.run(train, 2, job.to_json())
    assert [rank["resumed_at"] for rank in resumed] == [3, 3]
    for before, after in zip(reference, resumed, strict=True):
        assert differences(before, after) == []


def test_without_the_fence_the_gate_refuses_what_was_saved(ranks: Ranks, tmp_path: Path) -> None:
    job = job_in(tmp_path, steps=5, save_every=3)
    ranks.run(train, 2, job.to_json(), ["slow-copies", "no-fence"])
    with pytest.raises(RankFailure) as failure:
        ranks.run(train, 2, job.to_json())
    assert "the forward/backward is not as recorded" in failure.value.outcomes[0].error


@pytest.mark.parametrize(
    ("fault", "kind", "expected"),
    [
        ("broken-disk", "resume_kit.errors.SaveFailed", "the disk is gone"),
        ("crash-in-the-background", "resume_kit.errors.RanksFailed", "a bug"),
    ],
)
def test_a_failure_in_the_background_is_raised_by_a_later_step_on_every_rank(
    fault: str, kind: str, expected: str, ranks: Ranks, tmp_path: Path
) -> None:
    job = job_in(tmp_path, steps=500, save_every=3)
    with pytest.raises(RankFailure) as failure:
        ranks.run(train, 2, job.to_json(), [fault])
    steps = [event["step"] for event in events(job, "step")]
    assert 3 <= max(steps) < 500
    for outcome in failure.value.outcomes:
        assert outcome.error_type == kind
        assert expected in outcome.error
    assert left_in(Path(job.run_dir)) == []


def test_a_failure_in_the_last_save_is_raised_by_close(ranks: Ranks, tmp_path: Path) -> None:
    job = job_in(tmp_path, steps=3, save_every=3)
    with pytest.raises(RankFailure) as failure:
        ranks.run(train, 2, job.to_json(), ["slow-disk", "broken-disk"])
    assert all("the disk is gone" in outcome.error for outcome in failure.value.outcomes)
    assert events(job, "end") == []


def test_a_busy_disk_is_skipped_where_asked_and_both_say_so(ranks: Ranks, tmp_path: Path) -> None:
    job = job_in(tmp_path, steps=4, save_every=1, saving={"when_busy": "skip"})
    outcome = ranks.run(train, 2, job.to_json(), ["slow-disk"])
    assert len(outcome[0]["records"]) == 4
    skipped, committed = events(job, "skip"), events(job, "commit")
    assert skipped
    assert {event["step"] for event in skipped} | {event["step"] for event in committed} == {1, 2, 3, 4}
    assert skipped[0]["pending"] == committed[0]["step"] == 1


def test_a_busy_disk_is_waited_for_by_default(ranks: Ranks, tmp_path: Path) -> None:
    job = job_in(tmp_path, steps=3, save_every=1)
    ranks.run(train, 2, job.to_json(), ["slow-disk"])
    assert [event["step"] for event in events(job, "commit")] == [1, 2, 3]
    assert events(job, "skip") == []


def test_a_save_that_recorded_no_gate_is_resumed_on_its_fingerprints(ranks: Ranks, tmp_path: Path) -> None:
    job = job_in(tmp_path, steps=6, save_every=3, saving={"gate_every": 2})
    ranks.run(train, 2, job.to_json())
    run = Path(job.run_dir)
    recorded = [read_manifest(run / names.step_directory(step)).gate for step in (3, 6)]
    assert set(recorded[0] or {}) == {"loss", "grad_norm"}
    assert recorded[1] == {"recorded": False}
    ranks.run(train, 2, job.but(steps=7).to_json())
    report = json.loads((run / "resume-report-attempt-0002.json").read_text())
    warned = [check for check in report["checks"] if check["verdict"] == "warn" and check["stage"] == "gate"]
    assert "this save recorded no gate" in json.dumps(warned)


def save_once(rank: int, world_size: int, options: dict[str, Any], returns: str) -> dict[str, Any]:
    """Train two steps, save, and tell what the kit says of it."""
    from resume_kit import ResumeKit
    from tests.jobs import build

    job = Job(**options)
    engine, loader = build(rank, world_size, job)
    kit = ResumeKit(engine, loader, run_dir=job.run_dir, show=lambda _: None)
    kit.resume()
    batches = iter(loader)
    for _ in range(2):
        loss = engine(**next(batches)).loss
        engine.backward(loss)
        engine.step()
        kit.step(loss)
    at_once = kit.save(returns=returns)
    commit = kit.wait()
    again = kit.wait()
    kit.close()
    assert kit.last_commit is not None and kit.last_commit.step == 2
    return {"at once": at_once is not None, "commit": commit is not None, "again": again is not None}


@pytest.mark.parametrize(
    ("returns", "expected"),
    [
        ("committed", {"at once": True, "commit": False, "again": False}),
        ("overlapped", {"at once": False, "commit": True, "again": False}),
    ],
)
def test_save_and_wait(returns: str, expected: dict[str, bool], ranks: Ranks, tmp_path: Path) -> None:
    job = job_in(tmp_path, save_every=0)
    assert ranks.run(save_once, 2, job.to_json(), returns) == [expected, expected]
    assert names.committed_steps(Path(job.run_dir)) == [2]


def save_and_train_on(rank: int, world_size: int, options: dict[str, Any]) -> list[Any]:
    """What is known of the last commit: before it, beside it, and once a step has taken it."""
    from tests.saving.loop import Loop

    loop = Loop(rank, world_size, options)
    loop.steps(2)
    known = [loop.kit.last_commit]
    loop.kit.save(returns="overlapped")
    known.append(loop.kit.last_commit)
    while loop.kit.last_commit is None:
        loop.steps(1)
    known += [loop.kit.last_commit.step, loop.kit.wait()]
    loop.kit.close()
    return known


def test_a_commit_that_a_step_has_taken_stays_known(ranks: Ranks, tmp_path: Path) -> None:
    job = job_in(tmp_path, save_every=0)
    assert ranks.run(save_and_train_on, 2, job.to_json()) == [[None, None, 2, None]] * 2


def test_too_little_host_memory_is_told_before_training(ranks: Ranks, tmp_path: Path) -> None:
    job = job_in(tmp_path, steps=2, save_every=1)
    with pytest.raises(RankFailure) as failure:
        ranks.run(train, 2, job.to_json(), ["no-memory"])
    outcome = failure.value.outcomes[0]
    assert outcome.error_type == "resume_kit.errors.TooLittleMemory"
    assert "too little memory" in outcome.error
    assert events(job, "step") == []
