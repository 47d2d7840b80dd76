"""An attempt on all ranks: its journal, its signs of life, and what it does once a newer one has come."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from resume_kit.engines.coordination import Coordinator
from resume_kit.errors import Fenced, RunTaken, SaveFailed, UsageError
from resume_kit.recovery import attempts
from resume_kit.recovery.attempts import Token, read_attempts, shows_life
from resume_kit.recovery.events import JournalLines
from resume_kit.run.attempt import Attempt
from resume_kit.run.journal import Journal, last_commit, read_journal
from tests.conftest import Ranks


def test_a_kept_failure_is_raised_by_the_next_event_and_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attempt = Attempt(tmp_path, Coordinator.of_default_group(timeout=1.0))
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "write", lambda *_, **__: fail())
        attempt.record_soon("step", {"step": 1})
    with pytest.raises(SaveFailed, match="no space left"):
        attempt.record("end", {})
    attempt.record("end", {})
    assert attempt.take_failure() is None
    assert [event["event"] for event in read_journal(tmp_path)] == ["end"]


def fail() -> None:
    raise SaveFailed("no space left")


def last_line_lost(rank: int, world_size: int, run: str) -> str:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    attempt = Attempt(Path(run), Coordinator.of_default_group(timeout=20.0))
    write: Any = Journal.write
    Journal.write = lambda *_, **__: fail()
    attempt.record_soon("step", {"step": 1})
    Journal.write = write
    with pytest.raises(SaveFailed) as failure:
        attempt.record("end", {})
    return failure.value.headline


def test_all_ranks_hear_of_it(ranks: Ranks, tmp_path: Path) -> None:
    assert ranks.run(last_line_lost, 2, str(tmp_path)) == ["no space left"] * 2


# -- another attempt


def attempt_in(run: Path, **options: Any) -> Attempt:
    return Attempt(run, Coordinator.of_default_group(timeout=20.0), **options)


def test_the_attempt_and_its_journal_have_one_number(tmp_path: Path) -> None:
    Journal(tmp_path, attempt=6).write("start", {"run_id": "old"})
    attempt = attempt_in(tmp_path)
    attempt.start({"world_size": 1})
    assert (attempt.number, attempt.run_id) == (7, "old")
    assert attempt.folder == tmp_path / "attempts" / "000007" and attempt.ground == attempt.folder / "ground"
    *_, started = read_journal(tmp_path)
    assert (started["attempt"], started["run_id"], started["took_over"]) == (7, "old", None)
    attempt.ended("finished", step=3)
    assert [record.ended and record.ended["reason"] for record in read_attempts(tmp_path)] == ["finished"]


def test_the_attempt_keeps_how_many_failures_are_enough(tmp_path: Path) -> None:
    attempt_in(tmp_path, give_up_after=5)
    assert [record.give_up_after for record in read_attempts(tmp_path)] == [5]


def test_an_attempt_that_was_superseded_journals_nothing_more(tmp_path: Path) -> None:
    old = attempt_in(tmp_path)
    old.start({})
    newer = attempt_in(tmp_path)
    newer.start({})
    before = (tmp_path / "journal.jsonl").read_bytes()
    with pytest.raises(Fenced, match="attempt 2 took over"):
        old.record("end", {})
    with pytest.raises(Fenced):
        old.note("commit", {"step": 3})
    old.record_soon("step", {"step": 3})
    assert isinstance(old.failure, Fenced)
    with pytest.raises(Fenced):
        old.record("end", {})
    assert old.take_failure() is None
    assert (tmp_path / "journal.jsonl").read_bytes() == before
    newer.record("step", {"step": 3})


def test_a_line_that_came_too_late_is_stale_to_every_reader(tmp_path: Path) -> None:
    old = Journal(tmp_path, attempt=1)
    old.write("start", {"run_id": "r"})
    old.write("commit", {"step": 3})
    Journal(tmp_path, attempt=2).write("start", {"run_id": "r"})
    old.write("commit", {"step": 9})  # it had looked for a newer attempt just before
    old.write("step", {"step": 9})
    assert [event["step"] for event in read_journal(tmp_path) if event["event"] == "commit"] == [3]
    lines = JournalLines(tmp_path)
    assert last_commit(tmp_path) == 3 and len(list(lines)) == 3 and lines.stale == 2


def taken(rank: int, world_size: int, run: str) -> tuple[str, int]:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    with pytest.raises(RunTaken) as error:
        attempt_in(Path(run), patience=20.0)
    newer = attempt_in(Path(run), take_over=True)
    return str(error.value), newer.number


def test_all_ranks_hear_that_another_attempt_lives(ranks: Ranks, tmp_path: Path) -> None:
    old = attempt_in(tmp_path)  # gives a sign of life every two seconds
    (said, number), other = ranks.run(taken, 2, str(tmp_path))
    assert f"attempt 1 is alive (process {os.getpid()} on" in said
    assert other == (said, number) == (said, 2)
    with pytest.raises(Fenced):
        old.record("end", {})


def test_a_request_to_stop_and_a_newer_attempt_are_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "BEAT_SECONDS", 0.01)
    attempt = attempt_in(tmp_path)
    (attempt.folder / "stop").write_text('{"reason": "maintenance"}')
    told: list[Any] = []

    def ask(request: dict[str, Any]) -> None:
        told.append(request["reason"])
        raise ValueError("a callback that fails")

    attempt.watch(on_stop=ask, on_superseded=told.append)
    wait_until(lambda: told == ["maintenance"])
    (tmp_path / "attempts" / "000002").mkdir()
    wait_until(lambda: told == ["maintenance", 2])
    assert shows_life(attempt.folder, 20.0)
    attempt.ended("fenced", step=None)
    time.sleep(0.1)
    assert told == ["maintenance", 2] and not shows_life(attempt.folder, 0.3)


def test_a_disk_that_takes_no_sign_of_life_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "BEAT_SECONDS", 0.01)
    attempt = attempt_in(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Token, "beat", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        time.sleep(0.1)
        assert not shows_life(attempt.folder, 0.3)
    assert shows_life(attempt.folder, 20.0)


def wait_until(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20.0
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def of_two_hosts(rank: int, world_size: int, run: str) -> str:
    import torch.distributed as dist

    from resume_kit.checkpoint import files

    files.VISIBLE_WITHIN = 0.1
    dist.init_process_group("gloo")
    with pytest.raises(UsageError) as error:
        attempt_in(Path(run) / f"disk-of-{rank}")
    return str(error.value)


def test_a_run_directory_that_every_host_has_for_itself_is_refused(ranks: Ranks, tmp_path: Path) -> None:
    for said in ranks.run(of_two_hosts, 2, str(tmp_path)):
        assert "the run directory is not the same on every host" in said and "does not see what rank 0 wrote" in said
        assert "rank 1, " in said and "rank 0, " not in said
