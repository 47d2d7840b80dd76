"""The script in the README runs as printed: once from the start, once again to resume."""

from __future__ import annotations

import json
import os
import re
import warnings
from pathlib import Path

import pytest

from tests.conftest import Ranks
from tests.jobs import text_file
from tests.ranks import ROOT


def script(steps: int) -> str:
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert "if step >= 6:" in block
    return block.replace("if step >= 6:", f"if step >= {steps}:")


def run_script(rank: int, world_size: int, folder: str, steps: int) -> None:
    warnings.filterwarnings("ignore")
    os.chdir(folder)
    exec(compile(script(steps), "README.md", "exec"), {"__name__": "__main__"})


def test_the_script_starts_and_resumes(ranks: Ranks, tmp_path: Path) -> None:
    text_file(tmp_path)
    ranks.run(run_script, 2, str(tmp_path), 3)
    with ranks.start(run_script, 2, str(tmp_path), 6) as group:
        group.results()
        assert "training goes on after step 2, proved" in group.log(0)
    assert sorted(path.name for path in (tmp_path / "runs/mine").glob("step-*")) == [
        "step-000000002",
        "step-000000004",
        "step-000000006",
    ]


def test_the_readme_marks_five_lines() -> None:
    assert re.findall(r"# (\d)$", script(6), re.MULTILINE) == ["1", "2", "3", "4", "5"]


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert ((ROOT / page).parent / target).exists(), f"{page} links to {target}, which is not there"


def test_the_topology_table_is_that_of_the_newest_results() -> None:
    from benchmarks.topologies_report import with_table

    newest = max((ROOT / "benchmarks/results").glob("*-topologies")) / "topologies.json"
    page = (ROOT / "docs/topologies.md").read_text()
    assert with_table(page, json.loads(newest.read_text())) == page
