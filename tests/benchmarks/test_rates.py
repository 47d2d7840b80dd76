"""Parts of the kit by themselves: measuring them must not disturb the run that they are measured in."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.checkpoints import commit
from tests.ranks import ROOT

PLANNING = """
import json, random, sys
from pathlib import Path
from types import SimpleNamespace
from benchmarks.suite.rates import planning_time
from benchmarks.suite.results import Row

row = Row("part", "disk", "planning", "resume-kit plan")
clock = SimpleNamespace(rank=0, attempt=lambda work: work(), timed=lambda work: work() or 0.5)
before = random.getstate()
planning_time(lambda: Path(sys.argv[1]), "world=4", clock, row, 2)
print(json.dumps([random.getstate() == before, row.note, row.samples]))
"""


def test_planning_draws_nothing_from_the_generators_of_the_run(tmp_path: Path) -> None:
    """Between a resume and the first batch the kit refuses it. In a process of its own: nothing is imported there."""
    command = [sys.executable, "-c", PLANNING, str(commit(tmp_path / "run", 10))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    untouched, note, samples = json.loads(done.stdout)
    assert untouched and note == "world=4; exit code 0" and samples == {"seconds": [0.5, 0.5]}
