"""Staging: the image of the file comes block by block; a bounded ring uses memory again only once it is free."""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch

from resume_kit.checkpoint import blocks
from resume_kit.errors import SaveFailed
from resume_kit.saving import staging as module
from resume_kit.saving.staging import Block, Staging, on_stream

BLOCK = 1024
HEADER = bytes(range(200))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_BYTES", BLOCK)
    monkeypatch.setattr(module, "spans", lambda size: blocks.spans(size, BLOCK))


def sources_of(size: int, seed: int = 0) -> list[tuple[int, torch.Tensor]]:
    """The file behind its header, cut at random places."""
    rng = random.Random(seed)
    cuts = sorted({len(HEADER), size, *(rng.randrange(len(HEADER), size) for _ in range(9))})
    return [(a, torch.randint(256, (b - a,), dtype=torch.uint8)) for a, b in pairwise(cuts)]


def image_of(sources: list[tuple[int, torch.Tensor]]) -> bytes:
    return HEADER + b"".join(bytes(data.numpy()) for _, data in sources)


def staged(size: int, room: int, *, seed: int = 0, timeout: float = 5.0) -> tuple[Staging, bytes, torch.Tensor]:
    """A staging of a random file with memory for `room` blocks, the file's bytes, and that memory."""
    sources = sources_of(size, seed)
    memory = torch.full((room * BLOCK,), 255, dtype=torch.uint8)
    return Staging(sources, size, memory, None, timeout), image_of(sources), memory


def place(block: Block, memory: torch.Tensor) -> int:
    """Where the block lies in `memory`, in blocks."""
    offset = torch.frombuffer(block.memory, dtype=torch.uint8).data_ptr() - memory.data_ptr()
    assert offset % BLOCK == 0
    return offset // BLOCK


@pytest.mark.parametrize("size", [len(HEADER) + 11, BLOCK, 3 * BLOCK, 6 * BLOCK + 1])
@pytest.mark.parametrize("seed", range(5))
def test_with_room_for_all_the_memory_becomes_the_image(size: int, seed: int) -> None:
    staging, image, memory = staged(size, 7, seed=seed)
    assert not staging.bounded and not staging.by_device_alone
    found = list(staging.blocks(HEADER))
    assert [block.number for block in found] == list(range(-(-size // BLOCK)))
    assert b"".join(block.memory for block in found) == image == bytes(memory[:size].numpy())
    assert all(block.free is None for block in found)
    assert staging.copied == len(found)


@pytest.mark.parametrize("room", [1, 2, 5])
@pytest.mark.parametrize("seed", range(5))
def test_a_bounded_ring_gives_all_blocks_in_order(room: int, seed: int) -> None:
    staging, image, memory = staged(6 * BLOCK + 77, room, seed=seed)
    assert staging.bounded
    found, places = b"", set()
    for number, block in enumerate(staging.blocks(HEADER)):
        assert block.number == number and block.free is not None
        found += bytes(block.memory)
        places.add(place(block, memory))
        block.free()
    assert found == image and places == set(range(room))


def test_memory_is_used_again_only_once_it_is_free() -> None:
    staging, image, memory = staged(4 * BLOCK, 2)
    coming = staging.blocks(HEADER)
    first, second = next(coming), next(coming)
    assert second.free is not None
    second.free()
    third = next(coming)
    assert place(third, memory) == place(second, memory) != place(first, memory)
    assert bytes(first.memory) == image[:BLOCK] and bytes(third.memory) == image[2 * BLOCK : 3 * BLOCK]


def test_a_block_is_copied_when_it_is_asked_for_and_not_before() -> None:
    """A caller that waits for the disk before it goes on must know what has been copied."""
    staging, _, memory = staged(4 * BLOCK, 4)
    coming = staging.blocks(HEADER)
    next(coming)
    assert staging.copied == 1 and bool((memory[BLOCK:] == 255).all())


def test_blocks_that_are_left_for_later_come_last_and_whole() -> None:
    staging, image, memory = staged(6 * BLOCK + 77, 7)
    staging.start(without=[(2 * BLOCK - 1, 2 * BLOCK + 1), (5 * BLOCK, 5 * BLOCK + 9)])
    staging.start_rest()
    found = list(staging.blocks(HEADER))
    assert [block.number for block in found] == [0, 3, 4, 6, 1, 2, 5]
    assert all(bytes(b.memory) == image[b.number * BLOCK : (b.number + 1) * BLOCK] for b in found)
    assert bytes(memory[: len(image)].numpy()) == image


def test_the_header_may_lie_in_blocks_left_for_later() -> None:
    staging, image, _ = staged(3 * BLOCK, 3)
    staging.start(without=[(0, 1)])
    staging.start_rest()
    found = {block.number: bytes(block.memory) for block in staging.blocks(HEADER)}
    assert b"".join(found[number] for number in sorted(found)) == image


def test_where_no_memory_becomes_free_it_fails_within_the_bound() -> None:
    staging, _, _ = staged(4 * BLOCK, 2, timeout=0.2)
    coming = staging.blocks(HEADER)
    next(coming), next(coming)
    began = time.monotonic()
    with pytest.raises(SaveFailed, match="does not take the checkpoint") as failure:
        next(coming)
    assert 0.15 < time.monotonic() - began < 3.0
    (problem,) = failure.value.problems
    assert "no block was written within" in problem.what and "file system" in problem.remedy
    assert staging.copied == 2


def test_a_thread_is_on_the_streams_device_before_its_stream_is_set_and_until_it_is_taken_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Or torch goes back to the first device in its own way. Streams and devices are fakes that note their use."""
    calls: list[str] = []

    @contextmanager
    def noted(what: object) -> Iterator[None]:
        calls.append(f"into {what}")
        yield
        calls.append(f"out of {what}")

    class Side:
        device = torch.device("cuda", 1)

        def __str__(self) -> str:
            return "the stream"

    monkeypatch.setattr(torch.cuda, "device", noted)
    monkeypatch.setattr(torch.cuda, "stream", noted)
    with on_stream(Side()):  # type: ignore[arg-type]
        assert calls == ["into cuda:1", "into the stream"]
    assert calls[2:] == ["out of the stream", "out of cuda:1"]
    with on_stream(None):
        assert len(calls) == 4


class FakeEvent:
    """The end of a copy that comes when a test says so; `awaited` once somebody waits for it."""

    def __init__(self) -> None:
        self.awaited, self.come = threading.Event(), threading.Event()

    def synchronize(self) -> None:
        self.awaited.set()
        assert self.come.wait(5)


@pytest.fixture
def queued(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[FakeEvent]]:
    """Take the events of the next copies that are queued. Copies from a device are fakes, of a block each."""
    events: queue.SimpleQueue[FakeEvent] = queue.SimpleQueue()

    def copy(*_: object) -> FakeEvent:
        event = FakeEvent()
        events.put(event)
        return event

    def take(count: int) -> list[FakeEvent]:
        taken = [events.get(timeout=5) for _ in range(count)]
        time.sleep(0.05)  # in which one too many would come
        assert events.empty()
        return taken

    monkeypatch.setattr(module, "_TOGETHER", 1)
    monkeypatch.setattr(Staging, "_copy_from_device", copy)
    return take


def paced(count: int) -> Staging:
    stream: Any = object()
    return Staging([], count * BLOCK, torch.empty(count * BLOCK, dtype=torch.uint8), stream, 5.0)


def test_beside_training_a_copy_is_queued_once_the_one_before_has_come(
    queued: Callable[[int], list[FakeEvent]],
) -> None:
    staging = paced(5)
    staging.start()
    staging.start_rest()
    for _ in range(5):
        (event,) = queued(1)
        event.come.set()
    assert [block.number for block in staging.blocks(HEADER)] == list(range(5))


def test_once_somebody_waits_the_queue_does_not_run_dry(queued: Callable[[int], list[FakeEvent]]) -> None:
    staging = paced(6)
    staging.start()
    (first,) = queued(1)
    staging.hurry()
    first.come.set()
    flight = queued(3)
    flight[0].come.set()
    flight += queued(1)
    assert flight[1].awaited.wait(5) and not flight[2].awaited.is_set()
    for event in flight:
        event.come.set()
    staging.abandon()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_small_copy_of_trainings_own_comes_in_between(monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy engine stays with a queue that never runs dry, so it has to."""
    monkeypatch.undo()
    size = 128 * blocks.BLOCK_BYTES
    sources = [(at, torch.empty(size // 16, dtype=torch.uint8, device="cuda")) for at in range(0, size, size // 16)]
    memory, stream = torch.empty(size, dtype=torch.uint8, pin_memory=True), torch.cuda.Stream()
    flag = torch.ones(1, device="cuda")

    def run(*, hurried: bool) -> tuple[float, float]:
        """Seconds until all is copied, and the longest that a small copy took meanwhile."""
        staging, longest, over = Staging(sources, size, memory, stream, 5.0), 0.0, threading.Event()
        if hurried:
            staging.hurry()
        torch.cuda.synchronize()
        began = time.perf_counter()
        staging.start()
        staging.start_rest()

        def drain() -> None:
            try:
                list(staging.blocks(HEADER))
            finally:
                over.set()

        threading.Thread(target=drain).start()
        while not over.wait(0.001):
            asked = time.perf_counter()
            flag.item()
            longest = max(longest, time.perf_counter() - asked)
        assert staging.copied == 128
        return time.perf_counter() - began, longest

    run(hurried=False)
    runs = [run(hurried=False) for _ in range(3)]
    assert min(longest for _, longest in runs) < 0.2 * min(whole for whole, _ in runs)
    assert min(run(hurried=True) for _ in range(3))[0] < 1.05 * min(whole for whole, _ in runs)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("room", [7, 2])
def test_from_a_device_the_same_bytes_come(room: int) -> None:
    sources = sources_of(6 * BLOCK + 1)
    mixed = [(offset, data.cuda() if n % 2 else data) for n, (offset, data) in enumerate(sources)]
    memory = torch.empty(room * BLOCK, dtype=torch.uint8, pin_memory=True)
    staging = Staging(mixed, 6 * BLOCK + 1, memory, torch.cuda.Stream(), 5.0)
    if not staging.bounded:
        staging.start()
    staging.start_rest()
    found = b""
    for block in staging.blocks(HEADER):
        found += bytes(block.memory)
        if block.free is not None:
            block.free()
    assert found == image_of(sources)
