"""What is measured of the live state at a save, where it lies: fingerprints, casts, sums over copies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from resume_kit.algebra.boxes import Box
from resume_kit.algebra.fingerprint import MASK
from resume_kit.engines.casts import cast_mismatches
from resume_kit.engines.fingerprint import FingerprintPlan, Piece
from resume_kit.engines.totals import Places
from resume_kit.saving.plan import Holdings, SavePlan


@dataclass(frozen=True, eq=False)
class Measurement:
    """int64 tensors, perhaps still being computed on the device.

    values: fingerprints of the plan's `measured`. replicas: of the whole tensors. mismatches: elements of each of the
    plan's `cast` that are not their master's cast. sums: [2, copies × tensors], see `Places`. done: an event of the
    stream that computes them, None on the CPU.
    """

    values: torch.Tensor
    replicas: torch.Tensor
    mismatches: torch.Tensor
    sums: torch.Tensor
    done: torch.cuda.Event | None = None

    def wait(self) -> None:
        """Wait until they are computed: another stream would read what is not there yet."""
        if self.done is not None:
            self.done.synchronize()


class Gauge:
    """Fingerprints of tensors, prepared anew only when one of them lies elsewhere than before. It keeps the tensors."""

    def __init__(self) -> None:
        self._places: list[Any] | None = None
        self._plan: FingerprintPlan | None = None

    def of(self, pieces: Sequence[Piece]) -> FingerprintPlan:
        places = [(data.data_ptr(), data.dtype, shape, box) for data, shape, box in pieces]
        if self._plan is None or places != self._places:
            self._plan, self._places = FingerprintPlan(pieces), places
        return self._plan


@dataclass(frozen=True, eq=False)
class Measuring:
    """All measurements of a save, ready to be taken."""

    values: FingerprintPlan
    replicas: FingerprintPlan
    pairs: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    places: Places

    def run(self) -> Measurement:
        """Start them; nothing waits for the device, no communication."""
        values = self.values.run()
        return Measurement(values, self.replicas.run(), cast_mismatches(self.pairs), self.places.sums(values))


class Gauges:
    """What is kept between saves to measure the next one quickly."""

    def __init__(self) -> None:
        self._values, self._replicas = Gauge(), Gauge()

    def measuring(self, holdings: Holdings, plan: SavePlan) -> Measuring:
        every = holdings.every
        return Measuring(
            values=self._values.of([(every[n].data, every[n].spec.shape, every[n].box) for n in plan.measured]),
            replicas=self._replicas.of(
                [(r.data.reshape(-1), r.spec.shape, Box.whole(r.spec.shape)) for r in holdings.replicas]
            ),
            pairs=tuple((every[n].data, master.data) for n in plan.cast if (master := every[n].cast_of) is not None),
            places=plan.places,
        )


@dataclass(frozen=True)
class Measured:
    """`Measurement` as Python integers, fingerprints in [0, 2**64)."""

    values: dict[int, int]
    replicas: tuple[int, ...]
    miscast: frozenset[int]

    @classmethod
    def of(cls, found: Measurement, plan: SavePlan) -> Measured:
        """Waits for the device."""
        found.wait()
        return cls(
            values={n: value & MASK for n, value in zip(plan.measured, found.values.tolist(), strict=True)},
            replicas=tuple(value & MASK for value in found.replicas.tolist()),
            miscast=frozenset(n for n, bad in zip(plan.cast, found.mismatches.tolist(), strict=True) if bad),
        )
