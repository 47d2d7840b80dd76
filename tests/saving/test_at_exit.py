"""A script that ends without `close()` still commits its last save, or says on stderr why not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from resume_kit.checkpoint import names
from tests.conftest import Ranks
from tests.jobs import Job, text_file
from tests.ranks import RANK_ENVIRONMENT, ROOT, free_port
from tests.saving.loop import Loop

OURS = "resume_kit: the save of step 3 "


def ends_without_close(rank: int, world_size: int, options: dict[str, Any], faults: list[str]) -> None:
    Loop(rank, world_size, options, faults).steps(3)
    print("the script ends", flush=True)


def logs(ranks: Ranks, job: Job, *faults: str) -> list[str]:
    """What each rank printed after its script's end."""
    group = ranks.start(ends_without_close, 2, job.to_json(), list(faults))
    group.results(60)
    return [group.log(rank).partition("the script ends")[2] for rank in range(2)]


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(run_dir=str(tmp_path / "run"), data=text_file(tmp_path), stage=1, save_every=3)


def test_the_last_save_is_committed(ranks: Ranks, job: Job) -> None:
    assert not any(OURS in log for log in logs(ranks, job, "slow-disk"))
    assert names.committed_steps(Path(job.run_dir)) == [3]


def test_a_failure_of_the_last_save_is_printed_by_every_rank(ranks: Ranks, job: Job) -> None:
    for log in logs(ranks, job, "slow-disk", "broken-disk"):
        assert f"{OURS}failed: cannot write\n  [write] rank 1, " in log and "the disk is gone" in log
    assert names.committed_steps(Path(job.run_dir)) == []


def test_a_save_that_hangs_is_told_within_the_bound(ranks: Ranks, job: Job) -> None:
    for log in logs(ranks, job.but(timeout=2.0), "hung-disk"):
        assert f"{OURS}hangs; this process waits for it no longer" in log
    assert names.committed_steps(Path(job.run_dir)) == []


@pytest.mark.parametrize("farewell", [True, False])
def test_the_last_result_reaches_a_slow_rank_before_rank_zero_ends(farewell: bool, ranks: Ranks, job: Job) -> None:
    """Rank 0's process holds the store."""
    _, slow = logs(ranks, job, "slow-to-hear", *([] if farewell else ["no-farewell"]))
    assert (f"{OURS}failed" in slow) != farewell  # without: the save stands, and this rank cannot know it
    assert names.committed_steps(Path(job.run_dir)) == [3]


# -- real interpreters: one that shuts down starts no thread any more

ENVIRONMENT = {**os.environ, **RANK_ENVIRONMENT, "PYTHONPATH": str(ROOT)}

LATE_FINGERPRINT = """
import threading, time, torch
from resume_kit.algebra.boxes import Box
from resume_kit.engines.fingerprint import fingerprints

torch.set_num_threads(2)
data = torch.ones(1 << 24)
early = int(fingerprints([(data, data.shape, Box.whole(tuple(data.shape)))]))

def later():
    threading.main_thread().join()
    time.sleep(0.3)
    print(int(fingerprints([(data, data.shape, Box.whole(tuple(data.shape)))])) == early, flush=True)

threading.Thread(target=later).start()
"""


def test_fingerprints_are_taken_also_while_the_interpreter_shuts_down() -> None:
    command = [sys.executable, "-c", LATE_FINGERPRINT]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, env=ENVIRONMENT, check=False)
    assert ended.stdout == "True\n", ended.stderr[-2000:]


def script(job: Job, *faults: str) -> list[str]:
    return [str(ROOT / "tests" / "saving" / "unclosed.py"), job.run_dir, job.data, *faults]


@pytest.mark.slow
def test_under_torchrun_a_failure_is_printed(job: Job) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, *script(job, "slow-disk", "broken-disk")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=240, env=ENVIRONMENT, check=False)
    assert ended.stdout.count("the script ends") == 2
    assert ended.stderr.count(f"{OURS}failed: cannot write") == 2, ended.stderr[-3000:]
    assert names.committed_steps(Path(job.run_dir)) == []


@pytest.mark.slow
def test_without_a_launcher_it_is_committed(job: Job) -> None:
    place = {"MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, *script(job, "slow-disk", "slow-to-hear")],
            env={**ENVIRONMENT, **place, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    try:
        for process in processes:
            out, err = process.communicate(timeout=240)
            assert process.returncode == 0 and "the script ends" in out, err[-3000:]
            assert OURS not in err
    finally:
        for process in processes:
            process.kill()
    assert names.committed_steps(Path(job.run_dir)) == [3]
