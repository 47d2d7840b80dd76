"""Layouts are predictions: here they are compared with the real engines, on real ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from resume_kit.planning.layouts.megatron import megatron_layout
from resume_kit.planning.layouts.topology import MegatronTopology
from resume_kit.planning.layouts.zero import zero_layout
from resume_kit.planning.ownership import uncovered
from tests.conftest import Ranks
from tests.jobs import Job, text_file
from tests.planning.live import assert_predicted_is_live, deepspeed_masters, geometry_of, megatron_masters
from tests.ranks import run_ranks


@pytest.mark.parametrize(
    ("stage", "world_size", "changes"),
    [
        pytest.param(1, 2, {}, id="ZeRO-1 on 2"),
        pytest.param(1, 5, {"groups": 2}, id="ZeRO-1 on 5, two groups"),
        pytest.param(2, 3, {"frozen": True}, id="ZeRO-2 on 3, frozen weights"),
        pytest.param(3, 2, {"groups": 2}, id="ZeRO-3 on 2, two groups"),
        pytest.param(3, 5, {"frozen": True}, id="ZeRO-3 on 5, frozen weights"),
    ],
)
def test_deepspeed(ranks: Ranks, tmp_path: Path, stage: int, world_size: int, changes: dict[str, Any]) -> None:
    job = Job(run_dir=str(tmp_path), stage=stage, data=text_file(tmp_path), layers=1, **changes)
    live = ranks.run(deepspeed_masters, world_size, job.to_json())
    layout = zero_layout(live[0]["shapes"], live[0]["groups"], stage=stage, world_size=world_size)
    assert_predicted_is_live(layout, [rank["held"] for rank in live])


PLAIN = {
    "vocabulary": 260,
    "vocabulary_multiple": 4,
    "layers": 4,
    "hidden_size": 24,
    "attention_heads": 4,
    "tied_embeddings": True,
    "bias": True,
}
LLAMA = {
    **PLAIN,
    "query_groups": 2,
    "ffn_hidden_size": 52,
    "activation": "swiglu",
    "normalization": "RMSNorm",
    "positions": "rotary",
    "bias": False,
    "tied_embeddings": False,
}
MIXTURE = {**LLAMA, "experts": 4, "expert_ffn_hidden_size": 20, "tied_embeddings": True}


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "data parallel": ({}, PLAIN),
    "tensor, gated": ({"tensor": 2}, LLAMA),
    "pipeline, tied": ({"pipeline": 2}, PLAIN),
    "interleaved, tied": ({"pipeline": 2, "virtual_pipeline": 2}, PLAIN),
    "buckets, tied": ({"pipeline": 2, "overlap_grad_reduce": True, "bucket_size": 3000}, PLAIN),
    "plain optimizer, tensor": ({"tensor": 2, "distributed_optimizer": False}, LLAMA),
    "plain optimizer, tied": ({"pipeline": 2, "distributed_optimizer": False}, PLAIN),
    "experts over data ranks": ({"expert": 2}, MIXTURE),
    "experts over tensor ranks": ({"tensor": 2, "expert": 2, "expert_tensor": 1, "sequence": True}, MIXTURE),
    "experts without expert parallelism": ({"tensor": 2, "sequence": True}, MIXTURE),
}


@pytest.fixture(scope="module")
def live_megatron(fork_server: None) -> dict[str, list[dict[str, Any]]]:
    """Each case on four ranks, what each rank holds. One start for all: importing megatron-core takes longest."""
    cases = [{"parallel": parallel, "model": model} for parallel, model in CASES.values()]
    by_rank = run_ranks(megatron_masters, 4, cases)
    return {name: [rank[number] for rank in by_rank] for number, name in enumerate(CASES)}


@pytest.mark.parametrize("case", CASES)
def test_megatron(case: str, live_megatron: dict[str, list[dict[str, Any]]]) -> None:
    parallel, _ = CASES[case]
    live = live_megatron[case]
    told = live[0]["topology"]
    hidden = {"overlap": parallel.get("overlap_grad_reduce", False), "bucket_size": parallel.get("bucket_size")}
    topology = replace(MegatronTopology.from_engine(told), **hidden)
    assert topology.to_engine() == told
    geometry = geometry_of(live)
    holdings = [rank["held"] for rank in live]
    assert_predicted_is_live(megatron_layout(geometry, topology), holdings)
    assert uncovered(megatron_layout(geometry, topology).table) == {}
    holdings[3] = holdings[3][1:]
    with pytest.raises(AssertionError, match="rank 3"):
        assert_predicted_is_live(megatron_layout(geometry, topology), holdings)


@pytest.mark.parametrize("case", CASES)
def test_settings_are_what_megatron_calls_them(case: str, live_megatron: dict[str, list[dict[str, Any]]]) -> None:
    parallel, _ = CASES[case]
    (described, *_), told = (rank["description"] for rank in live_megatron[case]), live_megatron[case][0]["topology"]
    hidden = {"overlap": parallel.get("overlap_grad_reduce", False), "bucket_size": parallel.get("bucket_size")}
    settings = replace(MegatronTopology.from_engine(told), **hidden).to_settings()
    pinned = described["pinned"]["parallel"]
    assert settings == {name: pinned[name] for name in settings}
