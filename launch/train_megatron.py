"""Train a GPT with Megatron-core, in any topology. Start and resume are the same command.

torchrun --nproc-per-node 2 launch/train_megatron.py --config configs/megatron_tiny.yaml
srun python launch/train_megatron.py --config configs/megatron_1b.yaml --set parallel.pipeline=2
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launch.config import parse_as
from launch.entry import prefer_determinism, run, step_line
from launch.megatron_config import MegatronConfig
from launch.slurm import adopt_slurm


def main(arguments: Sequence[str] | None = None) -> int:
    """Run to the configured step and return the exit code of `launch.entry.run`."""
    return run(lambda: parse_as(MegatronConfig, arguments), prepare_environment, train)


def prepare_environment(config: MegatronConfig) -> None:
    """What must be set before torch touches a GPU; what somebody has set stays."""
    adopt_slurm(os.environ)
    # with one queue, collectives start in the order of the calls, as Megatron's overlapping counts on
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if config.run.deterministic:
        prefer_determinism()
    # torch renamed collectives that this Megatron calls by their old names, at every step
    warnings.filterwarnings("ignore", message=r".*`torch\.distributed\..* is deprecated", category=FutureWarning)
    # torch's own DataLoader calls this deprecated function of torch
    warnings.filterwarnings("ignore", message="'set_vital' is deprecated")


def train(config: MegatronConfig) -> None:
    """Build, resume, and train to the end."""
    import torch.distributed as dist

    from launch.megatron_training import build
    from resume_kit import Policy, ResumeKit
    from resume_kit.engines.megatron import MegatronEngine

    training = build(config)
    rank = dist.get_rank()
    if rank == 0:
        print(training.describe(), flush=True)
    engine = MegatronEngine(training.chunks, training.optimizer, training.scheduler)
    kit = ResumeKit(engine, training.loader, Policy.from_mapping(config.policy), **config.for_the_kit())
    step = kit.resume(at=config.run.resume_at)

    batches = iter(training.loader)
    while step < config.run.steps:
        result = training.step(batches)
        engine.stepped(result.successful, result.grad_norm)
        record = kit.step(result.loss)
        assert record is not None
        step = record["step"]
        if rank == 0:
            print(step_line(record, config.data.sequence_length), flush=True)
    kit.close()
    training.loader.close()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
