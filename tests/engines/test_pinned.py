"""Pinning host memory: on the GPU of this rank, whatever the thread, and a refusal leaves nothing behind.

CUDA is played by a fake that keeps a device a thread and an error for the next kernel, as CUDA does; what a real one
does on two GPUs is in tests/saving/test_other_gpu.py.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from resume_kit.engines import pinned

DEVICE = torch.device("cuda", 1)


class FakeCuda:
    """As much of CUDA's runtime as is called; registering returns `error`."""

    def __init__(self, error: int) -> None:
        self.error, self.kept = error, 0
        self.thread = threading.local()
        self.registered: dict[int, int] = {}

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        self.thread.device = device.index
        yield
        self.thread.device = 0

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        assert self.thread.device == DEVICE.index
        self.kept = self.error
        if not self.error:
            self.registered[address] = nbytes
        return self.error

    def cudaHostUnregister(self, address: int) -> int:
        assert self.thread.device == DEVICE.index
        self.kept = 0 if self.registered.pop(address, None) else 713
        return self.kept

    def ones(self, _numel: int, device: torch.device) -> None:
        """A kernel, which raises what an earlier call has left behind."""
        kept, self.kept = self.kept, 0
        if kept:
            raise RuntimeError(f"CUDA error {kept}")


@pytest.fixture
def fake(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    cuda = FakeCuda(request.param)
    there = SimpleNamespace(cuda=SimpleNamespace(cudart=lambda: cuda, device=cuda.device), ones=cuda.ones)
    monkeypatch.setattr(pinned, "torch", there)
    return cuda


def in_a_thread(call: object, *arguments: object) -> int:
    found: list[int] = []
    assert callable(call)
    thread = threading.Thread(target=lambda: found.append(call(*arguments)))
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.parametrize("fake", [0], indirect=True)
def test_any_thread_pins_and_unpins_on_the_ranks_own_device(fake: FakeCuda) -> None:
    assert in_a_thread(pinned.register, 4096, 100, DEVICE) == 0
    assert fake.registered == {4096: 100}
    assert in_a_thread(pinned.unregister, 4096, DEVICE) == 0
    assert fake.registered == {}


@pytest.mark.parametrize("fake", [2], indirect=True)
def test_the_next_kernel_does_not_raise_what_was_refused(fake: FakeCuda) -> None:
    assert pinned.register(4096, 100, DEVICE) == 2
    fake.ones(1, DEVICE)
    assert pinned.unregister(4096, DEVICE) == 713
    fake.ones(1, DEVICE)
    fake.kept = 2
    with pytest.raises(RuntimeError, match="CUDA error 2"):
        fake.ones(1, DEVICE)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_real_refusal_leaves_no_error_behind() -> None:
    """The address of no memory at all, then memory that was never registered."""
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    assert pinned.register(4096, 4096, device) != 0
    assert torch.ones(3, device=device).sum().item() == 3
    pages = torch.empty(1 << 20, dtype=torch.uint8)
    assert pinned.unregister(pages.data_ptr(), device) != 0
    assert torch.ones(3, device=device).sum().item() == 3
