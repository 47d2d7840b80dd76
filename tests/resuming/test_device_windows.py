"""Live tensors as the destination of a reading: on the CPU in place, on a GPU through windows and strided copies."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resume_kit.algebra.boxes import Box
from resume_kit.checkpoint import assignment, readplan
from resume_kit.checkpoint.assignment import needs_of
from resume_kit.checkpoint.blocks import digest_image
from resume_kit.checkpoint.carrying import carry_out
from resume_kit.checkpoint.destination import HostMemory
from resume_kit.checkpoint.node import Node
from resume_kit.checkpoint.pages import PAGE, allocate
from resume_kit.checkpoint.readplan import ReadPlan, Source, plan_reads, survey, window_bytes
from resume_kit.checkpoint.together import read_together
from resume_kit.checkpoint.transfers import Transfer
from resume_kit.engines import pinned
from resume_kit.errors import CheckpointDamaged
from resume_kit.resuming import device_windows
from resume_kit.resuming.device_windows import live_destination, move_strided
from tests.checkpoint.test_transfers import OFFSET, file_and_expectation, pairs
from tests.checkpoints import flip
from tests.nodes import in_threads

FILE = "rank-00000.safetensors"
BLOCK = 4096


@pytest.fixture(autouse=True)
def page_of_one_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or these small blocks would all be read whole."""
    monkeypatch.setattr(readplan, "PAGE", 1)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@given(pairs(), st.integers(0, 9), st.integers(0, 9), st.data())
def test_a_strided_copy_of_tensors_is_what_a_transfer_does(
    case: tuple[tuple[int, ...], Box, Box, int], before: int, aside: int, data: st.DataObject
) -> None:
    """Whole and cut anywhere, from and to memory that begins anywhere in its storage."""
    _, piece, box, itemsize = case
    image, expected = file_and_expectation(*case)
    transfer = Transfer.between(piece, OFFSET, box, itemsize, 0)
    cut = data.draw(st.integers(0, len(image)))
    storage = torch.zeros(before + len(expected) + 20, dtype=torch.uint8)
    target = storage[before : before + len(expected)]
    for start, stop in ((0, cut), (cut, len(image))):
        window = torch.zeros(aside + len(image), dtype=torch.uint8)[aside:]
        window[: stop - start] = torch.tensor(list(image[start:stop]), dtype=torch.uint8)
        for part in transfer.clip(start, stop):
            move_strided(part, window, start, target)
    assert bytes(target.tolist()) == expected
    assert int(storage.sum()) == int(target.sum())


def image_and_plan(directory: Path) -> tuple[bytes, ReadPlan, list[torch.Tensor], list[bytes]]:
    """A file of many blocks, what of it is wanted, live tensors for that, and what they must then hold.

    Wanted are: all of a large tensor, half of the columns of a matrix, single bytes, two odd ranges of one tensor.
    """
    image = np.random.default_rng(5).integers(0, 256, 50_000, np.uint8).tobytes()
    (directory / FILE).write_bytes(image)
    live = [torch.zeros(5_000, dtype=torch.float32), torch.zeros((100, 24), dtype=torch.bfloat16), torch.zeros(3)]
    live += [torch.zeros((), dtype=torch.int64), torch.zeros(0)]
    transfers = (
        Transfer(4_096, 0, 0, 20_000),
        Transfer(24_144, 1, 0, 48, ((100, 96, 48),)),
        Transfer(40_001, 2, 1, 2),
        Transfer(40_011, 2, 6, 5),
        Transfer(41_000, 3, 0, 8),
    )
    columns = np.frombuffer(image, np.uint8)[24_144:33_744].reshape(100, 96)[:, :48].tobytes()
    odd = bytes(1) + image[40_001:40_003] + bytes(3) + image[40_011:40_016] + bytes(1)
    expected = [image[4_096:24_096], columns, odd, image[41_000:41_008], b""]
    plan = plan_reads([Source(FILE, digest_image(memoryview(image), BLOCK), 50_000, transfers)])
    assert any(plan.whole) and {window.whole for window in plan.windows(0)} == {True, False}
    return image, plan, live, expected


def contents(live: list[torch.Tensor]) -> list[bytes]:
    return [tensor.cpu().reshape(-1).view(torch.uint8).numpy().tobytes() for tensor in live]


@pytest.mark.parametrize("readers", [1, 3])
def test_tensors_on_the_cpu_are_filled_in_place(readers: int, tmp_path: Path) -> None:
    _, plan, live, expected = image_and_plan(tmp_path)
    parameter = torch.nn.Parameter(live[0])
    destination = live_destination([parameter, *live[1:]])
    assert isinstance(destination, HostMemory)
    carry_out(plan, tmp_path, destination, readers=readers)
    assert contents(live) == expected and contents([parameter.detach()]) == expected[:1]


def test_a_tensor_that_is_not_contiguous_is_refused() -> None:
    with pytest.raises(RuntimeError, match="view"):
        live_destination([torch.zeros(4, 6)[:, :3]])


# -- the lane of a GPU, its stream played by another


class Stream:
    device = torch.device("cpu")
    waited = 0

    def synchronize(self) -> None:
        self.waited += 1


@pytest.mark.parametrize("on_host", [(), (0, 1), (2, 3, 4)])
def test_a_lane_brings_every_transfer_and_waits_before_its_window_is_used_again(
    on_host: tuple[int, ...], tmp_path: Path
) -> None:
    image, plan, live, expected = image_and_plan(tmp_path)
    flats = [tensor.view(-1).view(torch.uint8) for tensor in live]
    host = {number: flats[number].numpy().data for number in on_host}
    stream = Stream()
    memory = memoryview(bytearray(plan.window_bytes))
    lane = device_windows._DeviceLane(flats, host, memory, stream)  # type: ignore[arg-type]
    for taken, window in enumerate(plan.windows(0)):
        memory = lane.memory()
        assert stream.waited == taken + 1
        for start, stop in window.reads.tolist():
            memory[start - window.start : stop - window.start] = image[start:stop]
        lane.take(memory, window)
    assert contents(live) == expected


def test_a_lane_takes_from_memory_that_is_not_its_own(tmp_path: Path) -> None:
    """From the window of another rank, where the lane has none: and waits when it is told to."""
    image, plan, live, expected = image_and_plan(tmp_path)
    stream = Stream()
    flats = [tensor.view(-1).view(torch.uint8) for tensor in live]
    lane = device_windows._DeviceLane(flats, {}, memoryview(b""), stream)  # type: ignore[arg-type]
    for window in plan.windows(0):
        lane.take(memoryview(bytearray(image[window.start : window.stop])), window)
    assert contents(live) == expected and stream.waited == 0
    lane.wait()
    assert stream.waited == 1


class Cuda:
    """cudaHostRegister and its opposite, which note what is pinned."""

    def __init__(self, error: int) -> None:
        self.error = error
        self.pinned: dict[int, int] = {}

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        assert flags == 0 and address % PAGE == 0
        if not self.error:
            self.pinned[address] = nbytes
        return self.error

    def cudaHostUnregister(self, address: int) -> int:
        del self.pinned[address]
        return 0


@pytest.mark.parametrize("error", [0, 2])
def test_the_memory_of_a_lane_is_pinned_where_that_is_possible_and_only_while_it_lasts(
    error: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = Cuda(error)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(pinned, "_forgotten", lambda error, _device: error)
    memory = allocate(3 * PAGE)
    with device_windows._pinned(memory, torch.device("cuda", 0)):
        address = np.frombuffer(memory, np.uint8).ctypes.data
        assert cuda.pinned == ({} if error else {address: 3 * PAGE})
    assert not cuda.pinned


# -- on a GPU


@needs_gpu
@pytest.mark.parametrize("readers", [1, 4])
def test_a_gpu_gets_the_same_bytes_and_the_host_what_is_the_hosts(readers: int, tmp_path: Path) -> None:
    _, plan, live, expected = image_and_plan(tmp_path)
    for on_host in ((), (0,), (1, 3)):
        mixed = [tensor if number in on_host else tensor.cuda() for number, tensor in enumerate(live)]
        carry_out(plan, tmp_path, live_destination(mixed), readers=readers)
        assert contents(mixed) == expected


@needs_gpu
def test_nothing_of_a_bad_block_reaches_a_gpu(tmp_path: Path) -> None:
    _, plan, live, _ = image_and_plan(tmp_path)
    flip(tmp_path / FILE, 5 * BLOCK + 7, 2)
    on_device = live[0].cuda()
    with pytest.raises(CheckpointDamaged):
        carry_out(plan, tmp_path, live_destination([on_device, *live[1:]]), readers=2)
    assert not on_device.view(torch.uint8)[4 * BLOCK : 5 * BLOCK].any()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_ranks_of_a_node_take_their_parts_of_a_block_that_one_of_them_reads(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Halves of the columns of a matrix and, for both, all of a tensor; one rank has a part of it in host memory."""
    monkeypatch.setattr(assignment, "LEAST_SHARED", 1)
    image, plan, _, _ = image_and_plan(tmp_path)
    matrix = np.frombuffer(image, np.uint8)[24_144:33_744].reshape(100, 96)

    def read(node: Node) -> tuple[int, list[bytes]]:
        half = 48 * node.rank
        live = [
            torch.zeros(5_000, device="cpu" if node.rank else device),
            torch.zeros(100, 24, device=device).bfloat16(),
        ]
        transfers = (Transfer(4_096, 0, 0, 20_000), Transfer(24_144 + half, 1, 0, 48, ((100, 96, 48),)))
        sources, destination = [Source(FILE, plan.sources[0].digests, 50_000, transfers)], live_destination(live)
        touched = [survey(source) for source in sources]
        with read_together(node, needs_of(sources, touched), window_bytes(sources), destination) as together:
            mine = plan_reads(sources, touched, together.shared)
            assert together.shared == {FILE: {*range(1, 8)}}
            account = carry_out(mine, tmp_path, destination, readers=2, together=together)
        return account.verified_bytes, contents(live)

    outcomes = in_threads(2, read)
    for rank, outcome in enumerate(outcomes):
        assert isinstance(outcome, tuple), outcome
        assert outcome[1] == [image[4_096:24_096], matrix[:, 48 * rank : 48 * rank + 48].tobytes()]
    assert sum(outcome[0] for outcome in outcomes if isinstance(outcome, tuple)) == 7 * BLOCK
