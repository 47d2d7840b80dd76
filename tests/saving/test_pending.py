"""A save under way: how long it is waited for, and what becomes of an outcome that nobody takes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from resume_kit.engines.coordination import Coordinator
from resume_kit.errors import SaveFailed
from resume_kit.saving import pending as module
from resume_kit.saving.capture import FailedCapture
from resume_kit.saving.pending import Pending

TIMEOUT = 0.2
BOUND = 1.75 * TIMEOUT


class Staged:
    """As much of a staging as a pending save looks at."""

    copied = 0
    by_device_alone = False
    hurried = False

    def hurry(self) -> None:
        self.hurried = True


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Pending]]:
    """Start a save of step 5 whose background does `work(progress)`; its exit hook is taken back at the end."""
    begun: list[Pending] = []

    def act(
        work: Callable[[Any], Any], staging: Any = None, *, failed: bool = False, measured: object = None
    ) -> Pending:
        monkeypatch.setattr(module, "finish", lambda _capture, _rounds, _journal, progress: work(progress))
        request = SimpleNamespace(step=5, gate=None, gate_seconds=0.0)
        account: Any = SimpleNamespace(request=request)
        capture: Any = SimpleNamespace(account=account, staging=staging or Staged(), measured=measured)
        if failed:
            capture = FailedCapture(account, SaveFailed("no memory"))
        rounds = Coordinator(dist.HashStore(), rank=0, world_size=1, timeout=TIMEOUT)
        pending = Pending(capture, rounds, None, SimpleNamespace(), time.perf_counter())
        begun.append(pending)
        return pending

    yield act
    for pending in begun:
        pending.taken()
        assert pending.wait(5)  # no thread is left to the tests after this one


def fail(error: Exception) -> None:
    raise error


def test_the_outcome_is_there_once_it_is_over(start: Callable[..., Pending]) -> None:
    go = threading.Event()
    pending = start(lambda _: go.wait(5) and "the commit")
    assert not pending.over and not pending.wait(0.01)
    go.set()
    assert pending.wait() and pending.over
    assert pending.commit == "the commit" and pending.failure is None


def test_copies_that_come_slowly_are_waited_for_longer_than_the_bound(start: Callable[..., Pending]) -> None:
    staging = Staged()

    def slowly(progress: Any) -> None:
        for _ in range(6):
            time.sleep(0.6 * BOUND)
            staging.copied += 1
        progress.staged.set()
        time.sleep(0.1)

    pending = start(slowly, staging)
    began = time.monotonic()
    pending.wait_until_staged()
    assert staging.copied == 6 and time.monotonic() - began > 3 * BOUND
    assert not pending.over


def test_copies_that_do_not_come_are_waited_for_within_the_bound(start: Callable[..., Pending]) -> None:
    go = threading.Event()
    pending = start(lambda _: go.wait(5))
    began = time.monotonic()
    with pytest.raises(SaveFailed, match="the save of step 5 hangs") as failure:
        pending.fence()
    assert BOUND < time.monotonic() - began < 4 * BOUND + 1
    assert "nothing of the state was copied" in failure.value.problems[0].what
    go.set()


def test_a_save_that_fails_before_it_has_copied_holds_nobody_up(start: Callable[..., Pending]) -> None:
    pending = start(lambda _: fail(SaveFailed("no disk")))
    pending.fence()
    assert pending.wait() and str(pending.failure) == "no disk"


def test_the_fence_does_not_wait_for_a_state_that_was_not_captured(start: Callable[..., Pending]) -> None:
    go = threading.Event()
    pending = start(lambda _: go.wait(5), failed=True)
    began = time.monotonic()
    pending.fence()
    assert time.monotonic() - began < BOUND
    go.set()


@pytest.mark.parametrize("wait", [Pending.fence, Pending.wait_until_staged, Pending.wait])
def test_whoever_waits_hurries_the_copies_and_nobody_else(
    wait: Callable[[Pending], Any], start: Callable[..., Pending]
) -> None:
    asked = threading.Event()

    class Hurried(Staged):
        def hurry(self) -> None:
            asked.set()

    def copy(progress: Any) -> None:
        asked.wait(5)
        progress.staged.set()

    pending = start(copy, Hurried())
    assert not asked.wait(0.05)
    wait(pending)
    assert asked.is_set()


def test_a_fence_that_the_device_keeps_hurries_nothing(start: Callable[..., Pending]) -> None:
    class Queued(Staged):
        by_device_alone = True
        awaited = False

        def copied_on_device(self) -> None:
            self.awaited = True

    staging, go = Queued(), threading.Event()
    pending = start(lambda _: go.wait(5), staging, measured=object())
    pending.fence()
    go.set()
    assert staging.awaited and not staging.hurried


@pytest.mark.parametrize(
    ("work", "expected"),
    [
        (lambda _: fail(SaveFailed("no disk")), "resume_kit: the save of step 5 failed: no disk\n"),
        (lambda _: time.sleep(1.0), "resume_kit: the save of step 5 hangs; this process waits for it no longer\n"),
        (lambda _: None, ""),
    ],
    ids=["failed", "hangs", "committed"],
)
def test_an_outcome_that_nobody_took_is_told_at_exit(
    work: Callable[[Any], Any], expected: str, start: Callable[..., Pending], capsys: pytest.CaptureFixture[str]
) -> None:
    pending = start(work)
    pending._at_exit()
    assert capsys.readouterr().err == expected


def test_an_outcome_is_told_at_exit_only_if_nobody_took_it(
    start: Callable[..., Pending], monkeypatch: pytest.MonkeyPatch
) -> None:
    hooks: list[Any] = []
    kept = SimpleNamespace(register=hooks.append, unregister=lambda hook: hook in hooks and hooks.remove(hook))
    monkeypatch.setattr(module, "atexit", kept)
    pending = start(lambda _: fail(SaveFailed("no disk")))
    assert hooks == [pending._at_exit]
    pending.taken()
    assert hooks == []
