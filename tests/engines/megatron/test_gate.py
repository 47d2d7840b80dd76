"""The gate's loss and gradient norm, and the model's description, are the same in every topology."""

from __future__ import annotations

from typing import Any

import pytest

from resume_kit.engines.description import united
from tests.conftest import Ranks
from tests.jobs import live_digests, text_file
from tests.megatron_jobs import MegatronJob

LLAMA = {"groups": 2, "swiglu": True, "norm": "RMSNorm", "rotary": True, "tied": False}
MOE = {"experts": 4, "swiglu": True, "tied": False}

#: Kind of model → topologies: (ranks, options) by name.
TOPOLOGIES: dict[str, dict[str, tuple[int, dict[str, Any]]]] = {
    "gpt": {
        "tp2": (2, {"tp": 2}),
        "tp2-sp": (2, {"tp": 2, "sp": True}),
        "pp2": (2, {"pp": 2}),
        "pp2-vpp2": (2, {"pp": 2, "vpp": 2}),
        "dp2": (2, {"distributed_optimizer": False}),
        "tp2-pp2-sp": (4, {"tp": 2, "pp": 2, "sp": True}),
    },
    "llama": {
        "tp2": (2, {"tp": 2}),
        "pp2": (2, {"pp": 2}),
    },
    "experts": {
        "ep2": (2, {"ep": 2}),
        "dp2": (2, {}),
        "tp2-sp": (2, {"tp": 2, "sp": True}),
        "tp2-ep2-etp1-sp": (2, {"tp": 2, "ep": 2, "etp": 1, "sp": True}),
        "tp4-ep2-etp1-sp": (4, {"tp": 4, "ep": 2, "etp": 1, "sp": True}),
        "tp2-ep2-etp1-dp2-sp": (4, {"tp": 2, "ep": 2, "etp": 1, "sp": True}),
        "ep2-pp2": (4, {"ep": 2, "pp": 2}),
    },
}

OPTIONS: dict[str, dict[str, Any]] = {"gpt": {}, "llama": LLAMA, "experts": MOE}


def facts(rank: int, world_size: int, options: dict[str, Any]) -> dict[str, Any]:
    """Gate, traces of it, and this rank's description, on a model just built; on one rank torch's own norm too."""
    import torch

    from launch.megatron_training import build
    from launch.train_megatron import prepare_environment
    from resume_kit.engines.description import to_plain
    from resume_kit.engines.megatron import MegatronEngine
    from resume_kit.engines.megatron.adapter import MegatronAdapter
    from resume_kit.engines.megatron.forward import gpt_loss

    config = MegatronJob(**options).config()
    prepare_environment(config)
    training = build(config)
    adapter = MegatronAdapter(MegatronEngine(training.chunks, training.optimizer, training.scheduler))

    class Kit:
        _adapter = adapter

    def trace() -> dict[str, Any]:
        buffers = [b.grad_data for c in training.chunks for b in (*c.buffers, *c.expert_parallel_buffers)]
        found: dict[str, Any] = dict(live_digests(Kit))
        found["gradients"] = [float(buffer.double().abs().sum()) for buffer in buffers]
        found["modes"] = [part.training for chunk in training.chunks for part in chunk.modules()]
        found["grads"] = [p.grad is None for chunk in training.chunks for p in chunk.parameters()]
        return found

    batch = training.loader.pinned_batch(2)
    before = trace()
    result = adapter.run_gate(gpt_loss, batch)
    repeated = adapter.run_gate(gpt_loss, batch)
    after = trace()
    own = None
    if world_size == 1:
        training.chunks[0].eval()
        weights = [p for p in training.chunks[0].parameters() if p.requires_grad]
        loss = gpt_loss(training.chunks[0], batch)
        found = torch.autograd.grad(loss, weights, allow_unused=True)
        own = float(torch.stack([g.double().square().sum() for g in found if g is not None]).sum().sqrt())
    return {
        "gate": [result.loss, result.grad_norm],
        "repeats": result == repeated,
        "traces": [name for name in before if before[name] != after[name]],
        "description": to_plain(adapter.describe()),
        "own norm": own,
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return text_file(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def one_rank(fork_server: None, data: str) -> dict[str, dict[str, Any]]:
    """What each kind of model is on one rank."""
    from tests.ranks import run_ranks

    return {kind: run_ranks(facts, 1, job(kind, data).to_json())[0] for kind in TOPOLOGIES}


def job(kind: str, data: str) -> MegatronJob:
    return MegatronJob(data=data, precision="fp32", layers=4, **OPTIONS[kind])


@pytest.mark.parametrize("kind", TOPOLOGIES)
def test_the_norm_is_that_of_plain_autograd(kind: str, one_rank: dict[str, dict[str, Any]]) -> None:
    assert one_rank[kind]["gate"][1] == pytest.approx(one_rank[kind]["own norm"], rel=1e-12)


@pytest.mark.parametrize(
    ("kind", "topology"), [(kind, topology) for kind, every in TOPOLOGIES.items() for topology in every]
)
def test_gate_and_description_do_not_depend_on_the_topology(
    kind: str, topology: str, ranks: Ranks, data: str, one_rank: dict[str, dict[str, Any]]
) -> None:
    world_size, options = TOPOLOGIES[kind][topology]
    found = ranks.run(facts, world_size, job(kind, data).but(**options).to_json())
    for one in found:
        assert one["gate"] == pytest.approx(one_rank[kind]["gate"], rel=1e-5)
        assert one["repeats"] and one["traces"] == []
    whole, single = (united([one["description"] for one in every]) for every in (found, [one_rank[kind]]))
    for part in ("weights", "trainable", "master_dtypes", "buffers", "aliases", "groups"):
        assert whole[part] == single[part], part
    for part in ("geometry", "model", "optimizer config", "schedule"):
        assert whole["pinned"][part] == single["pinned"][part], part
