"""Twins, which let a second thread wait, and sections, which some rank may leave early."""

from __future__ import annotations

import threading
import time
from typing import Any

from resume_kit.engines.coordination import Coordinator
from tests.conftest import Ranks
from tests.engines.test_coordination import caught, coordinator, departing


@departing
def beside(rank: int, world_size: int) -> list[Any]:
    """A thread's round waits for rank 1's thread, which comes late; rounds of the main threads go on meanwhile."""
    ranks = coordinator()
    background = ranks.twin()
    found: dict[str, Any] = {}

    def work() -> None:
        if rank == 1:
            time.sleep(1.0)
        found["background"] = background.gather("same name", lambda: ["background", rank])

    thread = threading.Thread(target=work)
    thread.start()
    mine = [ranks.gather("same name", lambda n=n: ["main", n, rank]) for n in range(20)]
    meanwhile = thread.is_alive()
    thread.join()
    return [mine, found["background"], meanwhile]


def test_a_twin_waits_in_another_thread_without_holding_anything_up(ranks: Ranks) -> None:
    main = [[["main", n, rank] for rank in range(2)] for n in range(20)]
    background = [["background", rank] for rank in range(2)]
    assert ranks.run(beside, 2) == [[main, background, True]] * 2


@departing
def left_early(rank: int, world_size: int, sections: bool) -> list[dict[str, Any]]:
    """Rank 1 leaves the first piece of work before its second round; then all begin a second one."""
    ranks = coordinator()
    background = coordinator(timeout=1.0).twin()

    def work(number: int) -> Coordinator:
        return background.section(f"work {number}") if sections else background

    first = work(1)
    outcomes = [caught(lambda: first.gather("begin", lambda: rank))]
    if rank == 0:
        outcomes.append(caught(lambda: first.gather("end", lambda: rank)))
    ranks.gather("both are ready", lambda: None)
    second = work(2)
    outcomes.append(caught(lambda: second.gather("begin", lambda: rank)))
    return outcomes


def test_what_some_rank_left_early_puts_the_next_section_out_of_step_no_more(ranks: Ranks) -> None:
    stayed, left = ranks.run(left_early, 2, True)
    assert "rank 1 did not arrive" in stayed[1]["text"]
    assert stayed[-1] == left[-1] == {"value": [0, 1]}
    stayed, left = ranks.run(left_early, 2, False)  # what sections are for
    assert "did not arrive" in stayed[-1]["text"]
    assert "class" in left[-1]
