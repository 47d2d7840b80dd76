"""Connections between the ranks of one node, over which they read together. They leave nothing behind a SIGKILL."""

from __future__ import annotations

import os
import secrets
import socket
import struct
import time
from collections.abc import Mapping

_RANK = struct.Struct("<I")
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid


class NeighbourLost(Exception):
    """A rank of this node failed or ended while it was needed. Its own error says why, if it lives."""


class Node:
    """Two connections with each other rank of the node: over `giving` this rank offers windows, over `taking` it gets
    offers. Each wait is bounded by `timeout` seconds.

    `memory` are descriptors, by rank, this one's among them: of memory that a rank writes and all of the node see.
    `shortage` is why this rank had too little of it to read together, if so.
    """

    def __init__(self, rank: int, timeout: float, memory: int) -> None:
        self.rank = rank
        self.timeout = timeout
        self.memory = {rank: memory}
        self.shortage = ""
        self.giving: dict[int, socket.socket] = {}
        self.taking: dict[int, socket.socket] = {}

    def abort(self) -> None:
        """End every wait of this rank and of the others for it: each then raises `NeighbourLost`."""
        for connection in (*self.giving.values(), *self.taking.values()):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:  # the other rank is gone already
                continue

    def receive(self, connection: socket.socket, nbytes: int) -> bytes:
        """One message. Raises `NeighbourLost`."""
        try:
            message = connection.recv(nbytes)
        except TimeoutError:
            raise self._lost(connection, f"sent nothing within {self.timeout:g} s") from None
        except OSError as error:
            raise self._lost(connection, str(error)) from None
        if not message:
            raise self._lost(connection, "ended or failed")
        return message

    def send(self, connection: socket.socket, message: bytes) -> None:
        """One message. Raises `NeighbourLost`."""
        try:
            connection.send(message)
        except OSError as error:
            raise self._lost(connection, str(error)) from None

    def add(self, connections: dict[int, socket.socket], rank: int, connection: socket.socket) -> None:
        connection.settimeout(self.timeout)
        connections[rank] = connection

    def __enter__(self) -> Node:
        return self

    def __exit__(self, *_: object) -> None:
        for connection in (*self.giving.values(), *self.taking.values()):
            connection.close()
        for descriptor in self.memory.values():
            os.close(descriptor)

    def _lost(self, connection: socket.socket, how: str) -> NeighbourLost:
        both = (*self.giving.items(), *self.taking.items())
        rank = next(rank for rank, known in both if known is connection)
        return NeighbourLost(f"rank {rank} of this node was needed for reading together: it {how}")


class Meeting:
    """Where the other ranks of a node find this one: a socket that has a name and no file.

    OSError where this system has none, or no memory to share.
    """

    def __init__(self) -> None:
        self.name = f"resume_kit-{secrets.token_hex(16)}"
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._listener.bind(f"\0{self.name}")
            self._listener.listen(1024)
            self._memory = os.memfd_create("resume_kit")
        except OSError:
            self._listener.close()
            raise

    def __enter__(self) -> Meeting:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()
        os.close(self._memory)

    def connect(self, rank: int, names: Mapping[int, str], *, within: float, timeout: float) -> Node:
        """Connections with the ranks that listen at `names`, all of which call this at about the same time.

        `timeout` is that of the node. OSError where not all are there `within` so many seconds.
        """
        deadline = time.monotonic() + within
        node = Node(rank, timeout, os.dup(self._memory))
        try:
            for other, name in names.items():
                connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                node.add(node.giving, other, connection)
                connection.connect(f"\0{name}")
                _check_owner(connection)
                socket.send_fds(connection, [_RANK.pack(rank)], [self._memory])
            while len(node.taking) < len(names):
                self._accept(node, names, deadline)
        except BaseException:
            node.__exit__()
            raise
        return node

    def _accept(self, node: Node, names: Mapping[int, str], deadline: float) -> None:
        """Add the rank that calls next to the node."""
        self._listener.settimeout(max(deadline - time.monotonic(), 0.001))
        try:
            connection, _ = self._listener.accept()
        except TimeoutError:
            raise TimeoutError("not all others connected in time") from None
        memory: list[int] = []
        try:
            _check_owner(connection)
            connection.settimeout(max(deadline - time.monotonic(), 0.001))
            message, memory, *_ = socket.recv_fds(connection, _RANK.size, 1, socket.MSG_CMSG_CLOEXEC)
            if not message:
                raise ConnectionError("a rank of this node hung up")
            if not memory:  # the kernel has closed it again
                raise ConnectionError("no descriptor is left for another rank's memory (ulimit -n)")
            (rank,) = _RANK.unpack(message)
            if rank not in names or rank in node.taking:
                raise ConnectionError(f"rank {rank} called, which was not awaited")
        except BaseException:
            connection.close()
            for descriptor in memory:
                os.close(descriptor)
            raise
        node.add(node.taking, rank, connection)
        (node.memory[rank],) = memory


def _check_owner(connection: socket.socket) -> None:
    """PermissionError unless a process of the same user is at the other end."""
    _, uid, _ = _CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    if uid != os.getuid():
        raise PermissionError(f"a process of user {uid} is at the other end")
