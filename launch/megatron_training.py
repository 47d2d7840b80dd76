"""A Megatron run on one rank: process groups, model, optimizer, schedule, data, and one step of it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from launch.entry import seed_everything
from launch.megatron_config import MegatronConfig
from resume_kit import ResumableLoader, TokenDataset
from resume_kit.data import standard_library_path
from resume_kit.planning.layouts.topology import MegatronTopology

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Backend:
    """Which collectives a run uses, and why."""

    name: str
    reason: str

    @classmethod
    def choose(cls) -> Backend:
        """NCCL where every rank of this host has a GPU of its own, else gloo."""
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if gpus == 0:
            return cls("gloo", "no GPU is visible")
        if gpus < ranks:
            return cls("gloo", f"{ranks} ranks on this host and only {gpus} GPUs")
        return cls("nccl", f"{gpus} GPUs on this host for {ranks} ranks")

    @property
    def cuda(self) -> bool:
        return self.name == "nccl"


@dataclass(frozen=True)
class StepResult:
    """One optimizer step: mean loss over its micro-batches (None before the last stage), whether it updated, norm."""

    loss: torch.Tensor | None
    successful: bool
    grad_norm: float | None


@dataclass(frozen=True, eq=False)
class Training:
    """All that trains on this rank."""

    config: MegatronConfig
    backend: Backend
    topology: MegatronTopology
    micro_batches: int
    device: torch.device
    loader: ResumableLoader
    chunks: list[Any]
    optimizer: Any
    scheduler: Any

    def step(self, batches: Iterator[Batch]) -> StepResult:
        """One optimizer step. Every rank takes all of its step's micro-batches, whatever its stage does with them."""
        from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

        step = [next(batches) for _ in range(self.micro_batches)]
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        losses = get_forward_backward_func()(
            forward_step_func=self._forward,
            data_iterator=[iter(step) for _ in self.chunks],
            model=self.chunks,
            num_microbatches=self.micro_batches,
            seq_length=self.config.data.sequence_length,
            micro_batch_size=self.config.micro_batch_size,
            forward_only=False,
        )
        successful, grad_norm, _ = self.optimizer.step()
        self.scheduler.step(increment=self.config.global_batch_size)
        return StepResult(torch.stack(losses).mean() if losses else None, successful, grad_norm)

    def _forward(self, batches: Iterator[Batch], chunk: Any) -> tuple[torch.Tensor, Any]:
        tokens = next(batches)["input_ids"].to(self.device)
        positions = torch.arange(tokens.shape[1], device=self.device).expand_as(tokens)
        return chunk(tokens, positions, None, labels=tokens.roll(-1, dims=1)), _mean_loss

    def describe(self) -> str:
        """One line: collectives and why, sizes of the groups, micro-batches."""
        sizes = self.topology
        parts = {
            "tensor": sizes.tensor_parallel,
            "pipeline": sizes.pipeline_parallel,
            "data": sizes.data_parallel,
            "virtual pipeline": sizes.virtual_pipeline,
            "expert": sizes.expert_parallel,
        }
        shown = [f"{name} {size}" for name, size in parts.items() if size > 1] or ["one rank"]
        steps = f"{self.micro_batches} micro-batches a step"
        return f"{self.backend.name}: {self.backend.reason}; {' × '.join(shown)}; {steps}"


def _mean_loss(losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean over all tokens that have a next one: to differentiate, and to keep."""
    loss = losses[:, :-1].float().mean()
    return loss, loss.detach().clone()


def build(config: MegatronConfig) -> Training:
    """Everything of a run on this rank. Raises `UsageError` for a layout that cannot be, before any group is formed."""
    backend = Backend.choose()
    dataset = TokenDataset.from_path(
        config.data.path or standard_library_path(),
        sequence_length=config.data.sequence_length,
        max_bytes=config.data.max_bytes,
    )
    vocabulary = config.model.padded_vocabulary(dataset.vocab_size)
    topology = config.require_topology(int(os.environ.get("WORLD_SIZE", "1")), vocabulary)
    micro_batches = config.micro_batches(topology.data_parallel)
    # Apex and Transformer Engine are missed at import, and again in calls
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    device = _join(config, backend)
    chunks, optimizer, scheduler = _build_model(config, vocabulary, backend)
    data_rank, stage = _place()
    loader = ResumableLoader(
        dataset,
        micro_batch_size=config.micro_batch_size,
        gradient_accumulation_steps=micro_batches,
        rank=data_rank,
        world_size=topology.data_parallel,
        seed=config.seed,
        num_workers=config.data.num_workers,
    )
    # alike on tensor ranks, which must agree on dropout outside the regions that they split
    seed_everything(config.seed + 1 + 1000 * data_rank + 100 * stage)
    return Training(config, backend, topology, micro_batches, device, loader, chunks, optimizer, scheduler)


def _join(config: MegatronConfig, backend: Backend) -> torch.device:
    """Join the process groups and seed what the initial weights are drawn from."""
    if backend.cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        device = torch.device("cuda", torch.cuda.current_device())
    else:
        from launch.demo import megatron_on_cpu

        megatron_on_cpu.install()
        device = torch.device("cpu")
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    torch.use_deterministic_algorithms(config.run.deterministic and backend.cuda)
    if not dist.is_initialized():
        dist.init_process_group(backend.name, device_id=device if backend.cuda else None)
    parallel = config.parallel
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
        create_gloo_process_groups=False,
    )
    _, stage = _place()
    seed_everything(config.seed + 100 * stage)
    model_parallel_cuda_manual_seed(config.seed + 100 * stage)
    return device


def _place() -> tuple[int, int]:
    """(data-parallel rank, pipeline stage) of this rank."""
    from megatron.core import parallel_state

    return parallel_state.get_data_parallel_rank(), parallel_state.get_pipeline_model_parallel_rank()


def _build_model(config: MegatronConfig, vocabulary: int, backend: Backend) -> tuple[list[Any], Any, Any]:
    """Model chunks in Megatron's data-parallel wrapper, the optimizer, and the schedule of its learning rate."""
    from megatron.core.distributed import finalize_model_grads

    from launch.megatron_model import build_chunks, transformer_config

    transformer = transformer_config(config, cuda=backend.cuda)
    chunks = _wrapped(config, transformer, build_chunks(config, transformer, vocabulary, cuda=backend.cuda))
    optimizer = _optimizer(config, chunks)
    transformer.finalize_model_grads_func = finalize_model_grads
    transformer.grad_scale_func = optimizer.scale_loss
    if config.parallel.overlap_grad_reduce:
        pauses = [chunk.no_sync for chunk in chunks]
        transformer.no_sync_func = pauses if len(pauses) > 1 else pauses[0]
    return chunks, optimizer, _schedule(config, optimizer)


def _wrapped(config: MegatronConfig, transformer: Any, chunks: list[Any]) -> list[Any]:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    parallel = config.parallel
    return [
        DistributedDataParallel(
            transformer,
            DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                overlap_grad_reduce=parallel.overlap_grad_reduce,
                overlap_param_gather=parallel.overlap_param_gather,
                use_distributed_optimizer=parallel.distributed_optimizer,
                bucket_size=parallel.bucket_size,
            ),
            chunk,
            disable_bucketing=number > 0,
        )
        for number, chunk in enumerate(chunks)
    ]


def _optimizer(config: MegatronConfig, chunks: list[Any]) -> Any:
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    settings, bf16 = config.optimizer, config.precision == "bf16"
    return get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=settings.lr,
            min_lr=settings.min_lr,
            weight_decay=settings.weight_decay,
            adam_beta1=settings.betas[0],
            adam_beta2=settings.betas[1],
            adam_eps=settings.epsilon,
            clip_grad=settings.clip_grad,
            bf16=bf16,
            params_dtype=torch.bfloat16 if bf16 else torch.float32,
            use_distributed_optimizer=config.parallel.distributed_optimizer,
            overlap_param_gather=config.parallel.overlap_param_gather,
        ),
        chunks,
        use_gloo_process_groups=False,
    )


def _schedule(config: MegatronConfig, optimizer: Any) -> Any:
    """Megatron counts its schedule in samples."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    settings, per_step = config.optimizer, config.global_batch_size
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=settings.warmup_steps * per_step,
        lr_decay_steps=settings.decay_steps * per_step,
        lr_decay_style=settings.decay_style,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=settings.decay_steps * per_step,
        wd_incr_style="constant",
    )
