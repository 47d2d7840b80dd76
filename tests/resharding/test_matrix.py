"""Trips between topologies on real engines: a few on every day, all of them in the long tests."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.jobs import text_file
from tests.resharding.stays import Stay
from tests.resharding.travel import (
    FORWARD_STEPS,
    LEFT_AT,
    Traveller,
    compare_forward,
    manifest_of,
    other_tensors,
)
from tests.resharding.trips import TRIPS

#: Cheap ones of both engines that share their homes: world, stage, every kind of Megatron's ranks.
EVERYDAY = (
    "zero-2-1",
    "zero-stage-3-1",
    "zero-stage-3-2",
    "megatron-tp-pp",
    "megatron-tp-dp",
    "megatron-dp-tp",
    "megatron-sharded-plain",
)


@pytest.fixture(scope="module")
def traveller(fork_server: None, tmp_path_factory: pytest.TempPathFactory) -> Traveller:
    folder = tmp_path_factory.mktemp("trips")
    return Traveller(folder, text_file(folder))


def on_every_day_or_slow(name: str) -> object:
    return pytest.param(name, marks=[] if name in EVERYDAY else pytest.mark.slow)


@pytest.mark.parametrize("name", [on_every_day_or_slow(name) for name in TRIPS])
def test_there_and_back_and_on(name: str, traveller: Traveller) -> None:
    outcome = traveller.go(TRIPS[name])
    assert outcome.problems == []
    assert outcome.tensors > 50
    assert outcome.forward.steps == FORWARD_STEPS
    assert len(outcome.read["by_rank"]) == TRIPS[name].goal.world


def test_the_matrix_is_wide() -> None:
    assert len(TRIPS) >= 34
    assert {trip.engine for trip in TRIPS.values()} == {"DeepSpeed", "Megatron"}
    assert {trip.start.job.precision for trip in TRIPS.values()} == {"bf16", "fp32"}
    for trip in TRIPS.values():
        assert (trip.start.label, trip.start.world) != (trip.goal.label, trip.goal.world) or trip.note


@pytest.mark.parametrize("name", ["zero-stage-3-1", "megatron-tp-pp"])
def test_a_bit_that_flips_between_resume_and_save_is_seen(name: str, traveller: Traveller, tmp_path: Path) -> None:
    """The sign of one element of one moment, which no check of B can know to be wrong."""
    trip, run = TRIPS[name], tmp_path / name
    traveller.away(trip, run, ["flip-moment-later"])
    changed = other_tensors(manifest_of(traveller.home(trip.start).run), manifest_of(run))
    assert len(changed) == 1
    assert changed[0].startswith("exp_avg/")
    assert any(f" {changed[0]}[" in what for what in traveller.back(trip, run))


@pytest.mark.parametrize("name", ["zero-2-1", "megatron-tp-dp"])
def test_lost_moments_are_seen_in_the_losses(name: str, traveller: Traveller) -> None:
    """The tolerance has teeth: on these trips topologies differ by about 0.0001, this by more than 0.01."""
    trip = TRIPS[name]
    reset = trip.goal.job.but(policy={**trip.goal.job.policy, "optimizer_state": "reset"})
    found = traveller.forward(replace(trip, goal=replace(trip.goal, job=reset)))
    assert found.max_relative > 0.01
    assert len(found.out_of_tolerance) > 10
    assert found.other_samples == ()


def from_the_change_on(stays: tuple[Stay, ...]) -> tuple[Stay, ...]:
    return tuple(replace(one, records=one.records[LEFT_AT:], samples=one.samples[LEFT_AT:]) for one in stays)


def test_another_order_of_samples_is_seen(traveller: Traveller) -> None:
    trip = TRIPS["zero-2-1"]
    seeded = replace(trip.goal, job=trip.goal.job.but(seed=8))
    home, other = (traveller.home(place, dropout=0.0, until=4).ranks for place in (trip.goal, seeded))
    same, found = (compare_forward(home, from_the_change_on(runs), "standard") for runs in (home, other))
    assert (same.max_relative, same.max_absolute, same.out_of_tolerance, same.other_samples) == (0.0, 0.0, (), ())
    assert len(found.other_samples) == 2 and found.out_of_tolerance
    assert "batch" in found.other_samples[0] and found.max_relative > 1e-3


def test_a_sample_that_no_rank_took_is_seen(traveller: Traveller) -> None:
    home = traveller.home(TRIPS["zero-2-1"].start, dropout=0.0, until=4).ranks
    there = from_the_change_on(home)
    twice = (there[0].samples[0][:1] * len(there[0].samples[0]), *there[0].samples[1:])
    found = compare_forward(home, (replace(there[0], samples=twice), *there[1:]), "standard")
    assert found.other_samples == ("step 3: the ranks took other samples than before the change",)
    assert found.out_of_tolerance == ()


def test_without_the_carried_rng_the_way_back_is_another(traveller: Traveller, tmp_path: Path) -> None:
    """What makes the way back exact are the records that B's save carries, nothing else."""
    from tests.damage import resign, resign_index

    for name in ("zero-2-1", "megatron-tp-dp"):
        trip, run = TRIPS[name], tmp_path / name
        traveller.away(trip, run)
        checkpoint = run / f"step-{LEFT_AT:09d}"
        resign(checkpoint / "manifest.json", lambda document: document.update(carried=[]))
        for rank in range(trip.goal.world):
            resign_index(checkpoint, rank, lambda document: document.update(carried=[]))
        astray = traveller.back(trip, run)
        assert any("step" in what for what in astray)
        assert any("rng" in what for what in astray)
