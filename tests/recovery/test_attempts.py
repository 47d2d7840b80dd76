"""Who holds a run directory: one attempt at a time, and an older one neither commits nor deletes, however late."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from resume_kit.checkpoint import names
from resume_kit.errors import Fenced, RunTaken, UsageError
from resume_kit.integrity.verify import deep_problems
from resume_kit.recovery import attempts, grounds
from resume_kit.recovery.attempts import AttemptRecord, Token, fencing, newest_attempt, read_attempts, shows_life
from resume_kit.recovery.identity import Identity
from resume_kit.run.journal import Journal
from tests.checkpoints import Recipe, commit, settle, stage

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def take(run: Path, **options: Any) -> Token:
    return Token.take(run, **{"world_size": 2, "run_id": None, "take_over": False, "patience": 0.3, **options})


def contents(run: Path) -> dict[str, bytes]:
    """The committed checkpoints, and those that were set aside, byte by byte."""
    found = [*run.glob("step-*/*"), *run.glob("set-aside/*/*")]
    return {str(path.relative_to(run)): path.read_bytes() for path in found}


def held_by(run: Path, identity: dict[str, Any]) -> Path:
    """The folder of an attempt of another process, which never ended."""
    token = take(run)
    record = json.loads((token.folder / "attempt.json").read_bytes())
    (token.folder / "attempt.json").write_text(json.dumps({**record, "identity": identity}))
    return token.folder


ELSEWHERE = Identity(host="n7", boot_id="b", pid_namespace="pid:[1]", pid=5, pid_started=6, slurm_job="12").to_json()


# -- numbers and records


def test_attempts_are_numbered_and_leave_their_record(run: Path) -> None:
    first = take(run)
    first.ended("preempted", step=7, by="SIGTERM")
    first.ended("finished", step=8)
    second = take(run, run_id=first.run_id, give_up_after=5)
    assert (first.number, second.number, second.run_id) == (1, 2, first.run_id)
    (second.folder / "stop").write_text('{"reason": "maintenance"}')
    (second.folder / "rank-00001.json").write_text('{"rank": 1, "kind": "failed"}')
    (second.folder / "rank-00000.json").write_text('{"rank": 0, "ki')
    one, two = read_attempts(run)
    assert one.ended is not None and (one.ended["reason"], one.ended["step"]) == ("preempted", 7)
    assert (one.fenced_by, one.took_over, one.stop, one.last_words) == (2, None, None, ())
    assert (two.number, two.folder, two.world_size, two.run_id) == (2, second.folder, 2, first.run_id)
    assert two.identity == Identity.of_this_process() and two.started == pytest.approx(time.time(), abs=60)
    assert two.alive is not None and two.alive["beat"] == 1 and two.ended is None
    assert (one.give_up_after, two.give_up_after) == (None, 5)
    assert newest_attempt(run) == two and newest_attempt(run / "elsewhere") is None
    assert two.stop == {"reason": "maintenance"} and two.last_words == ({"rank": 1, "kind": "failed"},)
    assert not any((one.folder / name).exists() for name in ("ground", "stop")) and second.ground.is_dir()


def test_a_run_without_folders_goes_on_with_the_numbers_of_its_journal(run: Path) -> None:
    for attempt in (1, 2, 3):
        Journal(run, attempt=attempt).write("start", {"run_id": "old"})
    assert read_attempts(run) == []
    assert take(run).number == 4


def test_a_version_without_folders_that_ran_between_is_counted_and_the_old_attempt_is_shut_out(run: Path) -> None:
    first = take(run)
    for attempt in (2, 3):
        Journal(run, attempt=attempt).write("start", {"run_id": "old"})
    assert take(run, take_over=True).number == 4
    assert first.superseded() is not None


def test_what_is_no_attempt_is_no_attempt(run: Path) -> None:
    for name in ("000003.bak", "3", "notes"):
        (run / "attempts" / name).mkdir(parents=True)
    assert take(run).number == 1 and [record.number for record in read_attempts(run)] == [1]


def test_attempts_on_another_file_system_are_refused(run: Path) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as elsewhere:
        if os.stat(elsewhere).st_dev == os.stat(run).st_dev:
            pytest.skip("the temporary folder lies in /dev/shm")
        (run / "attempts").symlink_to(elsewhere)
        with pytest.raises(UsageError, match="lies on another file system than the run directory"):
            take(run)


# -- whether an older attempt is in the way


def test_an_attempt_that_gives_signs_of_life_holds_the_run(run: Path) -> None:
    with holder(run, "hold"):
        Journal(run, attempt=1).write("step", {"step": 41})
        with pytest.raises(RunTaken) as taken:
            take(run, patience=20.0)
        assert "attempt 1 is alive (process" in str(taken.value) and "at step 41" in str(taken.value)
        assert "run.take_over=true" in str(taken.value)
        assert names.attempt_numbers(run) == [1]
        newer = take(run, take_over=True)
    assert (newer.number, newer.took_over) == (2, 1)


def test_one_that_is_stopped_for_longer_than_the_patience_is_taken_over(run: Path) -> None:
    with holder(run, "hold") as process:
        process.send_signal(signal.SIGSTOP)
        wait_until_silent(run)
        newer = take(run)
        process.send_signal(signal.SIGCONT)
    assert (newer.number, newer.took_over) == (2, 1)


def test_one_that_died_here_is_taken_over_at_once(run: Path) -> None:
    with holder(run, "hold") as process:
        process.kill()
        process.wait()
    assert take(run, patience=3600.0).took_over == 1


@pytest.mark.parametrize("state", ["silent", "no sign of life at all", "no record"])
def test_another_hosts_attempt_is_watched(state: str, run: Path) -> None:
    folder = held_by(run, ELSEWHERE)
    if state != "silent":
        (folder / "alive").unlink()
    if state == "no record":
        (folder / "attempt.json").unlink()
    began = time.monotonic()
    assert take(run).took_over == 1
    assert time.monotonic() - began > 0.3


def test_a_restart_of_the_same_job_does_not_wait(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held_by(run, ELSEWHERE)
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert take(run, patience=3600.0).number == 2


def test_a_stranger_with_the_same_torchrun_id_and_a_higher_count_is_refused(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another torchrun of the same --rdzv-id, which starts its ranks again since they were refused."""
    held_by(run, {**ELSEWHERE, "slurm_job": None, "elastic_run": "100"})
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "100")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    over = threading.Event()
    beating = threading.Thread(target=beat_until, args=(Token(run, 1, "", None), over))
    beating.start()
    try:
        with pytest.raises(RunTaken, match="attempt 1 is alive"):
            take(run, patience=20.0)
    finally:
        over.set()
        beating.join()


@pytest.mark.parametrize("ended", [True, False])
def test_nobody_waits_for_an_attempt_that_ended_or_was_shut_out(ended: bool, run: Path) -> None:
    folder = held_by(run, ELSEWHERE)
    if ended:
        (folder / "ended.json").write_text('{"reason": "failed"}')
    else:
        (folder / "ground").rmdir()
        (folder / "fenced-by-000002").touch()
    assert take(run, patience=3600.0).took_over is None


def test_a_sign_of_life_is_a_change_whatever_the_clock_says(run: Path) -> None:
    token = take(run)
    (token.folder / "alive").write_text('{"beat": 5, "time": 1e12}')
    assert not shows_life(token.folder, 0.3)
    timer = threading.Timer(0.1, token.beat)
    timer.start()
    assert shows_life(token.folder, 20.0)
    timer.join()


# -- two at once


def contend(run: Path, barrier: Any, results: Any, take_over: bool, rounds: int) -> None:
    attempts._LOOK_SECONDS = 0.005
    for number in range(rounds):
        place = run / str(number)
        barrier.wait()
        over = threading.Event()
        try:
            token = Token.take(place, world_size=1, run_id=None, take_over=take_over, patience=20.0)
            threading.Thread(target=beat_until, args=(token, over)).start()
            results.put((number, token.number))
        except (RunTaken, Fenced) as error:
            results.put((number, type(error).__name__))
        barrier.wait()
        over.set()


def beat_until(token: Token, over: threading.Event) -> None:
    while not over.wait(0.002):
        token.beat()


def race(run: Path, *, take_over: bool, rounds: int) -> list[set[Any]]:
    """What two processes that start in the same instant got, round by round."""
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(2), context.SimpleQueue()
    for number in range(rounds):
        (run / str(number)).mkdir()
    both = [context.Process(target=contend, args=(run, barrier, results, take_over, rounds)) for _ in range(2)]
    for process in both:
        process.start()
    found: list[set[Any]] = [set() for _ in range(rounds)]
    for _ in range(2 * rounds):
        number, result = results.get()
        found[number].add(result)
    for process in both:
        process.join()
    return found


def test_of_two_that_start_at_once_one_trains(run: Path) -> None:
    assert race(run, take_over=False, rounds=100) == [{1, "RunTaken"}] * 100


def test_one_that_comes_while_an_older_attempt_is_watched_is_not_passed_over(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held_by(run, ELSEWHERE)
    watched: list[str] = []

    def another_comes(folder: Path, _seconds: float) -> bool:
        watched.append(folder.name)
        if len(watched) == 1:
            held_by(run, {**ELSEWHERE, "host": "n8"})
            Journal(run, attempt=2).write("start", {"run_id": "r"})
        return len(watched) == 3

    monkeypatch.setattr(attempts, "shows_life", another_comes)
    with pytest.raises(RunTaken, match="attempt 2 is alive"):
        take(run)
    assert watched == ["000001", "000001", "000002"] and names.attempt_numbers(run) == [1, 2]


def test_two_that_both_take_over_come_one_after_the_other(run: Path) -> None:
    for number, found in enumerate(race(run, take_over=True, rounds=100)):
        assert found in ({1, 2}, {"Fenced", 2})
        assert Token(run / str(number), 1, "", None).superseded() == 2
        assert not names.ground(run / str(number), 1).exists() and names.ground(run / str(number), 2).is_dir()


# -- a stale process


@contextmanager
def holder(run: Path, what: str, stop_at: int = 10**6) -> Iterator[subprocess.Popen[str]]:
    """A process that holds `run`, ready to do `what`."""
    command = [sys.executable, "-m", "tests.recovery.holder", str(run), what, str(stop_at)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


def wait_until_silent(run: Path) -> None:
    while shows_life(run / "attempts" / "000001", 0.2):
        pass


def taken_over_while_stopped(run: Path, what: str, stop_at: int) -> tuple[str, dict[str, bytes]]:
    """A process stops just before a rename, a newer attempt begins, and the process goes on: what it says at its end,
    and the checkpoints as the newer attempt found them."""
    with holder(run, what, stop_at) as process:
        assert process.stdout is not None and process.stdout.readline() == "stopped\n"
        wait_until_silent(run)
        token = take(run)
        assert (token.number, token.took_over) == (2, 1)
        found = contents(run)
        process.send_signal(signal.SIGCONT)
        return process.stdout.read(), found


@pytest.fixture
def trained(run: Path) -> Path:
    for step in (10, 20, 30, 40):
        commit(run, step)
    return run


@pytest.mark.parametrize(
    ("what", "stop_at"), [("commit", 0), ("prune", 0), ("prune", 1), ("set aside", 0), ("set aside", 1)]
)
def test_a_process_that_wakes_up_late_changes_nothing(what: str, stop_at: int, trained: Path) -> None:
    said, found = taken_over_while_stopped(trained, what, stop_at)
    assert said.startswith("Fenced: attempt 1 no longer holds the run directory") and "attempt 2 took over" in said
    assert contents(trained) == found
    assert (
        names.committed_steps(trained)
        == {
            ("commit", 0): [10, 20, 30, 40],
            ("prune", 0): [10, 20, 30, 40],
            ("prune", 1): [20, 30, 40],
            ("set aside", 0): [10, 20, 30, 40],
            ("set aside", 1): [10, 20, 40],  # it was on its way: the newer attempt has brought it to its place
        }[what, stop_at]
    )
    assert all(deep_problems(trained / names.step_directory(step)) == [] for step in names.committed_steps(trained))


@pytest.mark.parametrize("stop_at", [0, 1])
def test_a_replaced_checkpoint_is_put_back(stop_at: int, trained: Path) -> None:
    commit(trained, 50, seed=1)
    before = contents(trained)
    said, found = taken_over_while_stopped(trained, "commit", stop_at)
    assert said.startswith("Fenced")
    assert found == before == contents(trained)


def test_a_commit_that_came_first_stands(trained: Path) -> None:
    commit(trained, 50, seed=1)
    before = contents(trained)
    said, found = taken_over_while_stopped(trained, "commit", 2)  # before the old one is deleted
    assert said == "done\n"
    assert found == contents(trained) and found.keys() == before.keys() and found != before


def test_nothing_goes_through_a_handle_of_the_old_ground(trained: Path) -> None:
    """As an NFS client that has it in its cache, or a rename that was under way in the kernel, would try."""
    old = take(trained)
    stage(trained, Recipe(50, attempt=1))
    ground, run = os.open(old.ground, os.O_RDONLY), os.open(trained, os.O_RDONLY)
    assert take(trained).number == 2
    with pytest.raises(FileNotFoundError):
        os.rename("step-000000050", "step-000000050", src_dir_fd=ground, dst_dir_fd=run)
    with pytest.raises(FileNotFoundError):
        os.rename("step-000000010", "removed-step-000000010", src_dir_fd=run, dst_dir_fd=ground)
    assert names.committed_steps(trained) == [10, 20, 30, 40]
    os.close(ground)
    os.close(run)


# -- what lies in a ground that is taken away


def test_a_newer_attempt_finishes_what_another_began_to_take_away(trained: Path) -> None:
    """Attempt 2 died after it had renamed the ground of attempt 1."""
    first = take(trained)
    before = contents(trained)
    (trained / "step-000000030").rename(first.ground / "replaced-step-000000030")
    stage(trained, Recipe(30, attempt=1, seed=9))
    second = Token(trained, 2, "", None)
    second.ground.mkdir(parents=True)
    first.ground.rename(first.folder / "fenced-by-000002")
    (trained / "step-000000040").rename(second.ground / "setting-aside-step-000000040.attempt-2")
    token = take(trained)
    assert token.number == 3
    aside = {
        name.replace("step-000000040/", "set-aside/step-000000040.attempt-2/"): raw for name, raw in before.items()
    }
    assert contents(trained) == aside
    assert (first.folder / "fenced-by-000003").is_file() and (second.folder / "fenced-by-000003").is_file()
    assert [path.name for path in token.ground.iterdir()] == ["removed-step-000000030"]
    assert grounds.clear(token.ground) == [] and list(token.ground.iterdir()) == []
    assert [(r.number, r.fenced_by) for r in read_attempts(trained)] == [(1, 3), (2, 3), (3, None)]


def test_what_is_not_ours_stays_where_it_is_and_no_link_is_followed(trained: Path, tmp_path: Path) -> None:
    first = take(trained)
    target = commit(tmp_path / "elsewhere", 5)
    (first.ground / "step-000000005").symlink_to(target)
    (first.ground / "notes").mkdir()
    (first.ground / "step-000000006").write_text("a file")
    before = contents(trained)
    settle(trained)
    left = sorted(path.name for path in (first.folder / "fenced-by-000002").iterdir())
    assert left == ["notes", "step-000000005", "step-000000006"]
    assert deep_problems(target) == [] and contents(trained) == before
    assert settle(trained).number == 3 and len(list((first.folder / "fenced-by-000003").iterdir())) == 3


def test_what_cannot_be_deleted_is_told_and_is_deleted_by_the_next_start(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take(run)
    stage(run, Recipe(5))
    token = take(run)
    with monkeypatch.context() as patch:
        patch.setattr("resume_kit.checkpoint.files.shutil.rmtree", denied)
        assert [type(error) for error in grounds.clear(token.ground)] == [PermissionError]
    assert (token.ground / "removed-step-000000005").is_dir()
    last = settle(run)
    assert list(last.ground.iterdir()) == []


def test_an_old_attempt_that_cannot_be_shut_out_stops_the_new_one(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take(run)
    monkeypatch.setattr(os, "rename", denied)
    with pytest.raises(RunTaken, match=r"an older attempt cannot be shut out(.|\n)*could still commit and delete"):
        take(run)


def denied(*_: object, **__: object) -> None:
    raise PermissionError(13, "Permission denied")


# -- errors of work in a ground


def test_an_error_in_a_ground_that_was_taken_away_is_fenced(run: Path) -> None:
    first = take(run)
    with pytest.raises(OSError, match="its own"), fencing(first.ground):
        raise OSError("its own")
    second = take(run)
    with pytest.raises(Fenced, match="attempt 2 took over"), fencing(first.ground):
        (first.ground / "step-000000005").mkdir()
    with pytest.raises(Fenced):
        first.require()
    second.require()
    assert (first.superseded(), second.superseded()) == (2, None)


def test_a_ground_that_somebody_deleted_is_lost_too(run: Path) -> None:
    token = take(run)
    token.ground.rmdir()
    with pytest.raises(Fenced, match="no newer attempt is to be seen"), fencing(token.ground):
        (token.ground / "step-000000005").mkdir()


def test_an_unreadable_record_is_an_attempt_all_the_same(run: Path) -> None:
    folder = held_by(run, {"host": "n8"})
    assert AttemptRecord.of(folder).identity is None
    (folder / "attempt.json").write_text("[1]")
    (folder / "ended.json").write_text("{")
    record = AttemptRecord.of(folder)
    assert (record.number, record.run_id, record.started, record.ended) == (1, None, None, None)


def test_an_older_start_of_the_same_job_stays_out_even_when_the_later_one_has_ended(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A torchrun behind a cut starts its ranks again: they must not train on what the requeued job has finished."""
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    later = take(run)
    later.ended("finished", step=40)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    with pytest.raises(RunTaken, match="out of date") as refusal:
        take(run)
    assert "later start of this very job" in refusal.value.problems[0].what
    with pytest.raises(RunTaken, match="out of date"):
        take(run, take_over=True)
    monkeypatch.setenv("SLURM_JOB_ID", "13")
    assert take(run).number == later.number + 1
