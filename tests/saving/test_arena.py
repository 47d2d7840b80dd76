"""The host arena: allocated in the background, reused, grown; what it says when there is no memory."""

from __future__ import annotations

import gc
import os
import resource
import threading
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from resume_kit.checkpoint.blocks import BLOCK_BYTES, digest_image
from resume_kit.checkpoint.files import write_image
from resume_kit.errors import SaveFailed
from resume_kit.saving import arena as module
from resume_kit.saving.arena import Arena, memory_problems

MIB = 1 << 20


@pytest.fixture
def arena() -> Iterator[Arena]:
    arena = Arena(torch.device("cpu"))
    yield arena
    arena.close()


@pytest.fixture
def allocations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of all allocations from now on."""
    sizes: list[int] = []
    pages = module._pages

    def act(nbytes: int) -> torch.Tensor:
        sizes.append(nbytes)
        return pages(nbytes)

    monkeypatch.setattr(module, "_pages", act)
    return sizes


@pytest.mark.parametrize(("asked", "given"), [(0, 1), (1, 1), (BLOCK_BYTES, 1), (BLOCK_BYTES + 1, 2)])
def test_memory_is_whole_blocks_of_aligned_bytes(asked: int, given: int, arena: Arena) -> None:
    memory = arena.memory(asked)
    assert memory.dtype == torch.uint8 and memory.shape == (given * BLOCK_BYTES,) == (arena.nbytes,)
    assert memory.data_ptr() % 4096 == 0 and memory.is_contiguous()


def test_it_can_be_written_to_and_saved_from(arena: Arena, tmp_path: Path) -> None:
    memory = arena.memory(40 * MIB)
    memory.view(torch.int64).copy_(torch.arange(memory.numel() // 8))
    image = memory.numpy().data[: 40 * MIB - 3]
    assert write_image(tmp_path / "x", image) == digest_image(image)
    assert (tmp_path / "x").read_bytes() == image


def test_it_is_allocated_once_and_reused(arena: Arena, allocations: list[int]) -> None:
    assert not arena.ready and arena.nbytes == 0
    arena.begin(20 * MIB)
    first = arena.memory(20 * MIB)
    assert arena.ready
    first[-1] = 7
    arena.begin(5 * MIB)
    assert arena.memory(32 * MIB) is first and first[-1] == 7
    assert allocations == [32 * MIB]


def test_it_grows_to_what_is_asked_for(arena: Arena, allocations: list[int]) -> None:
    arena.memory(MIB)
    assert arena.memory(40 * MIB).numel() == 48 * MIB == arena.nbytes
    assert allocations == [16 * MIB, 48 * MIB]


def test_begin_returns_at_once_also_while_it_allocates(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    go, pages = threading.Event(), module._pages
    monkeypatch.setattr(module, "_pages", lambda nbytes: go.wait(10) and pages(nbytes))
    arena.begin(MIB)
    arena.begin(20 * MIB)
    arena.begin(30 * MIB)  # as much is on its way
    assert not arena.ready and arena.nbytes == 0
    go.set()
    assert arena.memory(20 * MIB).numel() == 32 * MIB


def test_close_gives_the_memory_back_and_it_may_begin_again(arena: Arena) -> None:
    before = threading.active_count()
    arena.begin(MIB)
    arena.close()
    assert arena.nbytes == 0 and not arena.ready and threading.active_count() == before
    arena.close()
    assert arena.memory(MIB).numel() == BLOCK_BYTES


def mapped(address: int) -> bool:
    """Whether this process has memory at an address."""
    ranges = (line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines())
    return any(int(start, 16) <= address < int(stop, 16) for start, stop in ranges)


def test_a_forked_worker_does_not_inherit_it(arena: Arena) -> None:
    """It would keep a second copy of every page that a later save writes."""
    address = arena.memory(40 * MIB).data_ptr()
    assert all(mapped(address + offset) for offset in (0, 40 * MIB))
    ordinary = torch.zeros(1)
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # of forks beside threads
        child = os.fork()
    if child == 0:
        inherited = [mapped(place) for place in (address, address + 40 * MIB, ordinary.data_ptr())]
        os._exit(0 if inherited == [False, False, True] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# -- no memory


def test_a_failure_in_the_background_is_told_once_when_the_memory_is_asked_for(
    arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(module, "available_memory", lambda: None)  # not known beforehand
        arena.begin(1 << 60)
        assert not arena.ready
        with pytest.raises(
            SaveFailed, match=r"bytes to stage a save cannot be had \(.*Cannot allocate memory\)"
        ) as error:
            arena.memory(1 << 60)
    assert "host_bytes" in error.value.problems[0].remedy
    assert arena.memory(MIB).numel() == BLOCK_BYTES and arena.ready


def test_what_the_host_does_not_have_is_not_touched(arena: Arena, allocations: list[int]) -> None:
    """The kernel would end the process."""
    with pytest.raises(SaveFailed, match=r"need 1,125,899,906,842,624 bytes to stage a save, [\d,]+ are available"):
        arena.memory(1 << 50)
    assert allocations == []


def test_the_ranks_of_a_node_share_its_memory() -> None:
    assert memory_problems(100, 8, 800) == [] == memory_problems(100, 8, None)
    (problem,) = memory_problems(101, 8, 800)
    assert "8 rank(s) need 808 bytes to stage a save, 800 are available" in problem.what
    assert "host_bytes" in problem.remedy and "fewer ranks a node" in problem.remedy


# -- a GPU, or one that says no


class Runtime:
    """As much of the CUDA runtime as the arena calls; `cudaHostRegister` returns `error`."""

    def __init__(self, error: int) -> None:
        self.error = error
        self.registered: dict[int, int] = {}

    def cudaHostRegister(self, pointer: int, nbytes: int, flags: int) -> int:
        if not self.error:
            self.registered[pointer] = nbytes
        return self.error

    def cudaHostUnregister(self, pointer: int) -> int:
        del self.registered[pointer]
        return 0


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    def arrange(error: int) -> tuple[Arena, Runtime]:
        runtime = Runtime(error)
        monkeypatch.setattr(module.torch.cuda, "cudart", lambda: runtime)
        monkeypatch.setattr(module.torch.cuda, "device", nullcontext)
        monkeypatch.setattr(module.pinned, "_forgotten", lambda error, _device: error)
        return Arena(torch.device("cuda", 0)), runtime

    return arrange


def test_for_a_gpu_it_is_registered_as_one_range_and_given_back(on_gpu: Any) -> None:
    arena, runtime = on_gpu(0)
    memory = arena.memory(MIB)
    assert runtime.registered == {memory.data_ptr(): BLOCK_BYTES}
    grown = arena.memory(20 * MIB)
    assert runtime.registered == {grown.data_ptr(): 32 * MIB}
    arena.close()
    assert runtime.registered == {} and arena.note == ""


def test_one_that_nobody_closed_is_unregistered_before_its_pages_go(on_gpu: Any) -> None:
    arena, runtime = on_gpu(0)
    arena.memory(MIB)
    assert len(runtime.registered) == 1
    del arena
    gc.collect()
    assert runtime.registered == {}


def torch_that_pins(monkeypatch: pytest.MonkeyPatch, pinned: torch.Tensor | None) -> None:
    """From now on pinned memory of torch is `pinned`, or refused."""
    empty = torch.empty

    def act(nbytes: int, dtype: torch.dtype, pin_memory: bool = False) -> torch.Tensor:
        if not pin_memory:
            return empty(nbytes, dtype=dtype)
        if pinned is None:
            raise RuntimeError("CUDA error: out of memory")
        return pinned

    monkeypatch.setattr(module.torch, "empty", act)


def test_where_it_cannot_be_registered_torch_pins(on_gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    arena, runtime = on_gpu(2)
    pinned = torch.zeros(BLOCK_BYTES, dtype=torch.uint8)
    torch_that_pins(monkeypatch, pinned)
    assert arena.memory(MIB) is pinned
    assert runtime.registered == {} and arena.note == ""
    arena.close()


def test_where_nothing_pins_it_is_pageable_and_says_so(on_gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    arena, _ = on_gpu(2)
    torch_that_pins(monkeypatch, None)
    monkeypatch.setattr(module, "resource", SimpleNamespace(**vars(resource) | {"getrlimit": lambda _: (65536, 65536)}))
    assert arena.memory(MIB).numel() == BLOCK_BYTES
    assert "cannot be pinned (CUDA error 2; the limit on locked memory, ulimit -l, is 65,536 bytes)" in arena.note
    arena.close()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_real_gpu_it_is_pinned_and_copies_are_right() -> None:
    arena = Arena(torch.device("cuda", 0))
    memory = arena.memory(40 * MIB)
    assert memory.is_pinned() and arena.note == ""
    data = torch.randint(256, (memory.numel(),), dtype=torch.uint8, device="cuda")
    memory.copy_(data, non_blocking=True)
    torch.cuda.synchronize()
    assert torch.equal(memory, data.cpu())
    arena.close()


@pytest.mark.parametrize(("cores", "ranks", "expected"), [(2, 2, 4), (16, 1, 8), (48, 8, 6), (192, 8, 8), (None, 1, 4)])
def test_ranks_share_the_cores(cores: int | None, ranks: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setattr("resume_kit.environment.local_world_size", lambda: ranks)
    assert module._touchers() == expected
