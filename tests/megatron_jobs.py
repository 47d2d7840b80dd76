"""Megatron jobs that tests run on real ranks: real megatron-core, gloo, a tiny GPT in any topology."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from launch.config import build as build_config
from launch.megatron_config import MegatronConfig
from tests.jobs import live_digests


@dataclass(frozen=True)
class MegatronJob:
    """A small training job. `kit=False` trains without the kit and without a run directory.

    sp: sequence parallel; etp: 0 takes tp; overlap: of gradient reduction, and of the weight gather where the
    optimizer is distributed; groups: query groups, 0 gives every head its own; norm: LayerNorm or RMSNorm.
    `model`, `optimizer` and `parallel` are further keys of the configuration's sections.
    """

    run_dir: str = ""
    tp: int = 1
    pp: int = 1
    vpp: int = 1
    ep: int = 1
    etp: int = 0
    sp: bool = False
    distributed_optimizer: bool = True
    overlap: bool = False
    bucket_size: int | None = None
    precision: str = "bf16"
    layers: int = 2
    hidden: int = 32
    heads: int = 4
    groups: int = 0
    swiglu: bool = False
    norm: str = "LayerNorm"
    rotary: bool = False
    tied: bool = True
    experts: int = 0
    dropout: float = 0.1
    steps: int = 8
    save_every: int = 3
    seed: int = 7
    micro_batch: int = 1
    global_batch: int = 4
    sequence_length: int = 16
    workers: int = 0
    lr: float = 3e-3
    data: str = ""
    policy: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    parallel: dict[str, Any] = field(default_factory=dict)
    keep_last: int = 3
    saving: dict[str, Any] = field(default_factory=dict)
    timeout: float = 60.0
    kit: bool = True

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def but(self, **changes: Any) -> MegatronJob:
        return replace(self, **changes)

    def config(self) -> MegatronConfig:
        """The job as the training entry's configuration."""
        content = {
            "run": {
                "dir": self.run_dir,
                "steps": self.steps,
                "save_every": self.save_every or self.steps + 1,
                "keep_last": self.keep_last,
                "timeout": self.timeout,
            },
            "data": {"path": self.data, "sequence_length": self.sequence_length, "num_workers": self.workers},
            "seed": self.seed,
            "micro_batch_size": self.micro_batch,
            "global_batch_size": self.global_batch,
            "precision": self.precision,
            "init": "by_name",
            "policy": self.policy,
            "parallel": {
                "tensor": self.tp,
                "pipeline": self.pp,
                "virtual_pipeline": self.vpp,
                "expert": self.ep,
                "expert_tensor": self.etp or None,
                "sequence": self.sp,
                "distributed_optimizer": self.distributed_optimizer,
                "overlap_grad_reduce": self.overlap,
                "overlap_param_gather": self.overlap and self.distributed_optimizer,
                "bucket_size": self.bucket_size,
                **self.parallel,
            },
            "model": {
                "layers": self.layers,
                "hidden_size": self.hidden,
                "attention_heads": self.heads,
                "query_groups": self.groups or None,
                "activation": "swiglu" if self.swiglu else "gelu",
                "normalization": self.norm,
                "positions": "rotary" if self.rotary else "learned",
                "tied_embeddings": self.tied,
                "experts": self.experts,
                "bias": not self.experts,
                "dropout": self.dropout,
                **self.model,
            },
            "optimizer": {
                "lr": self.lr,
                "min_lr": self.lr / 10,
                "warmup_steps": 3,
                "decay_steps": 50,
                **self.optimizer,
            },
        }
        config = build_config(MegatronConfig, content)
        assert not config.problems(), config.problems()
        return config


def train(rank: int, world_size: int, options: dict[str, Any], faults: list[str] | None = None) -> dict[str, Any]:
    """Run a job to its end; return its step records, where it resumed, and the final state's digests."""
    from launch.megatron_training import build
    from launch.train_megatron import prepare_environment

    job = MegatronJob(**options)
    config = job.config()
    prepare_environment(config)
    training = build(config)
    if job.kit:
        return _with_kit(job, config, training, faults or [], rank)
    batches = iter(training.loader)
    records = [_plain_record(training, training.step(batches), number + 1) for number in range(job.steps)]
    training.loader.close()
    return {"resumed_at": 0, "records": records, "state": {}}


def _with_kit(job: MegatronJob, config: MegatronConfig, training: Any, faults: list[str], rank: int) -> dict[str, Any]:
    from resume_kit import Policy, ResumeKit, Retention, Saving
    from resume_kit.engines.megatron import MegatronEngine
    from tests.faults import Faults

    engine = MegatronEngine(training.chunks, training.optimizer, training.scheduler)
    hold = Faults(faults, rank)
    hold.before_kit(engine, training.loader)
    kit = ResumeKit(
        engine,
        training.loader,
        Policy.from_mapping(config.policy),
        run_dir=config.run.dir,
        save_every=job.save_every or None,
        saving=Saving(**job.saving),
        retention=Retention(keep_last=config.run.keep_last),
        config=config.pinned(),
        timeout=config.run.timeout,
        show=lambda text: print(text, flush=True),
    )
    hold.before_resume(engine, kit)
    resumed_at = step = kit.resume()
    hold.after_resume(engine)
    records = []
    batches: Iterator[Any] = hold.batches or iter(training.loader)
    while step < job.steps:
        result = training.step(batches)
        engine.stepped(result.successful, result.grad_norm)
        hold.after_engine_step(engine, kit)
        record = kit.step(result.loss)
        assert record is not None
        step = record["step"]
        records.append(record)
        if os.environ.get("SHOW_STEPS"):
            print(f"step {step} loss {record['loss']!r}", flush=True)
    kit.close()
    training.loader.close()
    return {"resumed_at": resumed_at, "records": records, "state": live_digests(kit)}


def _plain_record(training: Any, result: Any, step: int) -> dict[str, Any]:
    """A step's figures without the kit: the loss is the mean over the ranks that have one."""
    import torch.distributed as dist

    every: list[float | None] = [None] * dist.get_world_size()
    dist.all_gather_object(every, None if result.loss is None else result.loss.item())
    losses = [loss for loss in every if loss is not None]
    return {
        "step": step,
        "loss": sum(losses) / len(losses),
        "grad_norm": result.grad_norm,
        "lr": training.optimizer.param_groups[0]["lr"],
        "samples": training.loader.position,
    }
