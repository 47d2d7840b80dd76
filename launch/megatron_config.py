"""The configuration of a Megatron run: model, parallelism, optimizer and schedule, in Megatron's own terms."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from launch.config import SharedConfig, at_least
from resume_kit.errors import Problem, UsageError
from resume_kit.planning.layouts.target import ModelSizes, target_problems
from resume_kit.planning.layouts.topology import MegatronTopology


@dataclass
class ParallelConfig:
    """Sizes of the parallel groups; data parallelism is what the world leaves. All may change at a resume.

    expert_tensor: null takes `tensor`. bucket_size: elements of a gradient bucket; null takes Megatron's default.
    """

    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1
    expert: int = 1
    expert_tensor: int | None = None
    sequence: bool = False
    distributed_optimizer: bool = True
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    bucket_size: int | None = None

    def topology(self, world_size: int) -> MegatronTopology:
        """These sizes in a world, as the kit's planning knows them."""
        return MegatronTopology(
            world_size=world_size,
            tensor_parallel=self.tensor,
            pipeline_parallel=self.pipeline,
            virtual_pipeline=self.virtual_pipeline,
            expert_parallel=self.expert,
            expert_tensor_parallel=self.expert_tensor or self.tensor,
            sequence_parallel=self.sequence,
            distributed_optimizer=self.distributed_optimizer,
            overlap=self.overlap_grad_reduce,
            bucket_size=self.bucket_size,
        )


@dataclass
class ModelConfig:
    """A GPT. `vocabulary` null is that of the data; it is padded to a multiple of `vocabulary_multiple`.

    query_groups: null gives every head its own. ffn_hidden_size: null is four times hidden_size.
    expert_ffn_hidden_size: null is ffn_hidden_size. experts: 0 for a dense model.
    """

    layers: int = 4
    hidden_size: int = 64
    ffn_hidden_size: int | None = None
    attention_heads: int = 4
    query_groups: int | None = None
    vocabulary: int | None = None
    vocabulary_multiple: int = 128
    positions: Literal["learned", "rotary"] = "learned"
    rotary_base: int = 10_000
    activation: Literal["gelu", "swiglu"] = "gelu"
    normalization: Literal["LayerNorm", "RMSNorm"] = "LayerNorm"
    norm_epsilon: float = 1e-5
    bias: bool = True
    tied_embeddings: bool = True
    dropout: float = 0.1
    init_std: float = 0.02
    experts: int = 0
    experts_per_token: int = 2
    expert_ffn_hidden_size: int | None = None
    dispatcher: Literal["alltoall", "allgather"] = "alltoall"
    balancing_loss: float = 0.01

    @property
    def feed_forward(self) -> int:
        return self.ffn_hidden_size or 4 * self.hidden_size

    @property
    def expert_feed_forward(self) -> int:
        return self.expert_ffn_hidden_size or self.feed_forward

    def padded_vocabulary(self, of_data: int) -> int:
        """Rows of the embedding: independent of the parallel layout, so that any layout holds the same tensor."""
        return -(-(self.vocabulary or of_data) // self.vocabulary_multiple) * self.vocabulary_multiple


@dataclass
class OptimizerConfig:
    """Adam with decoupled weight decay, and the schedule of its learning rate, counted in optimizer steps."""

    lr: float = 3e-3
    min_lr: float = 0.0
    weight_decay: float = 0.1
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    epsilon: float = 1e-8
    clip_grad: float = 1.0
    warmup_steps: int = 0
    decay_steps: int = 1000
    decay_style: Literal["constant", "linear", "cosine", "inverse-square-root"] = "cosine"


@dataclass
class MegatronConfig(SharedConfig):
    """`init: by_name` draws every weight from its name, the same for every parallel layout: for tiny models."""

    global_batch_size: int = 8
    precision: Literal["bf16", "fp32"] = "bf16"
    init: Literal["megatron", "by_name"] = "megatron"
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    def problems(self) -> list[Problem]:
        """All values that cannot be meant, or cannot be meant together, whatever the world size."""
        model, parallel = self.model, self.parallel
        sizes = {
            "global_batch_size": self.global_batch_size,
            "parallel.tensor": parallel.tensor,
            "parallel.pipeline": parallel.pipeline,
            "parallel.virtual_pipeline": parallel.virtual_pipeline,
            "parallel.expert": parallel.expert,
            "parallel.expert_tensor": parallel.expert_tensor,
            "parallel.bucket_size": parallel.bucket_size,
            "model.layers": model.layers,
            "model.hidden_size": model.hidden_size,
            "model.attention_heads": model.attention_heads,
            "model.query_groups": model.query_groups,
            "model.vocabulary": model.vocabulary,
            "model.vocabulary_multiple": model.vocabulary_multiple,
            "optimizer.decay_steps": self.optimizer.decay_steps,
        }
        found = super().problems() + at_least(1, sizes) + at_least(0, {"model.experts": model.experts})
        wrong = [
            (
                len(self.optimizer.betas) != 2 or not all(isinstance(beta, float) for beta in self.optimizer.betas),
                f"optimizer.betas is {self.optimizer.betas}; give two numbers, as [0.9, 0.95]",
            ),
            (
                self.optimizer.warmup_steps >= self.optimizer.decay_steps,
                f"optimizer.warmup_steps is {self.optimizer.warmup_steps}; it must be below decay_steps "
                f"{self.optimizer.decay_steps}",
            ),
            (
                self.optimizer.min_lr > self.optimizer.lr,
                f"optimizer.min_lr is {self.optimizer.min_lr:g}, above lr {self.optimizer.lr:g}",
            ),
            (
                model.hidden_size % max(model.attention_heads, 1) != 0,
                f"model.hidden_size {model.hidden_size} is no multiple of attention_heads {model.attention_heads}",
            ),
            (
                parallel.sequence and self.data.sequence_length % max(parallel.tensor, 1) != 0,
                f"parallel.sequence with tensor {parallel.tensor} cannot split data.sequence_length "
                f"{self.data.sequence_length}",
            ),
            (
                model.experts > 0 and model.bias,
                "experts have no bias: set model.bias to false",
            ),
            (
                parallel.overlap_param_gather and not (parallel.distributed_optimizer and parallel.overlap_grad_reduce),
                "parallel.overlap_param_gather needs distributed_optimizer and overlap_grad_reduce",
            ),
            (
                model.experts > 0 and not 1 <= model.experts_per_token <= model.experts,
                f"model.experts_per_token is {model.experts_per_token}; there are {model.experts} experts",
            ),
        ]
        return found + [Problem("configuration", "", what) for is_wrong, what in wrong if is_wrong]

    def require_topology(self, world_size: int, vocabulary: int) -> MegatronTopology:
        """The run's topology in this world. Raises `UsageError` with every reason for which it cannot be had."""
        model = self.model
        sizes = ModelSizes(
            layers=model.layers,
            attention_heads=model.attention_heads,
            query_groups=model.query_groups or model.attention_heads,
            experts=model.experts,
            vocabulary=vocabulary,
            split={"the feed-forward size": model.feed_forward} if not model.experts else {},
            expert_split={"the experts' feed-forward size": model.expert_feed_forward} if model.experts else {},
        )
        topology = self.parallel.topology(world_size)
        if problems := target_problems(sizes, topology):
            raise UsageError(f"this model cannot be trained on {world_size} ranks laid out so", problems)
        return topology

    def micro_batches(self, data_parallel: int) -> int:
        """Micro-batches of a step on every rank. Raises `UsageError` when the global batch cannot be cut so."""
        share = self.micro_batch_size * data_parallel
        count, rest = divmod(self.global_batch_size, share)
        if rest:
            raise UsageError(
                f"global_batch_size {self.global_batch_size} is no multiple of micro_batch_size "
                f"{self.micro_batch_size} × {data_parallel} data-parallel ranks = {share}; change one of the three"
            )
        pipeline = self.parallel.pipeline
        if self.parallel.virtual_pipeline > 1 and count % pipeline:
            raise UsageError(
                f"an interleaved pipeline of {pipeline} stages takes micro-batches in groups of {pipeline}, and a step "
                f"has {count} on every rank; choose global_batch_size as a multiple of {share * pipeline}"
            )
        return count

    def pinned(self) -> dict[str, Any]:
        """What a checkpoint pins beside model, optimizer and topology, which the engine tells itself."""
        return {
            "seed": self.seed,
            "micro_batch_size": self.micro_batch_size,
            "deterministic": self.run.deterministic,
            "init": self.init,
        }
