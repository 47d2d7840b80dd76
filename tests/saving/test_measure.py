"""What was measured is read only once it has been computed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from resume_kit.saving.measure import Measured, Measurement


class Event:
    """An event of a device that writes its results when it is waited for, and not before."""

    def __init__(self, *results: torch.Tensor) -> None:
        self._results = results

    def synchronize(self) -> None:
        for result in self._results:
            result.fill_(-1)


def test_the_device_is_waited_for() -> None:
    values, replicas, mismatches = (torch.zeros(2, dtype=torch.int64) for _ in range(3))
    done: Any = Event(values, replicas, mismatches)
    plan: Any = SimpleNamespace(measured=(4, 7), cast=(1, 2))
    found = Measured.of(Measurement(values, replicas, mismatches, torch.zeros(2, 0), done), plan)
    full = 2**64 - 1
    assert found.values == {4: full, 7: full} and found.replicas == (full, full)
    assert found.miscast == {1, 2}


def test_on_the_cpu_there_is_nothing_to_wait_for() -> None:
    found = torch.tensor([5, -1])
    plan: Any = SimpleNamespace(measured=(0, 1), cast=(3, 9))
    measured = Measured.of(Measurement(found, found[:0], torch.tensor([0, 2]), found[:0]), plan)
    assert measured.values == {0: 5, 1: 2**64 - 1} and measured.miscast == {9}
