"""The training entry under a real torchrun, as a scheduler treats it: told to stop, and with a rank that dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.launch.test_launchers import ENVIRONMENT
from tests.ranks import ROOT


class Torchrun:
    """A job under torchrun, in a session of its own."""

    def __init__(self, run: Path, *options: str, steps: int = 100_000) -> None:
        self.run, self._log = run, run.with_suffix(".log")
        entry = [str(ROOT / "launch" / "train_zero3.py"), "--config", str(ROOT / "configs" / "zero3_tiny.yaml")]
        for setting in (f"run.dir={run}", f"run.steps={steps}", "run.save_every=5", "data.max_bytes=200000"):
            entry += ["--set", setting]
        # ranks that are started again must not read the addresses of the old ones, see launch/torchrun_local.sh
        environment = {**ENVIRONMENT, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *options]
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [*launcher, *entry], stdout=log, stderr=log, cwd=ROOT, env=environment, start_new_session=True
            )

    def ranks(self) -> list[int]:
        """Process ids of the ranks."""
        return [pid for pid in children(self.process.pid) if "train_zero3" in command_line(pid)]

    def events(self, name: str) -> list[dict[str, Any]]:
        try:
            lines = (self.run / "journal.jsonl").read_text().splitlines()
        except FileNotFoundError:
            return []
        return [event for line in lines if (event := json.loads(line))["event"] == name]

    def log(self) -> str:
        return self._log.read_text()

    def wait_for(self, event: str, number: int = 1, timeout: float = 120.0) -> None:
        end = time.monotonic() + timeout
        while len(self.events(event)) < number:
            assert self.process.poll() is None and time.monotonic() < end, self.log()[-4000:]
            time.sleep(0.05)

    def close(self) -> None:
        for pid in [self.process.pid, *descendants(self.process.pid)]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


def children(pid: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            found += map(int, task.read_text().split())
    return found


def command_line(pid: int) -> str:
    """Empty where the process has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def descendants(pid: int) -> list[int]:
    return [each for child in children(pid) for each in (child, *descendants(child))]


@pytest.fixture
def jobs() -> Iterator[list[Torchrun]]:
    started: list[Torchrun] = []
    yield started
    for job in started:
        job.close()


def test_a_job_of_which_every_process_gets_sigterm_is_saved(jobs: list[Torchrun], tmp_path: Path) -> None:
    """SLURM signals every process of a step at once: torchrun, ranks, and their data workers."""
    job = Torchrun(tmp_path / "run")
    jobs.append(job)
    job.wait_for("commit")
    for pid in [job.process.pid, *descendants(job.process.pid)]:
        with suppress(ProcessLookupError):  # torchrun had a process for a moment only
            os.kill(pid, signal.SIGTERM)
    job.process.wait(timeout=60)
    (preempt,) = job.events("preempt")
    assert preempt["by"].startswith("SIGTERM on rank ")
    assert job.events("commit")[-1]["step"] == preempt["step"]
    assert "Start the same command again to go on" in job.log()
    assert "DataLoader worker" not in job.log()


@pytest.mark.slow
def test_a_rank_that_is_killed_is_started_again_and_the_run_goes_on(jobs: list[Torchrun], tmp_path: Path) -> None:
    job = Torchrun(tmp_path / "run", "--max-restarts=1", "--monitor-interval=0.1")
    jobs.append(job)
    job.wait_for("commit")
    os.kill(job.ranks()[1], signal.SIGKILL)
    job.wait_for("resume")
    steps = len(job.events("step"))
    job.wait_for("step", steps + 3)
    first, second = job.events("start")
    assert (first["attempt"], second["attempt"]) == (1, 2)
    job.process.send_signal(signal.SIGTERM)
    job.process.wait(timeout=60)
    assert job.events("preempt")[-1]["attempt"] == 2
