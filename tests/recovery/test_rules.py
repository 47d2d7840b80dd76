"""What to do next: the word for a batch script, and when a run is given up."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest

from resume_kit.errors import GivenUp, UsageError
from resume_kit.recovery.attempts import Token
from resume_kit.recovery.history import history
from resume_kit.recovery.identity import Identity
from resume_kit.recovery.rules import Decision, decide, pardon, require_hope
from tests.recovery.runs import START, Written, attempt, beating

QUICK = 0.3


def word(run: Path, **options: Any) -> str:
    return decide(run, look_seconds=QUICK, **options).word


def fail(
    run: Path, number: int, *, resumed: int = 10, step: int = 14, rank: int = 2, host: str = "n2", **options: Any
) -> Written:
    written = attempt(run, number, at=number * 1000, host="n1", **options)
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


# -- a SLURM job asks


@pytest.mark.parametrize("reason", ["preempted", "finished", "refused"])
def test_a_job_that_opened_no_run_is_started_again_for_a_while(tmp_path: Path, reason: str) -> None:
    """It died of a hiccup, or over a wrong option: then it would do so for ever."""
    attempt(tmp_path, 1, job=("41", 0)).train(12).ended(reason, "x")
    assert [word(tmp_path, job=("42", restarts)) for restarts in range(4)] == ["restart", "restart", "stop", "stop"]
    reason = decide(tmp_path, look_seconds=QUICK, job=("42", 2)).reason
    assert reason == "3 starts of this job have ended without opening the run; see its output"
    assert "1 start of this job has ended without" in decide(tmp_path, look_seconds=QUICK, job=("42", 0)).reason
    assert word(tmp_path, job=("42", 1), give_up_after=2) == "stop"


def test_starts_of_a_job_that_opened_no_run_are_counted_from_the_last_that_did(tmp_path: Path) -> None:
    attempt(tmp_path, 1, job=("42", 3)).train(12).ended("preempted", "SIGTERM")
    attempt(tmp_path, 2, job=("99", 0), at=100).train(15).ended("preempted", "SIGTERM")
    assert [word(tmp_path, job=("42", restarts)) for restarts in (3, 4, 5, 6)] == ["restart"] * 3 + ["stop"]


def test_the_first_job_of_a_run_may_die_before_it_opens_it(tmp_path: Path) -> None:
    assert word(tmp_path / "nowhere", job=("42", 0)) == word(tmp_path, job=("42", 1)) == "restart"
    assert word(tmp_path, job=("42", 2)) == "stop"


@pytest.mark.parametrize(
    ("reason", "expected"), [("finished", "finished"), ("preempted", "restart"), ("refused", "stop")]
)
def test_a_job_that_opened_the_run_asks_how_that_ended(tmp_path: Path, reason: str, expected: str) -> None:
    attempt(tmp_path, 1, job=("42", 5)).train(12).ended(reason, "x")
    assert word(tmp_path, job=("42", 5)) == expected


def test_a_job_that_was_kept_out_hears_that_another_runs(tmp_path: Path) -> None:
    with beating(attempt(tmp_path, 1, job=("41", 0)).train(12)):
        assert decide(tmp_path, look_seconds=QUICK, job=("42", 7)).word == "running"


def test_a_start_of_a_job_that_was_replaced_does_nothing(tmp_path: Path) -> None:
    attempt(tmp_path, 1, job=("42", 2)).train(12).ended("preempted", "SIGTERM")
    decision = decide(tmp_path, look_seconds=QUICK, job=("42", 1))
    assert decision.word == "stop" and "SLURM has started job 42 again meanwhile" in decision.reason


def test_a_job_that_was_not_let_in_since_the_run_was_given_up_stops(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        fail(tmp_path, number)
    assert "failed 3 times without a step beyond 14" in decide(tmp_path, look_seconds=QUICK, job=("42", 0)).reason


# -- giving up


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


def test_going_back_begins_anew(tmp_path: Path) -> None:
    """To an older checkpoint by run.resume_at, or since a newer one was damaged: thousands of steps are trained."""
    attempt(tmp_path, 1).train(500, save_every=100).words(3, "x").ended("failed", "x")
    fail(tmp_path, 2, resumed=100, step=104)
    fail(tmp_path, 3, resumed=100, step=104)
    assert word(tmp_path) == "restart", "two failures at 104; 500 is of another line"
    fail(tmp_path, 4, resumed=100, step=104)
    with pytest.raises(GivenUp, match="failed 3 times without a step beyond 104"):
        require_hope(tmp_path)


def test_commits_are_progress_also_below_the_step_of_the_first_failure(tmp_path: Path) -> None:
    attempt(tmp_path, 1).train(99, save_every=100).words(3, "x").ended("failed", "x")
    attempt(tmp_path, 2, at=1000).resume(0).train(30).words(1, "x").ended("failed", "x")
    attempt(tmp_path, 3, at=2000).resume(30).train(45).words(2, "x").ended("failed", "x")
    assert word(tmp_path) == "restart"


def test_going_back_again_and_again_is_given_up(tmp_path: Path) -> None:
    """Each commits step 20 and fails at 24, and its checkpoint turns out to be damaged."""
    for number in range(1, 10):
        assert number == 1 or word(tmp_path) == "restart"
        attempt(tmp_path, number, at=1000 * number).resume(10).train(24).words(1, "x").ended("failed", "x")
    with pytest.raises(GivenUp, match="failed 9 times without a checkpoint beyond that of step 20"):
        require_hope(tmp_path)


def test_a_node_that_fails_all_restarts_within_a_job_is_left_once(tmp_path: Path) -> None:
    """torchrun starts the ranks again on the same nodes: that tells nothing of other nodes."""
    for number in range(1, 5):
        fail(tmp_path, number, job=("42", 0))
    assert word(tmp_path, job=("42", 0)) == "restart"
    fail(tmp_path, 5, job=("42", 1))
    assert word(tmp_path, job=("42", 1)) == "stop"


@pytest.mark.parametrize(("job", "failures"), [(("42", 0), 9), ((None, 0), 3)])
def test_failures_within_one_job_are_bounded_and_without_slurm_they_count_as_they_are(
    tmp_path: Path, job: tuple[str | None, int], failures: int
) -> None:
    for number in range(1, failures + 1):
        assert number == 1 or word(tmp_path) == "restart"
        fail(tmp_path, number, job=job)
    assert word(tmp_path) == "stop"


def test_the_run_says_itself_how_many_failures_are_enough(tmp_path: Path) -> None:
    for number in (1, 2):
        fail(tmp_path, number, give_up_after=2)
    assert word(tmp_path) == "stop"
    with pytest.raises(GivenUp, match="failed 2 times"):
        require_hope(tmp_path)
    assert word(tmp_path, give_up_after=3) == "restart"
    require_hope(tmp_path, 3)


@pytest.mark.parametrize("strange", [0, -1, "x", True, None, 10**30])
def test_a_strange_number_on_disk_is_none(tmp_path: Path, strange: object) -> None:
    for number in (1, 2, 3):
        assert number == 1 or word(tmp_path) == "restart"
        fail(tmp_path, number, give_up_after=strange)
    assert word(tmp_path) == "stop"


def test_no_failure_at_all_cannot_be_asked_for(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="give_up_after is 0; it must be at least 1"):
        require_hope(tmp_path, 0)


def test_who_only_saw_others_end_is_not_what_failures_have_in_common(tmp_path: Path) -> None:
    """Rank 2, on another node, is killed each time."""
    for number in (1, 2, 3):
        written = attempt(tmp_path, number, at=number * 1000, host="n0").train(5)
        for rank in (0, 1, 3):
            written.words(rank, "RuntimeError: Connection closed by peer", host="n0", after=rank / 10)
        written.ended("failed", "RuntimeError: Connection closed by peer")
    with pytest.raises(GivenUp) as raised:
        require_hope(tmp_path)
    common = next(line for line in str(raised.value).splitlines() if "[in common]" in line)
    assert "silent rank 2 (3 of 3)" in common and "host" not in common and "; rank" not in common


def test_preempted_attempts_that_come_to_no_step_are_bounded(tmp_path: Path) -> None:
    """Asked to stop before the first step each time: the time limit is too short."""
    attempt(tmp_path, 1).train(20).ended("preempted", "SIGTERM")
    for number in range(2, 11):
        assert word(tmp_path) == "restart"
        attempt(tmp_path, number, at=number * 1000).resume(20).ended("preempted", "REQUEST: time limit")
    decision = decide(tmp_path)
    assert decision.word == "stop" and "9 attempts in a row came to no step" in decision.reason
    assert "the job is asked to stop, or ends, before its first step" in decision.reason
    assert pardon(tmp_path) == 10 and word(tmp_path) == "restart"


def test_attempts_that_a_person_or_the_scheduler_ended_are_not_counted(tmp_path: Path) -> None:
    for number in range(1, 4):
        attempt(tmp_path, number, at=number * 1000).train(5).words(0, "KeyboardInterrupt").ended("failed", "x")
    for number in range(4, 7):
        attempt(tmp_path, number, at=number * 1000).resume(0).train(5).asked()
    assert word(tmp_path) == "restart"
    require_hope(tmp_path)


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
    with pytest.raises(GivenUp, match="failed 9 times without a checkpoint beyond that of step 10"):
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
