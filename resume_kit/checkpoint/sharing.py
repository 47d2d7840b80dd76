"""Work of many threads on one list of things, so that waiting for a disk and checking what came go on side by side."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Generic, TypeVar

from resume_kit import environment

#: Threads that read in one process by default. Fewer leave the disk idle while they check and copy what came.
LEAST_READERS, MOST_READERS = 4, 16
#: Windows of one process that the other ranks of its node see.
LEAST_WINDOWS, MOST_WINDOWS = 2, 8

Item = TypeVar("Item")


class Shared(Generic[Item]):
    """An iterator that threads take from in turn, until it ends or one of them stops it for all."""

    def __init__(self, items: Iterable[Item]) -> None:
        self._items = iter(items)
        self._lock = threading.Lock()
        self._stopped = False

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        with self._lock:
            if self._stopped:
                raise StopIteration
            return next(self._items)

    def stop(self) -> None:
        self._stopped = True


def default_readers() -> int:
    """Threads that read: this rank's share of the cores, from 4 to 16."""
    return max(LEAST_READERS, min(MOST_READERS, environment.cores_per_rank()))


def default_windows() -> int:
    """Windows that the node sees: one for each core of this rank's share, from 2 to 8.

    To make one of 16 MiB takes the ranks 30 ms of processor, as long as ten such blocks take from the page cache.
    """
    return max(LEAST_WINDOWS, min(MOST_WINDOWS, environment.cores_per_rank()))


def share_out(items: Iterable[Item], work: Callable[[Shared[Item]], None], threads: int) -> None:
    """Call `work` in so many threads, this one among them, each taking its share of `items`.

    The first error of one stops all and is raised, after every thread has ended.
    """
    shared = Shared(items)
    side_by_side([("reader", lambda: work(shared))] * threads, shared.stop)


def side_by_side(works: Sequence[tuple[str, Callable[[], None]]], stop: Callable[[], None]) -> None:
    """Call each of `works`, (name, function), in a thread of its own, the first in this one.

    The first error of one is raised, after every thread has ended, or else what interrupted one; `stop`, called at
    each, is to make them end.
    """
    failures: list[BaseException] = []
    ended = [threading.Event() for _ in works]

    def run(number: int) -> None:
        try:
            works[number][1]()
        except BaseException as error:
            failures.append(error)
            stop()
        finally:
            ended[number].set()

    others = [
        threading.Thread(target=run, args=(n,), name=f"{works[n][0]}-{n}", daemon=True) for n in range(1, len(works))
    ]
    try:
        for thread in others:
            thread.start()
        run(0)
    except BaseException:
        stop()
        raise
    finally:
        while interrupt := _interrupt_of_waiting(others, ended[1:]):
            failures.append(interrupt)
            stop()
    failures.sort(key=lambda error: isinstance(error, Exception))  # an interrupt comes before what it may follow
    if failures:
        raise failures[0]


def _interrupt_of_waiting(
    threads: Sequence[threading.Thread], ended: Sequence[threading.Event]
) -> BaseException | None:
    """Wait for the end of all threads that were started; returns what interrupted that."""
    try:
        for thread, event in zip(threads, ended, strict=True):
            if thread.ident is not None:
                event.wait()  # not join, which takes a thread for ended after an interrupt (Python before 3.13)
                thread.join()
    except KeyboardInterrupt as error:
        return error
    return None
