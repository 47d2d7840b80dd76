"""Seconds as a training run feels them: from a barrier on, and the slowest rank counts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping

import torch
import torch.distributed as dist

_SHOWN = 160  # characters of an exception in a table


class SystemFailed(RuntimeError):
    """A measured system failed on at least one rank; raised on all of them, with the first rank's reason."""


class Clock:
    """Barriers, slowest-rank durations and common failures over the default process group. All calls are collective.

    device: where the ranks train; it is synchronised before a measurement begins.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()

    def synchronize(self) -> None:
        """Wait for this rank's device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def barrier(self) -> None:
        """Wait for this rank's device, then for all ranks."""
        self.synchronize()
        dist.barrier()

    def slowest(self, seconds: Iterable[float]) -> list[float]:
        """Of each duration the largest over all ranks."""
        values = torch.tensor(list(seconds), dtype=torch.float64, device=self.device)
        if values.numel():
            dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return [float(value) for value in values.tolist()]

    def slowest_of(self, seconds: Mapping[str, float]) -> dict[str, float]:
        """The same for named durations; every rank gives the same names."""
        names = sorted(seconds)
        return dict(zip(names, self.slowest(seconds[name] for name in names), strict=True))

    def timed(self, work: Callable[[], object]) -> float:
        """Seconds that `work` and what it put on the device take on the slowest rank, begun together."""
        self.barrier()
        start = time.perf_counter()
        work()
        self.synchronize()
        return self.slowest([time.perf_counter() - start])[0]

    def attempt(self, work: Callable[[], object]) -> None:
        """Run `work` on every rank. Raises `SystemFailed` on all of them where it failed on any."""
        reason = ""
        try:
            work()
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # torch's CheckpointException is no Exception
            reason = shortened(error)
        reasons: list[str] = [""] * self.world_size
        dist.all_gather_object(reasons, reason)
        if first := next((text for text in reasons if text), ""):
            raise SystemFailed(first)

    def agreed(self, decision: bool) -> bool:
        """Rank 0's decision, on every rank."""
        value = torch.tensor([int(decision)], device=self.device)
        dist.broadcast(value, src=0)
        return bool(value.item())


def shortened(error: BaseException) -> str:
    """An exception in one line of a table: its class and its first two lines, of a traceback the last."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = lines[-1] if lines and "Traceback" in lines[0] else "; ".join(lines[:2])
    text = f"{type(error).__name__}: {said}" if said else type(error).__name__
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"
