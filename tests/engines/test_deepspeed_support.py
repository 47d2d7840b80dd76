"""A DeepSpeed engine whose state would not be saved whole is refused before it trains; all reasons at once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from resume_kit.engines.deepspeed.support import require_supported
from resume_kit.errors import UsageError


def engine(stage: int = 3, *, offload: dict[str, Any] | None = None, base: object = None, **sections: Any) -> Any:
    """As much of an engine as is looked at."""
    zero = {"offload_optimizer": offload} if offload is not None else {}
    optimizer = SimpleNamespace(optimizer=base, fp32_partitioned_groups_flat=[], single_partition_of_fp32_groups=[])
    return SimpleNamespace(
        zero_optimization_stage=lambda: stage,
        zero_hpz_partition_size=lambda: 1,
        optimizer=optimizer,
        _config=SimpleNamespace(_param_dict={"zero_optimization": zero, **sections}),
        mp_world_size=1,
        has_moe_layers=False,
        training_dataloader=None,
    )


def refused(found: Any) -> str:
    with pytest.raises(UsageError, match="cannot be saved whole") as refusal:
        require_supported(found)
    return str(refusal.value)


@pytest.mark.parametrize(
    "offload",
    [None, {"device": "cpu"}, {"device": "cpu", "ratio": 1.0}, {"device": "cpu", "super_offload": False}],
)
def test_an_optimizer_that_is_offloaded_whole_is_supported(offload: dict[str, Any] | None) -> None:
    require_supported(engine(offload=offload))
    require_supported(engine(stage=1, offload=offload))


@pytest.mark.parametrize(
    "offload", [{"device": "cpu", "ratio": 0.5}, {"device": "cpu", "ratio": 0.0}, {"super_offload": True}]
)
def test_an_optimizer_of_which_a_part_is_offloaded_is_refused(offload: dict[str, Any]) -> None:
    assert "ratio below 1, or super_offload: part of its state would not be saved" in refused(engine(offload=offload))


@pytest.mark.parametrize("name", ["Muon", "MuonWithAuxAdam"])
def test_muon_is_refused(name: str) -> None:
    assert "Muon: its momentum moves outside" in refused(engine(stage=1, base=type(name, (), {})()))


def test_all_reasons_come_together() -> None:
    text = refused(engine(offload={"ratio": 0.5}, base=type("Muon", (), {})(), eigenvalue={"enabled": True}))
    assert all(word in text for word in ("ratio below 1", "Muon", "eigenvalue: its state"))


def test_a_stateful_feature_that_is_switched_off_is_supported() -> None:
    require_supported(engine(eigenvalue={"enabled": False}))
