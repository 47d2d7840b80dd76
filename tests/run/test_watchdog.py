"""A rank that hangs ends itself, and its stacks name the place; one that only takes long does not."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from resume_kit.errors import UsageError
from resume_kit.run import watchdog as module
from resume_kit.run.last_words import LastWords
from resume_kit.run.watchdog import Watchdog
from tests import jobs
from tests.conftest import Ranks
from tests.run.stopped import train


def job(tmp_path: Path) -> jobs.Job:
    return jobs.Job(run_dir=str(tmp_path / "run"), data=jobs.text_file(tmp_path), steps=6, save_every=0)


def words(run: jobs.Job, rank: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(run.run_dir) / f"attempts/000001/rank-{rank:05d}.json").read_bytes())
    return found


def test_a_rank_that_sleeps_ends_all_within_the_bound(ranks: Ranks, tmp_path: Path) -> None:
    run = job(tmp_path)
    group = ranks.start(train, 2, run.to_json(), {"hang_after": 2.0, "at": [3, 0, 1, "sleep"]})
    group.wait_for("step 3", timeout=60)
    began = time.monotonic()
    assert group.wait(timeout=30) == [77, 77]
    assert time.monotonic() - began < 10
    assert words(run, 1)["kind"] == "hung" and words(run, 1)["step"] == 3
    assert words(run, 1)["error"] == "no progress for 2 s, in the training code since step 3"
    stacks = (Path(run.run_dir) / "attempts/000001/rank-00001.stacks.txt").read_text()
    assert "sleep_where_a_person_should_look" in stacks
    assert "ERROR: rank 1 hangs: no progress for 2 s" in group.log(1) and "kit.alive()" in group.log(1)
    ended = json.loads((Path(run.run_dir) / "attempts/000001/ended.json").read_bytes())
    assert ended["reason"] == "failed" and "no progress" in ended["by"]


def test_a_long_evaluation_that_says_so_goes_on(ranks: Ranks, tmp_path: Path) -> None:
    run = job(tmp_path)
    both = ranks.run(evaluate_everywhere, 2, run.to_json(), timeout=60)
    assert [len(rank["records"]) for rank in both] == [6, 6]
    assert not list(Path(run.run_dir).glob("attempts/*/rank-*"))


def evaluate_everywhere(rank: int, world_size: int, options: dict[str, Any]) -> dict[str, Any]:
    """3 s of evaluation under a bound of 1.5 s."""
    return train(rank, world_size, options, {"hang_after": 1.5, "at": [3, 0, rank, "evaluate"]})


def test_an_interpreter_that_is_held_is_ended_by_the_thread_in_c(ranks: Ranks, tmp_path: Path) -> None:
    run = job(tmp_path)
    group = ranks.start(hold_the_interpreter, 2, run.to_json())
    assert group.wait(timeout=40) == [77, 1]
    stacks = (Path(run.run_dir) / "attempts/000001/rank-00001.stacks.txt").read_text()
    assert "Timeout" in stacks and "in _act" in stacks
    assert words(run, 0)["kind"] == "hung"


def hold_the_interpreter(rank: int, world_size: int, options: dict[str, Any]) -> None:
    Watchdog.SLACK = 1.0
    train(rank, world_size, options, {"hang_after": 2.0, "at": [3, 0, 1, "hold the interpreter"]})


# -- without ranks


class FakeAttempt(SimpleNamespace):
    """Keeps how it ended."""

    def ended(self, reason: str, *, step: int | None, by: str = "") -> None:
        self.said = reason, step, by


def watched(tmp_path: Path, bound: float | None) -> tuple[Watchdog, list[float], FakeAttempt]:
    """A watchdog that notes its end instead of ending the process."""
    attempt: Any = FakeAttempt(folder=tmp_path)
    dog, ends = Watchdog(bound, LastWords(attempt, 0)), list[float]()
    dog._end = ends.append  # type: ignore[method-assign]
    return dog, ends, attempt


def test_what_the_kit_waits_for_itself_has_more_time_and_signs_of_its_own(tmp_path: Path) -> None:
    dog, ends, _attempt = watched(tmp_path, 0.3)
    dog.arm()
    with dog.within("saving", more=5.0):
        time.sleep(0.6)
    with dog.within("resume", sign=time.monotonic):
        time.sleep(0.6)
    assert not ends
    with dog.within("resume", sign=lambda: 3):
        time.sleep(0.6)
    assert ends and ends[0] == 0.3
    dog.off()


def test_a_process_that_was_stopped_is_not_hung(tmp_path: Path) -> None:
    child = os.fork()
    if not child:
        dog, ends, _attempt = watched(tmp_path, 1.0)
        dog.arm()
        time.sleep(0.2)
        (tmp_path / "armed").touch()
        time.sleep(0.5)
        os._exit(bool(ends))
    while not (tmp_path / "armed").exists():
        time.sleep(0.01)
    os.kill(child, signal.SIGSTOP)
    time.sleep(2.0)
    os.kill(child, signal.SIGCONT)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_the_thread_in_c_which_cannot_tell_leaves_a_suspended_job_its_hours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bounds: list[float] = []
    monkeypatch.setattr(module.faulthandler, "dump_traceback_later", lambda left, **_: bounds.append(left))
    dog, _ends, _attempt = watched(tmp_path, 1.0)
    dog.arm()
    time.sleep(0.3)
    dog.off()
    assert bounds and all(6 * 3600 < left <= 6 * 3600 + 1 for left in bounds)


def test_off_leaves_nothing_and_it_can_be_armed_again(tmp_path: Path) -> None:
    dog, ends, _attempt = watched(tmp_path, 0.2)
    dog.arm()
    dog.off()
    time.sleep(0.5)
    assert not ends and list(tmp_path.iterdir()) == []
    dog.arm()
    time.sleep(0.5)
    assert ends
    dog.off()


def test_without_a_bound_it_watches_nothing(tmp_path: Path) -> None:
    dog, ends, _attempt = watched(tmp_path, None)
    dog.arm()
    with dog.within("x", more=1.0):
        assert list(tmp_path.iterdir()) == [] and not ends
    dog.off()


@pytest.mark.parametrize("bound", [0.0, -1.0, float("nan")])
def test_a_bound_that_cannot_be_meant(bound: float, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="hang_after is"):
        watched(tmp_path, bound)
