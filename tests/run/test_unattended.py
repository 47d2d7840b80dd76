"""Starts that nobody watches: orders given once, faults that pass, ends that leave word, ranks that die in a wait."""

from __future__ import annotations

import io
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from resume_kit.engines.coordination import Coordinator
from resume_kit.errors import RunTaken, SaveFailed, UsageError
from resume_kit.run import attempt as attempt_module
from resume_kit.run.attempt import Attempt
from resume_kit.run.guards import Guards
from tests import jobs
from tests.conftest import Ranks
from tests.ranks import RankFailure
from tests.run.test_preempted import ended, events, job


def build_kit(rank: int, world_size: int, options: dict[str, Any], **more: Any) -> tuple[Any, Any, Any]:
    from resume_kit import ResumeKit, Retention, Saving

    run = jobs.Job(**options)
    engine, loader = jobs.build(rank, world_size, run)
    given = {"save_every": run.save_every or None, "retention": Retention(keep_last=9), "timeout": 30.0, **more}
    kit = ResumeKit(engine, loader, run_dir=run.run_dir, saving=Saving(**run.saving), show=print, **given)
    return engine, loader, kit


def train_to(
    rank: int, world_size: int, options: dict[str, Any], last: int, at: int | None = None, **more: Any
) -> dict[str, Any]:
    """Train until the run is stopped, by rank 0, before the step after `last`."""
    from resume_kit.run.stopping import Preempted

    engine, loader, kit = build_kit(rank, world_size, options, **more)
    resumed_at = step = kit.resume(at=at)
    batches = iter(loader)
    try:
        while True:
            if step == last and rank == 0:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.2)
            loss = engine(**next(batches)).loss
            engine.backward(loss)
            engine.step()
            step = kit.step(loss)["step"]
    except Preempted as stop:
        loader.close()
        return {"resumed_at": resumed_at, "stopped_at": stop.step, "report": kit.report.render()}


# -- orders that were given once


def test_going_back_is_obeyed_once_in_a_job_that_slurm_starts_again(ranks: Ranks, tmp_path: Path) -> None:
    run = job(tmp_path, save_every=2)

    def start(last: int, at: int | None, **environment: str) -> dict[str, Any]:
        return ranks.run(train_to, 1, run.to_json(), last, at, env=environment, timeout=60)[0]

    start(5, None, SLURM_JOB_ID="6")
    first = start(6, 2, SLURM_JOB_ID="7")
    again = start(8, 2, SLURM_JOB_ID="7", SLURM_RESTART_COUNT="1")
    once_more = start(9, 2, SLURM_JOB_ID="7", SLURM_RESTART_COUNT="2")
    assert [each["resumed_at"] for each in (first, again, once_more)] == [2, first["stopped_at"], again["stopped_at"]]
    said = "step 2: attempt 2 of this very job went back there; this one goes on from the newest"
    assert said in again["report"] and said in once_more["report"] and said not in first["report"]
    assert [event["at"] for event in events(run, "resume")] == [2, None, None]
    person = start(9, 2, SLURM_JOB_ID="8")
    assert person["resumed_at"] == 2


def test_taking_over_is_for_the_first_start_of_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    holder = Attempt(tmp_path, Coordinator.of_default_group(timeout=5.0))
    for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"):
        with monkeypatch.context() as patch:
            patch.setattr("resume_kit.recovery.attempts.same_lineage", lambda *_: False)  # of another process
            patch.setenv(name, "1")
            with pytest.raises(RunTaken):
                Attempt(tmp_path, Coordinator.of_default_group(timeout=5.0), take_over=True)
    assert holder.token is not None and holder.token.superseded() is None
    assert Attempt(tmp_path, Coordinator.of_default_group(timeout=5.0), take_over=True).number == 2


# -- faults that pass, and what does not


def test_a_stale_handle_in_a_resume_costs_a_second_and_no_checkpoint(ranks: Ranks, tmp_path: Path) -> None:
    run = job(tmp_path, save_every=2)
    ranks.run(train_to, 2, run.to_json(), 5, timeout=60)
    both = ranks.run(resume_beside_faults, 2, run.to_json(), 1, timeout=60)
    assert [rank["step"] for rank in both] == [6, 6]
    assert "Stale file handle; read once more after" in both[0]["report"]
    assert not (Path(run.run_dir) / "set-aside").exists()


def test_a_fault_that_stays_fails_the_start_and_sets_nothing_aside(ranks: Ranks, tmp_path: Path) -> None:
    run = job(tmp_path, save_every=2)
    ranks.run(train_to, 2, run.to_json(), 5, timeout=60)
    both = ranks.run(resume_beside_faults, 2, run.to_json(), 10**9, timeout=60)
    for rank in both:
        assert rank["error"] == "Unreadable" and "step-000000006 cannot be read" in rank["text"]
    assert ended(run, 2)["reason"] == "failed"
    assert (Path(run.run_dir) / "step-000000006").is_dir() and not (Path(run.run_dir) / "set-aside").exists()


def resume_beside_faults(rank: int, world_size: int, options: dict[str, Any], faults: int) -> dict[str, Any]:
    """The first `faults` times rank 1 opens a data file of the newest checkpoint the handle is stale."""
    from resume_kit.errors import ResumeKitError
    from resume_kit.resuming import patience
    from resume_kit.run import last_words

    patience.PAUSES = (0.05, 0.05)
    _, loader, kit = build_kit(rank, world_size, options)
    left, really_open = [faults], io.FileIO

    def stale(path: Path) -> io.FileIO:
        if path.suffix == ".safetensors" and left[0] > 0:
            left[0] -= 1
            raise OSError(116, "Stale file handle", str(path))
        return really_open(path)

    if rank == 1:
        io.FileIO = stale  # type: ignore[assignment, misc]
    try:
        return {"step": kit.resume(), "report": kit.report.render()}
    except ResumeKitError as error:
        last_words.record(error)
        return {"error": type(error).__name__, "text": str(error)}
    finally:
        loader.close()


def test_too_little_memory_now_is_no_refusal(ranks: Ranks, tmp_path: Path) -> None:
    run = job(tmp_path)
    assert ranks.run(without_memory, 1, run.to_json(), timeout=60) == ["TooLittleMemory"]
    assert ended(run)["reason"] == "failed"


def without_memory(rank: int, world_size: int, options: dict[str, Any]) -> str:
    from resume_kit.errors import ResumeKitError
    from resume_kit.run import last_words
    from resume_kit.saving import saver

    saver.available_memory = lambda: 1000
    _, loader, kit = build_kit(rank, world_size, options)
    try:
        kit.resume()
    except ResumeKitError as error:
        last_words.record(error)
        return type(error).__name__
    finally:
        loader.close()
    return ""


def test_a_journal_that_cannot_be_read_now_is_no_refusal(ranks: Ranks, tmp_path: Path) -> None:
    assert ranks.run(with_a_journal_out_of_reach, 1, job(tmp_path).to_json(), timeout=60) == ["Unreadable"]


def with_a_journal_out_of_reach(rank: int, world_size: int, options: dict[str, Any]) -> str:
    from resume_kit.errors import CheckpointDamaged
    from resume_kit.run import kit as module

    _, loader, kit = build_kit(rank, world_size, options)

    def fail(_run: Path) -> int:
        raise CheckpointDamaged("the journal cannot be read")

    module.last_commit = fail
    with pytest.raises(Exception, match="the journal cannot be read") as error:
        kit.resume()
    loader.close()
    return error.type.__name__


# -- ends before anybody speaks for the attempt


@pytest.mark.parametrize(
    ("error", "reason"), [(UsageError("not shared"), "refused"), (PermissionError(13, "Permission denied"), "failed")]
)
def test_an_attempt_that_cannot_begin_says_so(
    error: Exception, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise error

    place = "_require_shared" if isinstance(error, UsageError) else "_clean_up"
    monkeypatch.setattr(attempt_module.Attempt, place, fail)
    with pytest.raises(Exception, match=str(error.args[-1])):
        Attempt(tmp_path, Coordinator.of_default_group(timeout=5.0))
    said = json.loads((tmp_path / "attempts/000001/ended.json").read_bytes())
    assert said["reason"] == reason and str(error.args[-1]) in said["by"]


@pytest.mark.parametrize("given", [{"mtbf_hours": 1.0}, {"timeout": 31.0}, {"hang_after": 9.0}, {"give_up_after": 9}])
def test_what_decides_on_a_round_is_given_alike_on_all_ranks(given: Any, ranks: Ranks, tmp_path: Path) -> None:
    with pytest.raises(RankFailure) as failure:
        ranks.run(with_other_options, 2, job(tmp_path).to_json(), given, timeout=60)
    for outcome in failure.value.outcomes:
        assert outcome.error_type == "resume_kit.errors.UsageError" and next(iter(given)) in outcome.error


def with_other_options(rank: int, world_size: int, options: dict[str, Any], given: dict[str, Any]) -> None:
    build_kit(rank, world_size, options, **(given if rank else {}))


def test_giving_up_after_no_failure_at_all_cannot_be_meant() -> None:
    from resume_kit import ResumeKit

    with pytest.raises(UsageError, match="give_up_after is 0"):
        ResumeKit(None, None, run_dir="x", give_up_after=0)  # type: ignore[arg-type]


# -- ranks that die, and saves that fail, while the run is to stop


def test_a_rank_whose_peer_was_killed_does_not_wait_for_it(ranks: Ranks, tmp_path: Path) -> None:
    run = job(tmp_path)
    group = ranks.start(wait_for_a_dead_peer, 2, run.to_json())
    group.wait_for("ready", timeout=60)
    group.wait_for("ready", rank=1, timeout=60)
    group.kill(1)
    time.sleep(0.2)
    group.kill(0, signal.SIGTERM)
    began = time.monotonic()
    assert group.wait(timeout=20)[0] == 1
    assert time.monotonic() - began < 8
    assert "its peer, rank 1 " in ended(run)["by"] and ended(run)["reason"] == "failed"
    asked = json.loads((Path(run.run_dir) / "attempts/000001/asked.json").read_bytes())
    assert asked.items() >= {"signal": "SIGTERM", "rank": 0}.items() and abs(asked["time"] - time.time()) < 30


def wait_for_a_dead_peer(rank: int, world_size: int, options: dict[str, Any]) -> None:
    from resume_kit.run.outlook import RankOutlook

    RankOutlook.GONE_FOR = 1.0
    _, _, kit = build_kit(rank, world_size, options)
    print("ready", flush=True)
    if rank == 1:
        time.sleep(60)
    kit.resume()


def test_a_stop_saves_although_the_save_before_has_failed(ranks: Ranks, tmp_path: Path) -> None:
    run = job(tmp_path, save_every=3)
    both = ranks.run(train_on_a_disk_that_fails_once, 2, run.to_json(), timeout=60)
    assert [rank["stopped_at"] for rank in both] == [4, 4]
    assert [event["step"] for event in events(run, "commit")] == [4]
    assert ended(run)["reason"] == "preempted"


def train_on_a_disk_that_fails_once(rank: int, world_size: int, options: dict[str, Any]) -> dict[str, Any]:
    from resume_kit.checkpoint import files

    really, full = files.require_space, [True]

    def once(*arguments: Any) -> None:
        if full.pop() if full else False:
            time.sleep(0.1)
            raise SaveFailed("no space left")
        really(*arguments)

    files.require_space = once
    return train_to(rank, world_size, options, 3)


# -- a rank 0 that was superseded


@pytest.mark.parametrize(("last_step", "seconds"), [(0.0, 30.0), (45.0, 135.0)])
def test_it_leaves_alone_only_after_some_steps(
    last_step: float, seconds: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[float] = []

    class Timer(SimpleNamespace):
        def __init__(self, after: float, *_: Any) -> None:
            begun.append(after)

        start: Callable[..., None] = lambda _: None
        cancel: Callable[..., None] = lambda _: None

    coordinator = Coordinator.of_default_group(timeout=5.0)
    guards = Guards(Attempt(tmp_path, coordinator), coordinator, None)
    try:
        guards._outlook.last_step = last_step
        monkeypatch.setattr("resume_kit.run.guards.threading.Timer", Timer)
        guards._superseded(2)
        assert begun == [seconds]
    finally:
        guards.close()
