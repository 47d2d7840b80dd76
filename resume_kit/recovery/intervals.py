"""How often to save: the interval that loses least, and what any interval loses. No torch.

All times are in seconds. A failure costs the work since the last checkpoint and the restart; failures come at random,
one every `mtbf` seconds on average. J. W. Young, CACM 17(9), 1974, has the first order; J. T. Daly, Future Generation
Computer Systems 22(3), 2006, the higher order (equation 37) and the full model of the time to the end (equation 20).
"""

from __future__ import annotations

import math

from resume_kit.recovery.account import failures_in_gpu_hours
from resume_kit.recovery.history import Past

#: GPU-hours between unexpected interruptions: 419 in 54 days on 16,384 GPUs (The Llama 3 Herd of Models, 2024).
PRIOR_GPU_HOURS = 16_384 * 54 * 24 / 419


def best_interval(cost_seconds: float, mtbf_seconds: float) -> float:
    """Seconds of training between two saves that lose the least time; `cost_seconds`: what a save takes from training.

    A save that costs nothing gives 0: then the disk bounds the interval, see docs/sizing.md.
    """
    _require(cost_seconds >= 0 and mtbf_seconds > 0, cost=cost_seconds, mtbf=mtbf_seconds)
    if cost_seconds >= 2 * mtbf_seconds:
        return mtbf_seconds
    ratio = cost_seconds / (2 * mtbf_seconds)
    return math.sqrt(2 * cost_seconds * mtbf_seconds) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - cost_seconds


def expected_loss(
    interval_seconds: float, cost_seconds: float, mtbf_seconds: float, restart_seconds: float = 0.0
) -> float:
    """The fraction of wall time that is lost to saves, to work done again and to restarts, in [0, 1].

    Daly's full model, exact where failures are exponential and may hit a save or a restart too. Where saves overlap
    training, the time until a checkpoint is durable counts as part of `restart_seconds`: it is trained again as well.
    """
    _require(
        interval_seconds > 0 and cost_seconds >= 0 and mtbf_seconds > 0 and restart_seconds >= 0,
        interval=interval_seconds,
        cost=cost_seconds,
        mtbf=mtbf_seconds,
        restart=restart_seconds,
    )
    segment = (interval_seconds + cost_seconds) / mtbf_seconds
    restart = restart_seconds / mtbf_seconds
    if segment + restart > 700:  # e**709 is the largest double: nothing gets done
        return 1.0
    return 1.0 - interval_seconds / (mtbf_seconds * math.exp(restart) * math.expm1(segment))


def blended_mtbf(pasts: list[Past], world_size: int) -> float:
    """Seconds between failures to expect of `world_size` ranks: the run's own record, blended with a prior.

    The prior counts as one failure in `PRIOR_GPU_HOURS`; ends that were planned (finished, preempted, refused) as
    none. A machine that fails far more often than the prior has it would be believed only after weeks, so the run's own
    failures, less one, count as they are where that is more.
    """
    _require(world_size > 0, world_size=world_size)
    failures, gpu_hours = failures_in_gpu_hours(pasts)
    an_hour = (1 + failures) / (PRIOR_GPU_HOURS + gpu_hours)
    if gpu_hours > 0:
        an_hour = max(an_hour, (failures - 1) / gpu_hours)
    return 3600 / an_hour / world_size


def _require(fine: bool, **given: float) -> None:
    if not fine:
        raise ValueError(f"no interval follows from {', '.join(f'{name} {value}' for name, value in given.items())}")
