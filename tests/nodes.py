"""Ranks of one node, connected: each a process of its own, or all of them threads of one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

from resume_kit.checkpoint.node import Meeting, Node

T = TypeVar("T")


def connected(folder: Path, rank: int, world_size: int, *, timeout: float = 20.0) -> Node:
    """This process as one of `world_size`, which find each other through files in `folder`."""
    with Meeting() as meeting:
        (folder / f"{rank}.part").write_text(meeting.name)
        (folder / f"{rank}.part").rename(folder / f"{rank}.name")
        paths = {other: folder / f"{other}.name" for other in range(world_size) if other != rank}
        deadline = time.monotonic() + 30
        while not all(path.exists() for path in paths.values()):
            assert time.monotonic() < deadline, "the other ranks did not come"
            time.sleep(0.002)
        names = {other: path.read_text() for other, path in paths.items()}
        return meeting.connect(rank, names, within=10, timeout=timeout)


def in_threads(world_size: int, work: Callable[[Node], T]) -> list[T | Exception]:
    """What `work` returns or raises on each rank of a node of threads. An error ends the node, as it does in a run."""
    found: list[T | Exception] = [AssertionError("did not run")] * world_size
    with ExitStack() as held:
        meetings = [held.enter_context(Meeting()) for _ in range(world_size)]

        def run(rank: int) -> None:
            names = {other: meeting.name for other, meeting in enumerate(meetings) if other != rank}
            try:
                node = meetings[rank].connect(rank, names, within=10, timeout=20)
                nodes.append(node)
                found[rank] = work(node)
            except Exception as error:
                node.abort()
                found[rank] = error

        nodes: list[Node] = []
        threads = [threading.Thread(target=run, args=(rank,), name=f"rank-{rank}") for rank in range(world_size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for node in nodes:
            node.__exit__()
    return found
