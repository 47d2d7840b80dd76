"""16 ranks become 24, and back: real files, every rank's reading, no engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from resume_kit.algebra import fingerprint
from resume_kit.algebra.boxes import Box
from resume_kit.checkpoint.records import TensorKey
from resume_kit.errors import CheckpointDamaged
from resume_kit.planning.layouts.layout import Layout
from resume_kit.planning.layouts.megatron import megatron_layout
from resume_kit.planning.layouts.topology import MegatronTopology
from resume_kit.planning.layouts.zero import zero_layout
from resume_kit.resuming.reading import verify_unread
from tests.damage import flip_bit
from tests.planning.models import Gpt
from tests.reading import read, surplus_allowed
from tests.resharding.simulated import holdings, order_of, random_state, write_world

GPT = Gpt(layers=4, hidden=144, ffn=432, heads=12, groups=12, vocabulary=240, tied=True).geometry
SHAPES = {name: weight.shape for name, weight in GPT.weights.items()}
BLOCK_BYTES = 64 << 10


def zero(stage: int, world_size: int) -> Layout:
    return zero_layout(SHAPES, [list(SHAPES)], stage=stage, world_size=world_size)


def megatron(world_size: int, tensor: int, pipeline: int) -> Layout:
    topology = MegatronTopology(world_size=world_size, tensor_parallel=tensor, pipeline_parallel=pipeline)
    return megatron_layout(GPT, topology)


CHANGES = {
    "ZeRO-3 on 16 to 24": (zero(3, 16), zero(3, 24)),
    "ZeRO-3 on 24 to 16": (zero(3, 24), zero(3, 16)),
    "ZeRO-3 on 16 to ZeRO-1 on 24": (zero(3, 16), zero(1, 24)),
    "TP4 PP2 DP2 to TP3 PP4 DP2": (megatron(16, 4, 2), megatron(24, 3, 4)),
    "TP2 PP4 DP2 to TP6 PP2 DP2": (megatron(16, 2, 4), megatron(24, 6, 2)),
    "TP4 PP2 DP3 to ZeRO-3 on 16": (megatron(24, 4, 2), zero(3, 16)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_element_arrives_on_every_rank_that_holds_it(change: str, tmp_path: Path) -> None:
    source, target = CHANGES[change]
    state = random_state(SHAPES)
    indices = write_world(tmp_path / "world", state, source, BLOCK_BYTES)
    sums: dict[TensorKey, list[int]] = {spec.key: [] for spec in state}
    elements = dict.fromkeys(sums, 0)
    for rank in range(target.world_size):
        held = list(holdings(target, rank))
        assert held
        order = order_of(held, indices)
        staged = read(tmp_path / "world", order)
        for one in held:
            found = staged.get(one.spec.key, one.box)
            assert found is not None
            assert np.array_equal(found.numpy(), state[one.spec][one.box.slices].ravel())
            if one.owned:
                sums[one.spec.key].append(fingerprint.fingerprint_of_box(found.numpy(), one.spec.shape, one.box))
                elements[one.spec.key] += one.box.numel
        account = staged.account
        assert account.wanted_bytes == sum(one.box.numel * one.spec.itemsize for one in held)
        assert account.verified_bytes <= account.read_bytes
        assert 0 <= account.read_bytes - account.wanted_bytes <= surplus_allowed(order)
    saved = {key: fingerprint.combine(parts) for key, parts in sums.items()}
    for spec, array in state.items():
        assert elements[spec.key] == spec.numel
        whole = [fingerprint.from_hex(p.fingerprint) for i in indices.values() for p in i.pieces if p.spec == spec]
        assert saved[spec.key] == fingerprint.combine(whole)
        assert saved[spec.key] == fingerprint.fingerprint_of_box(array.ravel(), spec.shape, Box.whole(spec.shape))


def test_a_flipped_bit_changes_the_sum_or_is_met_in_a_whole_block(tmp_path: Path) -> None:
    source, target = CHANGES["ZeRO-3 on 16 to 24"]
    state = random_state(SHAPES)
    indices = write_world(tmp_path / "world", state, source, BLOCK_BYTES)
    piece = max((p for p in indices[7].pieces if p.key.kind == "master"), key=lambda p: p.nbytes)
    assert piece.offset is not None
    flip_bit(tmp_path / "world" / indices[7].data_file, 8 * (piece.offset + piece.nbytes // 2))
    met, total = [], 0
    for rank in range(target.world_size):
        held = list(holdings(target, rank))
        order = order_of(held, indices)
        try:
            staged = read(tmp_path / "world", order)
        except CheckpointDamaged as damage:
            met.append(str(damage))
            continue
        parts = [(one.box, staged.get(one.spec.key, one.box)) for one in held if one.spec == piece.spec]
        shares = [fingerprint.fingerprint_of_box(found.numpy(), piece.spec.shape, box) for box, found in parts]
        before = [
            fingerprint.fingerprint_of_box(state[piece.spec][box.slices].ravel(), piece.spec.shape, box)
            for box, _ in parts
        ]
        if shares != before:
            total += 1
            with pytest.raises(CheckpointDamaged, match="rank-00007"):
                verify_unread(tmp_path / "world", order, staged.account)
    assert len(met) + total == 1
    assert all("rank-00007.safetensors" in text for text in met)
