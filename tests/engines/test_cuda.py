"""What only a GPU can show: device fingerprints, device RNG, the pinned arena. Skipped, saying so, without one."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from resume_kit.algebra import fingerprint as reference
from resume_kit.algebra.boxes import Box, boxes_of_flat_range
from resume_kit.checkpoint.layout import plan_file
from resume_kit.checkpoint.records import TensorKey, TensorSpec
from resume_kit.engines import rng
from resume_kit.engines.adapter import LivePiece
from resume_kit.engines.fingerprint import as_unsigned, fingerprints
from resume_kit.saving.staging import Arena, stage

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


def test_the_pinned_arena_is_the_file() -> None:
    spec = TensorSpec(TensorKey("master", "w"), "float32", (64, 1000))
    data = torch.randn(64_000, device="cuda")
    layout = plan_file([(spec, Box.whole(spec.shape))], {})
    arena = Arena(torch.device("cuda"))
    staged = stage(arena, layout, [LivePiece(spec, Box.whole(spec.shape), data)], frozenset())
    assert arena.reserve(1).is_pinned()
    offset = staged.pieces[0].offset
    assert offset is not None
    assert bytes(staged.image[offset : offset + 256_000]) == data.cpu().numpy().tobytes()


def test_pieces_on_host_and_device_go_together() -> None:
    shape, box = (40, 25), Box.whole((40, 25))
    host = torch.randn(1000)
    mixed = fingerprints([(host, shape, box), (host.cuda(), shape, box), (host.bfloat16().cuda(), shape, box)])
    one, two, three = as_unsigned(mixed)
    assert one == two == reference.fingerprint_of_box(host.numpy(), shape, box)
    assert three == reference.fingerprint_of_box(host.bfloat16().view(torch.int16).numpy().view("u2"), shape, box)
