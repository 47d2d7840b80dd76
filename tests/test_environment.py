"""What memory can be had: the host's, and less where a cgroup allows less."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from resume_kit.environment import (
    _free_in_cgroups,
    available_memory,
    elastic_run,
    process_started,
    slurm_job,
    started_again,
)


def _group(folder: Path, limit: str, used: int, cache: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {cache}\n")


def test_each_limit_around_this_process_counts(tmp_path: Path) -> None:
    root, own = tmp_path / "cgroup", tmp_path / "self"
    own.write_text("0::/slurm/job_7/step_0\n")
    _group(root, "", 9000, 0)
    _group(root / "slurm", "max", 9000, 0)
    _group(root / "slurm/job_7", "1000", 700, 100)
    _group(root / "slurm/job_7/step_0", "5000", 600, 0)
    assert sorted(_free_in_cgroups(root, own)) == [400, 4400]


def test_the_memory_controller_of_version_1_counts_too(tmp_path: Path) -> None:
    root, own = tmp_path / "cgroup", tmp_path / "self"
    own.write_text("5:devices:/job_7\n4:cpu,memory:/job_7\n1:name=0::memory:/no\n0::/\n")
    for place, limit in (("memory", 1 << 62), ("memory/job_7", 1000)):
        (root / place).mkdir(parents=True)
        (root / place / "memory.limit_in_bytes").write_text(f"{limit}\n")
        (root / place / "memory.usage_in_bytes").write_text("700\n")
        (root / place / "memory.stat").write_text("inactive_file 1\ntotal_inactive_file 50\n")
    assert sorted(_free_in_cgroups(root, own)) == [350, (1 << 62) - 650]


def test_without_cgroups_there_is_no_limit(tmp_path: Path) -> None:
    own = tmp_path / "self"
    own.write_text("1:name=systemd:/\n")
    assert list(_free_in_cgroups(tmp_path, own)) == []
    assert list(_free_in_cgroups(tmp_path, tmp_path / "absent")) == []


def test_this_host_tells() -> None:
    assert (available_memory() or 0) > 1 << 20


def test_this_process_was_started_before_now_and_after_boot() -> None:
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    assert time.time() - uptime < process_started() < time.time()


def test_what_started_this_again_is_told_and_may_be_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.setenv(name, "")
    assert slurm_job() == ("7", 0) and elastic_run()[1] == 0 and not started_again()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert slurm_job() == ("7", 2) and started_again()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert started_again()
