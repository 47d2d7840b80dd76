"""A resumed run is the uninterrupted run: every later record and the final state, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Ranks
from tests.jobs import Job, text_file, train


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return text_file(tmp_path_factory.mktemp("data"))


VARIANTS: dict[str, tuple[int, dict[str, Any]]] = {
    "zero1": (2, {"stage": 1}),
    "zero2-two-groups-frozen": (2, {"stage": 2, "groups": 2, "frozen": True}),
    "zero3-accumulation-workers": (2, {"stage": 3, "accumulation": 2, "workers": 1}),
    "zero3-four-ranks-two-groups-frozen": (4, {"stage": 3, "groups": 2, "frozen": True}),
    "zero1-fp32": (2, {"stage": 1, "precision": "fp32"}),
    "zero3-fp32": (2, {"stage": 3, "precision": "fp32"}),
    "zero2-offload": (2, {"stage": 2, "offload": True}),
    "zero3-offload": (2, {"stage": 3, "offload": True}),
    "zero3-sgd": (2, {"stage": 3, "client_optimizer": "sgd", "scheduler": "lambda"}),
    "zero2-plain-sgd": (2, {"stage": 2, "client_optimizer": "plain sgd"}),
    "zero1-amsgrad": (2, {"stage": 1, "client_optimizer": "amsgrad"}),
    "one-rank": (1, {"stage": 3}),
}


#: Of every stage one that is resumed, ended and resumed again; the others are resumed once, to save time.
TWICE = {"zero1", "zero2-two-groups-frozen", "zero3-accumulation-workers", "zero3-four-ranks-two-groups-frozen"}


def differences(reference: dict[str, Any], resumed: dict[str, Any]) -> list[str]:
    """Names of all that differs between a rank's uninterrupted and resumed run."""
    later = [record for record in reference["records"] if record["step"] > resumed["resumed_at"]]
    found = [f"step {a['step']}" for a, b in zip(later, resumed["records"], strict=True) if a != b]
    names = reference["state"].keys() | resumed["state"].keys()
    return found + sorted(n for n in names if reference["state"].get(n) != resumed["state"].get(n))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_resumed_run_is_the_uninterrupted_one(variant: str, ranks: Ranks, data: str, tmp_path: Path) -> None:
    world_size, options = VARIANTS[variant]
    job = Job(run_dir=str(tmp_path / "reference"), data=data, steps=9, save_every=3, **options)
    reference = ranks.run(train, world_size, job.to_json())
    again = job.but(run_dir=str(tmp_path / "resumed"))
    ranks.run(train, world_size, again.but(steps=4).to_json())
    if variant in TWICE:
        ranks.run(train, world_size, again.but(steps=7).to_json())
    resumed = ranks.run(train, world_size, again.to_json())
    for rank in range(world_size):
        assert resumed[rank]["resumed_at"] == (6 if variant in TWICE else 3)
        assert differences(reference[rank], resumed[rank]) == []


def test_the_comparison_sees_a_difference(ranks: Ranks, data: str, tmp_path: Path) -> None:
    job = Job(run_dir=str(tmp_path / "a"), data=data, steps=3, save_every=0)
    one = ranks.run(train, 2, job.to_json())[0]
    other = ranks.run(train, 2, job.but(run_dir=str(tmp_path / "b"), seed=8).to_json())[0]
    found = differences({**one, "resumed_at": 0}, other)
    assert "step 1" in found
    assert any(name.startswith("master/") for name in found)


def test_training_with_and_without_the_gate_is_identical(ranks: Ranks, data: str, tmp_path: Path) -> None:
    for stage in (1, 3):
        job = Job(run_dir=str(tmp_path / f"with-{stage}"), data=data, stage=stage, steps=7, save_every=2)
        gated = ranks.run(train, 2, job.to_json())
        free = ranks.run(
            train, 2, job.but(run_dir=str(tmp_path / f"without-{stage}"), policy={"gate": False}).to_json()
        )
        never = ranks.run(train, 2, job.but(run_dir=str(tmp_path / f"unsaved-{stage}"), save_every=0).to_json())
        for rank in range(2):
            assert gated[rank]["records"] == free[rank]["records"] == never[rank]["records"]
            assert gated[rank]["state"] == free[rank]["state"] == never[rank]["state"]
