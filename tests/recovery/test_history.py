"""The history of a run: what each attempt trained, lost and died of, from journals and folders, whole and torn."""

from __future__ import annotations

from pathlib import Path

import pytest

from resume_kit.checkpoint.names import JOURNAL
from resume_kit.recovery.history import history, read_story
from tests.recovery.runs import BATCH, START, attempt


def test_a_run_that_was_killed_and_came_back(tmp_path: Path) -> None:
    run = tmp_path / "run"
    attempt(run, 1).train(14).words(2, "RuntimeError: CUDA out of memory", host="n2")
    second = attempt(run, 2, at=100, process_started=START + 60)
    second.time += 6
    second.resume(10, report={"seconds": {"load": 3.0, "prove": 1.0}}).train(25).ended("finished")
    first, second = history(run)
    assert (first.kind, first.why) == ("failed", "failed at step 14: rank 2 on n2: RuntimeError: CUDA out of memory")
    assert (first.resumed_from, first.trained, first.lost_steps, first.lost_samples) == (0, 14, 4, 4 * BATCH)
    assert first.last_commit is not None and first.last_commit.step == 10
    assert (first.started, first.ended, first.host, first.world_size) == (START, START + 28, "n1", 4)
    assert (second.kind, second.resumed_from, second.trained, second.lost_steps) == ("finished", 10, 15, 0)
    assert second.job == "SLURM 41.1" and second.step_seconds == 2.0
    assert second.to_first_step == 80
    assert second.phases == {"gap": 32, "start": 40, "load": 3.0, "prove": 1.0, "first step": 2}


def test_a_step_back_takes_what_earlier_attempts_had_committed(tmp_path: Path) -> None:
    run = tmp_path / "run"
    attempt(run, 1).train(15)
    attempt(run, 2, at=100).resume(10).train(25)
    attempt(run, 3, at=200)  # never came to train
    attempt(run, 4, at=300).resume(10).train(12).ended("finished")  # the checkpoint of step 20 was damaged
    assert [past.lost_steps for past in history(run)] == [5, 15, 0, 0]
    assert [past.trained for past in history(run)] == [15, 15, 0, 2]


@pytest.mark.parametrize(("alive", "kind", "lost"), [(None, "open", 0), (True, "open", 0), (False, "died", 3)])
def test_the_newest_attempt_is_open_until_it_is_known_to_be_dead(
    tmp_path: Path, alive: bool | None, kind: str, lost: int
) -> None:
    attempt(tmp_path, 1).train(13)
    (past,) = history(tmp_path, alive=alive)
    assert (past.kind, past.lost_steps) == (kind, lost)


def test_a_preempted_attempt_loses_nothing(tmp_path: Path) -> None:
    attempt(tmp_path, 1).train(13).commit(13).ended("preempted", "SIGTERM")
    (past,) = history(tmp_path)
    assert (past.kind, past.why, past.lost_steps, past.is_failure) == ("preempted", "preempted by SIGTERM", 0, False)


def test_of_a_hang_the_rank_that_did_not_wait_for_others_is_named(tmp_path: Path) -> None:
    written = attempt(tmp_path, 1).train(5)
    written.words(0, "in the step's exchange", kind="hung")
    written.words(3, "in the training code since step 5", kind="hung", host="n2", after=9).ended(
        "failed", "no progress"
    )
    (past,) = history(tmp_path)
    assert (past.kind, past.why) == ("hung", "hung at step 5: rank 3 on n2: in the training code since step 5")


def test_who_left_no_word_is_suspected_where_the_others_only_saw_an_end(tmp_path: Path) -> None:
    """Rank 2 was killed; the others say so, rank 0 among them."""
    written = attempt(tmp_path, 1).train(5).words(0, "RuntimeError: Connection closed by peer [10.0.0.7]:3333")
    written.words(1, "RuntimeError: connection reset", after=1).words(3, "Connection closed by peer", after=2)
    written.ended("failed", "RuntimeError: Connection closed by peer")
    (past,) = history(tmp_path)
    assert past.silent == (2,) and past.kind == "failed"
    assert past.why == (
        "failed at step 5: rank 0 on n1: RuntimeError: Connection closed by peer [10.0.0.7]:3333; rank 2 left no word"
        " and may have died first"
    )


def test_of_many_without_a_word_some_are_named(tmp_path: Path) -> None:
    attempt(tmp_path, 1, ranks=12).train(5).words(1, "RuntimeError: connection reset")
    (past,) = history(tmp_path, alive=False)
    some = "ranks 0, 2, 3, 4, 5, 6, 7, 8 and 3 more left no word and one of them may have died first"
    assert past.why.endswith(some) and len(past.silent) == 11


def test_a_cause_goes_before_what_the_others_saw_of_it(tmp_path: Path) -> None:
    written = attempt(tmp_path, 1).train(5).words(0, "RuntimeError: connection reset")
    written.words(2, "ValueError: bad", host="n2", after=1).ended("failed", "RuntimeError: connection reset")
    (past,) = history(tmp_path)
    assert (past.why, past.silent) == ("failed at step 5: rank 2 on n2: ValueError: bad", ())


@pytest.mark.parametrize("alive", [None, True])
def test_one_that_was_asked_to_stop_and_lives_is_open(tmp_path: Path, alive: bool | None) -> None:
    attempt(tmp_path, 1).train(13).asked()
    assert [past.kind for past in history(tmp_path, alive=alive)] == ["open"]


def test_one_that_was_asked_to_stop_and_was_killed_before_it_had_saved_was_preempted(tmp_path: Path) -> None:
    attempt(tmp_path, 1).train(13).asked()
    (past,) = history(tmp_path, alive=False)
    why = "asked to stop by SIGTERM on rank 3, killed before it had saved"
    assert (past.kind, past.why, past.lost_steps, past.is_failure) == ("preempted", why, 3, False)


def test_a_failure_after_the_signal_is_a_failure(tmp_path: Path) -> None:
    attempt(tmp_path, 1).train(13).asked().words(1, "ValueError: bad")
    assert [past.kind for past in history(tmp_path, alive=False)] == ["failed"]


@pytest.mark.parametrize("rank_0", [True, False])
def test_a_person_who_interrupts_it_is_no_failure(tmp_path: Path, rank_0: bool) -> None:
    written = attempt(tmp_path, 1).train(13)
    if rank_0:
        written.ended("failed", "KeyboardInterrupt")
    else:
        written.words(0, "RuntimeError: connection closed").words(1, "KeyboardInterrupt", after=1)
    (past,) = history(tmp_path, alive=False)
    assert (past.kind, past.why) == ("preempted", "stopped by a person (KeyboardInterrupt)")


def test_a_fenced_attempt_and_its_stale_lines(tmp_path: Path) -> None:
    old = attempt(tmp_path, 1).train(12)
    new = attempt(tmp_path, 2, at=100).resume(10).train(11)
    old.train(20).ended("fenced", "attempt 2 took over")
    new.train(15).ended("finished")
    story = read_story(tmp_path)
    assert story.stale == 9  # eight steps and a commit
    assert [(past.kind, past.trained, past.lost_steps) for past in story.pasts] == [
        ("fenced", 12, 2),
        ("finished", 5, 0),
    ]
    assert story.pasts[0].why == "fenced: attempt 2 took over"
    assert story.run_id == "abc"


def test_a_run_of_before_attempts_had_folders(tmp_path: Path) -> None:
    attempt(tmp_path, 1, folder=False).train(12)
    attempt(tmp_path, 2, at=100, folder=False).resume(10).note("refuse", reason="the data has changed")
    attempt(tmp_path, 3, at=200, folder=False).resume(10).train(20).note("end", step=20)
    kinds = [(past.kind, past.why) for past in history(tmp_path)]
    assert kinds == [
        ("died", "died without a word"),
        ("refused", "refused: the data has changed"),
        ("finished", "finished at step 20"),
    ]
    assert [past.lost_steps for past in history(tmp_path)] == [2, 0, 0]


def test_a_refusal_that_the_script_outlived_is_not_the_end(tmp_path: Path) -> None:
    written = attempt(tmp_path, 1)
    written.note("refuse", reason="no such step")
    written.train(3)
    (past,) = history(tmp_path, alive=False)
    assert past.kind == "died"


def test_torn_and_strange_lines_are_passed_over(tmp_path: Path) -> None:
    attempt(tmp_path, 1).train(10)
    with (tmp_path / JOURNAL).open("ab") as file:
        file.write(b'{"event":"step","attempt":1,"time":18000')
    strange = [
        b'{"event":"step","attempt":2,"time":1,"step":null}',
        b'{"event":"commit","attempt":2,"time":1,"step":1,"bytes":[]}',
        b'{"event":"resume","attempt":2,"time":1}',
        b'{"event":"step","attempt":true,"time":1,"step":99}',
        b'{"event":"step","attempt":2,"time":"now","step":99}',
        b"[1]",
    ]
    second = attempt(tmp_path, 2, at=100)
    with (tmp_path / JOURNAL).open("ab") as file:
        file.write(b"\n".join(strange) + b"\n")
    second.resume(10).train(12).ended("finished")
    assert [(past.trained, past.reached) for past in history(tmp_path)] == [(10, 10), (2, 12)]


def test_torn_files_of_a_folder_are_as_good_as_none(tmp_path: Path) -> None:
    written = attempt(tmp_path, 1).train(10)
    assert written.folder is not None
    (written.folder / "ended.json").write_text('{"reason": "fin')
    (written.folder / "rank-00001.json").write_text("[]")
    (written.folder / "alive").write_text('{"beat": 3, "time": "x"}')
    (past,) = history(tmp_path, alive=False)
    assert (past.kind, past.ended) == ("died", START + 20)


def test_an_empty_run_has_no_history(tmp_path: Path) -> None:
    assert history(tmp_path) == []
    assert history(tmp_path / "nowhere") == []
