"""Reading together: a block that several ranks of a node want is read once, checked, and taken from shared memory.

Each rank has windows that the others of its node see, and brings its share of the blocks into them. It offers a full
window to those that want of its block, and uses it again when all have answered that they took their part.
"""

from __future__ import annotations

import functools
import json
import mmap
import os
import select
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress

import numpy as np

from resume_kit.checkpoint.assignment import Needs, Share, assign
from resume_kit.checkpoint.destination import Destination
from resume_kit.checkpoint.node import NeighbourLost, Node
from resume_kit.checkpoint.readplan import ReadPlan, Window
from resume_kit.checkpoint.sharing import Shared, default_windows

#: What ranks say: how many windows their memory has, of how many bytes, and how long the needs are that lie behind
#: them; whether they have memory for what they are to read for others; window w holds share s; w is taken.
_HELLO, _READY, _OFFER, _TAKEN = (struct.Struct(form) for form in ("<QQQ", "<?", "<II", "<I"))
#: In an offer, in place of a window: the rank is still reading for others, and its offers are to come.
_LATER = 0xFFFFFFFF
#: Threads of one rank that take what the others offer, at least one for each of them.
TAKERS = 2


class SharedWindow:
    """`nbytes` of the memory behind a descriptor, from byte `offset` on. One thread of a rank has it at a time.

    Its `owner` takes the memory, the others find it taken.
    """

    def __init__(self, descriptor: int, offset: int, nbytes: int, *, owner: bool) -> None:
        self._descriptor = descriptor
        self._offset = offset
        self._nbytes = nbytes
        self._owner = owner
        self._mapped: tuple[mmap.mmap, memoryview] | None = None
        self._pinned = ExitStack()

    def memory(self, destination: Destination) -> memoryview:
        """Mapped at the first call, and pinned where `destination` is a GPU.

        OSError where there is no memory for it: without the reservation, touching it would be a SIGBUS.
        """
        if self._mapped is None:
            if self._owner:
                os.posix_fallocate(self._descriptor, self._offset, self._nbytes)
            flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
            pages = mmap.mmap(self._descriptor, self._nbytes, flags, offset=self._offset)
            self._mapped = pages, memoryview(pages)
            self._pinned.enter_context(destination.pinned(self._mapped[1]))
        return self._mapped[1]

    def close(self) -> None:
        self._pinned.close()
        if self._mapped is not None:
            (pages, memory), self._mapped = self._mapped, None
            with suppress(BufferError):  # an error on its way still refers to it, and takes it along
                memory.release()
                pages.close()


class Together:
    """One reading of a node: who reads what (`shares`), and the windows that it goes through."""

    def __init__(
        self,
        node: Node,
        shares: Sequence[Share],
        own: Sequence[SharedWindow],
        theirs: Mapping[int, Sequence[SharedWindow]],
        destination: Destination,
    ) -> None:
        self._node = node
        self._shares = shares
        self._numbers = {(share.file, share.block): number for number, share in enumerate(shares)}
        self._own = own
        self._theirs = theirs
        self._destination = destination
        self._free = [*reversed(range(len(own)))]
        self._answers = dict.fromkeys(self._free, 0)
        self._due = Counter(rank for share in shares if share.reader == node.rank for rank in share.takers)
        self._told = dict.fromkeys(self._due, time.monotonic())
        self._offering, self._listening = threading.Lock(), threading.Lock()
        self._poll = select.poll()
        self._givers = {connection.fileno(): connection for connection in node.giving.values()}
        for descriptor in self._givers:
            self._poll.register(descriptor, select.POLLIN)

    @property
    def shared(self) -> dict[str, set[int]]:
        """The blocks, by file, that some rank of the node reads for others too."""
        found: dict[str, set[int]] = {}
        for share in self._shares:
            found.setdefault(share.file, set()).add(share.block)
        return found

    def own(self, plan: ReadPlan) -> Iterator[tuple[int, Window]]:
        """The blocks that this rank reads for the node: (number of its source, window)."""
        numbers = {source.file: number for number, source in enumerate(plan.sources)}
        for share in self._shares:
            if share.reader == self._node.rank:
                yield numbers[share.file], plan.window(numbers[share.file], share.block)

    def abort(self) -> None:
        """End every wait, here and on the other ranks of the node, with `NeighbourLost`."""
        self._node.abort()

    # -- giving: in the threads that read

    def window(self) -> tuple[int, memoryview]:
        """A window that nobody needs any more: its number and its memory. Waits. Raises `NeighbourLost`."""
        while True:
            number = self._free_window()
            with suppress(OSError):  # no memory for one more: those that there are go round, the first at least
                return number, self._own[number].memory(self._destination)

    def _free_window(self) -> int:
        with self._listening:
            deadline = time.monotonic() + self._node.timeout
            while not self._free:
                ready = self._poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
                if not ready:
                    raise NeighbourLost(f"no rank of this node took its part within {self._node.timeout:g} s")
                for descriptor, _ in ready:
                    (taken,) = _TAKEN.unpack(self._node.receive(self._givers[descriptor], _TAKEN.size))
                    self._answers[taken] -= 1
                    if not self._answers[taken]:
                        self._free.append(taken)
            return self._free.pop()  # the last used: the others may never take memory

    def give(self, number: int, file: str, block: int) -> None:
        """Offer a window, which holds a block that has been checked. Raises `NeighbourLost`.

        Ranks whose offers come later hear of it often enough not to take this one for lost.
        """
        share = self._numbers[file, block]
        takers = self._shares[share].takers
        self._answers[number] = len(takers)
        with self._offering:
            for rank in takers:
                self._due[rank] -= 1
                self._tell(rank, number, share)
            late = time.monotonic() - self._node.timeout / 4
            for rank, due in self._due.items():
                if due and self._told[rank] < late:
                    self._tell(rank, _LATER, 0)

    def _tell(self, rank: int, window: int, share: int) -> None:
        self._told[rank] = time.monotonic()
        self._node.send(self._node.giving[rank], _OFFER.pack(window, share))

    # -- taking: in threads of their own

    def takers(self, plan: ReadPlan) -> list[tuple[str, Callable[[], None]]]:
        """What threads are to do, by name, beside those that read. `abort` ends them too."""
        works: list[tuple[str, Callable[[], None]]] = []
        for rank in self._node.taking:
            expected = sum(share.reader == rank and self._node.rank in share.takers for share in self._shares)
            take = functools.partial(self._take, rank, Shared(range(expected)), plan)
            works += [("taker", take)] * min(expected, max(1, TAKERS // len(self._node.taking)))
        return works

    def _take(self, rank: int, turns: Shared[int], plan: ReadPlan) -> None:
        numbers = {source.file: number for number, source in enumerate(plan.sources)}
        connection = self._node.taking[rank]
        with self._destination.lane(0) as lane:
            for _ in turns:
                window = _LATER
                while window == _LATER:
                    window, number = _OFFER.unpack(self._node.receive(connection, _OFFER.size))
                share = self._shares[number]
                memory = self._theirs[rank][window].memory(self._destination)
                lane.take(memory, plan.window(numbers[share.file], share.block))
                lane.wait()
                self._node.send(connection, _TAKEN.pack(window))


@contextmanager
def read_together(node: Node, needs: Needs, window_bytes: int, destination: Destination) -> Iterator[Together]:
    """Tell the other ranks of the node what this one wants, and hear what they want; all of them call this.

    Once for each node. No block that this rank wants is larger than `window_bytes`. Nothing is shared where a rank has
    no memory for a first window of its own, or to tell its needs; that rank's `node.shortage` says so. Raises
    `NeighbourLost`. Nothing is mapped any more at the end.
    """
    with ExitStack() as held:

        def windows(rank: int, count: int, nbytes: int) -> list[SharedWindow]:
            memory, owner = node.memory[rank], rank == node.rank
            found = [SharedWindow(memory, number * nbytes, nbytes, owner=owner) for number in range(count)]
            for window in found:
                held.callback(window.close)
            return found

        unit = mmap.ALLOCATIONGRANULARITY  # where a window may begin: a page, of 64 KiB on some machines
        count, nbytes, text = default_windows(), -(-window_bytes // unit) * unit, json.dumps(needs).encode()
        own, theirs, everyone = windows(node.rank, count, nbytes), {}, {node.rank: needs}
        told = _has_memory(node, lambda: _write(node.memory[node.rank], text, count * nbytes))
        for connection in node.giving.values():
            node.send(connection, _HELLO.pack(count, nbytes, len(text) if told else 0))
        for rank, connection in node.taking.items():
            count, nbytes, length = _HELLO.unpack(node.receive(connection, _HELLO.size))
            theirs[rank] = windows(rank, count, nbytes)
            told = told and length > 0
            everyone[rank] = json.loads(os.pread(node.memory[rank], length, count * nbytes) or "{}")
        shares = assign(everyone) if told else ()
        if shares:
            reads = any(share.reader == node.rank for share in shares)
            ready = not reads or _has_memory(node, lambda: own[0].memory(destination))
            for connection in node.giving.values():
                node.send(connection, _READY.pack(ready))
            answers = [_READY.unpack(node.receive(other, _READY.size)) for other in node.taking.values()]
            shares = shares if ready and all(other for (other,) in answers) else ()
        yield Together(node, shares, own, theirs, destination)


def _has_memory(node: Node, take: Callable[[], object]) -> bool:
    """Whether `take` gets the memory that it shares. If not, the node's `shortage` says so."""
    try:
        take()
    except OSError as error:
        node.shortage = f"no memory to share with the other ranks of its node: {error.strerror}"
    return not node.shortage


def _write(descriptor: int, content: bytes, offset: int) -> None:
    """All of it. OSError where there is no memory for it."""
    os.posix_fallocate(descriptor, offset, len(content))
    os.pwrite(descriptor, content, offset)


def copy(source: memoryview, target: memoryview, nbytes: int) -> None:
    """The first bytes of one memory into another. Other threads run meanwhile."""
    np.copyto(np.frombuffer(target, np.uint8, nbytes), np.frombuffer(source, np.uint8, nbytes))
