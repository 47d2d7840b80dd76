"""What the training entries share: exit codes and errors, seeds, the line of a step."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from resume_kit.errors import ResumeKitError
from resume_kit.recovery.exits import exit_code
from resume_kit.run import last_words

Config = TypeVar("Config")


def run(parse: Callable[[], Config], prepare: Callable[[Config], None], train: Callable[[Config], None]) -> int:
    """Train to the configured step; the exit code, see `resume_kit.recovery.exits`.

    A run that is to stop early leaves through here with `Preempted`, a SystemExit.
    """
    try:
        config = parse()
        prepare(config)
        train(config)
    except ResumeKitError as error:
        last_words.record(error)
        report_error(error)
        return exit_code(error)
    return 0


def prefer_determinism() -> None:
    """What NCCL and cuBLAS read from the environment; what somebody has set stays. Call before CUDA starts."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # switches that sum on the way do so in no fixed order
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")


def seed_everything(seed: int) -> None:
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def step_line(record: dict[str, Any], tokens_per_sample: int) -> str:
    """One line a step: step, loss, grad norm, LR and tokens consumed."""
    norm = "n/a" if record["grad_norm"] is None else f"{record['grad_norm']:.6f}"
    return (
        f"step {record['step']} loss {record['loss']:.6f} grad_norm {norm} "
        f"lr {record['lr']:.3e} tokens {record['samples'] * tokens_per_sample}"
    )


def report_error(error: ResumeKitError) -> None:
    """The whole error once, from rank 0; a line from every other rank."""
    rank = int(os.environ.get("RANK", "0"))
    text = f"\nERROR: {error}" if rank == 0 else f"rank {rank}: {error.headline}"
    print(text, file=sys.stderr, flush=True)
