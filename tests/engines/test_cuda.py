"""What only a GPU can show: device fingerprints and RNG, copies on a side stream, the fence. Skipped without one."""

from __future__ import annotations

import random
import time

import numpy as np
import pytest
import torch

from resume_kit.algebra import fingerprint as reference
from resume_kit.algebra.boxes import Box, boxes_of_flat_range
from resume_kit.engines import rng
from resume_kit.engines.fingerprint import FingerprintPlan, as_unsigned, fingerprints
from resume_kit.saving.arena import Arena
from resume_kit.saving.measure import Measurement
from resume_kit.saving.staging import Staging

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64", "int64", "uint8"])
def test_the_device_computes_the_reference_fingerprint(dtype: str) -> None:
    shape = (37, 53, 29)
    raw = torch.randint(0, 256, (37 * 53 * 29 * 8,), dtype=torch.uint8)
    data = raw.view(getattr(torch, dtype))[: 37 * 53 * 29]
    start, stop = 1_000, 50_001
    boxes = boxes_of_flat_range(shape, start, stop)
    parts = []
    for box in boxes:
        view = data[start : start + box.numel]
        start += box.numel
        host = view.view(torch.uint8).numpy().view(f"u{view.element_size()}")
        (device,) = as_unsigned(fingerprints([(view.cuda(), shape, box)]))
        assert device == reference.fingerprint_of_box(host, shape, box)
        parts.append(device)
    assert len(parts) == len(boxes) > 1


def test_device_generators_come_back() -> None:
    torch.cuda.manual_seed_all(5)
    random.seed(5)
    torch.rand(3, device="cuda")
    state = rng.capture({})
    expected = torch.rand(100, device="cuda"), torch.rand(10), random.random(), np.random.rand()
    rng.seed_all(9)
    rng.restore(state, {})
    found = torch.rand(100, device="cuda"), torch.rand(10), random.random(), np.random.rand()
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert found[2:] == expected[2:]


HEADER, SIZE, CYCLES = b"h" * 4096, 40 << 20, 200_000_000  # about 0.1 s of a device doing nothing


def staged(arena: Arena, data: torch.Tensor, side: torch.cuda.Stream, *, room: int | None = None) -> Staging:
    memory = arena.memory(room or SIZE + len(HEADER))
    assert memory.is_pinned(), arena.note
    return Staging([(len(HEADER), data)], SIZE + len(HEADER), memory, side, 60.0)


def image_of(staging: Staging) -> bytes:
    parts = {}
    for block in staging.blocks(HEADER):
        parts[block.number] = bytes(block.memory)
        if block.free is not None:
            block.free()
    return b"".join(parts[number] for number in sorted(parts))


def wait_until_queued(staging: Staging) -> None:
    deadline = time.monotonic() + 10.0
    while not staging.by_device_alone:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def bytes_on_device(seed: int) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randint(0, 256, (SIZE,), dtype=torch.uint8, device="cuda:0", generator=generator)


@pytest.mark.parametrize("fenced", [True, False])
def test_only_the_fence_keeps_an_update_from_what_is_being_copied(fenced: bool) -> None:
    data, side = bytes_on_device(1), torch.cuda.Stream()
    before = HEADER + bytes(data.cpu().numpy())
    arena = Arena(data.device)
    staging = staged(arena, data, side)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(CYCLES)
    staging.start()
    staging.start_rest()
    wait_until_queued(staging)
    if fenced:
        staging.copied_on_device()
    data.zero_()
    assert (image_of(staging) == before) is fenced


def test_a_bounded_arena_gives_the_same_image() -> None:
    data, side = bytes_on_device(2), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    arena = Arena(data.device)
    assert image_of(staged(arena, data, side, room=32 << 20)) == HEADER + bytes(data.cpu().numpy())


def test_measurements_are_not_read_before_they_are_there() -> None:
    data = torch.randn(1 << 20, device="cuda")
    plan = FingerprintPlan([(data, (1 << 20,), Box.whole((1 << 20,)))])
    expected = plan.run().tolist()
    torch.cuda._sleep(CYCLES)
    values = plan.run()
    done = torch.cuda.Event()
    done.record()
    measurement = Measurement(values, values, values, values, done)
    with torch.cuda.stream(torch.cuda.Stream()):
        measurement.wait()
        assert values.tolist() == expected


def test_pieces_on_host_and_device_go_together() -> None:
    shape, box = (40, 25), Box.whole((40, 25))
    host = torch.randn(1000)
    mixed = fingerprints([(host, shape, box), (host.cuda(), shape, box), (host.bfloat16().cuda(), shape, box)])
    one, two, three = as_unsigned(mixed)
    assert one == two == reference.fingerprint_of_box(host.numpy(), shape, box)
    assert three == reference.fingerprint_of_box(host.bfloat16().view(torch.int16).numpy().view("u2"), shape, box)


def test_what_a_capture_writes_is_copied_after_the_rest() -> None:
    """Most copies start before the state is looked at; a buffer's snapshot is taken after that."""
    data, arena, side = bytes_on_device(5), Arena(torch.device("cuda:0")), torch.cuda.Stream()
    staging = staged(arena, data, side)
    lo, hi = len(HEADER) + (17 << 20), len(HEADER) + (17 << 20) + 100
    torch.cuda._sleep(CYCLES)
    side.wait_stream(torch.cuda.current_stream())
    staging.start(without=[(lo, hi)])
    assert not staging.by_device_alone
    data[17 << 20 : (17 << 20) + 100] = 7
    side.wait_stream(torch.cuda.current_stream())
    staging.start_rest()
    wait_until_queued(staging)
    image = image_of(staging)
    assert image[lo:hi] == bytes([7]) * 100
    assert image == HEADER + bytes(data.cpu().numpy())
    arena.close()


@pytest.mark.parametrize(("hurried", "queued"), [(False, 1), (True, 3)])
def test_few_copies_are_queued_at_a_time_and_none_after_abandon(hurried: bool, queued: int) -> None:
    """Else a copy of the training's own would wait behind all of the state."""
    side, arena = torch.cuda.Stream(), Arena(torch.device("cuda:0"))
    data = torch.zeros(512 << 20, dtype=torch.uint8, device="cuda:0")
    memory = arena.memory(data.numel())
    memory.fill_(1)
    with torch.cuda.stream(side):
        torch.cuda._sleep(CYCLES)
    staging = Staging([(0, data)], data.numel(), memory, side, 60.0)
    if hurried:
        staging.hurry()
    staging.start()
    staging.start_rest()
    time.sleep(0.02)
    assert not staging.by_device_alone  # the device sleeps: the next copy waits for the first
    staging.abandon()
    side.synchronize()
    copied = int((memory == 0).sum())
    assert copied == queued * 4 * (16 << 20)
    arena.close()
