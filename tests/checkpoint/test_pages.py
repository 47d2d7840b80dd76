"""Memory for windows: where it lies, and what it takes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from resume_kit.checkpoint.pages import PAGE, allocate, filled


def resident(address: int) -> int:
    """Bytes that the mapping around `address` has in memory."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        key, *rest = line.split()
        if "-" in key and not key.endswith(":"):
            start, stop = (int(end, 16) for end in key.split("-"))
            inside = start <= address < stop
        elif inside and key == "Rss:":
            return int(rest[0]) * 1024
    raise AssertionError("no such mapping")


@pytest.mark.parametrize("nbytes", [1, PAGE, PAGE + 1, (1 << 20) - 1, (1 << 20) + PAGE, 3 << 20, 16 << 20])
def test_memory_takes_no_more_than_is_told_even_on_huge_pages(nbytes: int) -> None:
    memory = allocate(nbytes)
    address = np.frombuffer(memory, np.uint8).ctypes.data
    assert address % PAGE == 0 and len(memory) == nbytes
    np.frombuffer(memory, np.uint8)[:] = 1
    assert nbytes <= resident(address) <= filled(nbytes) < nbytes + (2 << 20)
