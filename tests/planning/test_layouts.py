"""Layouts of any topology own every element exactly once."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resume_kit.algebra.boxes import Box, boxes_of_flat_range
from resume_kit.planning.layouts.geometry import Geometry
from resume_kit.planning.layouts.megatron import gradient_buffer, megatron_layout
from resume_kit.planning.layouts.target import ModelSizes, target_problems
from resume_kit.planning.layouts.topology import MegatronTopology
from resume_kit.planning.layouts.zero import zero_layout
from resume_kit.planning.ownership import uncovered
from resume_kit.planning.table import boxes_of_flat_ranges, cut, padded_shapes
from tests.planning.models import Gpt

SHAPES = st.lists(st.integers(1, 6), max_size=3).map(tuple)


# -- flat ranges


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_boxes_of_many_flat_ranges_are_those_of_each(data: st.DataObject) -> None:
    width = data.draw(st.integers(1, 4))
    shape = st.lists(st.integers(0, 5), min_size=width, max_size=width).map(tuple)
    shapes = data.draw(st.lists(shape, min_size=1, max_size=8))
    ends = [sorted(data.draw(st.tuples(*[st.integers(0, math.prod(s))] * 2))) for s in shapes]
    start, stop = (np.array([pair[i] for pair in ends], np.int64) for i in (0, 1))
    row, lo, hi = boxes_of_flat_ranges(padded_shapes(shapes), start, stop)
    found: list[list[Box]] = [[] for _ in shapes]
    for r, a, b in zip(row.tolist(), lo.tolist(), hi.tolist(), strict=True):
        found[r].append(Box(tuple(a[:width]), tuple(b[:width])))
    assert [tuple(boxes) for boxes in found] == [
        boxes_of_flat_range(s, a, b) for s, (a, b) in zip(shapes, ends, strict=True)
    ]


def test_a_cut_gives_each_part_what_lies_in_it() -> None:
    row, part, start, stop = cut(np.array([0, 7, 9, 20]), np.array([7, 2, 0, 11]), np.array([5, 5, 5, 10]))
    assert list(zip(row.tolist(), part.tolist(), start.tolist(), stop.tolist(), strict=True)) == [
        (0, 0, 0, 5),
        (0, 1, 5, 7),
        (1, 1, 0, 2),
        (3, 2, 0, 10),
        (3, 3, 10, 11),
    ]


# -- DeepSpeed


@given(st.lists(SHAPES, min_size=1, max_size=6), st.integers(1, 9), st.integers(1, 3), st.data())
@settings(max_examples=150, deadline=None)
def test_zero_owns_every_element_once(
    shapes: list[tuple[int, ...]], world_size: int, stage: int, data: st.DataObject
) -> None:
    named = {f"w{i}": shape for i, shape in enumerate(shapes)}
    names = data.draw(st.permutations(list(named)))
    at = data.draw(st.integers(0, len(names)))
    layout = zero_layout(named, [names[:at], names[at:]], stage=stage, world_size=world_size)
    assert uncovered(layout.table) == {}
    sizes = [sum(held.box.numel for held in layout.held(rank)) for rank in range(world_size)]
    assert sum(sizes) == sum(math.prod(shape) for shape in shapes)


def test_zero_12_packs_groups_and_pads_at_the_end() -> None:
    named = {"a": (5,), "b": (2, 3), "c": (4,)}
    layout = zero_layout(named, [["b", "a"], ["c"]], stage=1, world_size=3)
    # 11 elements are padded to 12: partitions of 4; the second group's 4 to 6: partitions of 2
    assert [[(h.name, str(h.box)) for h in layout.held(rank)] for rank in range(3)] == [
        [("b", "0:1,0:3"), ("b", "1:2,0:1"), ("c", "0:2")],
        [("b", "1:2,1:3"), ("a", "0:2"), ("c", "2:4")],
        [("a", "2:5")],
    ]


def test_zero_leaves_frozen_weights_to_stage_3() -> None:
    named = {"a": (5,), "frozen": (4,)}
    assert {h.name for rank in range(2) for h in zero_layout(named, [["a"]], stage=3, world_size=2).held(rank)} == {
        "a",
        "frozen",
    }
    assert {h.name for h in zero_layout(named, [["a"]], stage=2, world_size=1).held(0)} == {"a"}
    with pytest.raises(IndexError):
        zero_layout(named, [["a"]], stage=2, world_size=2).held(2)


# -- Megatron


@st.composite
def cases(draw: st.DrawFn) -> tuple[Geometry, MegatronTopology]:
    """A model and a topology that fits it."""
    tp, pp, dp = (draw(st.sampled_from((1, 2, 4))) for _ in range(3))
    vpp = draw(st.sampled_from((1, 2))) if pp > 1 else 1
    experts = draw(st.sampled_from((0, 0, 4)))
    stage_ranks = tp * dp
    ep = draw(st.sampled_from([n for n in (1, 2, 4) if stage_ranks % n == 0])) if experts else 1
    etp = tp if ep == 1 else draw(st.sampled_from([n for n in (1, 2, 4) if stage_ranks % (n * ep) == 0]))
    overlap = draw(st.booleans())
    topology = MegatronTopology(
        world_size=tp * pp * dp,
        tensor_parallel=tp,
        pipeline_parallel=pp,
        virtual_pipeline=vpp,
        expert_parallel=ep,
        expert_tensor_parallel=etp,
        sequence_parallel=bool(experts) and tp > 1,
        distributed_optimizer=draw(st.booleans()),
        overlap=overlap,
        bucket_size=draw(st.sampled_from((None, 1, 100))) if overlap else None,
    )
    model = Gpt(
        layers=pp * vpp * draw(st.sampled_from((1, 2))),
        hidden=draw(st.sampled_from((16, 48))),
        ffn=draw(st.sampled_from((4, 20))),
        heads=4,
        groups=draw(st.sampled_from((1, 2, 4))),
        experts=experts,
        gated=draw(st.booleans()),
        tied=draw(st.booleans()),
    )
    return model.geometry, topology


@given(cases())
@settings(max_examples=150, deadline=None)
def test_megatron_owns_every_element_once_and_copies_complete_each_model_rank(
    case: tuple[Geometry, MegatronTopology],
) -> None:
    geometry, topology = case
    assert target_problems(ModelSizes.of_geometry(geometry), topology) == []
    layout = megatron_layout(geometry, topology)
    assert uncovered(layout.table) == {}
    held = [layout.held(rank) for rank in range(topology.world_size)]
    for name, weight in geometry.weights.items():
        stages = 2 if weight.place == "both" and topology.pipeline_parallel > 1 else 1
        expert = weight.expert is not None
        replicas = topology.expert_tensor_parallel if expert else topology.tensor_parallel
        copies = stages * (replicas if weight.axis is None else 1)
        total = sum(h.box.numel for rank in held for h in rank if h.name == name)
        assert total == copies * math.prod(weight.shape), name


def test_a_frozen_weight_is_in_no_buffer_and_shared_evenly_by_the_data_ranks() -> None:
    plain = Gpt().geometry
    shapes = {name: weight.shape for name, weight in plain.weights.items()}
    name = "decoder.layers.1.self_attention.linear_proj.weight"
    geometry = Geometry.from_document(plain.to_document(), shapes, frozen={name})
    layout = megatron_layout(geometry, MegatronTopology(world_size=2))
    assert uncovered(layout.table) == {}
    found = [[(str(h.box), h.owned) for h in layout.held(rank) if h.name == name] for rank in range(2)]
    assert found == [[("0:4,0:8", True)], [("4:8,0:8", True)]]


def test_experts_may_be_numbered_by_each_expert_rank_for_itself() -> None:
    geometry = Gpt(experts=4).geometry
    first = {w.layer: w.order for w in reversed(geometry.weights.values()) if w.expert == 0}
    local = {
        name: weight if weight.expert is None else replace(weight, order=weight.order - 2 * (weight.expert // 2 * 2))
        for name, weight in geometry.weights.items()
    }
    assert {w.order for w in local.values() if w.expert == 2 and w.layer == 1} >= {first[1]}
    for topology in (
        MegatronTopology(world_size=4),
        MegatronTopology(world_size=4, expert_parallel=2),
        MegatronTopology(world_size=4, expert_parallel=4, distributed_optimizer=False),
    ):
        one, other = (megatron_layout(replace(geometry, weights=w), topology) for w in (geometry.weights, local))
        assert [one.held(rank) for rank in range(4)] == [other.held(rank) for rank in range(4)]


def test_the_document_of_a_geometry_reads_back() -> None:
    geometry = Gpt(experts=4, tied=True).geometry
    shapes = {name: weight.shape for name, weight in geometry.weights.items()}
    document = geometry.to_document()
    assert Geometry.from_document(document, shapes) == geometry
    shapes.pop("decoder.final_layernorm.weight")
    with pytest.raises(ValueError, match="final_layernorm"):
        Geometry.from_document(document, shapes)
    document["weights"]["embedding.word_embeddings.weight"]["place"] = "middle"
    with pytest.raises(ValueError, match="middle"):
        Geometry.from_document(document, shapes)


def test_buffers_are_aligned_and_a_shared_embedding_has_a_bucket_of_its_own() -> None:
    # (offset in the bucket, its size) in the order of the buffer
    assert gradient_buffer([(100, False), (30, False), (200, True), (5, False)], 2, None) == [
        (0, 256),  # 100, then 28 of alignment, then 30 and the bucket's end
        (128, 256),
        (0, 256),
        (0, 128),
    ]
    assert gradient_buffer([(100, False), (100, False), (100, False)], 3, 150) == [(0, 384), (128, 384), (0, 384)]
    assert gradient_buffer([], 2, None) == []


def test_overlap_moves_ownership_on_the_first_stage_only() -> None:
    geometry = Gpt(layers=4, hidden=32, ffn=64).geometry
    plain, buckets = (
        megatron_layout(geometry, MegatronTopology(world_size=4, pipeline_parallel=2, overlap=overlap, bucket_size=500))
        for overlap in (False, True)
    )
    assert plain.held(0) != buckets.held(0)
    assert plain.held(2) == buckets.held(2)
