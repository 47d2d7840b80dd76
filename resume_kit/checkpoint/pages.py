"""Host memory that disks and GPUs move fast: whole, aligned and, where the kernel has them, huge pages. No torch."""

from __future__ import annotations

import mmap
from contextlib import suppress

import numpy as np

PAGE = 4096
#: Bytes from which memory is on huge pages, and a read may bypass the page cache.
LARGE = 1 << 20
_HUGE = 2 << 20


def whole_pages(nbytes: int) -> int:
    """`nbytes`, rounded up to pages: what memory for a block needs for a read that bypasses the page cache."""
    return -(-nbytes // PAGE) * PAGE


def filled(nbytes: int) -> int:
    """Bytes that `allocate(nbytes)` takes at the most, once all of it has been filled."""
    return -(-nbytes // _HUGE) * _HUGE if nbytes >= LARGE else whole_pages(nbytes)


def allocate(nbytes: int) -> memoryview:
    """Host memory, uint8 [nbytes], on whole pages, huge ones where it is large; it costs nothing until it is filled.

    A disk request has room for a few dozen to a few hundred addresses: on pages of 4 KiB that ends it at 512 KiB or
    so, on huge ones it takes several MiB. Forked processes do not have it: a data worker must not keep a second
    copy, nor move pages that are pinned.
    """
    pages = mmap.mmap(-1, nbytes + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if nbytes >= LARGE:
        with suppress(OSError):  # a kernel without huge pages: slower, but right
            pages.madvise(mmap.MADV_HUGEPAGE)
    pages.madvise(mmap.MADV_DONTFORK)
    memory = np.frombuffer(pages, np.uint8)
    start = -memory.ctypes.data % _HUGE
    return memory[start : start + nbytes].data
