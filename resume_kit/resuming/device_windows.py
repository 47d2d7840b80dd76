"""Live tensors as the destination of a reading: host memory directly, a GPU's through pinned windows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import numpy as np
import torch

from resume_kit.checkpoint.destination import Destination, HostMemory, Lane
from resume_kit.checkpoint.pages import allocate
from resume_kit.checkpoint.readplan import Window
from resume_kit.checkpoint.transfers import Transfer
from resume_kit.engines import pinned

_UNITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def live_destination(tensors: Sequence[torch.Tensor]) -> Destination:
    """`tensors` (contiguous) as the targets of a reading, by number. They are on the CPU, or on it and one GPU."""
    flats = [tensor.detach().view(-1).view(torch.uint8) for tensor in tensors]
    devices = {flat.device for flat in flats if flat.device.type != "cpu"}
    host = {number: _memory(flat) for number, flat in enumerate(flats) if flat.device.type == "cpu"}
    if not devices:
        return HostMemory([host[number] for number in range(len(flats))])
    (device,) = devices
    return DeviceWindows(flats, host, device)


def _memory(flat: torch.Tensor) -> memoryview:
    """The memory of a 1-D uint8 tensor on the CPU."""
    return flat.numpy().data


@contextmanager
def _pinned(memory: memoryview, device: torch.device) -> Iterator[None]:
    """Host memory on whole pages, registered with the GPU. Where it cannot be, copies only take longer.

    Registered in each thread at the same time, it is there sooner than torch's own pinned memory. Another thread may
    end it.
    """
    address = np.frombuffer(memory, np.uint8).ctypes.data
    refused = pinned.register(address, len(memory), device)
    try:
        yield
    finally:
        if not refused:
            pinned.unregister(address, device)


class DeviceWindows:
    """Targets in the memory of a GPU, and some in host memory (`host`, by number)."""

    def __init__(self, flats: Sequence[torch.Tensor], host: dict[int, memoryview], device: torch.device) -> None:
        self._flats = flats
        self._host = host
        self._device = device
        torch.cuda.synchronize(device)  # what was done to the targets before is over

    @contextmanager
    def lane(self, nbytes: int) -> Iterator[Lane]:
        stream, memory = torch.cuda.Stream(self._device), allocate(nbytes)  # type: ignore[no-untyped-call]
        held = self.pinned(memory) if nbytes else nullcontext()
        with torch.cuda.device(self._device), torch.cuda.stream(stream), held:
            try:
                yield _DeviceLane(self._flats, self._host, memory, stream)
            finally:
                stream.synchronize()

    def pinned(self, memory: memoryview) -> AbstractContextManager[None]:
        return _pinned(memory, self._device)


class _DeviceLane:
    """Copies are queued on the lane's stream. While they are on their way, other lanes read."""

    def __init__(
        self,
        flats: Sequence[torch.Tensor],
        host: dict[int, memoryview],
        window: memoryview,
        stream: torch.cuda.Stream,
    ) -> None:
        self._flats, self._host, self._window, self._stream = flats, host, window, stream
        self._on_device: torch.Tensor | None = None

    def memory(self) -> memoryview:
        self.wait()
        return self._window

    def wait(self) -> None:
        self._stream.synchronize()

    def take(self, memory: memoryview, window: Window) -> None:
        strided = []
        read = torch.frombuffer(memory, dtype=torch.uint8)
        for transfer in window.transfers:
            if transfer.target in self._host:
                transfer.move(memory, window.start, self._host[transfer.target])
            elif transfer.grid:
                strided.append(transfer)
            else:
                source = read.narrow(0, transfer.offset - window.start, transfer.length)
                self._flats[transfer.target].narrow(0, transfer.at, transfer.length).copy_(source, non_blocking=True)
        if strided:
            self._scatter(read, window.start, strided)

    def _scatter(self, read: torch.Tensor, start: int, strided: Sequence[Transfer]) -> None:
        """One copy to the device for all of `strided`, whose runs then find their places there."""
        if self._on_device is None or len(self._on_device) < len(read):
            self._on_device = torch.empty_like(read, device=self._stream.device)
        lo = min(transfer.offset for transfer in strided) - start
        hi = max(transfer.stop for transfer in strided) - start
        self._on_device[lo:hi].copy_(read[lo:hi], non_blocking=True)
        for transfer in strided:
            move_strided(transfer, self._on_device, start, self._flats[transfer.target])


def move_strided(transfer: Transfer, window: torch.Tensor, start: int, target: torch.Tensor) -> None:
    """`Transfer.move` between two uint8 tensors of one device, as one strided copy in the largest words that fit."""
    counts, sources, aims = zip(*transfer.grid, strict=True) if transfer.grid else ((), (), ())
    origin = int(window.storage_offset()) + transfer.offset - start
    aim = int(target.storage_offset()) + transfer.at
    unit = math.gcd(8, transfer.length, origin, aim, *sources, *aims)
    shape = (*counts, transfer.length // unit)

    def view(tensor: torch.Tensor, at: int, strides: Sequence[int]) -> torch.Tensor:
        empty = torch.empty(0, dtype=_UNITS[unit], device=tensor.device)
        return empty.set_(tensor.untyped_storage(), at // unit, shape, (*(step // unit for step in strides), 1))

    view(target, aim, aims).copy_(view(window, origin, sources), non_blocking=True)
