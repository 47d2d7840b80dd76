"""Train a transformers causal LM with DeepSpeed ZeRO. Start and resume are the same command.

deepspeed --num_gpus 2 launch/train_zero3.py --config configs/zero3_tiny.yaml
torchrun --nproc-per-node 2 launch/train_zero3.py --config configs/zero3_tiny.yaml --set run.steps=200
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launch.config import TrainConfig, parse_arguments
from launch.entry import prefer_determinism, run, seed_everything, step_line
from launch.slurm import adopt_slurm


def main(arguments: Sequence[str] | None = None) -> int:
    """Run to the configured step and return the exit code of `launch.entry.run`."""
    return run(lambda: parse_arguments(arguments), prepare_environment, train)


def prepare_environment(config: TrainConfig) -> None:
    """What must be set before torch and DeepSpeed are imported."""
    adopt_slurm(os.environ)
    if not uses_cuda():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    elif config.run.deterministic:
        prefer_determinism()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # torch renamed collectives that this DeepSpeed calls by their old names, at every step
    warnings.filterwarnings("ignore", message=r".*`torch\.distributed\..* is deprecated", category=FutureWarning)


def uses_cuda() -> bool:
    """Whether ranks run on GPUs: there are some, and DeepSpeed was not told to leave them alone."""
    import torch

    return torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"


def build(config: TrainConfig) -> tuple[Any, Any]:
    """Engine and resumable loader of a configuration, on a process group of its own making."""
    import deepspeed
    import torch
    import torch.distributed as dist

    from resume_kit import ResumableLoader, TokenDataset
    from resume_kit.data import standard_library_path

    cuda = uses_cuda()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if cuda:
        torch.cuda.set_device(local_rank)
    torch.use_deterministic_algorithms(config.run.deterministic and cuda)
    deepspeed.init_distributed(dist_backend="nccl" if cuda else "gloo", verbose=False)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    config.accumulate_over(world_size)

    dataset = TokenDataset.from_path(
        config.data.path or standard_library_path(),
        sequence_length=config.data.sequence_length,
        max_bytes=config.data.max_bytes,
    )
    loader = ResumableLoader(
        dataset,
        micro_batch_size=config.micro_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        rank=rank,
        world_size=world_size,
        seed=config.seed,
        num_workers=config.data.num_workers,
    )
    seed_everything(config.seed)
    engine = build_engine(config, vocab_size=dataset.vocab_size)
    seed_everything(config.seed + 1 + rank)
    return engine, loader


def train(config: TrainConfig) -> None:
    """Build engine and data, resume, and train to the end."""
    import torch.distributed as dist

    from resume_kit import Policy, ResumeKit

    engine, loader = build(config)
    rank = dist.get_rank()
    kit = ResumeKit(engine, loader, Policy.from_mapping(config.policy), **config.for_the_kit())
    step = kit.resume(at=config.run.resume_at)

    tokens_per_sample = config.data.sequence_length
    batches = iter(loader)
    while step < config.run.steps:
        batch = {name: value.to(engine.device) for name, value in next(batches).items()}
        loss = engine(**batch).loss
        engine.backward(loss)
        engine.step()
        record = kit.step(loss)
        if record:
            step = record["step"]
            if rank == 0:
                print(step_line(record, tokens_per_sample), flush=True)
    kit.close()
    loader.close()
    dist.barrier()
    dist.destroy_process_group()


def build_engine(config: TrainConfig, *, vocab_size: int) -> Any:
    """A DeepSpeed engine around a randomly initialised transformers model."""
    import deepspeed
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = dict(config.model)
    kind = settings.pop("type", "gpt2")
    attention = settings.pop("attn_implementation", "eager")
    settings.setdefault("vocab_size", vocab_size)
    model_config = AutoConfig.for_model(kind, **settings, use_cache=False)
    deepspeed_config = {
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "steps_per_print": 10**9,
        **config.deepspeed,
    }
    model = AutoModelForCausalLM.from_config(model_config, attn_implementation=attention)
    model.train()
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=deepspeed_config)
    return engine


if __name__ == "__main__":
    sys.exit(main())
