"""Training runs to measure on, built by the launch entries' own code: an engine, its data, one step of it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Protocol

import torch
import torch.distributed as dist

from benchmarks.machine import ROOT
from launch import train_megatron, train_zero3
from launch.config import TrainConfig, load_as
from launch.megatron_config import MegatronConfig
from resume_kit import ResumableLoader

Batches = Iterator[dict[str, Any]]


class Workload(Protocol):
    """A training run on this rank."""

    engine: Any  # what the kit takes
    loader: ResumableLoader
    device: torch.device

    def step(self, batches: Batches) -> torch.Tensor | None:
        """One optimizer step; the loss where this rank has it."""

    def state(self) -> dict[str, torch.Tensor]:
        """This rank's masters and optimizer tensors, the engine's own memory, under names of this rank."""

    def pinned(self) -> dict[str, Any]:
        """What the kit pins as the run's configuration."""

    def describe(self) -> str:
        """One line: engine, ranks and how they share the work, collectives."""


class ZeroRun:
    """A DeepSpeed run. Without `initial` its weights may be whatever lies in memory: a checkpoint will bring them."""

    def __init__(self, config: TrainConfig, *, initial: bool) -> None:
        train_zero3.prepare_environment(config)
        from transformers.initialization import no_init_weights

        self._backend = "nccl" if train_zero3.uses_cuda() else "gloo"
        self.config = config
        skipped = not initial and not ties_weights(config.model)  # on a host's cores it takes seconds a billion weights
        with no_init_weights() if skipped else nullcontext():
            self.engine, self.loader = train_zero3.build(config)
        self.device = torch.device(self.engine.device)

    def step(self, batches: Batches) -> torch.Tensor | None:
        losses = []
        for _ in range(self.engine.gradient_accumulation_steps()):
            batch = {name: value.to(self.device) for name, value in next(batches).items()}
            losses.append(self.engine(**batch).loss)
            self.engine.backward(losses[-1])
            self.engine.step()
        return torch.stack([loss.detach() for loss in losses]).mean()

    def state(self) -> dict[str, torch.Tensor]:
        zero = self.engine.optimizer
        groups = getattr(zero, "fp32_partitioned_groups_flat", None)
        if groups is None:
            groups = zero.single_partition_of_fp32_groups
        return _named(groups, zero.optimizer.state)

    def pinned(self) -> dict[str, Any]:
        return self.config.pinned()

    def describe(self) -> str:
        stage = self.engine.zero_optimization_stage()
        return f"DeepSpeed ZeRO-{stage} on {dist.get_world_size()} ranks, {self._backend}"


class MegatronRun:
    """A Megatron-core run; without a GPU on CPU ranks."""

    def __init__(self, config: MegatronConfig) -> None:
        train_megatron.prepare_environment(config)
        from launch.megatron_training import build
        from resume_kit.engines.megatron import MegatronEngine

        self.training = build(config)
        self.config = config
        self.loader = self.training.loader
        self.device = self.training.device
        self.engine = MegatronEngine(self.training.chunks, self.training.optimizer, self.training.scheduler)

    def step(self, batches: Batches) -> torch.Tensor | None:
        result = self.training.step(batches)
        self.engine.stepped(result.successful, result.grad_norm)
        return result.loss

    def state(self) -> dict[str, torch.Tensor]:
        optimizer = self.training.optimizer
        found: dict[str, torch.Tensor] = {}
        for number, part in enumerate(getattr(optimizer, "chained_optimizers", [optimizer])):
            masters = [p for group in part.optimizer.param_groups for p in group["params"]]
            found |= {f"{number}.{name}": value for name, value in _named(masters, part.optimizer.state).items()}
        return found

    def pinned(self) -> dict[str, Any]:
        return self.config.pinned()

    def describe(self) -> str:
        return f"Megatron-core, {self.training.describe()}"


def ties_weights(model: Mapping[str, Any]) -> bool:
    """Whether a transformers model of these settings has a weight twice; initialising is what makes it one."""
    from transformers import AutoConfig

    settings = {key: value for key, value in model.items() if key not in ("type", "attn_implementation")}
    return bool(getattr(AutoConfig.for_model(model.get("type", "gpt2"), **settings), "tie_word_embeddings", True))


def _named(masters: Sequence[torch.Tensor], state: Any) -> dict[str, torch.Tensor]:
    """Masters and their moments under names that no other rank uses."""
    rank, found = dist.get_rank(), {}
    for number, master in enumerate(masters):
        found[f"rank{rank}.{number}.master"] = master.data
        for kind, value in state[master].items():
            if torch.is_tensor(value) and value.numel() > 1:
                found[f"rank{rank}.{number}.{kind}"] = value
    return found


def build(engine: str, config: str, settings: Sequence[str], *, initial: bool = True) -> Workload:
    """The workload on this rank; `initial`: with weights to begin training with. Joins the default process group.

    Raises `UsageError` for settings that cannot be.
    """
    # torchdata calls this deprecated function of torch whenever an iterator is made
    warnings.filterwarnings("ignore", message="'set_vital' is deprecated")
    path = ROOT / config
    if engine == "megatron":
        return MegatronRun(load_as(MegatronConfig, path, settings))
    return ZeroRun(load_as(TrainConfig, path, settings), initial=initial)
