"""The floors move the bytes that they say, and choose a way that works."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.suite import floors
from benchmarks.suite.floors import Way
from benchmarks.suite.memory import watched
from benchmarks.suite.storage import drop_cached, file_system, size_of, sync

NBYTES = (33 << 20) + 4097


@pytest.mark.parametrize("way", [Way(1, False), Way(4, False), Way(4, True)], ids=str)
def test_raw_files_have_the_bytes(tmp_path: Path, way: Way) -> None:
    path = tmp_path / "raw"
    try:
        assert floors.write(path, NBYTES, way) > 0
    except OSError:
        assert way.direct, "only O_DIRECT may be refused"
        pytest.skip("this file system refuses O_DIRECT")
    assert path.stat().st_size == -(-NBYTES // 4096) * 4096
    content = path.read_bytes()
    assert content[: 1 << 20] == content[32 << 20 : 33 << 20]  # every block is the same one ...
    assert len(set(content[: 1 << 16])) == 256  # ... and not zeros
    assert floors.read(path, way) > 0


def test_a_file_that_is_written_is_fsynced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr("os.fsync", synced.append)
    floors.write(tmp_path / "raw", 100, Way(1, False))
    assert len(synced) == 1


def test_the_fastest_way_of_the_slowest_rank_is_taken() -> None:
    seconds = {Way(1, True): 3.0, Way(4, True): 1.0, Way(1, False): 2.0}

    def measure(way: Way) -> float:
        if way == Way(4, True):
            raise OSError("refused")
        return seconds[way]

    assert floors.choose(measure, lambda mine: mine, tuple(seconds)) == Way(1, False)
    other_rank = iter([3.0, float("inf"), 9.0])
    assert floors.choose(measure, lambda mine: [max(mine[0], next(other_rank))], tuple(seconds)) == Way(1, True)


def test_copies_take_time_by_their_bytes() -> None:
    measures = floors.Copies(torch.device("cpu"), 1000).measures()
    assert list(measures) == ["memory copy"]
    assert measures["memory copy"]() > 0


def test_files_are_counted_synced_and_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "below").mkdir()
    for name in ("a", "below/b"):
        (tmp_path / name).write_bytes(b"12345")
    assert size_of(tmp_path) == 10
    calls: list[str] = []
    monkeypatch.setattr("os.fsync", lambda _: calls.append("fsync"))
    monkeypatch.setattr("os.posix_fadvise", lambda *_: calls.append("drop"))
    sync(tmp_path)
    assert calls == ["fsync"] * 4  # two files, two folders
    calls.clear()
    drop_cached(tmp_path)
    assert sorted(calls) == ["drop", "drop", "fsync", "fsync"]


def test_file_systems_are_told_apart(tmp_path: Path) -> None:
    assert file_system(tmp_path) != "unknown"
    assert file_system(Path("/proc")) == "proc"


def test_growth_of_memory_is_seen() -> None:
    with watched() as growth:
        block = bytearray(64 << 20)
        block[::4096] = b"1" * len(block[::4096])
        del block
    if not growth.resident:
        pytest.skip("/proc does not tell")
    assert 50 << 20 < growth.resident < 200 << 20
