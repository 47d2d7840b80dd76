"""What the adapter would not save whole is refused when the kit is made, all of it at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Ranks
from tests.jobs import text_file
from tests.megatron_jobs import MegatronJob


def built(options: dict[str, Any]) -> Any:
    """A Megatron engine as a training script hands it to the kit."""
    from launch.megatron_training import build
    from launch.train_megatron import prepare_environment
    from resume_kit.engines.megatron import MegatronEngine

    config = MegatronJob(**options).config()
    prepare_environment(config)
    training = build(config)
    return MegatronEngine(training.chunks, training.optimizer, training.scheduler)


def refusal(engine: Any) -> str:
    """What the adapter says; empty where it takes the engine."""
    from resume_kit.engines.choose import adapter_for
    from resume_kit.errors import UsageError

    try:
        adapter_for(engine)
    except UsageError as error:
        return str(error)
    return ""


def switched_on(rank: int, world_size: int, options: dict[str, Any]) -> dict[str, str]:
    """The refusal for each feature, switched on in the configuration of a real engine, and for all together."""
    from resume_kit.engines.megatron.logical import unwrapped

    engine = built(options)
    ddp, model = engine.model_chunks[0].ddp_config, unwrapped(engine.model_chunks[0]).config
    settings = [
        (ddp, "use_megatron_fsdp", True),
        (ddp, "num_distributed_optimizer_instances", 2),
        (model, "fp8", "hybrid"),
        (model, "fp4", "e2m1"),
        (model, "mtp_num_layers", 1),
        (model, "moe_grouped_gemm", True),
        (model, "heterogeneous_block_specs", True),
        (engine.optimizer.config, "use_precision_aware_optimizer", True),
        (engine.optimizer.config, "optimizer_cpu_offload", True),
    ]
    found = {"nothing": refusal(engine)}
    before = [getattr(holder, name, False) for holder, name, _ in settings]
    for (holder, name, value), old in zip(settings, before, strict=True):
        setattr(holder, name, value)
        found[name] = refusal(engine)
        setattr(holder, name, old)
    for holder, name, value in settings:
        setattr(holder, name, value)
    found["all"] = refusal(engine)
    for (holder, name, _), old in zip(settings, before, strict=True):
        setattr(holder, name, old)
    engine.model_chunks = [unwrapped(chunk) for chunk in engine.model_chunks]
    found["bare chunk"] = refusal(engine)
    return found


def test_every_feature_that_would_be_lost_is_refused(ranks: Ranks, tmp_path: Path) -> None:
    (found,) = ranks.run(switched_on, 1, MegatronJob(data=text_file(tmp_path)).to_json())
    assert found.pop("nothing") == ""
    everything, bare = found.pop("all"), found.pop("bare chunk")
    for name, text in found.items():
        assert text.startswith("this Megatron engine cannot be saved whole\n"), name
        assert text.count("[engine] Megatron:") == 1, text
        assert name in text or name == "use_megatron_fsdp", text
    assert everything.count("[engine] Megatron:") == len(found)
    assert "a GPTModel as model chunk" in bare and "wrap each chunk in DistributedDataParallel" in bare


def regrouped(rank: int, world_size: int, options: dict[str, Any], groups: dict[str, Any]) -> str:
    """The refusal of an engine whose process groups are formed otherwise."""
    from megatron.core import parallel_state

    engine = built(options)
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(**groups, create_gloo_process_groups=False)
    return refusal(engine)


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ({"context_parallel_size": 2}, "context parallelism\n    → set context_parallel_size to 1"),
        ({"pipeline_model_parallel_size": 2, "order": "tp-cp-ep-pp-dp"}, "ranks in another order than tp-cp-ep-dp-pp"),
    ],
)
def test_groups_that_the_kit_does_not_know_are_refused(
    groups: dict[str, Any], expected: str, ranks: Ranks, tmp_path: Path
) -> None:
    texts = ranks.run(regrouped, 4, MegatronJob(data=text_file(tmp_path)).to_json(), groups)
    assert all(expected in text for text in texts)


def two_loss_scalers(rank: int, world_size: int, options: dict[str, Any]) -> str:
    from resume_kit.engines.megatron.ownership import single_optimizers

    engine = built(options)
    for one in single_optimizers(engine.optimizer):
        one.config.fp16 = True
    return refusal(engine)


def test_two_loss_scalers_are_refused(ranks: Ranks, tmp_path: Path) -> None:
    job = MegatronJob(data=text_file(tmp_path), ep=2, experts=4)
    for text in ranks.run(two_loss_scalers, 2, job.to_json()):
        assert "fp16 with expert parallelism: two loss scalers" in text
    assert all("scalers" not in text for text in ranks.run(two_loss_scalers, 2, job.but(ep=1, experts=0).to_json()))
