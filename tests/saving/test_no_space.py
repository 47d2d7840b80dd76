"""A full disk or an unwritable directory is one error on every rank, and the last commit stands."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import left_in
from tests.conftest import Ranks
from tests.jobs import Job, build, text_file, train
from tests.ranks import RankFailure

MIB = 1 << 20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB. Mounting needs root; without it the test says so."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)], capture_output=True, text=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def fill_then_save(rank: int, world_size: int, options: dict[str, Any], filler: str) -> dict[str, Any]:
    """Commit a checkpoint, fill the disk behind the space check's back, fail to save, make room, save again."""
    from resume_kit import ResumeKit
    from resume_kit.checkpoint import files
    from resume_kit.errors import SaveFailed

    job = Job(**options)
    engine, loader = build(rank, world_size, job)
    kit = ResumeKit(engine, loader, run_dir=job.run_dir, config={}, show=lambda _: None)
    kit.resume()
    batches = iter(loader)
    errors = []
    for _ in range(3):
        loss = engine(**next(batches)).loss
        engine.backward(loss)
        engine.step()
        kit.step(loss)
        try:
            if kit.step_number == 2:
                files.require_space = lambda *_: None  # as if another job had filled the disk just after the check
                if rank == 0:
                    with suppress(OSError), open(filler, "wb", buffering=0) as file:
                        while file.write(b"x" * 4096):
                            pass
            kit.save()
        except SaveFailed as error:
            errors.append(str(error))
            if rank == 0:
                Path(filler).unlink()
    return {"errors": errors, "left": left_in(Path(job.run_dir))}


def test_a_disk_that_fills_up_in_a_save(ranks: Ranks, small_disk: Path, tmp_path: Path) -> None:
    job = Job(run_dir=str(small_disk / "run"), data=text_file(tmp_path), save_every=0)
    mine, other = ranks.run(fill_then_save, 2, job.to_json(), str(small_disk / "filler"))
    assert len(mine["errors"]) == len(other["errors"]) == 1
    assert mine["errors"] == other["errors"]
    assert "no space left" in mine["errors"][0]
    assert "keep fewer checkpoints" in mine["errors"][0]
    assert mine["left"] == ["step-000000001", "step-000000003"]


def test_too_little_space_is_known_before_a_byte_is_written(ranks: Ranks, small_disk: Path, tmp_path: Path) -> None:
    (small_disk / "filler").write_bytes(b"x" * (2 * MIB - 200_000))
    job = Job(run_dir=str(small_disk / "run"), data=text_file(tmp_path), steps=2, save_every=2)
    with pytest.raises(RankFailure) as failure:
        ranks.run(train, 2, job.to_json())
    for outcome in failure.value.outcomes:
        assert outcome.error_type == "resume_kit.errors.SaveFailed"
        assert "the checkpoint needs" in outcome.error
    assert left_in(Path(job.run_dir)) == []


def test_a_run_directory_that_cannot_be_written(ranks: Ranks, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    job = Job(run_dir=str(tmp_path / "file" / "run"), data=text_file(tmp_path))
    with pytest.raises(RankFailure) as failure:
        ranks.run(train, 2, job.to_json())
    for outcome in failure.value.outcomes:
        assert outcome.error_type == "resume_kit.errors.UsageError"
        assert "the run directory cannot be used" in outcome.error
