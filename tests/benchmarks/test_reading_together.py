"""The benchmark of column slices, on 96 MB: what it says of each way, and that reading together is what it measures."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import reading_together
from benchmarks.reading_together import measure


def test_ways_and_bytes(tmp_path: Path) -> None:
    found = measure(tmp_path, 96, 2, 1)
    assert {name for name in found["seconds"] if not name.startswith("raw")} == set(found["bytes"])
    assert all(len(seconds) == 1 and seconds[0] > 0 for seconds in found["seconds"].values())
    size = 2 * 3 * (16 << 20)  # fp32 of master and two moments, over both ranks
    for ranks in found["bytes"].values():
        assert sum(wanted for wanted, *_ in ranks) == size
    alone, together = (sum(n[2] for n in found["bytes"][f"column slices, {way}"]) for way in ("alone", "together"))
    assert alone < size // 2 < size <= together
    assert not list(tmp_path.iterdir())


def test_the_way_of_the_kit_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for memory, way in ((True, "alone"), (False, "together")):
        monkeypatch.setattr(reading_together, "in_memory", lambda work, memory=memory: memory and work == tmp_path)
        assert measure(tmp_path, 48, 2, 1)["kit"] == f"column slices, {way}"
