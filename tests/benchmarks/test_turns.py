"""Turns on two ranks: the slowest counts, a failure of one rank is told on both and stops nobody else."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tests.conftest import Ranks

STEPS = {"one": 0}


class Fake:
    """A system that writes a file a rank, and does as a test says."""

    group, note, fsyncs, loads = "peer", "", False, True

    def __init__(self, name: str, root: Path, *, fail: str = "", slow: int = -1) -> None:
        self.name, self._root, self._fail, self._slow = name, root / name, fail, slow
        self.saves = self.syncs = 0

    def available(self) -> str | None:
        return None

    def save(self, step: int) -> None:
        self.saves += 1
        if self._fail == "save" and dist.get_rank() == 1 and self.saves > 1:
            raise RuntimeError("disk on fire\nand more")
        if self._slow == dist.get_rank():
            time.sleep(0.3)
        self._root.mkdir(parents=True, exist_ok=True)
        (self._root / f"{dist.get_rank()}").write_bytes(bytes(1000))

    def wait(self) -> None:
        if self._slow == dist.get_rank():
            time.sleep(0.2)

    def folder(self) -> Path:
        return self._root

    def load(self) -> Mapping[str, float]:
        if self._fail == "load" and dist.get_rank() == 0:
            raise KeyError("step")
        return {"load": 5.0 + dist.get_rank(), "proof": 1.0} if self.name == "exact" else {}

    def nbytes(self) -> int:
        return 2000

    def trim(self) -> None:
        shutil.rmtree(self._root)

    def details(self) -> Mapping[str, float]:
        return {"save: stage": 1.0 + dist.get_rank()}

    def close(self) -> None: ...


def in_turns(
    rank: int,
    world_size: int,
    root: str,
    make: Callable[[Path], list[Fake]],
    repeats: int,
    late_at: str = "nothing",
) -> Any:
    import torch

    from benchmarks.suite.results import Row
    from benchmarks.suite.timing import Clock
    from benchmarks.suite.turns import Turns

    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    steps = 0

    def step() -> int:
        nonlocal steps
        steps += 1
        return steps

    systems = make(Path(root))
    rows = [Row("part", "target", "peer", system.name) for system in systems]
    turns = Turns(Clock(torch.device("cpu")), step, systems, rows, Path(root))
    for repeat in range(repeats):
        turns.take(first=repeat == 0, late=lambda name: name == late_at)
    dist.destroy_process_group()
    left = sorted(path.name for path in Path(root).iterdir())
    return [vars(row) for row in (*rows, *turns.floor_rows)], steps, left


def one_slow(root: Path) -> list[Fake]:
    return [Fake("slow", root, slow=1), Fake("exact", root)]


def some_fail(root: Path) -> list[Fake]:
    return [Fake("saving", root, fail="save"), Fake("loading", root, fail="load"), Fake("good", root)]


def test_the_slowest_rank_counts(ranks: Ranks, tmp_path: Path) -> None:
    first, second = ranks.run(in_turns, 2, str(tmp_path), one_slow, 2)
    assert first[0] == second[0], "both ranks must know the same figures"
    slow, exact, *floors = first[0]
    assert 0.3 <= slow["samples"]["blocking"][0] < 0.5 <= slow["samples"]["durable"][0]
    assert exact["samples"]["load"] == [6.0]  # what a system says of itself, of the slower rank
    assert exact["samples"]["proof"] == [1.0]
    assert exact["samples"]["save: stage"] == [2.0]
    assert exact["samples"]["durable"][0] < 0.3
    assert [row["system"] for row in floors] == ["raw write and fsync", "raw read", "memory copy"]
    assert {row["nbytes"] for row in floors} == {2000}
    assert all(set(row["first"]) == set(row["samples"]) for row in (slow, exact, *floors))
    assert first[1] == 4, "one training step before every save"
    assert first[2] == [], "nothing is left behind"


def three(root: Path) -> list[Fake]:
    return [Fake("quick", root), Fake("middling", root), Fake("dear", root)]


def test_a_repeat_without_time_leaves_the_rest_of_the_peers_out(ranks: Ranks, tmp_path: Path) -> None:
    first, second = ranks.run(in_turns, 2, str(tmp_path), three, 2, "middling")
    assert first[0] == second[0]
    quick, middling, dear, *floors = first[0]
    assert [len(row["samples"].get("durable", [])) for row in (quick, middling, dear)] == [1, 0, 0]
    assert all(row["first"]["durable"] for row in (quick, middling, dear)), "the first repeat is always whole"
    assert all(row["samples"] for row in floors), "the floors are measured in every repeat"


def test_a_failure_is_told_and_stops_nobody_else(ranks: Ranks, tmp_path: Path) -> None:
    first, second = ranks.run(in_turns, 2, str(tmp_path), some_fail, 3)
    assert first[0] == second[0]
    saving, loading, good, *_ = first[0]
    assert saving["failure"] == "RuntimeError: disk on fire; and more"
    assert set(saving["first"]) > {"blocking", "durable", "load"}
    assert saving["samples"] == {}
    assert loading["failure"] == "load: KeyError: 'step'"
    assert len(loading["samples"]["durable"]) == 2
    assert "load" not in loading["samples"]
    assert good["failure"] == ""
    assert len(good["samples"]["durable"]) == len(good["samples"]["load"]) == 2
