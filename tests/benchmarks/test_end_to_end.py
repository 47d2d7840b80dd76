"""The smallest preset from its command to its report."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.machine import ROOT
from benchmarks.suite.parts import _finished
from benchmarks.suite.results import read_results


@pytest.mark.slow
def test_smoke(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks", "run", "--preset", "smoke", "--out", str(tmp_path)]
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=300)
    results = read_results(tmp_path)
    rows = {row.system: row for row in results.rows}
    for way in ("overlapped", "staged", "committed"):
        row = rows[f"resume_kit, {way}"]
        assert not row.failure
        assert 0 < row.samples["blocking"][0] <= row.samples["durable"][0]
        assert row.nbytes > 1_000_000
    assert {"load", "load with proof", "resume: gate"} <= rows["resume_kit, committed"].samples.keys()
    assert rows["torch DCP save"].samples["load"]
    # the kit's documents are some bytes longer when they tell of more
    assert rows["raw write and fsync"].nbytes == pytest.approx(rows["resume_kit, overlapped"].nbytes, rel=0.01)
    assert len(rows["no saves"].samples["step"]) == 2
    assert rows["resume-kit plan"].note.endswith("exit code 0")
    assert results.parts["zero3"]["parameters"] > 100_000
    assert "resume_kit, overlapped" in (tmp_path / "results.md").read_text()
    assert not (tmp_path / "work").exists()


def test_a_part_that_does_not_end_is_killed() -> None:
    assert "was killed" in _finished([sys.executable, "-c", "import time; time.sleep(60)"], 0.5)
    assert _finished([sys.executable, "-c", "raise SystemExit(3)"], 30) == "ended with code 3"
    assert _finished([sys.executable, "-c", ""], None) == ""
