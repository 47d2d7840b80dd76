"""Which models a leg may build without initial weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.suite.workloads import ROOT, ties_weights
from launch.config import load


@pytest.mark.parametrize(("config", "ties"), [("zero3_tiny", True), ("zero3_1b", False)])
def test_a_model_that_ties_its_weights_is_initialised(config: str, ties: bool, tmp_path: Path) -> None:
    assert ties_weights(load(ROOT / f"configs/{config}.yaml", [f"run.dir={tmp_path}"]).model) is ties
