"""The text of a model that is pinned: blind to what ZeRO-3 has gathered, sensitive to layers and their settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from resume_kit.engines.deepspeed.structure import structure
from tests.conftest import Ranks
from tests.jobs import text_file


class Norm(torch.nn.Module):
    """Prints its weight's shape, as the norms of transformers models do."""

    def __init__(self, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.arange(8.0))
        self.eps = eps

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


def partitioned(module: torch.nn.Module) -> torch.nn.Module:
    """As ZeRO-3 leaves a module between forwards."""
    for weight in module.parameters():
        weight.ds_shape = weight.shape  # type: ignore[attr-defined]
        weight.data = weight.data.new_empty(0)
    return module


def model(*layers: torch.nn.Module) -> torch.nn.Module:
    return torch.nn.Sequential(Norm(), *layers)


def test_partitioned_weights_are_printed_whole_and_left_as_they_were() -> None:
    whole, parts = model(torch.nn.Linear(8, 8)), partitioned(model(torch.nn.Linear(8, 8)))
    before = [(weight, weight.data_ptr(), weight.shape) for weight in parts.parameters()]
    assert "(0,)" in repr(parts)
    assert structure(parts) == structure(whole) == repr(whole)
    assert [(weight, weight.data_ptr(), weight.shape) for weight in parts.parameters()] == before
    scalar = torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(()))])
    assert structure(partitioned(torch.nn.ModuleList([scalar]))).count("torch.float32") == 1


def test_weights_come_back_where_a_layer_cannot_be_printed() -> None:
    class Broken(Norm):
        def extra_repr(self) -> str:
            raise RuntimeError("no text")

    parts = partitioned(torch.nn.Sequential(Norm(), Broken()))
    with pytest.raises(RuntimeError, match="no text"):
        structure(parts)
    assert all(weight.shape == (0,) for weight in parts.parameters())


CHANGED = {
    "layer type": model(torch.nn.LayerNorm(8), torch.nn.Dropout(0.1), torch.nn.GELU()),
    "order": model(torch.nn.Dropout(0.1), torch.nn.Linear(8, 8), torch.nn.GELU()),
    "dropout": model(torch.nn.Linear(8, 8), torch.nn.Dropout(0.2), torch.nn.GELU()),
    "activation": model(torch.nn.Linear(8, 8), torch.nn.Dropout(0.1), torch.nn.GELU("tanh")),
    "a layer more": model(torch.nn.Linear(8, 8), torch.nn.Dropout(0.1), torch.nn.GELU(), torch.nn.Identity()),
    "a norm's epsilon": torch.nn.Sequential(Norm(1e-5), torch.nn.Linear(8, 8), torch.nn.Dropout(0.1), torch.nn.GELU()),
}


@pytest.mark.parametrize("changed", CHANGED.values(), ids=CHANGED)
def test_another_layer_order_or_setting_is_another_structure(changed: torch.nn.Module) -> None:
    built = model(torch.nn.Linear(8, 8), torch.nn.Dropout(0.1), torch.nn.GELU())
    assert structure(partitioned(changed)) != structure(partitioned(built))


def llama(rank: int, world_size: int, options: dict[str, Any]) -> dict[str, Any]:
    """A tiny Llama: save at step 1, or resume there after an evaluation that came before the kit."""
    from launch.config import TrainConfig
    from launch.config import build as build_config
    from launch.train_zero3 import build, prepare_environment
    from resume_kit import Policy, ResumeKit

    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    content = {
        "data": {"path": options["data"], "sequence_length": 16, "num_workers": 0},
        "model": {"type": "llama", **shape},
        "deepspeed": {
            "bf16": {"enabled": True},
            "zero_optimization": {"stage": options["stage"]},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        },
        "run": {"dir": options["run_dir"]},
        "global_batch_size": 4,
        "micro_batch_size": 2,
    }
    config = build_config(TrainConfig, content)
    prepare_environment(config)
    engine, loader = build(config)
    before = repr(engine.module)
    if options["evaluate"]:
        with torch.no_grad():
            for _ in range(2):  # the first forward only records, then releases all
                engine(**loader.pinned_batch(1))
    gathered = before != repr(engine.module)
    policy = Policy.from_mapping(options.get("policy", {}))
    kit = ResumeKit(engine, loader, policy, run_dir=options["run_dir"], timeout=60.0, show=lambda _text: None)
    resumed_at = kit.resume()
    batches = iter(loader)
    if not resumed_at:
        loss = engine(**next(batches)).loss
        engine.backward(loss)
        engine.step()
        kit.step(loss)
        kit.save()
    kit.close()
    loader.close()
    return {"resumed_at": resumed_at, "gathered": gathered}


def test_a_kit_made_after_an_evaluation_resumes_under_the_strict_policy(ranks: Ranks, tmp_path: Path) -> None:
    options = {"stage": 3, "run_dir": str(tmp_path / "run"), "data": text_file(tmp_path)}
    for found in ranks.run(llama, 2, {**options, "evaluate": False}):
        assert found == {"resumed_at": 0, "gathered": False}
    for found in ranks.run(llama, 2, {**options, "evaluate": True}):
        assert found == {"resumed_at": 1, "gathered": True}


def test_a_model_that_prints_shapes_resumes_under_another_stage(ranks: Ranks, tmp_path: Path) -> None:
    options = {"run_dir": str(tmp_path / "run"), "data": text_file(tmp_path), "evaluate": False}
    ranks.run(llama, 2, {**options, "stage": 3})
    for found in ranks.run(llama, 2, {**options, "stage": 1, "policy": {"preset": "flexible"}}):
        assert found["resumed_at"] == 1
