"""The ranks of a node meet before they read, so that a block which several of them want is read once."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from resume_kit.checkpoint.node import Meeting, NeighbourLost, Node
from resume_kit.engines.coordination import Coordinator
from resume_kit.errors import RanksFailed
from resume_kit.planning.holders import format_ranks
from resume_kit.recovery.identity import Identity
from resume_kit.resuming.report import Report

#: Seconds for the ranks of a node to connect. They all begin at the same moment.
CONNECTING = 10.0


def read_with_neighbours(coordinator: Coordinator, report: Report, read: Callable[[Node | None], None]) -> None:
    """A round in which each rank reads, given the node that it may read together with. Collective.

    Ranks that cannot connect read alone, as the report says. An error of a rank ends the others' waits; they count as
    failed only if none says what was wrong.
    """
    with ExitStack() as held:
        node = _meet(coordinator, report, held)

        def local() -> str:
            try:
                read(node)
            except NeighbourLost as lost:
                node.abort() if node else None
                return str(lost)
            except BaseException:
                node.abort() if node else None
                raise
            return ""

        coordinator.round("read", local, _all_read)


def _all_read(lost: Sequence[str]) -> None:
    if any(lost):
        raise RanksFailed("read", [(rank, what) for rank, what in enumerate(lost) if what])


def _meet(coordinator: Coordinator, report: Report, held: ExitStack) -> Node | None:
    """This rank's node, once all of it are connected; it ends with `held`. None for a rank that reads alone."""
    if coordinator.world_size == 1:
        return None
    with ExitStack() as until_met:
        meeting, failure, node = None, "", None
        try:
            meeting = until_met.enter_context(Meeting())
        except OSError as error:
            failure = f"it cannot be met: {error}"
        told = coordinator.gather("meet", lambda: [_place(), meeting.name if meeting else ""])
        nodes: dict[str, dict[int, str]] = defaultdict(dict)
        for rank, (place, name) in enumerate(told):
            nodes[place][rank] = name
        if all(len(ranks) == 1 for ranks in nodes.values()):
            return None
        others = {r: name for r, name in nodes[told[coordinator.rank][0]].items() if r != coordinator.rank}
        if meeting and others and all(others.values()):
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
