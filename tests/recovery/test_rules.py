"""What to do next: the word for a batch script, and when a run is given up."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from resume_kit.errors import GivenUp, UsageError
from resume_kit.recovery.attempts import Token
from resume_kit.recovery.history import history
from resume_kit.recovery.identity import Identity
from resume_kit.recovery.rules import Decision, decide, pardon, require_hope
from tests.recovery.runs import START, Written, attempt, beating

QUICK = 0.3


def word(run: Path, **options: float) -> str:
    return decide(run, look_seconds=QUICK, **options).word  # type: ignore[arg-type]


def fail(run: Path, number: int, *, resumed: int = 10, step: int = 14, rank: int = 2, host: str = "n2") -> Written:
    written = attempt(run, number, at=number * 1000, host="n1")
    if number > 1:
        written.resume(resumed)
    return written.train(step).words(rank, f"RuntimeError: bad at 0x{number:x}", host=host).ended("failed", "a rank")


def test_nothing_started_is_not_started_again(tmp_path: Path) -> None:
    decision = decide(tmp_path)
    assert decision.word == "stop" and "no attempt" in decision.reason


@pytest.mark.parametrize(
    ("reason", "expected"),
    [("finished", "finished"), ("preempted", "restart"), ("failed", "restart"), ("refused", "stop")],
)
def test_each_end_has_its_word(tmp_path: Path, reason: str, expected: str) -> None:
    attempt(tmp_path, 1).train(12).ended(reason, "SIGTERM")
    assert word(tmp_path) == expected


def test_a_death_without_a_word_is_started_again(tmp_path: Path) -> None:
    attempt(tmp_path, 1).train(12).beat()
    assert decide(tmp_path, look_seconds=QUICK) == Decision(
        "restart", "attempt 1: died without a word; the next goes on from the checkpoint of step 10"
    )


def test_before_the_first_commit_it_starts_from_the_start(tmp_path: Path) -> None:
    attempt(tmp_path, 1).train(3).ended("failed", "x")
    assert "from the start: there is no checkpoint" in decide(tmp_path).reason


def test_whoever_shows_life_is_running(tmp_path: Path) -> None:
    with beating(attempt(tmp_path, 1).train(12)):
        decision = decide(tmp_path)
    assert decision == Decision("running", "attempt 1 is alive on n1")


def test_a_process_of_this_host_that_is_gone_is_not_waited_for(tmp_path: Path) -> None:
    mine = Identity.of_this_process()
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    written = attempt(tmp_path, 1).train(12)
    assert written.folder is not None
    record = {"identity": {**mine.to_json(), "pid": child}, "started": START}
    written._put("attempt.json", record)
    assert decide(tmp_path, look_seconds=3600).word == "restart"


def test_an_attempt_that_is_older_than_the_job_is_not_the_jobs(tmp_path: Path) -> None:
    """The job ended over a wrong option before it made one: started again, it would do so for ever."""
    attempt(tmp_path, 1).train(12).ended("preempted", "SIGTERM")
    assert word(tmp_path, since=START - 1) == "restart"
    assert word(tmp_path, since=START + 1) == "stop"


def test_three_failures_at_one_step_are_given_up(tmp_path: Path) -> None:
    fail(tmp_path, 1)
    fail(tmp_path, 2)
    assert word(tmp_path) == "restart"
    require_hope(tmp_path)
    fail(tmp_path, 3)
    decision = decide(tmp_path)
    assert decision.word == "stop"
    with pytest.raises(GivenUp, match="failed 3 times without a step beyond 14") as raised:
        require_hope(tmp_path)
    text = str(raised.value)
    assert str(decision.reason) == text
    assert "[failure] attempt 2, step 14, n1: failed at step 14: rank 2 on n2: RuntimeError: bad at 0x2" in text
    assert "step 14 (3 of 3); host n2 (3 of 3); rank 2 (3 of 3); error RuntimeError: bad at # (3 of 3)" in text
    assert f"resume-kit retry {tmp_path}" in text
    assert word(tmp_path, give_up_after=4) == "restart"


def test_what_differs_is_not_in_common(tmp_path: Path) -> None:
    for number, rank in enumerate((0, 1, 2), 1):
        fail(tmp_path, number, rank=rank, host=f"n{rank}")
    with pytest.raises(GivenUp) as raised:
        require_hope(tmp_path)
    assert "[in common] step 14 (3 of 3); error RuntimeError: bad at # (3 of 3)" in str(raised.value)


def test_one_step_further_is_hope(tmp_path: Path) -> None:
    for number, step in enumerate((14, 14, 15), 1):
        fail(tmp_path, number, step=step)
    assert word(tmp_path) == "restart"
    fail(tmp_path, 4, step=15)
    assert word(tmp_path) == "restart"  # of the last three, the first ended at 14
    fail(tmp_path, 5, step=15)
    assert word(tmp_path) == "stop"


def test_failures_before_the_first_step_count(tmp_path: Path) -> None:
    fail(tmp_path, 1)
    for number in (2, 3, 4):
        attempt(tmp_path, number, at=number * 1000).words(0, "ImportError: no module").ended("failed")
    assert word(tmp_path) == "stop"


def test_preempted_attempts_are_no_failures(tmp_path: Path) -> None:
    for number in range(1, 8):
        attempt(tmp_path, number, at=number * 1000).train(5).ended("preempted", "SIGTERM")
    assert word(tmp_path) == "restart"


def test_a_preempted_attempt_that_came_further_is_hope(tmp_path: Path) -> None:
    fail(tmp_path, 1)
    fail(tmp_path, 2)
    attempt(tmp_path, 3, at=3000).resume(10).train(18).ended("preempted", "SIGTERM")
    fail(tmp_path, 4)
    assert word(tmp_path) == "restart"


def test_many_failures_without_a_commit_are_given_up_even_if_each_comes_further(tmp_path: Path) -> None:
    attempt(tmp_path, 1).train(10).ended("preempted", "SIGTERM")
    for number in range(2, 11):  # steps 11 to 19
        assert word(tmp_path) == "restart"
        fail(tmp_path, number, step=9 + number)
    with pytest.raises(GivenUp, match="failed 9 times without a new checkpoint"):
        require_hope(tmp_path)


def test_retry_pardons_what_was(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        fail(tmp_path, number)
    assert word(tmp_path) == "stop"
    assert pardon(tmp_path) == 3
    assert word(tmp_path) == "restart"
    for number in (4, 5):
        fail(tmp_path, number)
    assert word(tmp_path) == "restart"
    fail(tmp_path, 6)
    assert word(tmp_path) == "stop"


def test_who_lives_is_not_given_up(tmp_path: Path) -> None:
    fail(tmp_path, 1)
    fail(tmp_path, 2)
    with beating(attempt(tmp_path, 3, at=3000)):
        require_hope(tmp_path)


def test_the_folders_of_a_real_token_are_understood(tmp_path: Path) -> None:
    first = Token.take(tmp_path, world_size=2, run_id=None, take_over=False)
    assert word(tmp_path) == "restart"  # no more signs of life than that of its begin
    first.ended("failed", step=7, by="ValueError: bad")
    second = Token.take(tmp_path, world_size=3, run_id=first.run_id, take_over=False)
    second.ended("preempted", step=9, by="SIGTERM")
    pasts = history(tmp_path)
    assert [(past.number, past.kind, past.world_size, past.host) for past in pasts] == [
        (1, "failed", 2, socket.gethostname()),
        (2, "preempted", 3, socket.gethostname()),
    ]
    assert [past.why for past in pasts] == ["failed: ValueError: bad", "preempted by SIGTERM"]


def test_the_name_of_an_attempt_that_never_was_is_passed_over(tmp_path: Path) -> None:
    attempt(tmp_path, 1).train(3).ended("failed")
    (tmp_path / "attempts" / "000002").mkdir()
    attempt(tmp_path, 3, at=100).train(3).ended("failed")
    assert [past.number for past in history(tmp_path)] == [1, 3]


def test_old_runs_without_folders_have_nothing_to_give_up_or_pardon(tmp_path: Path) -> None:
    for number in range(1, 11):
        attempt(tmp_path, number, at=number * 1000, folder=False).train(3)
    require_hope(tmp_path)
    with pytest.raises(UsageError, match="no attempts to pardon"):
        pardon(tmp_path)
