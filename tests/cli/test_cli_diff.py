from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import WEIGHTS, commit
from tests.cli.conftest import Cli, Result


@pytest.fixture
def diff(cli: Cli, tmp_path: Path) -> Any:
    """Diff of the plain checkpoint of step 10 with one of another recipe."""

    def run(step: int = 10, *flags: str, **recipe: Any) -> Result:
        a = commit(tmp_path / "a", 10)
        b = commit(tmp_path / "b", step, **recipe)
        return cli("diff", a, b, *flags)

    return run


def changed_sections(result: Result) -> dict[str, list[str]]:
    sections = result.json["sections"].items()
    return {name: [d["path"] for d in s["differences"]] for name, s in sections if s["differences"]}


def test_same(diff: Any) -> None:
    result = diff()
    assert (result.code, result.err) == (0, "")
    assert "✓ the training state is the same; nothing differs" in result.out


def test_provenance_is_shown_and_does_not_count(diff: Any) -> None:
    result = diff(10, "--json", attempt=4, created=1_700_000_001.5, run_id="ba9876543210")
    assert result.code == 0
    assert result.json["identical"]
    assert [d["path"] for d in result.json["provenance"]] == ["attempt", "created", "run_id"]


@pytest.mark.parametrize(
    ("recipe", "sections"),
    [
        ({"lr": 0.001}, {"state": ["groups[0].lr"]}),
        ({"position": 81}, {"data": ["position"]}),
        ({"rng_seed": 1}, {"rng": ["rank 0", "rank 1"]}),
        ({"user": {"ema": 1}}, {"state": ["user.ema"]}),
    ],
)
def test_training_state_counts(diff: Any, recipe: dict, sections: dict) -> None:
    result = diff(10, "--json", **recipe)
    assert result.code == 1
    assert changed_sections(result) == sections
    assert result.json["tensors"]["same"] == 9


@pytest.mark.parametrize(
    ("recipe", "sections"),
    [
        ({"gate": None}, {"gate": [""]}),
        ({"zero_stage": 2}, {"engine": ["zero_stage"]}),
        ({"config": {"layers": 1, "dropout": 0.2}}, {"configuration": ["config.dropout"]}),
        ({"versions": {"python": "3.12.0", "torch": "2.9.0"}}, {"versions": ["python"]}),
    ],
)
def test_surroundings_do_not_count(diff: Any, recipe: dict, sections: dict) -> None:
    result = diff(10, "--json", **recipe)
    assert result.code == 0
    assert changed_sections(result) == sections
    assert not result.json["identical"]


def test_tensors(diff: Any) -> None:
    weights = {**WEIGHTS, "layers.0.bias": (9,), "layers.1.weight": (2,)}
    result = diff(10, "--json", weights=weights, seed=3)
    assert result.code == 1
    tensors = result.json["tensors"]
    assert len(tensors["only_b"]) == 4
    assert tensors["only_b"][0] == ["exp_avg", "layers.1.weight"]
    assert len(tensors["respecified"]) == 4
    assert tensors["respecified"][0] == {
        "tensor": ["exp_avg", "layers.0.bias"],
        "a": ["float32", [7]],
        "b": ["float32", [9]],
    }
    assert tensors["changed_by_kind"] == {"buffer": 1, "exp_avg": 1, "exp_avg_sq": 1, "master": 1, "param": 1}


def test_text_of_a_later_step(diff: Any) -> None:
    result = diff(20)
    assert result.code == 1
    assert "9 have another content: 1 buffer, 2 exp_avg, 2 exp_avg_sq, 2 master, 2 param" in result.out
    assert "counters.global_steps" in result.out
    assert "layers.0.bias.step.value (and 1 alike)" in result.out
    assert result.out.endswith("✗ the training state differs\n")


def test_another_sharding_is_the_same_tensors(diff: Any) -> None:
    result = diff(10, "--json", ranks=3)
    assert result.json["tensors"]["same"] == 9
    assert changed_sections(result) == {"rng": ["rank 2"], "engine": ["world_size"]}


def test_nan_equals_itself(cli: Cli, tmp_path: Path) -> None:
    nan = {"loss": float("nan"), "grad_norm": float("inf")}
    a, b = (commit(tmp_path / name, 10, gate=nan) for name in "ab")
    result = cli("diff", a, b, "--json")
    assert result.code == 0
    assert result.json["identical"]


def test_a_damaged_side(cli: Cli, run: Path) -> None:
    (run / "step-000000010" / "manifest.json").write_bytes(b"{")
    result = cli("diff", run, run / "step-000000010")
    assert (result.code, result.out) == (1, "")
    assert "step-000000010/manifest.json" in result.err
