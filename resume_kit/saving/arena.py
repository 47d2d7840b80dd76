"""The host arena: memory that becomes the image of the file, pinned where there is a GPU."""

from __future__ import annotations

import ctypes
import resource
import threading
import weakref

import torch

from resume_kit.checkpoint.blocks import BLOCK_BYTES
from resume_kit.checkpoint.pages import allocate
from resume_kit.engines import pinned
from resume_kit.environment import available_memory, cores_per_rank, host_name
from resume_kit.errors import Problem, SaveFailed

_REMEDY = 'set Saving(staging="bounded", host_bytes=...), which stages in less memory, or run fewer ranks a node'


def memory_problems(nbytes: int, local_ranks: int, available: int | None) -> list[Problem]:
    """What stands against `nbytes` of host memory for each of this node's `local_ranks`.

    `available` bytes can be had on the node; None where that is not known, then nothing is found.
    """
    needed = nbytes * local_ranks
    if available is None or needed <= available:
        return []
    what = f"{local_ranks} rank(s) need {needed:,} bytes to stage a save, {available:,} are available"
    return [Problem("host memory", f"node {host_name()}", what, _REMEDY)]


class Arena:
    """Host memory, allocated once in the background and then reused.

    For a GPU it is pinned by registering it, which takes a fraction of the time that torch's own pinned memory takes.
    Where it cannot be pinned it is left pageable, and `note` says so.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._registered: weakref.finalize[..., Arena] | None = None
        self._wanted = 0
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None
        self.note = ""

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        return self._memory.numel()

    @property
    def ready(self) -> bool:
        """Whether all that was asked for is there, so that `memory` does not wait."""
        return 0 < self._wanted <= self.nbytes

    def begin(self, nbytes: int) -> None:
        """Allocate `nbytes`, rounded up to whole blocks, in the background, unless as much is there or on its way.

        What `memory` gave before is given back first, so nothing may use it any more.
        """
        nbytes = max(1, -(-nbytes // BLOCK_BYTES)) * BLOCK_BYTES
        if nbytes > self._wanted:
            self._wanted = nbytes
            self._thread = threading.Thread(target=self._allocate, args=(nbytes, self._thread), name="arena")
            self._thread.start()

    def memory(self, nbytes: int) -> torch.Tensor:
        """A page-aligned uint8 tensor of at least `nbytes`; its content is what the last user left.

        Waits for `begin`. Raises `SaveFailed` when the memory cannot be had; the next call tries anew.
        """
        self.begin(nbytes)
        self._join()
        if self._failure is not None:
            failure, self._failure, self._wanted = self._failure, None, self.nbytes
            if isinstance(failure, SaveFailed):
                raise failure
            what = f"{nbytes:,} bytes to stage a save cannot be had ({failure})"
            problem = Problem("host memory", f"node {host_name()}", what, _REMEDY)
            raise SaveFailed("no host memory for the save", [problem]) from failure
        return self._memory

    def close(self) -> None:
        """Give the memory back. Copies into it must be done."""
        self._join()
        self._release()
        self._wanted, self._failure = 0, None

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _allocate(self, nbytes: int, before: threading.Thread | None) -> None:
        if before is not None:
            before.join()
        try:
            self._release()
            problems = memory_problems(nbytes, 1, available_memory())
            if problems:  # else the kernel would end the process when the pages are touched
                raise SaveFailed("no host memory for the save", problems)
            memory = _pages(nbytes)
            self._memory = self._pinned(memory) if self._device.type == "cuda" else memory
            self._failure = None
        except Exception as error:
            self._failure = error

    def _pinned(self, memory: torch.Tensor) -> torch.Tensor:
        error = pinned.register(memory.data_ptr(), memory.numel(), self._device)
        if not error:
            self._registered = weakref.finalize(self, _unregister, memory, self._device)
            self._registered.atexit = False  # the process gives everything back by itself
            return memory
        try:
            return torch.empty(memory.numel(), dtype=torch.uint8, pin_memory=True)
        except RuntimeError:
            limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
            locked = "unlimited" if limit == resource.RLIM_INFINITY else f"{limit:,} bytes"
            self.note = (
                f"{memory.numel():,} bytes of host memory cannot be pinned (CUDA error {error}; the limit on "
                f"locked memory, ulimit -l, is {locked}): copies to it are slow and hold up training"
            )
            return memory

    def _release(self) -> None:
        if self._registered is not None:
            self._registered()
            self._registered = None
        self._memory = torch.empty(0, dtype=torch.uint8)


def _unregister(memory: torch.Tensor, device: torch.device) -> None:
    """In whichever thread lets go of it last."""
    pinned.unregister(memory.data_ptr(), device)


def _touchers() -> int:
    """Threads that touch new pages: this rank's share of the cores, from 4 to 8."""
    return max(4, min(8, cores_per_rank()))


def _pages(nbytes: int) -> torch.Tensor:
    """Anonymous memory, uint8 [nbytes], its pages there already: touched by several threads, huge where possible."""
    memory = torch.frombuffer(allocate(nbytes), dtype=torch.uint8)
    share = -(-nbytes // BLOCK_BYTES // _touchers()) * BLOCK_BYTES
    threads = [
        # ctypes leaves the interpreter to others meanwhile; mmap's own methods do not.
        threading.Thread(target=ctypes.memset, args=(memory.data_ptr() + start, 0, min(share, nbytes - start)))
        for start in range(0, nbytes, share)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return memory
