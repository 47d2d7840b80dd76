"""Every generator's state: captured without a draw, told apart, put back exactly."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from resume_kit.checkpoint import canonical
from resume_kit.engines import rng
from resume_kit.errors import ResumeRefused


class Tracker:
    """A generator of an engine's own, such as the one for dropout under tensor parallelism."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self) -> None:
        torch.rand(3, generator=self.generator)

    @property
    def pair(self) -> rng.Tracker:
        return (
            lambda: self.generator.get_state().numpy().tobytes(),
            lambda state: self.generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8)) and None,
        )


@pytest.fixture(autouse=True)
def _leave_the_generators_alone() -> Any:
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)


def draws() -> list[Any]:
    """Some of everything that the generators give."""
    return [
        random.random(),
        random.gauss(0, 1),
        random.sample(range(100), 5),
        np.random.standard_normal(3).tolist(),
        np.random.randint(0, 1000, 4).tolist(),
        np.random.permutation(6).tolist(),
        torch.rand(3).tolist(),
        torch.randn(17).tolist(),
        torch.randperm(5).tolist(),
    ]


DRAWS: dict[str, tuple[str, Callable[[], object]]] = {
    "python": ("python", random.random),
    "python gauss": ("python", lambda: random.gauss(0, 1)),
    "numpy": ("numpy", np.random.rand),
    "numpy gauss": ("numpy", np.random.standard_normal),
    "torch": ("torch", lambda: torch.rand(1)),
    "torch shuffle": ("torch", lambda: torch.randperm(10)),
}


@pytest.mark.parametrize("draw", DRAWS)
def test_a_draw_changes_the_digest_of_its_generator_only(draw: str) -> None:
    generator, act = DRAWS[draw]
    tracker = Tracker(1)
    before = rng.capture({"dropout": tracker.pair})
    act()
    after = rng.capture({"dropout": tracker.pair})
    old, new = rng.digests(before), rng.digests(after)
    assert {"python", "numpy", "torch", "engine:dropout"} <= old.keys() == new.keys()
    assert {name for name in old if old[name] != new[name]} == {generator}
    assert rng.digest(before) != rng.digest(after)


def test_an_engines_generator_has_its_own_digest() -> None:
    one, other = Tracker(1), Tracker(2)
    trackers = {"one": one.pair, "other": other.pair}
    before = rng.digests(rng.capture(trackers))
    other.draw()
    after = rng.digests(rng.capture(trackers))
    assert {name for name in before if before[name] != after[name]} == {"engine:other"}


def test_the_second_half_of_a_gauss_pair_is_part_of_the_state() -> None:
    rng.seed_all(5)
    np.random.standard_normal()  # NumPy now holds the other half of the pair
    held = rng.capture({})
    assert canonical.decode(held["numpy"])["has_gauss"] == 1
    np.random.standard_normal()
    assert rng.digests(held)["numpy"] != rng.digests(rng.capture({}))["numpy"]
    random.gauss(0, 1)
    half = rng.capture({})
    random.gauss(0, 1)
    assert rng.digests(half)["python"] != rng.digests(rng.capture({}))["python"]


def test_capturing_draws_nothing() -> None:
    tracker = Tracker(3)
    rng.seed_all(1)
    expected = draws()
    rng.seed_all(1)
    first = rng.capture({"t": tracker.pair})
    second = rng.capture({"t": tracker.pair})
    rng.digests(first)
    rng.digest(second)
    rng.compatibility(canonical.decode(first), {"t": tracker.pair})
    assert first == second
    assert draws() == expected


@pytest.mark.parametrize("odd_gauss", [False, True])
def test_restoring_gives_the_same_draws(odd_gauss: bool) -> None:
    tracker = Tracker(4)
    rng.seed_all(9)
    if odd_gauss:
        np.random.standard_normal()
        random.gauss(0, 1)
    record = rng.capture({"t": tracker.pair})
    expected = [draws(), torch.rand(4, generator=tracker.generator).tolist()]
    rng.seed_all(10)
    tracker.draw()
    old, new = rng.digests(record), rng.digests(rng.capture({"t": tracker.pair}))
    assert all(old[name] != new[name] for name in ("python", "numpy", "torch", "engine:t"))
    rng.restore(record, {"t": tracker.pair})
    assert rng.capture({"t": tracker.pair}) == record
    assert [draws(), torch.rand(4, generator=tracker.generator).tolist()] == expected


def test_a_record_survives_the_way_through_a_file() -> None:
    rng.seed_all(11)
    np.random.standard_normal()
    record = rng.capture({})
    raw = canonical.sign({"rng": record})
    expected = draws()
    read = canonical.parse_signed(raw, Path("index.json"))["rng"]
    assert rng.digest(read) == rng.digest(record) and rng.digests(read) == rng.digests(record)
    rng.restore(read, {})
    assert draws() == expected


def test_whatever_is_drawn_inside_preserved_leaves_no_trace() -> None:
    tracker = Tracker(5)
    trackers = {"t": tracker.pair}
    np.random.standard_normal()
    before = rng.capture(trackers)
    with rng.preserved(trackers):
        draws()
        tracker.draw()
        assert rng.capture(trackers) != before
    assert rng.capture(trackers) == before


def test_preserved_holds_when_an_error_leaves_it() -> None:
    before = rng.capture({})

    def fail() -> None:
        with rng.preserved({}):
            draws()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert rng.capture({}) == before


def test_a_fitting_record_has_no_problems() -> None:
    tracker = Tracker(6)
    assert rng.compatibility(canonical.decode(rng.capture({"t": tracker.pair})), {"t": tracker.pair}) == []


@pytest.mark.parametrize("lost", ["python", "numpy", "torch", "engine:t"])
def test_a_generator_without_a_record_is_named_and_nothing_is_restored(lost: str) -> None:
    tracker = Tracker(7)
    trackers = {"t": tracker.pair}
    record = rng.capture(trackers)
    del record[lost]
    draws()
    now = rng.capture(trackers)
    (problem,) = rng.compatibility(canonical.decode(record), trackers)
    assert (problem.check, problem.where) == ("rng", lost) and "its record does not" in problem.what
    with pytest.raises(ResumeRefused, match=lost):
        rng.restore(record, trackers)
    assert rng.capture(trackers) == now


@pytest.mark.parametrize("extra", ["cuda:7", "engine:other", "jax"])
def test_a_record_without_a_generator_is_named_and_nothing_is_restored(extra: str) -> None:
    record = {**rng.capture({}), extra: {"$bytes": ""}}
    draws()
    now = rng.capture({})
    (problem,) = rng.compatibility(canonical.decode(record), {})
    assert (problem.check, problem.where) == ("rng", extra) and "no such generator" in problem.what
    with pytest.raises(ResumeRefused, match=extra):
        rng.restore(record, {})
    assert rng.capture({}) == now


def test_all_that_is_missing_or_too_much_is_told_at_once() -> None:
    tracker = Tracker(8)
    record = canonical.decode(rng.capture({"old": tracker.pair}))
    del record["numpy"]
    problems = rng.compatibility(record, {"new": tracker.pair})
    assert [problem.where for problem in problems] == ["engine:new", "numpy", "engine:old"]


def test_another_current_device_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    record = canonical.decode(rng.capture({}))
    assert rng.compatibility(record, {}) == []
    (problem,) = rng.compatibility({**record, "current_device": 3}, {})
    assert problem.where == "current_device" and "was cuda:3" in problem.what


def test_seeding_makes_all_generators_alike_again() -> None:
    rng.seed_all(2**40 + 1)  # more than NumPy's 32 bits
    first = rng.capture({})
    draws()
    rng.seed_all(2**40 + 1)
    assert rng.capture({}) == first
    rng.seed_all(2**40 + 2)
    new = rng.digests(rng.capture({}))
    assert all(new[name] != digest for name, digest in rng.digests(first).items() if name != "current_device")


@pytest.mark.parametrize("generator", ["python", "numpy", "torch", "engine:model-parallel-rng"])
def test_a_derived_state_is_that_of_a_generator_freshly_seeded_and_draws_nothing(generator: str) -> None:
    own = Tracker(5)
    trackers = {"model-parallel-rng": own.pair}
    before = rng.capture(trackers)
    state = rng.derived(generator, 2**63 + 11)
    assert rng.capture(trackers) == before
    rng.restore({**before, generator: canonical.encode(state)}, trackers)
    if generator == "python":
        assert random.random() == random.Random(2**63 + 11).random()
    elif generator == "numpy":
        assert np.random.random() == np.random.RandomState((2**63 + 11) % 2**32).random_sample()
    else:
        source = None if generator == "torch" else own.generator
        expected = torch.rand(3, generator=torch.Generator().manual_seed(2**63 + 11))
        assert torch.equal(torch.rand(3, generator=source), expected)


def test_derived_states_differ_by_seed_and_repeat() -> None:
    for generator in ("python", "numpy", "torch"):
        states = [canonical.dumps(canonical.encode(rng.derived(generator, seed))) for seed in (1, 2, 1)]
        assert states[0] == states[2] != states[1]
