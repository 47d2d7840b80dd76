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
    offers. Each wait is bounded by `timeout` seconds."""

    def __init__(self, rank: int, timeout: float) -> None:
        self.rank = rank
        self.timeout = timeout
        self.giving: dict[int, socket.socket] = {}
        self.taking: dict[int, socket.socket] = {}

    def abort(self) -> None:
        """End every wait of this rank and of the others for it: each then raises `NeighbourLost`."""
        for connection in (*self.giving.values(), *self.taking.values()):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:  # the other rank is gone already
                continue

    def receive(self, connection: socket.socket, nbytes: int, descriptors: int = 0) -> tuple[bytes, list[int]]:
        """One message. Raises `NeighbourLost`."""
        try:
            data, found, flags, _ = socket.recv_fds(connection, nbytes, descriptors, socket.MSG_CMSG_CLOEXEC)
        except TimeoutError:
            raise self._lost(connection, f"sent nothing within {self.timeout:g} s") from None
        except OSError as error:
            raise self._lost(connection, str(error)) from None
        if len(data) != nbytes or flags & socket.MSG_CTRUNC:
            for descriptor in found:
                os.close(descriptor)
            raise self._lost(connection, "ended or failed" if not data else "sent half a message")
        return data, list(found)

    def send(self, connection: socket.socket, message: bytes, descriptors: list[int] | None = None) -> None:
        """One message. Raises `NeighbourLost`."""
        try:
            socket.send_fds(connection, [message], descriptors or [])
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

    def _lost(self, connection: socket.socket, how: str) -> NeighbourLost:
        both = (*self.giving.items(), *self.taking.items())
        rank = next(rank for rank, known in both if known is connection)
        return NeighbourLost(f"rank {rank} of this node was needed for reading together: it {how}")


class Meeting:
    """Where the other ranks of a node find this one: a socket that has a name and no file.

    OSError where this system has none.
    """

    def __init__(self) -> None:
        self.name = f"resume_kit-{secrets.token_hex(16)}"
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._listener.bind(f"\0{self.name}")
            self._listener.listen(1024)
        except OSError:
            self._listener.close()
            raise

    def __enter__(self) -> Meeting:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def connect(self, rank: int, names: Mapping[int, str], *, within: float, timeout: float) -> Node:
        """Connections with the ranks that listen at `names`, all of which call this at about the same time.

        `timeout` is that of the node. OSError where not all are there `within` so many seconds.
        """
        deadline = time.monotonic() + within
        node = Node(rank, timeout)
        try:
            for other, name in names.items():
                connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                node.add(node.giving, other, connection)
                connection.connect(f"\0{name}")
                _check_owner(connection)
                connection.send(_RANK.pack(rank))
            while len(node.taking) < len(names):
                connection, other = self._accept(deadline)
                if other not in names or other in node.taking:
                    connection.close()
                    raise ConnectionError(f"rank {other} called, which was not awaited")
                node.add(node.taking, other, connection)
        except BaseException:
            node.__exit__()
            raise
        return node

    def _accept(self, deadline: float) -> tuple[socket.socket, int]:
        self._listener.settimeout(max(deadline - time.monotonic(), 0.001))
        try:
            connection, _ = self._listener.accept()
        except TimeoutError:
            raise TimeoutError("not all others connected in time") from None
        try:
            _check_owner(connection)
            connection.settimeout(max(deadline - time.monotonic(), 0.001))
            return connection, _RANK.unpack(connection.recv(_RANK.size))[0]
        except struct.error:
            connection.close()
            raise ConnectionError("a rank of this node hung up") from None
        except BaseException:
            connection.close()
            raise


def _check_owner(connection: socket.socket) -> None:
    """PermissionError unless a process of the same user is at the other end."""
    _, uid, _ = _CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    if uid != os.getuid():
        raise PermissionError(f"a process of user {uid} is at the other end")
