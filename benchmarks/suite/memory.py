"""Peak host memory of this process while something runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass
class Growth:
    """Bytes by which the resident set grew at its peak, and of pinned memory that torch holds afterwards."""

    resident: int = 0
    pinned: int = 0


@contextmanager
def watched() -> Iterator[Growth]:
    """The growth during the block, set at its end. Child processes are not counted; zero where /proc cannot tell."""
    growth = Growth()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
        before = _status("VmRSS")
    except OSError:
        before = _status("VmHWM")
    try:
        yield growth
    finally:
        growth.resident = max(0, _status("VmHWM") - before)
        growth.pinned = _pinned()


def _status(name: str) -> int:
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return 0


def _pinned() -> int:
    if not torch.cuda.is_available():
        return 0
    with suppress(Exception):  # a debugging interface, absent from some builds
        return int(torch.cuda.host_memory_stats().get("allocated_bytes.current", 0))
    return 0
