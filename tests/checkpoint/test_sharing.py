"""Threads that share a list of things: each thing once, the first error for all, and no thread left behind."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from resume_kit.checkpoint.sharing import Shared, default_readers, default_windows, share_out, side_by_side


def readers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("reader-")]


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_each_thing_is_done_once_by_some_thread(threads: int) -> None:
    done: list[tuple[int, str]] = []
    all_have_one = threading.Barrier(threads, timeout=30)

    def work(numbers: Shared[int]) -> None:
        for number in numbers:
            if not any(name == threading.current_thread().name for _, name in done):
                all_have_one.wait()
            done.append((number, threading.current_thread().name))

    share_out(range(100), work, threads)
    assert sorted(number for number, _ in done) == list(range(100))
    assert len({name for _, name in done}) == threads and not readers()


def test_the_first_error_stops_all_and_is_raised_after_they_have_ended() -> None:
    done: list[int] = []

    def work(numbers: Shared[int]) -> None:
        for number in numbers:
            if number == 5:
                raise LookupError("five")
            time.sleep(0.001)
            done.append(number)

    with pytest.raises(LookupError, match="five"):
        share_out(range(10_000), work, 4)
    assert len(done) < 5_000 and not readers()


def test_an_error_of_the_list_itself_is_raised() -> None:
    def numbers() -> object:
        yield 1
        raise ArithmeticError("no more")

    with pytest.raises(ArithmeticError, match="no more"):
        share_out(numbers(), list, 3)  # type: ignore[arg-type]
    assert not readers()


@pytest.mark.parametrize("main_works_on", [True, False])
def test_an_interrupt_ends_the_work_at_once_and_no_thread_survives(main_works_on: bool) -> None:
    """Ctrl-C arrives in the main thread: in its own share, or while it waits for the others."""

    def work(numbers: Shared[int]) -> None:
        main = threading.current_thread() is threading.main_thread()
        if main and not main_works_on:
            return
        for number in numbers:
            if number == 20:
                os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.002)

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        share_out(range(100_000), work, 3)
    assert time.monotonic() - start < 5 and not readers()


def test_a_thread_that_cannot_start_ends_those_that_did(monkeypatch: pytest.MonkeyPatch) -> None:
    real = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        if thread.name == "reader-2":
            raise RuntimeError("can't start new thread")
        real(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(RuntimeError, match="can't start"):
        share_out(iter(int, 1), lambda zeros: [time.sleep(0.001) for _ in zeros] and None, 4)
    assert not readers()


def test_readers_are_this_ranks_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, ranks, expected, windows in [
        (192, 8, 16, 8),
        (64, 8, 8, 8),
        (16, 1, 16, 8),
        (24, 8, 4, 3),
        (1, 4, 4, 2),
    ]:
        monkeypatch.setattr("os.cpu_count", lambda cores=cores: cores)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        assert (default_readers(), default_windows()) == (expected, windows)


def test_threads_of_several_kinds_end_together_with_the_first_error() -> None:
    stopped = threading.Event()

    def wait() -> None:
        assert stopped.wait(30)
        raise ConnectionError("stopped")  # what follows from the end does not count

    def fail() -> None:
        raise LookupError("first")

    names: list[str] = []
    works = [("reader", wait), ("taker", fail), ("taker", lambda: names.append(threading.current_thread().name))]
    with pytest.raises(LookupError, match="first"):
        side_by_side(works, stopped.set)
    assert names == ["taker-2"] and threading.active_count() == 1


def test_an_interrupt_counts_before_an_error_that_came_first() -> None:
    """Ctrl-C reaches all ranks of a node; one that is quicker ends the waits of the others before they see theirs."""
    stopped = threading.Event()

    def interrupted() -> None:
        assert stopped.wait(30)
        raise KeyboardInterrupt

    def fails() -> None:
        raise ValueError("a neighbour is gone")

    with pytest.raises(KeyboardInterrupt):
        side_by_side([("reader", interrupted), ("taker", fails)], stopped.set)
