"""The memory that preflight asks for is at least what the ranks of a host then take, read together or alone."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import pytest
import torch

from resume_kit.checkpoint import assignment, destination, readplan
from resume_kit.checkpoint.pages import PAGE
from resume_kit.resuming import preflight
from resume_kit.resuming.preflight import ReadOrder
from resume_kit.resuming.reading import read_into
from tests.conftest import Ranks
from tests.nodes import connected
from tests.resuming.test_reading import columns_of, order_of, save, tensors

BLOCK = 64 << 10
ROWS, COLUMNS = 256, 128  # of each of three tensors in fp32: six blocks and a header


def asked(directory: Path, order: ReadOrder) -> int:
    """Bytes that preflight wants for all ranks of this host."""
    preflight.available_memory = lambda: 0  # type: ignore[attr-defined]
    (problem,) = preflight.check_memory(directory, order, 0)
    found = re.search(r"needs ([\d,]+) bytes", problem.what)
    assert found
    return int(found[1].replace(",", ""))


def taken(rank: int, world_size: int, folder: str) -> tuple[int, list[int], int]:
    """What preflight asks for, and what a rank then takes: the memory of its lanes, and of its shared windows."""
    readplan.PAGE, assignment.LEAST_SHARED = 1, 1  # or so little would be read whole, and alone
    preflight.in_memory = lambda _: False  # type: ignore[attr-defined]
    allocate, lanes, saved = destination.allocate, list[int](), tensors(ROWS, COLUMNS)

    def noting(nbytes: int) -> memoryview:
        lanes.append(nbytes)
        return allocate(nbytes)

    destination.allocate = noting  # type: ignore[attr-defined]
    directory = Path(folder) / str(rank)
    directory.mkdir()
    order = order_of(save(directory, saved, 1, BLOCK), columns_of(saved, world_size, rank))
    places = {(want.spec.key, want.box): [torch.zeros(want.box.numel)] for want, _ in order.wants}
    with connected(Path(folder), rank, world_size) as node:
        read_into(directory, order, places, node=node)
        shared = os.fstat(node.memory[rank]).st_blocks * 512 - PAGE  # without what this rank told that it wants
        (Path(folder) / f"{rank}.done").touch()
        while len([*Path(folder).glob("*.done")]) < world_size:
            time.sleep(0.002)
    return asked(directory, order), lanes, shared


@pytest.mark.parametrize("ranks_here", [2, 4])
def test_reading_together_takes_no_more_than_was_asked_for(ranks_here: int, ranks: Ranks, tmp_path: Path) -> None:
    """Fewer blocks than windows: every rank has lanes for what it wants, and shared windows beside them."""
    found = ranks.run(taken, ranks_here, str(tmp_path), timeout=60)
    took = 0
    for _, lanes, shared in found:
        assert shared % BLOCK == 0 and {*lanes} == {0, BLOCK}  # threads that take have no memory
        took += sum(lanes) + shared
    (needed,) = {needed for needed, *_ in found}
    assert took <= needed and sum(shared for *_, shared in found) >= 2 * BLOCK


def test_memory_for_the_windows_of_all_ranks_of_a_host_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large, small = (tensors(ROWS * times, COLUMNS) for times in (8, 1))  # half of their columns: 24 and 3 windows
    monkeypatch.setattr("os.cpu_count", lambda: 24)
    for host, in_memory, saved, windows in [
        (8, False, large, 8 * (4 + 3)),  # 4 threads a rank, and 3 windows that the others see
        (8, True, large, 8 * 4),  # from memory each reads alone
        (1, False, large, 16),
        (1, False, small, 3),  # more threads would find nothing to read
    ]:
        order = order_of(save(tmp_path, saved, 1, BLOCK), columns_of(saved, 2, 1))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(host))
        monkeypatch.setattr(preflight, "in_memory", lambda directory, told=in_memory: told and directory == tmp_path)
        needed = windows * BLOCK
        for available, expected in ((needed, 0), (needed - 1, 1), (None, 0)):
            monkeypatch.setattr(preflight, "available_memory", lambda available=available: available)
            problems = preflight.check_memory(tmp_path, order, 5)
            assert len(problems) == expected
            for problem in problems:
                assert problem.where == "rank 5" and f"needs {needed:,} bytes of memory" in problem.what
