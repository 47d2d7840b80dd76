"""Growth from fewer to more ranks: rows are found by engine, whatever their parts are called."""

from __future__ import annotations

import pytest

from benchmarks.suite.compare import comparison
from benchmarks.suite.growth import grown
from benchmarks.suite.results import Results, Row


def run_on(ranks: int, part: str, gigabytes: int, seconds: dict[str, float], *, target: str = "ext4") -> Results:
    """A run that moved so many GB: seconds of its saves by system."""
    rows = [
        Row(part, target, "ours", system, nbytes=gigabytes * 10**9, samples={"durable": [value]})
        for system, value in seconds.items()
    ]
    made = Results("by-hand", date="2026-01-02")
    made.replace_part(part, {"engine": "megatron", "ranks": ranks}, rows)
    return made


def test_efficiency_is_the_rate_by_the_ranks() -> None:
    two = run_on(2, "megatron-tp2", 10, {"fast": 5.0, "slow": 5.0})
    eight = run_on(8, "megatron-tp2-pp2-dp2", 40, {"fast": 5.0, "slow": 10.0})
    lines = list(comparison(two, eight))
    header = "| engine | file system | system | what | s on 2 | s on 8 | GB on 2 | GB on 8 | GB/s on 2 | GB/s on 8 |"
    assert any(line.startswith(header) for line in lines)
    assert "| megatron | ext4 | fast | durable | 5.00 | 5.00 | 10.00 | 40.00 | 2.00 | 8.00 | 1.00 |" in lines
    assert "| megatron | ext4 | slow | durable | 5.00 | 10.0 | 10.00 | 40.00 | 2.00 | 4.00 | 0.50 |" in lines
    assert "Did not scale, efficiency below 0.7: megatron, ext4, slow, durable (0.50)." in lines
    assert not any(line.startswith("only ") for line in lines), "the parts have other names, and are told all the same"


def test_what_all_scaled_is_said_too() -> None:
    lines = comparison(run_on(2, "a", 1, {"x": 1.0}), run_on(4, "b", 2, {"x": 1.0}))
    assert "Did not scale, efficiency below 0.7: nothing." in list(lines)


@pytest.mark.parametrize(
    "other",
    [run_on(2, "a", 9, {"x": 1.0}), run_on(8, "a", 9, {"y": 1.0}), run_on(8, "a", 9, {"x": 1.0}, target="tmpfs")],
)
def test_the_same_ranks_and_other_systems_have_not_grown(other: Results) -> None:
    before = run_on(2, "a", 1, {"x": 1.0})
    assert grown(before, other) == []
    assert not any("efficiency" in line for line in comparison(before, other))


def test_nothing_moved_has_no_efficiency() -> None:
    (pair,) = grown(run_on(2, "a", 0, {"x": 1.0}), run_on(8, "b", 0, {"x": 1.0}))
    assert pair.efficiency("durable") is None
    assert pair.efficiency("load") is None
