"""A resumed Megatron run is the uninterrupted run: every later record and the final state, bit for bit, dropout on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Ranks
from tests.jobs import text_file
from tests.megatron_jobs import MegatronJob, train
from tests.resuming.test_exact import differences


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return text_file(tmp_path_factory.mktemp("data"))


LLAMA = {"groups": 2, "swiglu": True, "norm": "RMSNorm", "rotary": True}

VARIANTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2-workers": (2, {"tp": 2, "workers": 1}),
    "pp2": (2, {"pp": 2}),
    "tp2-pp2": (4, {"tp": 2, "pp": 2}),
    "dp2": (2, {}),
    "dp2-plain-optimizer": (2, {"distributed_optimizer": False}),
    "dp2-overlap-small-buckets": (2, {"overlap": True, "bucket_size": 3000}),
    "vpp2": (2, {"pp": 2, "vpp": 2, "layers": 4}),
    "ep2": (2, {"ep": 2, "experts": 4}),
    "tp2-sequence-parallel": (2, {"tp": 2, "sp": True}),
    "tp2-fp32": (2, {"tp": 2, "precision": "fp32"}),
    "dp2-fp32-plain-optimizer": (2, {"precision": "fp32", "distributed_optimizer": False}),
    "tp2-llama": (2, {"tp": 2, "tied": False, **LLAMA}),
}

#: Those that are resumed, ended and resumed again.
TWICE = {"tp2-workers", "dp2-overlap-small-buckets", "ep2"}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_resumed_run_is_the_uninterrupted_one(variant: str, ranks: Ranks, data: str, tmp_path: Path) -> None:
    world_size, options = VARIANTS[variant]
    job = MegatronJob(run_dir=str(tmp_path / "reference"), data=data, steps=9, save_every=3, **options)
    reference = ranks.run(train, world_size, job.to_json())
    again = job.but(run_dir=str(tmp_path / "resumed"))
    ranks.run(train, world_size, again.but(steps=4).to_json())
    if variant in TWICE:
        ranks.run(train, world_size, again.but(steps=7).to_json())
    resumed = ranks.run(train, world_size, again.to_json())
    for rank in range(world_size):
        assert resumed[rank]["resumed_at"] == (6 if variant in TWICE else 3)
        assert differences(reference[rank], resumed[rank]) == []


def test_the_comparison_sees_another_dropout(ranks: Ranks, data: str, tmp_path: Path) -> None:
    job = MegatronJob(run_dir=str(tmp_path / "a"), data=data, tp=2, steps=3, save_every=0)
    one = ranks.run(train, 2, job.to_json())[1]
    other = ranks.run(train, 2, job.but(run_dir=str(tmp_path / "b"), dropout=0.2).to_json())[1]
    found = differences({**one, "resumed_at": 0}, other)
    assert "step 1" in found
    assert any(name.startswith("master/") for name in found)


@pytest.mark.parametrize("variant", ["tp2-pp2", "dp2-overlap-small-buckets", "ep2"])
def test_training_with_and_without_the_kit_and_its_gate_is_identical(
    variant: str, ranks: Ranks, data: str, tmp_path: Path
) -> None:
    world_size, options = VARIANTS[variant]
    job = MegatronJob(run_dir=str(tmp_path / "gated"), data=data, steps=7, save_every=2, **options)
    gated = ranks.run(train, world_size, job.to_json())
    free = ranks.run(train, world_size, job.but(run_dir=str(tmp_path / "free"), policy={"gate": False}).to_json())
    plain = ranks.run(train, world_size, job.but(run_dir="", kit=False).to_json())
    for rank in range(world_size):
        assert gated[rank]["records"] == free[rank]["records"]
        assert gated[rank]["state"] == free[rank]["state"]
        assert [{**record, "batch": ""} for record in plain[rank]["records"]] == [
            {**record, "batch": ""} for record in gated[rank]["records"]
        ]
