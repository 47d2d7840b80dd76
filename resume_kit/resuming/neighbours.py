"""The ranks of a node meet before they read, so that a block which several of them want is read once."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from resume_kit.checkpoint.filesystems import in_memory
from resume_kit.checkpoint.node import Meeting, NeighbourLost, Node
from resume_kit.engines.coordination import Coordinator
from resume_kit.errors import RanksFailed
from resume_kit.planning.holders import format_ranks
from resume_kit.recovery.identity import Identity
from resume_kit.resuming.report import Report

#: Seconds for the ranks of a node to connect. They all begin at the same moment.
CONNECTING = 10.0


def read_with_neighbours(
    coordinator: Coordinator, report: Report, directory: Path, read: Callable[[Node | None], None]
) -> None:
    """A round in which each rank reads `directory`, given the node that it may read together with. Collective.

    From a memory file system each rank reads alone, for that is faster; so do ranks that cannot connect, or have no
    memory to share, as the report says. An error of a rank ends the others' waits; they count as failed only if none
    says what was wrong.
    """
    with ExitStack() as held:
        node = _meet(coordinator, report, directory, held)

        def local() -> list[str]:
            lost = ""
            try:
                read(node)
            except BaseException as error:
                if node is not None:
                    node.abort()
                if not isinstance(error, NeighbourLost):
                    raise
                lost = str(error)
            return [lost, node.shortage if node else ""]

        for rank, shortage in enumerate(coordinator.round("read", local, _all_read)):
            if shortage:
                report.warned("load", "reading together", f"rank {rank}'s node read each by itself; it has {shortage}")


def _all_read(told: Sequence[Sequence[str]]) -> list[str]:
    """Each rank's shortage. Raises `RanksFailed` if one was lost by others."""
    if any(lost for lost, _ in told):
        raise RanksFailed("read", [(rank, lost) for rank, (lost, _) in enumerate(told) if lost])
    return [shortage for _, shortage in told]


def _meet(coordinator: Coordinator, report: Report, directory: Path, held: ExitStack) -> Node | None:
    """This rank's node, once all of it are connected; it ends with `held`. None for a rank that reads alone.

    A node meets where each of its ranks tells a name, which one that sees the directory in memory does not.
    """
    if coordinator.world_size == 1:
        return None
    with ExitStack() as until_met:
        meeting, failure, node = None, "", None
        if not in_memory(directory):
            try:
                meeting = until_met.enter_context(Meeting())
            except OSError as error:
                failure = f"it cannot be met: {error}"
        told = coordinator.gather("meet", lambda: [_place(), meeting.name if meeting else "", failure])
        failures = [failed for *_, failed in told]
        nodes: dict[str, dict[int, str]] = defaultdict(dict)
        for rank, (place, name, _) in enumerate(told):
            nodes[place][rank] = name
        meet = {place for place, ranks in nodes.items() if len(ranks) > 1 and all(ranks.values())}
        if meet:
            place = told[coordinator.rank][0]
            others = {rank: name for rank, name in nodes[place].items() if rank != coordinator.rank}
            if meeting and place in meet:
                try:
                    # half of the round's bound: a rank that hangs is named by the round, in time for all
                    node = meeting.connect(coordinator.rank, others, within=CONNECTING, timeout=coordinator.timeout / 2)
                    held.enter_context(node)
                except OSError as error:
                    failure = str(error) or type(error).__name__
            failures = coordinator.gather("met", lambda: failure)
    for ranks in nodes.values():
        wrong = [f"rank {rank}: {failures[rank]}" for rank in ranks if failures[rank]]
        if wrong and len(ranks) > 1:
            who = f"ranks {format_ranks(sorted(ranks))} of one node read each by itself"
            report.warned("load", "reading together", "; ".join([who, *wrong]))
            node = None if coordinator.rank in ranks else node
    return node


def _place() -> str:
    """What ranks have in common that can connect: the boot of a host, its name, and a network namespace."""
    identity = Identity.of_this_process()
    try:
        network = os.readlink("/proc/self/ns/net")
    except OSError:
        network = ""
    return " ".join((identity.host, identity.boot_id, network))
