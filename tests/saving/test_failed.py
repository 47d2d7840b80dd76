"""A save that fails on one rank fails alike on all, within a bound, and what comes after it works or is refused."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from resume_kit.checkpoint import names
from resume_kit.checkpoint.manifest import read_manifest
from tests.conftest import Ranks
from tests.jobs import Job, text_file, train
from tests.ranks import RankFailure
from tests.saving.loop import Loop, told


def job_in(folder: Path, **options: Any) -> Job:
    return Job(run_dir=str(folder / "run"), data=text_file(folder), **{"stage": 1, "save_every": 0, **options})


def events(job: Job, kind: str) -> list[dict[str, Any]]:
    lines = (Path(job.run_dir) / "journal.jsonl").read_text().splitlines()
    return [event for line in lines if (event := json.loads(line))["event"] == kind]


# -- one rank cannot capture its state


def three_saves(rank: int, world_size: int, options: dict[str, Any], fault: str) -> list[str]:
    loop = Loop(rank, world_size, options, [fault])
    outcomes = []
    for _ in range(3):
        loop.steps(1)
        outcomes.append(told(loop.kit.save))
    loop.kit.close()
    return outcomes


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("no-account-once", "RanksFailed: save: capture failed on 1 rank(s)"),
        ("no-agreement-once", "RanksFailed: save: copies failed on 1 rank(s)"),
        ("no-plan-once", "RanksFailed: save: agree failed on 1 rank(s)"),
        ("no-arena-once", "SaveFailed: no host memory for the save\n  [host memory] rank 1: all gone"),
    ],
)
def test_one_ranks_failed_capture_is_raised_on_all_and_the_next_save_works(
    fault: str, expected: str, ranks: Ranks, tmp_path: Path
) -> None:
    job = job_in(tmp_path, saving={"gate_every": 2}, timeout=20.0)
    mine, other = ranks.run(three_saves, 2, job.to_json(), fault, timeout=60)
    assert mine == other and mine[1:] == ["", ""]
    assert mine[0].startswith(expected)
    run = Path(job.run_dir)
    assert names.committed_steps(run) == [2, 3]
    # The failed save has not used up the turn of the gate.
    gates = [read_manifest(run / names.step_directory(step)).gate for step in (2, 3)]
    assert "loss" in (gates[0] or {}) and gates[1] == {"recorded": False}


def ended_copies(rank: int, world_size: int, options: dict[str, Any]) -> tuple[int, str]:
    from resume_kit.saving.staging import Staging

    abandon, ended = Staging.abandon, list[Staging]()
    Staging.abandon = lambda staging: (ended.append(staging), abandon(staging))[1]  # type: ignore[method-assign]
    loop = Loop(rank, world_size, options, ["no-measuring-once"])
    loop.steps(1)
    outcome = told(loop.kit.save)
    loop.kit.close()
    return len(ended), outcome


def test_copies_that_a_failed_capture_has_begun_are_ended(ranks: Ranks, tmp_path: Path) -> None:
    """Else they would go on into the memory in which the next save stages."""
    _, (ended, outcome) = ranks.run(ended_copies, 2, job_in(tmp_path).to_json(), timeout=60)
    assert ended == 1 and "out of device memory" in outcome


def test_an_index_that_comes_too_late_is_a_failed_save_and_no_damage(ranks: Ranks, tmp_path: Path) -> None:
    """A save that fails is tried again by the next start; damage would have a person called."""
    job = job_in(tmp_path)
    mine, other = ranks.run(three_saves, 2, job.to_json(), "late-index-once", timeout=60)
    assert mine == other and mine[1:] == ["", ""]
    assert mine[0].startswith("SaveFailed: an index did not arrive") and "not-here-yet" in mine[0]
    assert names.committed_steps(Path(job.run_dir)) == [2, 3]


def agreements(rank: int, world_size: int, options: dict[str, Any]) -> list[int]:
    """How often the ranks had agreed on copies after each of three saves, of which the first one's agreement fails."""
    import resume_kit.saving.saver as saver

    counted: list[int] = []
    agree = saver.agree_on_copies

    def count(*arguments: Any) -> Any:
        calls.append(1)
        return agree(*arguments)

    calls: list[int] = []
    saver.agree_on_copies = count
    loop = Loop(rank, world_size, options, ["no-agreement-once"])
    for _ in range(3):
        loop.steps(1)
        told(loop.kit.save)
        counted.append(len(calls))
    loop.kit.close()
    return counted


def test_a_layout_counts_as_agreed_only_once_it_is(ranks: Ranks, tmp_path: Path) -> None:
    assert ranks.run(agreements, 2, job_in(tmp_path).to_json()) == [[1, 2, 2]] * 2


def test_a_failed_capture_of_a_scheduled_save_is_raised_by_a_later_step(ranks: Ranks, tmp_path: Path) -> None:
    job = job_in(tmp_path, steps=500, save_every=3)
    with pytest.raises(RankFailure) as failure:
        ranks.run(train, 2, job.to_json(), ["no-arena-once"])
    assert [outcome.error_type for outcome in failure.value.outcomes] == ["resume_kit.errors.SaveFailed"] * 2
    assert all("all gone" in outcome.error for outcome in failure.value.outcomes)
    assert 3 < events(job, "step")[-1]["step"] < 500


# -- one rank's disk hangs, or is slower than the bound


def until_it_fails(rank: int, world_size: int, options: dict[str, Any]) -> dict[str, Any]:
    loop = Loop(rank, world_size, options, ["hung-disk"])
    loop.steps(2)
    loop.kit.save(returns="overlapped")
    began = time.monotonic()
    error = ""
    while not error and time.monotonic() < began + 40:
        time.sleep(0.1)
        error = told(lambda: loop.steps(1))
    seconds = time.monotonic() - began
    step = loop.kit.step_number
    again = told(loop.kit.save)
    return {"step": step, "seconds": seconds, "error": error, "again": again, "end": told(loop.kit.close)}


def test_a_hung_disk_on_one_rank_is_raised_on_all_by_one_step_and_later_saves_are_refused(
    ranks: Ranks, tmp_path: Path
) -> None:
    job = job_in(tmp_path, timeout=3.0)
    mine, other = ranks.run(until_it_fails, 2, job.to_json(), timeout=90)
    assert mine["step"] == other["step"] > 2
    assert all(2.5 < each["seconds"] < 9 for each in (mine, other))
    assert "rank 1 did not arrive within 3 s" in mine["error"]
    assert "SaveFailed: the save of step 2 hangs" in other["error"] and "start the job again" in other["error"]
    assert mine["again"] == other["again"]
    assert "SaveFailed: the save of step 2 still hangs\n  [save] rank 1" in mine["again"]
    assert mine["end"] == other["end"] == ""
    assert names.committed_steps(Path(job.run_dir)) == []


def saves_after_a_slow_one(rank: int, world_size: int, options: dict[str, Any]) -> list[str]:
    """Rank 0's disk takes longer than rank 1 waits; both let it come to its end."""
    import torch.distributed as dist

    from resume_kit.checkpoint.writing import ImageFile
    from resume_kit.saving.saver import SaveState

    loop = Loop(rank, world_size, options)
    finish, naps = ImageFile.finish, [2.5 * loop.kit._coordinator.timeout] if rank == 0 else []

    def slow(image: ImageFile) -> Any:
        while naps:
            time.sleep(naps.pop())
        return finish(image)

    ImageFile.finish = slow
    outcomes = []
    for _ in range(3):
        loop.steps(1)
        loop.kit.save(returns="overlapped")
        while loop.kit._saves.state is SaveState.RUNNING:
            time.sleep(0.05)
        dist.barrier()
        outcomes.append(told(loop.kit.wait))
    loop.kit.close()
    return outcomes


def test_after_a_save_that_one_rank_gave_up_the_next_ones_work(ranks: Ranks, tmp_path: Path) -> None:
    job = job_in(tmp_path, timeout=2.0)
    slow, other = ranks.run(saves_after_a_slow_one, 2, job.to_json())
    assert "rank 0 sent no result within 4 s" in other[0]
    assert "rank 1 did not arrive within 2 s" in slow[0]
    assert slow[1:] == other[1:] == ["", ""]
    assert names.committed_steps(Path(job.run_dir))[-2:] == [2, 3]


# -- Ctrl-C


def interrupted(rank: int, world_size: int, options: dict[str, Any]) -> dict[str, Any]:
    """Ctrl-C while `wait` waits; the script then trains on and saves once more."""
    import os
    import signal
    import threading

    loop = Loop(rank, world_size, options, ["slow-disk"])
    loop.steps(2)
    loop.kit.save(returns="overlapped")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Timer(0.4, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        loop.kit.wait()
    busy = loop.kit._saves._saver.busy
    loop.steps(1)
    error = told(loop.kit.save)
    loop.kit.close()
    return {"busy": busy, "error": error}


def test_a_wait_that_is_interrupted_leaves_the_save_to_be_waited_for(ranks: Ranks, tmp_path: Path) -> None:
    job = job_in(tmp_path)
    assert ranks.run(interrupted, 2, job.to_json()) == [{"busy": True, "error": ""}] * 2
    assert [event["step"] for event in events(job, "commit")] == [2, 3] == names.committed_steps(Path(job.run_dir))


# -- what is beside the save: the journal, retention


@pytest.mark.parametrize("steps", [4, 2], ids=["by the next step", "by close"])
def test_a_journal_that_cannot_say_that_a_save_is_skipped_is_raised_on_all(
    steps: int, ranks: Ranks, tmp_path: Path
) -> None:
    job = job_in(tmp_path, steps=steps, save_every=1, saving={"when_busy": "skip"}, timeout=20.0)
    with pytest.raises(RankFailure) as failure:
        ranks.run(train, 2, job.to_json(), ["slow-disk", "no-skip-event@0"], timeout=60)
    assert [outcome.error_type for outcome in failure.value.outcomes] == ["resume_kit.errors.SaveFailed"] * 2
    assert "no space left" in failure.value.outcomes[0].error
    assert events(job, "step")[-1]["step"] == 2


def test_old_checkpoints_that_cannot_be_deleted_are_a_warning(ranks: Ranks, tmp_path: Path) -> None:
    job = job_in(tmp_path, steps=4, save_every=1, keep_last=2)
    group = ranks.start(train, 2, job.to_json(), ["no-prune@0"])
    assert [len(result["records"]) for result in group.results()] == [4, 4]
    assert "warning: old checkpoints could not be deleted: [Errno 13] Permission denied" in group.log(0)
    assert names.committed_steps(Path(job.run_dir)) == [1, 2, 3, 4]
    assert [event["step"] for event in events(job, "commit")] == [1, 2, 3, 4]


# -- the journal fails once the checkpoint stands


def unpublished(rank: int, world_size: int, options: dict[str, Any]) -> str:
    loop = Loop(rank, world_size, options, ["no-commit-event@0"])
    loop.steps(1)
    return told(loop.kit.save)


def test_a_checkpoint_that_stands_is_said_to_stand(ranks: Ranks, tmp_path: Path) -> None:
    job = job_in(tmp_path, timeout=20.0)
    mine, other = ranks.run(unpublished, 2, job.to_json(), timeout=60)
    assert mine == other
    assert mine.startswith("SaveFailed: the checkpoint of step 1 stands, but not every rank or the journal knows")
    assert "cannot write journal.jsonl" in mine
    assert names.committed_steps(Path(job.run_dir)) == [1]
