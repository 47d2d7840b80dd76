"""A run's sums: what stood and what was lost, how long steps, saves and restarts take, and the goodput. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from statistics import median, median_high

from resume_kit.recovery.history import Past, Story


@dataclass(frozen=True)
class Account:
    """Durations in seconds; None where the run has not shown it.

    wall: from the first start to now, or to the end of a run that does not run. productive: each attempt's steps that
    stand, times its median step. step, save_interval, save_blocked, save_durable, restart: medians; the restart is
    from an attempt's end to the first step of the next.
    """

    wall: float
    productive: float
    lost_steps: int
    lost_samples: int | None
    failures: int
    gpu_hours: float
    step: float | None
    save_interval: float | None
    save_interval_steps: int | None
    save_blocked: float | None
    save_durable: float | None
    restart: float | None

    @property
    def goodput(self) -> float | None:
        """The part of the wall time that went into steps that stand; the rest went into saves, failures, restarts and
        what lies between steps."""
        return min(1.0, self.productive / self.wall) if self.wall > 0 else None

    @classmethod
    def of(cls, story: Story, *, until: float | None = None) -> Account:
        """`until`: Unix seconds up to which a running run is counted."""
        pasts, recent = story.pasts, story.commits[-100:]
        step = next((past.step_seconds for past in reversed(pasts) if past.step_seconds is not None), None)
        ends = [until] if until is not None else [past.ended for past in pasts if past.ended]
        starts = [past.started for past in pasts if past.started]
        within = [(a, b) for a, b in pairwise(recent) if a.attempt == b.attempt]
        samples = [past.lost_samples for past in pasts]
        failures, gpu_hours = failures_in_gpu_hours(pasts)
        return cls(
            wall=max(0.0, max(ends) - min(starts)) if ends and starts else 0.0,
            productive=sum((past.trained - past.lost_steps) * (past.step_seconds or step or 0.0) for past in pasts),
            lost_steps=sum(past.lost_steps for past in pasts),
            lost_samples=None if None in samples else sum(count for count in samples if count is not None),
            failures=failures,
            gpu_hours=gpu_hours,
            step=step,
            save_interval=median_high([b.time - a.time for a, b in within]) if within else None,
            save_interval_steps=median_high([b.step - a.step for a, b in within]) if within else None,
            save_blocked=_median(commit.blocked for commit in recent),
            save_durable=_median(commit.durable for commit in recent),
            restart=_median(past.to_first_step for past in pasts),
        )


def failures_in_gpu_hours(pasts: list[Past]) -> tuple[int, float]:
    """How many attempts failed, and the GPU-hours of all, in which they did."""
    hours = sum((past.world_size or 1) * past.seconds / 3600 for past in pasts)
    return sum(past.is_failure for past in pasts), hours


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None and value >= 0]
    return median(known) if known else None
