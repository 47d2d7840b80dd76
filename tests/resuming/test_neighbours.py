"""The meeting of a node's ranks, and whose error counts, among real ranks."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from resume_kit.checkpoint.blocks import BLOCK_BYTES
from resume_kit.checkpoint.destination import HostMemory
from resume_kit.checkpoint.filesystems import in_memory
from resume_kit.checkpoint.node import NeighbourLost, Node
from resume_kit.checkpoint.together import read_together
from resume_kit.errors import CheckpointDamaged, Problem, RanksFailed, ResumeKitError
from resume_kit.resuming.report import Report
from tests.conftest import Ranks
from tests.engines.test_coordination import coordinator, departing


@dataclass
class Met:
    """Whom a rank is connected with while it reads (None: it reads alone), the report's warnings, the rounds."""

    others: list[int] | None
    warnings: list[str]
    rounds: list[str]


MEET, MET, READ = "meet", "met", "read"


def met(rank: int, world_size: int, places: list[str], fault: str = "", directories: Sequence[str] = ()) -> Met:
    """The meeting of ranks on `places`, of which each reads one of `directories`, on disk where none are given."""
    from resume_kit.checkpoint import node as connections
    from resume_kit.resuming import neighbours

    rounds = coordinator()
    found: list[list[int] | None] = []
    neighbours._place = lambda: places[rank]
    neighbours.CONNECTING = 0.5
    if not directories:
        neighbours.in_memory = lambda _: False  # type: ignore[attr-defined]
    if fault == "cannot listen" and rank == 1:

        def no_socket(*_: Any) -> None:
            raise OSError(errno.EAFNOSUPPORT, "Address family not supported")

        connections.socket.socket = no_socket  # type: ignore[assignment, misc]
    if fault == "no memory to share" and rank == 1:  # as where vm.memfd_noexec=2 forbids it
        os.memfd_create = lambda *_: (_ for _ in ()).throw(PermissionError(errno.EACCES, "Permission denied"))
    if fault == "cannot connect" and rank == 1:
        connections.Meeting.connect = lambda *_, **__: (_ for _ in ()).throw(ConnectionRefusedError("refused"))  # type: ignore[method-assign]

    def read(node: Node | None) -> None:
        assert node is None or node.giving.keys() == node.taking.keys()
        found.append(None if node is None else sorted(node.giving))

    report, round_, names = Report("run", 1), rounds.round, list[str]()

    def noting(name: str, *given: Any) -> Any:
        names.append(name)
        return round_(name, *given)

    rounds.round = noting  # type: ignore[method-assign]
    directory = Path(directories[rank] if directories else "run")
    neighbours.read_with_neighbours(rounds, report, directory, read)
    open_sockets = [name for name in os.listdir("/proc/self/fd") if is_unix(name)]
    assert not open_sockets
    rounds.depart()
    return Met(found[0], warnings_of(report), names)


def warnings_of(report: Report) -> list[str]:
    return [check.figure for check in report.checks if check.verdict == "warn"]


def is_unix(descriptor: str) -> bool:
    """Whether a descriptor is one of the node's: a sequenced-packet socket."""
    sockets = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
    inodes = [fields[6] for fields in sockets if fields[4] == "0005"]
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}") in [f"socket:[{inode}]" for inode in inodes]
    except FileNotFoundError:
        return False


def test_the_ranks_of_each_node_are_connected_with_each_other_only(ranks: Ranks) -> None:
    found = ranks.run(met, 4, ["one", "two", "one", "one"], timeout=30)
    assert found == [Met(others, [], [MEET, MET, READ]) for others in ([2, 3], None, [0, 3], [0, 2])]


def test_ranks_that_are_alone_on_their_nodes_read_alone(ranks: Ranks) -> None:
    assert ranks.run(met, 2, ["one", "two"], timeout=30) == [Met(None, [], [MEET, READ])] * 2
    assert ranks.run(met, 1, ["one"], timeout=30) == [Met(None, [], [READ])]


IN_MEMORY = "/dev/shm"


def test_ranks_read_together_from_a_disk_and_alone_from_memory(ranks: Ranks, tmp_path: Path) -> None:
    if not in_memory(Path(IN_MEMORY)) or in_memory(tmp_path):
        pytest.skip("no memory file system at /dev/shm, or none but such")
    together, alone = (
        ranks.run(met, 2, ["one"] * 2, "", [path] * 2, timeout=30) for path in (str(tmp_path), IN_MEMORY)
    )
    assert together == [Met([1], [], [MEET, MET, READ]), Met([0], [], [MEET, MET, READ])]
    assert alone == [Met(None, [], [MEET, READ])] * 2


def test_a_node_of_which_one_rank_sees_memory_reads_alone_and_another_node_together(
    ranks: Ranks, tmp_path: Path
) -> None:
    if not in_memory(Path(IN_MEMORY)) or in_memory(tmp_path):
        pytest.skip("no memory file system at /dev/shm, or none but such")
    places, directories = ["one", "two", "one", "two"], [str(tmp_path)] * 3 + [IN_MEMORY]
    found = ranks.run(met, 4, places, "", directories, timeout=30)
    assert found == [Met(others, [], [MEET, MET, READ]) for others in ([2], None, [0], None)]


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ("cannot listen", "it cannot be met: [Errno 97] Address family not supported"),
        ("no memory to share", "it cannot be met: [Errno 13] Permission denied"),
        ("cannot connect", "refused"),
    ],
)
def test_if_one_rank_cannot_connect_its_node_reads_alone_and_the_report_says_so(
    fault: str, why: str, ranks: Ranks
) -> None:
    found = ranks.run(met, 4, ["one", "one", "two", "two"], fault, timeout=30)
    assert [rank.others for rank in found] == [None, None, [3], [2]]
    for (warning,) in (rank.warnings for rank in found):
        assert warning.startswith("ranks 0-1 of one node read each by itself; rank ") and why in warning


@departing
def fails(rank: int, world_size: int, kind: str) -> tuple[str, str]:
    """How the round ends where rank 1 fails and rank 0 is left waiting for it."""
    from resume_kit.resuming import neighbours

    neighbours.in_memory = lambda _: False  # type: ignore[attr-defined]

    def read(node: Node | None) -> None:
        assert node is not None
        if rank == 1 and kind == "damage":
            raise CheckpointDamaged("step-1 is damaged", [Problem("integrity", "file", "not what was saved")])
        if rank == 1 and kind == "lost":
            raise NeighbourLost("rank 0 took nothing")
        node.receive(node.taking[1], 4)

    with pytest.raises((CheckpointDamaged, RanksFailed)) as caught:
        neighbours.read_with_neighbours(coordinator(), Report("run", 1), Path("run"), read)
    return type(caught.value).__name__, str(caught.value)


def test_the_error_that_was_first_counts_and_not_what_follows_from_it(ranks: Ranks) -> None:
    found = ranks.run(fails, 2, "damage", timeout=30)
    assert found[0] == found[1] and found[0][0] == "CheckpointDamaged"
    assert "rank 1, file: not what was saved" in found[0][1] and "reading together" not in found[0][1]


def test_ranks_that_lost_each_other_for_no_other_reason_fail_alike(ranks: Ranks) -> None:
    found = ranks.run(fails, 2, "lost", timeout=30)
    assert found[0] == found[1] and found[0][0] == "RanksFailed"
    assert "rank 1: rank 0 took nothing" in found[0][1]
    assert "rank 0: rank 1 of this node was needed for reading together: it ended or failed" in found[0][1]


@departing
def stands_still(rank: int, world_size: int) -> str:
    """Rank 2 stands still, rank 0 needs it, rank 1 needs nothing."""
    from resume_kit.resuming import neighbours

    neighbours.in_memory = lambda _: False  # type: ignore[attr-defined]

    def read(node: Node | None) -> None:
        assert node is not None
        if rank == 0:
            time.sleep(0.2)
            node.receive(node.taking[2], 4)
        time.sleep(4 if rank == 2 else 0)

    with pytest.raises(ResumeKitError) as caught:
        neighbours.read_with_neighbours(coordinator(timeout=1.0), Report("run", 1), Path("run"), read)
    return str(caught.value)


def test_a_rank_that_stands_still_is_named_on_every_rank_that_does_not(ranks: Ranks) -> None:
    needs_it, needs_nothing, _ = ranks.run(stands_still, 3, timeout=30)
    assert "rank 2 did not arrive" in needs_it and needs_nothing == needs_it


@departing
def has_no_memory(rank: int, world_size: int) -> tuple[list[int], list[str]]:
    """How many blocks the ranks share where rank 1 has no memory for a window, and the report's warnings."""
    from resume_kit.resuming import neighbours

    neighbours.in_memory = lambda _: False  # type: ignore[attr-defined]
    shared: list[int] = []

    def no_memory(*_: int) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    def read(node: Node | None) -> None:
        assert node is not None
        needs = {"file": [(block, BLOCK_BYTES, BLOCK_BYTES // 2) for block in range(8)]}
        with read_together(node, needs, BLOCK_BYTES, HostMemory([])) as together:
            shared.extend(map(len, together.shared.values()))
            os.posix_fallocate = posix_fallocate

    report, posix_fallocate = Report("run", 1), os.posix_fallocate
    for fails in (False, True):
        if fails and rank == 1:
            os.posix_fallocate = no_memory
        neighbours.read_with_neighbours(coordinator(), report, Path("run"), read)
    return shared, warnings_of(report)


def test_a_node_without_memory_to_share_reads_alone_and_every_rank_says_whose_it_is(ranks: Ranks) -> None:
    no_memory = "no memory to share with the other ranks of its node: Cannot allocate memory"
    warning = f"rank 1's node read each by itself; it has {no_memory}"
    assert ranks.run(has_no_memory, 2, timeout=30) == [([8], [warning])] * 2
