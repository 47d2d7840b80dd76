"""Topologies as plain numbers: the parallel sizes of a DeepSpeed or Megatron job, as a manifest's `engine` has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

#: Elements that a bucket of Megatron's gradient buffer has at least, where nothing is said: so many, or so many a rank.
_BUCKET_SIZE, _BUCKET_SIZE_PER_RANK = 40_000_000, 1_000_000


@dataclass(frozen=True, kw_only=True)
class ZeroTopology:
    """A DeepSpeed job: its ZeRO stage and number of ranks."""

    stage: int = 3
    world_size: int = 1

    @property
    def data_parallel(self) -> int:
        """Ranks that each read samples of their own."""
        return self.world_size

    def to_engine(self) -> dict[str, Any]:
        return {"engine": "deepspeed", "zero_stage": self.stage, "world_size": self.world_size}

    @classmethod
    def from_engine(cls, engine: Mapping[str, Any]) -> ZeroTopology:
        return cls(stage=engine["zero_stage"], world_size=engine["world_size"])


@dataclass(frozen=True, kw_only=True)
class MegatronTopology:
    """A Megatron job, its ranks in Megatron's default order tp-cp-ep-dp-pp without context parallelism.

    `expert_tensor_parallel` 0 stands for Megatron's default, the tensor parallel size. `overlap` is
    overlap_grad_reduce: with it the first stage's gradient buffer is cut into buckets, so other ranks own other
    elements. `bucket_size` is the least number of elements of such a bucket; None is Megatron's default.
    """

    world_size: int = 1
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    virtual_pipeline: int = 1
    expert_parallel: int = 1
    expert_tensor_parallel: int = 0
    sequence_parallel: bool = False
    distributed_optimizer: bool = True
    overlap: bool = False
    bucket_size: int | None = None

    def __post_init__(self) -> None:
        if not self.expert_tensor_parallel:
            object.__setattr__(self, "expert_tensor_parallel", self.tensor_parallel)

    @property
    def stage_ranks(self) -> int:
        """Ranks of one pipeline stage."""
        return self.world_size // self.pipeline_parallel

    @property
    def data_parallel(self) -> int:
        return self.stage_ranks // self.tensor_parallel

    @property
    def expert_data_parallel(self) -> int:
        return self.stage_ranks // (self.expert_tensor_parallel * self.expert_parallel)

    @property
    def bucket_limit(self) -> int | None:
        """Elements that a bucket has at least; None where the buffer is one bucket."""
        if not self.overlap:
            return None
        return self.bucket_size or max(_BUCKET_SIZE, _BUCKET_SIZE_PER_RANK * self.data_parallel)

    def to_engine(self) -> dict[str, Any]:
        return {
            "engine": "megatron",
            "world_size": self.world_size,
            "tensor_parallel": self.tensor_parallel,
            "pipeline_parallel": self.pipeline_parallel,
            "virtual_pipeline": self.virtual_pipeline,
            "expert_parallel": self.expert_parallel,
            "expert_tensor_parallel": self.expert_tensor_parallel,
            "data_parallel": self.data_parallel,
            "sequence_parallel": self.sequence_parallel,
            "distributed_optimizer": self.distributed_optimizer,
        }

    def to_settings(self) -> dict[str, Any]:
        """The same under the names of Megatron's own configurations, as a checkpoint pins them under `parallel`."""
        return {
            "tensor_model_parallel_size": self.tensor_parallel,
            "pipeline_model_parallel_size": self.pipeline_parallel,
            "virtual_pipeline_model_parallel_size": self.virtual_pipeline if self.virtual_pipeline > 1 else None,
            "expert_model_parallel_size": self.expert_parallel,
            "expert_tensor_parallel_size": self.expert_tensor_parallel,
            "sequence_parallel": self.sequence_parallel,
            "use_distributed_optimizer": self.distributed_optimizer,
            "overlap_grad_reduce": self.overlap,
            "bucket_size": self.bucket_limit,
        }

    @classmethod
    def from_engine(cls, engine: Mapping[str, Any]) -> MegatronTopology:
        given = {name: engine[name] for name in cls.__dataclass_fields__ if name in engine}
        return cls(**given)


Topology: TypeAlias = ZeroTopology | MegatronTopology
