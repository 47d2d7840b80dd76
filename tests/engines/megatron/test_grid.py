"""Random streams by coordinates: over all topologies of up to 8 ranks, a stream's rank is the one that has it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from resume_kit.engines.megatron.grid import Grid
from resume_kit.planning.layouts.topology import MegatronTopology

MODEL, EXPERT = "engine:model-parallel-rng", "engine:expert-parallel-rng"
GENERATORS = ("torch", "python", MODEL, EXPERT)


def topologies(most: int = 8) -> Iterator[MegatronTopology]:
    """Every way to lay ranks out, experts included."""
    sizes = range(1, most + 1)
    for world in sizes:
        for tensor in sizes:
            for pipeline in sizes:
                if world % (tensor * pipeline):
                    continue
                stage = world // pipeline
                for expert in sizes:
                    for expert_tensor in sizes:
                        if stage % (expert * expert_tensor) == 0:
                            yield MegatronTopology(
                                world_size=world,
                                tensor_parallel=tensor,
                                pipeline_parallel=pipeline,
                                expert_parallel=expert,
                                expert_tensor_parallel=expert_tensor,
                            )


ALL = list(topologies())


def grid(topology: MegatronTopology, rank: int) -> Grid:
    """A rank's place in Megatron's default order: tensor fastest, then data, then pipeline."""
    inside = rank % topology.stage_ranks
    tensor, experts = topology.tensor_parallel, topology.expert_parallel
    return Grid(
        tensor=tensor,
        pipeline=topology.pipeline_parallel,
        virtual=1,
        data=topology.data_parallel,
        expert=experts,
        expert_tensor=topology.expert_tensor_parallel,
        tensor_rank=inside % tensor,
        pipeline_rank=rank // topology.stage_ranks,
        data_rank=inside // tensor,
        expert_rank=inside // topology.expert_tensor_parallel % experts,
        expert_tensor_rank=inside % topology.expert_tensor_parallel,
        expert_data_rank=inside // (topology.expert_tensor_parallel * experts),
    )


def grids(topology: MegatronTopology) -> list[Grid]:
    return [grid(topology, rank) for rank in range(topology.world_size)]


def test_there_are_many_topologies() -> None:
    assert len(ALL) > 100
    assert {topology.world_size for topology in ALL} == set(range(1, 9))


@pytest.mark.parametrize("generator", GENERATORS)
def test_in_its_own_topology_a_rank_finds_its_own_stream(generator: str) -> None:
    for topology in ALL:
        saved = topology.to_engine()
        every = grids(topology)
        for rank, place in enumerate(every):
            source = place.rank_of_stream(generator, saved)
            assert source is not None
            assert every[source].stream(generator) == place.stream(generator)
            if generator in (MODEL, EXPERT):
                assert source == rank  # every rank has one of its own
            else:
                assert every[source].tensor_rank == 0


@pytest.mark.parametrize("generator", GENERATORS)
def test_the_rank_found_in_another_topology_is_one_that_had_the_stream(generator: str) -> None:
    had = [[place.stream(generator) for place in grids(topology)] for topology in ALL]
    for live in ALL[::3]:
        for place in grids(live):
            stream = place.stream(generator)
            for saved, streams in zip(ALL, had, strict=True):
                source = place.rank_of_stream(generator, saved.to_engine())
                if source is None:
                    assert stream not in streams
                else:
                    assert streams[source] == stream


def test_tensor_ranks_share_the_default_stream_and_nobody_else_does() -> None:
    for topology in ALL:
        by_stream: dict[str, set[tuple[int, int]]] = {}
        for place in grids(topology):
            by_stream.setdefault(str(place.stream("torch")), set()).add((place.data_rank, place.pipeline_rank))
        assert all(len(places) == 1 for places in by_stream.values())
        assert len(by_stream) == topology.data_parallel * topology.pipeline_parallel


def place_of_this_rank(rank: int, world_size: int, sizes: dict[str, Any]) -> tuple[Grid, bool]:
    """Megatron's own account of this rank, and whether its order is the default one."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(**sizes, create_gloo_process_groups=False)
    found = Grid.of_megatron()
    return found, found.follows_default_order


@pytest.mark.parametrize(
    ("world_size", "tp", "pp", "ep", "etp"), [(4, 2, 2, 1, 2), (4, 1, 1, 2, 2), (4, 2, 1, 2, 1), (4, 1, 2, 2, 1)]
)
def test_megatron_counts_its_ranks_so(world_size: int, tp: int, pp: int, ep: int, etp: int, ranks: Any) -> None:
    sizes = {
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "expert_model_parallel_size": ep,
        "expert_tensor_parallel_size": etp,
    }
    topology = MegatronTopology(
        world_size=world_size,
        tensor_parallel=tp,
        pipeline_parallel=pp,
        expert_parallel=ep,
        expert_tensor_parallel=etp,
    )
    found = ranks.run(place_of_this_rank, world_size, sizes)
    assert found == [(place, True) for place in grids(topology)]


def test_another_order_of_ranks_is_seen_by_every_rank(ranks: Any) -> None:
    sizes = {"pipeline_model_parallel_size": 2, "order": "tp-cp-ep-pp-dp"}
    assert [default for _, default in ranks.run(place_of_this_rank, 4, sizes)] == [False] * 4
