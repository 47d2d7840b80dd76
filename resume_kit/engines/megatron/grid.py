"""This rank's place in Megatron's grid of tensor, expert, data and pipeline ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch.distributed as dist


@dataclass(frozen=True)
class Grid:
    """Sizes and this rank's coordinates. Expert ranks share a stage's tensor × data ranks in a grid of their own.

    Ranks are numbered in Megatron's default order: tensor fastest, then data, then pipeline; inside a stage, for
    experts: expert-tensor fastest, then expert, then expert-data.
    """

    tensor: int
    pipeline: int
    virtual: int
    data: int
    expert: int
    expert_tensor: int
    tensor_rank: int
    pipeline_rank: int
    data_rank: int
    expert_rank: int
    expert_tensor_rank: int
    expert_data_rank: int

    @classmethod
    def of_megatron(cls) -> Grid:
        """Read from megatron's parallel state, which must be initialised."""
        from megatron.core import parallel_state as state

        return cls(
            tensor=state.get_tensor_model_parallel_world_size(),
            pipeline=state.get_pipeline_model_parallel_world_size(),
            virtual=state.get_virtual_pipeline_model_parallel_world_size() or 1,
            data=state.get_data_parallel_world_size(),
            expert=state.get_expert_model_parallel_world_size(),
            expert_tensor=state.get_expert_tensor_parallel_world_size(),
            tensor_rank=state.get_tensor_model_parallel_rank(),
            pipeline_rank=state.get_pipeline_model_parallel_rank(),
            data_rank=state.get_data_parallel_rank(),
            expert_rank=state.get_expert_model_parallel_rank(),
            expert_tensor_rank=state.get_expert_tensor_parallel_rank(),
            expert_data_rank=state.get_expert_data_parallel_rank(),
        )

    @property
    def world(self) -> int:
        return self.tensor * self.data * self.pipeline

    @property
    def expert_data(self) -> int:
        return self.tensor * self.data // (self.expert_tensor * self.expert)

    @property
    def first_stage(self) -> bool:
        return self.pipeline_rank == 0

    @property
    def last_stage(self) -> bool:
        return self.pipeline_rank == self.pipeline - 1

    @property
    def follows_default_order(self) -> bool:
        """Whether Megatron's groups step through the ranks as the default order does; the same on every rank."""
        from megatron.core import parallel_state as state

        steps = (
            (state.get_tensor_model_parallel_group(), 1),
            (state.get_data_parallel_group(), self.tensor),
            (state.get_pipeline_model_parallel_group(), self.tensor * self.data),
            (state.get_expert_tensor_parallel_group(), 1),
            (state.get_expert_model_parallel_group(), self.expert_tensor),
            (state.get_expert_data_parallel_group(), self.expert_tensor * self.expert),
        )
        members = [(dist.get_process_group_ranks(group), step) for group, step in steps]
        return all(b - a == step for ranks, step in members for a, b in pairwise(ranks))

    def data_group(self, *, expert: bool) -> dist.ProcessGroup:
        """The ranks that hold the same slice of a weight as this one, those of an expert or of any other weight."""
        from megatron.core import parallel_state as state

        found: dist.ProcessGroup = state.get_expert_data_parallel_group() if expert else state.get_data_parallel_group()
        return found

    def stream(self, generator: str) -> dict[str, int]:
        """The coordinates that tell a generator's stream apart: tensor ranks share all but the tracker's streams."""
        place = {"pipeline": self.pipeline_rank}
        if generator == "engine:model-parallel-rng":
            return {**place, "data": self.data_rank, "tensor": self.tensor_rank}
        if generator == "engine:expert-parallel-rng":
            return {
                **place,
                "expert data": self.expert_data_rank,
                "expert": self.expert_rank,
                "expert tensor": self.expert_tensor_rank,
            }
        return {**place, "data": self.data_rank}

    def rank_of_stream(self, generator: str, saved: Mapping[str, Any]) -> int | None:
        """The rank with the same stream in a saved topology, or None where that has no such place."""
        tensor, data = int(saved["tensor_parallel"]), int(saved["data_parallel"])
        expert, expert_tensor = int(saved["expert_parallel"]), int(saved["expert_tensor_parallel"])
        place = self.stream(generator)
        sizes = {
            "pipeline": int(saved["pipeline_parallel"]),
            "data": data,
            "tensor": tensor,
            "expert": expert,
            "expert tensor": expert_tensor,
            "expert data": tensor * data // (expert * expert_tensor),
        }
        if any(coordinate >= sizes[axis] for axis, coordinate in place.items()):
            return None
        if "expert" in place:
            inside = place["expert tensor"] + expert_tensor * (place["expert"] + expert * place["expert data"])
        else:
            inside = place.get("tensor", 0) + tensor * place["data"]
        return inside + tensor * data * place["pipeline"]
