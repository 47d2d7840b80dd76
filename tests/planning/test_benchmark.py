"""The planning benchmark runs and says what it is asked for; its figures are not judged here."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import planning


@pytest.fixture(autouse=True)
def _all_cores() -> Iterator[None]:
    """The benchmark keeps to one core; the tests after it get theirs back."""
    cores = os.sched_getaffinity(0)
    yield
    os.sched_setaffinity(0, cores)


def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(planning, "LARGEST", 256)
    options = ["--ranks", "64", "128", "--zero-ranks", "4", "--repeats", "1", "--sample", "4"]
    assert planning.main(["--out", str(tmp_path), *options]) == 0
    result = json.loads((tmp_path / "planning.json").read_text())
    assert [row["ranks"] for row in result["scaling"]] == [64, 128]
    one = result["documents"][0]["one rank of the target reads"]
    assert 0 < one["indices"]["median"] < 64
    assert (tmp_path / "planning.png").stat().st_size > 10_000
    assert "times the ranks take" in (tmp_path / "README.md").read_text()


def test_the_model_is_llamas() -> None:
    geometry = planning.llama(planning.Sizes(layers=126))
    total = sum(
        weight.shape[0] * (weight.shape[1] if len(weight.shape) > 1 else 1) for weight in geometry.weights.values()
    )
    assert round(total / 1e9) == 406
    orders = [weight.order for weight in geometry.weights.values()]
    assert orders == sorted(orders) and len(geometry.weights) == 126 * 7 + 3
