"""Goes on a trip with real engines and compares: tensors, the way back, and the steps after the change.

    home     A trains to the end, uninterrupted, and takes one checkpoint on the way
    away     B resumes from it and saves at once: fingerprints of all tensors must be those of A's save
    back     A resumes from B's save: every later record and the final state must be those of home, bit for bit
    forward  the same without dropout, B trains on: losses as at home within a tolerance, the same samples

Homes are kept: trips that start from the same place share them.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resume_kit.checkpoint import names
from resume_kit.checkpoint.manifest import Manifest, read_manifest
from resume_kit.checkpoint.records import TensorKey
from resume_kit.policy.policy import agrees
from tests.ranks import run_ranks
from tests.resharding.stays import Stay, stay
from tests.resharding.trips import AnyJob, Place, Trip

LEFT_AT = 2  # the step of the checkpoint from which a trip sets out
HOME_STEPS = 5
FORWARD_STEPS = 20


@dataclass(frozen=True)
class Forward:
    """The steps in B against those of A: largest relative and absolute difference of the loss, and what is off."""

    steps: int
    max_relative: float
    max_absolute: float
    out_of_tolerance: tuple[str, ...]
    other_samples: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """What a trip showed.

    changed: tensors of which B's save tells other things than A's. astray: what is not, back in A, as at home.
    read: bytes of B's resume, over all ranks and `by_rank` as [wanted, read, verified].
    """

    trip: Trip
    tensors: int
    changed: tuple[str, ...]
    astray: tuple[str, ...]
    forward: Forward
    read: Mapping[str, Any]
    seconds: float

    @property
    def problems(self) -> list[str]:
        """All reasons for which the trip fails, for people."""
        found = [f"{name} is not the tensor that was saved" for name in self.changed]
        found += [f"back in {self.trip.start.label}, {what} is not as in the uninterrupted run" for what in self.astray]
        return [*found, *self.forward.out_of_tolerance, *self.forward.other_samples]


@dataclass(frozen=True)
class _Home:
    """An uninterrupted run, and its run directory with the checkpoint of step `LEFT_AT`."""

    run: Path
    ranks: tuple[Stay, ...]


class Traveller:
    """Makes trips in `folder`, which then holds all run directories."""

    def __init__(self, folder: Path, data: str, *, timeout: float = 180.0) -> None:
        self._folder = folder
        self._data = data
        self._timeout = timeout
        self._homes: dict[tuple[int, str, int], _Home] = {}

    def go(self, trip: Trip) -> Outcome:
        """The whole trip."""
        began = time.perf_counter()
        run = self._folder / trip.name
        away = self.away(trip, run)
        saved, again = manifest_of(self.home(trip.start).run), manifest_of(run)
        assert again.engine["world_size"] == trip.goal.world and again.attempt > saved.attempt
        astray = self.back(trip, run)
        shutil.rmtree(run)
        return Outcome(
            trip,
            len(saved.tensors),
            other_tensors(saved, again),
            astray,
            self.forward(trip),
            away[0].read,
            time.perf_counter() - began,
        )

    def away(self, trip: Trip, run: Path, faults: Sequence[str] = ()) -> tuple[Stay, ...]:
        """B resumes a copy of A's run, made in `run`, and saves at once. `faults` are done to B, see `tests.faults`."""
        shutil.copytree(self.home(trip.start).run, run)
        return self._stay(trip.goal, trip.goal.job, run, LEFT_AT, LEFT_AT, faults)

    def back(self, trip: Trip, run: Path) -> tuple[str, ...]:
        """A resumes `run` and trains to the end; all that is not as at home, rank by rank."""
        found: list[str] = []
        back = self._stay(trip.start, trip.start.job, run, HOME_STEPS)
        for rank, (here, there) in enumerate(zip(self.home(trip.start).ranks, back, strict=True)):
            assert there.resumed_at == LEFT_AT
            later = here.records[LEFT_AT:]
            found += [f"rank {rank} step {a['step']}" for a, b in zip(later, there.records, strict=True) if a != b]
            every = here.state.keys() | there.state.keys()
            found += [f"rank {rank} {name}" for name in sorted(every) if here.state.get(name) != there.state.get(name)]
        return tuple(found)

    def forward(self, trip: Trip) -> Forward:
        """B trains on without dropout, step by step against A."""
        home = self.home(trip.start, dropout=0.0, until=LEFT_AT + FORWARD_STEPS)
        run = self._folder / f"{trip.name}-forward"
        shutil.copytree(home.run, run)
        there = self._stay(trip.goal, trip.goal.job.but(dropout=0.0), run, LEFT_AT + FORWARD_STEPS)
        shutil.rmtree(run)
        return compare_forward(home.ranks, there, trip.tolerance)

    def home(self, place: Place, *, dropout: float | None = None, until: int = HOME_STEPS) -> _Home:
        """The uninterrupted run in a place."""
        job = place.job if dropout is None else place.job.but(dropout=dropout)
        key = (place.world, repr(job), until)
        if key not in self._homes:
            run = self._folder / f"home-{len(self._homes)}"
            self._homes[key] = _Home(run, self._stay(place, job, run, until, LEFT_AT))
        return self._homes[key]

    def _stay(
        self,
        place: Place,
        job: AnyJob,
        run: Path,
        until: int,
        save_at: int | None = None,
        faults: Sequence[str] = (),
    ) -> tuple[Stay, ...]:
        here = job.but(run_dir=str(run), data=self._data)
        return tuple(run_ranks(stay, place.world, here, until, save_at, [*faults], timeout=self._timeout))


def manifest_of(run: Path) -> Manifest:
    """The manifest of the checkpoint from which trips set out."""
    return read_manifest(run / names.step_directory(LEFT_AT))


def other_tensors(one: Manifest, other: Manifest) -> tuple[str, ...]:
    """The tensors that are not in both with the same dtype, shape and fingerprint."""

    def told(manifest: Manifest) -> dict[TensorKey, tuple[Any, str]]:
        return {entry.spec.key: (entry.spec, entry.fingerprint) for entry in manifest.tensors}

    first, second = told(one), told(other)
    return tuple(str(key) for key in sorted(first.keys() | second.keys()) if first.get(key) != second.get(key))


def compare_forward(home: Sequence[Stay], there: Sequence[Stay], tolerance: str) -> Forward:
    """The records and samples of runs in two topologies, from the change on."""
    relative = absolute = 0.0
    losses: list[str] = []
    samples: list[str] = []
    pairs = list(zip(home[0].records[LEFT_AT:], there[0].records, strict=True))
    for number, (here, now) in enumerate(pairs):
        step, (a, b) = here["step"], (here["loss"], now["loss"])
        absolute, relative = max(absolute, abs(b - a)), max(relative, abs(b - a) / abs(a))
        if not agrees(b, a, tolerance):
            losses.append(f"step {step}: loss {b!r}, was {a!r} (tolerance {tolerance})")
        if (here["batch"], here["samples"]) != (now["batch"], now["samples"]):
            samples.append(f"step {step}: batch {now['batch']}, was {here['batch']}")
        elif taken(home, LEFT_AT + number) != taken(there, number):
            samples.append(f"step {step}: the ranks took other samples than before the change")
    return Forward(len(pairs), relative, absolute, tuple(losses), tuple(samples))


def taken(ranks: Sequence[Stay], number: int) -> list[str]:
    """The samples of all data-parallel ranks in one step, sorted; ranks that share a batch must agree on it."""
    by_data_rank: dict[int, tuple[str, ...]] = {}
    for one in ranks:
        assert by_data_rank.setdefault(one.data_rank, one.samples[number]) == one.samples[number]
    return sorted(sample for samples in by_data_rank.values() for sample in samples)
