"""The gate's loss and gradient norm, and the model's description, are the same in every topology."""

from __future__ import annotations

import time
from typing import Any

import pytest

from resume_kit.engines.description import united
from resume_kit.errors import UsageError
from tests.conftest import Ranks
from tests.jobs import live_digests, text_file
from tests.megatron_changes import change
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


def facts(rank: int, world_size: int, options: dict[str, Any], freeze: str = "") -> dict[str, Any]:
    """Gate, traces of it, and this rank's description, on a model just built; on one rank torch's own norm too."""
    import torch

    from launch.megatron_training import build
    from launch.train_megatron import prepare_environment
    from resume_kit.engines.description import to_plain
    from resume_kit.engines.megatron import MegatronEngine
    from resume_kit.engines.megatron.adapter import MegatronAdapter
    from resume_kit.engines.megatron.forward import gpt_loss

    change(freeze=freeze)
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


FROZEN = {
    "the first stage": r"embedding|decoder\.layers\.[01]\.",
    "a stage in the middle": r"decoder\.layers\.[23]\.",
    "the last stage": r"decoder\.layers\.[45]\.|decoder\.final|output",
}


@pytest.mark.parametrize("stage", FROZEN)
def test_a_stage_whose_weights_are_all_frozen_passes_the_gradient_on(stage: str, ranks: Ranks, data: str) -> None:
    options = job("gpt", data).but(layers=6, tied=False)
    (whole,) = ranks.run(facts, 1, options.to_json(), FROZEN[stage])
    assert whole["gate"][1] == pytest.approx(whole["own norm"], rel=1e-12)
    for found in ranks.run(facts, 3, options.but(pp=3).to_json(), FROZEN[stage]):
        assert found["gate"] == pytest.approx(whole["gate"], rel=1e-5)
        assert found["repeats"] and found["traces"] == []


def failing(
    rank: int, world_size: int, options: dict[str, Any], at: dict[str, int], how: str
) -> tuple[str, str, float]:
    """Run a gate whose forward fails at one place: type and text of this rank's error, and after how many seconds.

    how: forward, backward, or shape for a loss of several elements. at: stage and virtual stage, perhaps data rank.
    """
    import torch
    from megatron.core import parallel_state

    from launch.megatron_training import build
    from launch.train_megatron import prepare_environment
    from resume_kit.engines.megatron import MegatronEngine
    from resume_kit.engines.megatron.adapter import MegatronAdapter
    from resume_kit.engines.megatron.forward import gpt_loss

    config = MegatronJob(**options).config()
    prepare_environment(config)
    training = build(config)
    adapter = MegatronAdapter(MegatronEngine(training.chunks, training.optimizer, training.scheduler))
    here = parallel_state.get_pipeline_model_parallel_rank() == at["stage"]
    mine = here and at.get("data", parallel_state.get_data_parallel_rank()) == parallel_state.get_data_parallel_rank()

    def lost(_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no kernel for this")

    def forward(chunk: Any, batch: Any) -> torch.Tensor:
        output = gpt_loss(chunk, batch)
        if mine and chunk is training.chunks[at.get("chunk", 0)]:
            if how == "shape":
                return output.expand(3)
            if how == "forward":
                lost(output)
            output.register_hook(lost)
        return output

    batch = training.loader.pinned_batch(2)
    start = time.monotonic()
    with pytest.raises((UsageError, RuntimeError)) as failure:
        adapter.run_gate(forward, batch)
    took = time.monotonic() - start
    modes = {part.training for chunk in training.chunks for part in chunk.modules()}
    assert modes == {True}
    again = adapter.run_gate(gpt_loss, batch)
    assert again.loss > 0
    return failure.type.__name__, str(failure.value), took


@pytest.mark.parametrize("how", ["forward", "backward"])
@pytest.mark.parametrize(
    ("world_size", "options", "at"),
    [
        (2, {"pp": 2}, {"stage": 0}),
        (2, {"pp": 2}, {"stage": 1}),
        (2, {"pp": 2, "vpp": 2}, {"stage": 0, "chunk": 1}),
        (2, {"pp": 2, "vpp": 2}, {"stage": 1, "chunk": 0}),
        (4, {"pp": 2}, {"stage": 1, "data": 1}),
    ],
    ids=["first stage", "last stage", "a later chunk of the first", "a first chunk of the last", "one data rank"],
)
def test_a_gate_that_fails_in_one_place_fails_on_all_ranks_at_once(
    world_size: int, options: dict[str, Any], at: dict[str, int], how: str, ranks: Ranks, data: str
) -> None:
    found = ranks.run(failing, world_size, job("gpt", data).but(**options).to_json(), at, how, timeout=60)
    own = [number for number, (_, text, _) in enumerate(found) if text == "no kernel for this"]
    assert len(own) == 1
    for number, (kind, text, took) in enumerate(found):
        assert took < 20
        if number not in own:
            assert kind == "UsageError"
            assert text in (
                f"the gate failed on pipeline stage {at['stage']}; see its error",
                "the gate failed on another rank; see its error",
            )


def test_a_loss_of_several_elements_is_told_where_it_is(ranks: Ranks, data: str) -> None:
    mine, other = ranks.run(failing, 2, job("gpt", data).but(pp=2).to_json(), {"stage": 1}, "shape", timeout=60)
    assert mine[:2] == ("UsageError", "the gate failed on pipeline stage 1; see its error")
    assert other[0] == "UsageError" and "must return the loss, a tensor of one element" in other[1]
