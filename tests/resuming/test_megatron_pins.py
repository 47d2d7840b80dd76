"""What shapes a Megatron model or its gradients without shaping any tensor is pinned, and refused where it differs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Ranks
from tests.jobs import text_file
from tests.megatron_changes import train_changed
from tests.megatron_jobs import MegatronJob
from tests.ranks import RankFailure
from tests.resuming.test_exact import differences

PINNED: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    "rotary base": (
        {"model": {"rotary_base": 20_000}},
        {},
        ["model.rotary_base: saved with 10000, live 20000", "model.rotary frequencies"],
    ),
    "positions": (
        {"rotary": False},
        {},
        ["model.position_embedding_type: saved with", "param/embedding.position_embeddings.weight: additional"],
    ),
    "dtype of the reduction": (
        {},
        {"gradients": {"grad_reduce_in_fp32": False}},
        ["gradients.grad_reduce_in_fp32: saved with True, live False"],
    ),
}


@pytest.fixture(scope="module")
def saved(fork_server: None, tmp_path_factory: pytest.TempPathFactory) -> MegatronJob:
    """A run with rotary positions and a checkpoint of step 1."""
    from tests.ranks import run_ranks

    folder = tmp_path_factory.mktemp("saved")
    job = MegatronJob(run_dir=str(folder / "run"), data=text_file(folder), tp=2, rotary=True, steps=1, save_every=1)
    run_ranks(train_changed, 2, job.to_json(), {})
    return job


@pytest.mark.parametrize("policy", [{}, {"topology": "reshard", "rng": "derive"}], ids=["strict", "reshard"])
@pytest.mark.parametrize("what", PINNED)
def test_a_setting_that_shapes_no_tensor_is_refused(
    what: str, policy: dict[str, Any], ranks: Ranks, saved: MegatronJob
) -> None:
    options, changes, expected = PINNED[what]
    job = saved.but(**options, policy=policy, **({"tp": 1, "pp": 2} if policy else {}))
    with pytest.raises(RankFailure) as failure:
        ranks.run(train_changed, 2, job.to_json(), changes)
    for outcome in failure.value.outcomes:
        assert outcome.error_type == "resume_kit.errors.ResumeRefused"
        for part in expected:
            assert part in outcome.error
        assert re.search(r"topology\b.*saved", outcome.error) is None


BIASED = {
    "transformer": {
        "moe_router_enable_expert_bias": True,
        "moe_router_score_function": "sigmoid",
        "moe_router_bias_update_rate": 1e-2,
    }
}
FIRST_STAGE_FROZEN = {"freeze": r"embedding|decoder\.layers\.0\."}
EXPERTS = {"experts": 4, "swiglu": True, "tied": False}

EXACT: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "expert bias, ep2": ({"ep": 2, **EXPERTS}, BIASED),
    "expert bias, tp2": ({"tp": 2, "sp": True, **EXPERTS}, BIASED),
    "first stage frozen, pp2": ({"pp": 2, "tied": False}, FIRST_STAGE_FROZEN),
}


@pytest.mark.parametrize("variant", EXACT)
def test_a_run_with_such_a_setting_resumes_exactly(variant: str, ranks: Ranks, tmp_path: Path) -> None:
    options, changes = EXACT[variant]
    job = MegatronJob(run_dir=str(tmp_path / "whole"), data=text_file(tmp_path), steps=4, save_every=2, **options)
    reference = ranks.run(train_changed, 2, job.to_json(), changes)
    again = job.but(run_dir=str(tmp_path / "resumed"))
    ranks.run(train_changed, 2, again.but(steps=3).to_json(), changes)
    resumed = ranks.run(train_changed, 2, again.to_json(), changes)
    for one, other in zip(reference, resumed, strict=True):
        assert other["resumed_at"] == 2
        assert differences(one, other) == []
        if changes is BIASED:
            biases = [value for name, value in other["state"].items() if "router.expert_bias" in name]
            assert len(biases) == 2 and set(biases) != {"0" * 16}


def test_the_bias_of_an_expert_router_moves_to_another_topology(ranks: Ranks, tmp_path: Path) -> None:
    """It is proved there: in bf16 it is kept in fp32, also before the first forward has said so."""
    place = {"run_dir": str(tmp_path / "run"), "data": text_file(tmp_path), "steps": 2, "save_every": 2}
    before = ranks.run(train_changed, 2, MegatronJob(ep=2, **EXPERTS, **place).to_json(), BIASED)
    flexible = {"policy": {"preset": "flexible"}, **place}
    after = ranks.run(train_changed, 2, MegatronJob(tp=2, sp=True, **EXPERTS, **flexible).to_json(), BIASED)
    biases = [{k: v for k, v in one["state"].items() if "expert_bias" in k} for one in (*before, *after)]
    assert biases[0] and biases == [biases[0]] * 4
    manifest = json.loads((Path(place["run_dir"]) / "step-000000002" / "manifest.json").read_bytes())
    assert {dtype for kind, name, dtype, *_ in manifest["tensors"] if "expert_bias" in name} == {"float32"}
