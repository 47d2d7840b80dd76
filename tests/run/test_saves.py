"""The saves of a run: when the gate is recorded, what is said and journaled beside them, what is known of the last."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from resume_kit.checkpoint import names
from resume_kit.errors import Fenced, SaveFailed
from resume_kit.run import saves as module
from resume_kit.run.saves import Saves
from resume_kit.saving.options import Saving
from resume_kit.saving.save import Commit
from resume_kit.saving.saver import SaveState

COMMIT = Commit(Path("run/step-000000005"), 5, 100, {"durable": 0.1})


class Saver:
    """A saver whose saves come out as `outcomes` say: a commit, or an error that `take` raises."""

    def __init__(self) -> None:
        self.outcomes: list[Commit | Exception] = []
        self.gates: list[bool] = []
        self.taken_failed: list[bool] = []
        self.busy = False
        self.note = ""
        self.pending_step = 5
        self.prepared = 0
        self.closed = False

    def begin(self, build: Callable[[], Any], _returns: str) -> None:
        self.busy = True
        self.gates.append(build())

    def take(self, *, failed: bool = False) -> tuple[Commit, bool]:
        self.busy = False
        self.taken_failed.append(failed)
        outcome = self.outcomes.pop(0) if self.outcomes else COMMIT
        if isinstance(outcome, Exception):
            raise outcome
        return outcome, self.gates[-1]

    def stepped(self) -> None: ...

    def prepare(self) -> None:
        self.prepared += 1

    def close(self) -> None:
        self.closed = True


class Journaled:
    """An attempt that keeps what it is told; its disk is full for `full` events."""

    def __init__(self, run: Path) -> None:
        self.ground = names.ground(run, 1)
        self.ground.mkdir(parents=True, exist_ok=True)
        self.events: list[str] = []
        self.full: set[str] = set()
        self.failure: SaveFailed | None = None

    def note(self, event: str, _fields: Any) -> None:
        if event in self.full:
            raise SaveFailed("no space left")
        self.events.append(event)

    def record_soon(self, event: str, fields: Any) -> None:
        try:
            self.note(event, fields)
        except SaveFailed as error:
            self.failure = error


class Given:
    """`Saves` with everything that it talks to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, run: Path, rank: int = 0, **options: Any) -> None:
        self.saver, self.attempt, self.shown = Saver(), Journaled(run), list[str]()
        monkeypatch.setattr(module, "Saver", lambda *_, **__: self.saver)
        nothing: Any = None
        coordinator: Any = SimpleNamespace(rank=rank)
        attempt: Any = self.attempt
        build: Any = lambda with_gate: with_gate  # noqa: E731
        self.saves = Saves(
            run,
            nothing,
            coordinator,
            nothing,
            Saving(**options),
            attempt=attempt,
            retention=nothing,
            build=build,
            show=self.shown.append,
        )


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Given]:
    return lambda **options: Given(monkeypatch, tmp_path, **options)


# -- the gate


def test_every_nth_commit_records_the_gate(given: Callable[..., Given]) -> None:
    run = given(gate_every=3)
    for _ in range(7):
        run.saves.now("committed")
    assert run.saver.gates == [True, False, False, True, False, False, True]


def test_a_save_that_failed_has_not_recorded_it(given: Callable[..., Given]) -> None:
    """With every n-th save *begun*, the second here would have gone without, and so the first commit of the run."""
    run = given(gate_every=2)
    run.saver.outcomes = [SaveFailed("no disk"), COMMIT, SaveFailed("no disk"), COMMIT, COMMIT]
    for _ in range(5):
        try:
            run.saves.now("committed")
        except SaveFailed:
            continue
    assert run.saver.gates == [True, True, False, False, True]


# -- a step


@pytest.mark.parametrize(
    ("state", "taken"), [(SaveState.RUNNING, []), (SaveState.DONE, [False]), (SaveState.FAILED, [True])]
)
def test_a_step_takes_the_outcome_once_it_is_known_on_all(
    state: SaveState, taken: list[bool], given: Callable[..., Given]
) -> None:
    run = given()
    run.saves.now("overlapped")
    run.saves.stepped(state, updated=True)
    assert run.saver.taken_failed == taken


def test_host_memory_is_made_once_and_after_the_first_step_that_updates(given: Callable[..., Given]) -> None:
    run = given()
    for updated in (False, False, True, True):  # a loss scale that overflows skips the first updates
        run.saves.stepped(SaveState.RUNNING, updated=updated)
        assert run.saver.prepared == updated


# -- a busy saver


def test_a_skip_that_cannot_be_journaled_does_not_raise_on_rank_0_alone(given: Callable[..., Given]) -> None:
    run = given(when_busy="skip")
    run.attempt.full = {"skip"}
    run.saves.scheduled(5)
    run.saves.scheduled(6)
    assert len(run.saver.gates) == 1
    assert str(run.attempt.failure) == "no space left"
    assert run.shown == ["step 6: no save, that of step 5 is still being written"]


def test_a_save_that_is_skipped_has_not_begun_and_is_told_once(given: Callable[..., Given]) -> None:
    """By the clock it is due again at every step, until the one before is written."""
    run, begun = given(when_busy="skip"), list[int]()
    for step in (5, 6, 7):
        run.saves.scheduled(step, lambda step=step: begun.append(step), insists=True)
    assert begun == [5] and run.attempt.events == ["skip"] and len(run.shown) == 1


def test_before_a_stop_a_failed_save_is_told_and_not_raised(given: Callable[..., Given]) -> None:
    run = given()
    run.saves.now("overlapped")
    run.saver.outcomes = [SaveFailed("no disk"), COMMIT]
    run.saves.stepped(SaveState.FAILED, updated=True, stopping=True)
    assert run.shown == ["warning: the save before failed: no disk"]
    run.saves.settle()
    assert run.saves.now("committed") is COMMIT


def test_a_busy_save_is_waited_for_and_the_wait_is_told(given: Callable[..., Given]) -> None:
    run = given()
    run.saves.scheduled(5)
    run.saves.scheduled(6)
    assert len(run.saver.gates) == 2
    assert run.shown == ["step 6: waited 0.0 s for the save before"]


# -- what is told


@pytest.mark.parametrize("rank", [0, 1])
def test_memory_that_cannot_be_pinned_is_told_once_by_rank_0(rank: int, given: Callable[..., Given]) -> None:
    run = given(rank=rank)
    run.saves.now("committed")
    run.saver.note = "4 bytes of host memory cannot be pinned"
    run.saves.now("committed")
    run.saves.now("committed")
    assert run.shown == ["warning: 4 bytes of host memory cannot be pinned"][rank:]


def test_the_last_commit_stays_known_after_a_step_took_it_and_after_a_failure(given: Callable[..., Given]) -> None:
    run = given()
    assert run.saves.last is None
    run.saves.now("overlapped")
    assert run.saves.last is None
    run.saves.stepped(SaveState.DONE, updated=True)
    assert run.saves.wait() is None and run.saves.last is COMMIT
    run.saver.outcomes = [SaveFailed("no disk")]
    with pytest.raises(SaveFailed):
        run.saves.now("committed")
    assert run.saves.last is COMMIT


def test_memory_is_given_back_also_when_the_last_save_failed(given: Callable[..., Given]) -> None:
    run = given()
    run.saves.now("overlapped")
    run.saver.outcomes = [SaveFailed("no disk")]
    with pytest.raises(SaveFailed):
        run.saves.close()
    assert run.saver.closed


# -- once a checkpoint stands


def published(run: Given) -> None:
    request: Any = SimpleNamespace(step=5, gate=None)
    run.saves.published(request, COMMIT)


def test_a_retention_that_fails_does_not_fail_the_save(
    given: Callable[..., Given], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    run = given()
    monkeypatch.setattr(module, "prune", refuse)
    published(run)
    assert run.attempt.events == ["commit"]
    assert run.shown == ["warning: old checkpoints could not be deleted: [Errno 13] Permission denied"]


def test_an_attempt_that_was_superseded_prunes_nothing_and_says_so(
    given: Callable[..., Given], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = given()
    monkeypatch.setattr(module, "prune", lambda *_: run.attempt.ground.rmdir() or (run.attempt.ground / "x").mkdir())
    with pytest.raises(Fenced):
        published(run)


def test_a_commit_that_cannot_be_journaled_prunes_nothing(
    given: Callable[..., Given], monkeypatch: pytest.MonkeyPatch
) -> None:
    pruned: list[Any] = []
    run = given()
    run.attempt.full = {"commit"}
    monkeypatch.setattr(module, "prune", lambda *arguments: pruned.append(arguments))
    with pytest.raises(SaveFailed):
        published(run)
    assert pruned == []
