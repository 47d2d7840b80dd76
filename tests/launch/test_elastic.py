"""An elastic job of Megatron, two torchruns as on two nodes: one is lost with its rank, the other goes on alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from resume_kit.recovery.history import history
from resume_kit.recovery.rules import decide
from resume_kit.run.journal import read_journal
from tests.launch.test_launchers import ENVIRONMENT
from tests.launch.test_stopping import descendants
from tests.ranks import ROOT, free_port

#: What launch/job.sh gives torchrun for ELASTIC=1:2, but for a shorter patience.
OPTIONS = ("--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=3", "--monitor-interval=0.1", "--rdzv-backend=c10d")
PATIENCE = "last_call_timeout=3,keep_alive_interval=1,keep_alive_max_attempt=2"
SETTINGS = (
    "run.steps=100000",
    "run.save_every=10",
    "run.hang_after=60",
    "data.max_bytes=200000",
    "model.layers=2",
    "model.dropout=0.0",
    "policy.preset=flexible",
)


class Nodes:
    """Two torchruns of one job, each with one rank; the first is the head, at which they meet."""

    def __init__(self, run: Path) -> None:
        self.run, self._log = run, run.with_suffix(".log")
        entry = [str(ROOT / "launch" / "train_megatron.py"), "--config", str(ROOT / "configs" / "megatron_tiny.yaml")]
        for setting in (f"run.dir={run}", *SETTINGS):
            entry += ["--set", setting]
        torchrun = [sys.executable, "-m", "torch.distributed.run", *OPTIONS, "--rdzv-id=7-0"]
        torchrun.append(f"--rdzv-endpoint=127.0.0.1:{free_port()}")
        environment = {**ENVIRONMENT, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        with self._log.open("w") as log:
            self.agents = [
                subprocess.Popen(
                    [*torchrun, f"--rdzv-conf=is_host={is_head},{PATIENCE}", *entry],
                    **{"stdout": log, "stderr": log, "cwd": ROOT, "env": environment, "start_new_session": True},
                )
                for is_head in (1, 0)
            ]

    def wait_for(self, event: str, number: int, *, attempt: int, timeout: float = 120.0) -> None:
        end = time.monotonic() + timeout
        while sum(e["event"] == event and e["attempt"] == attempt for e in read_journal(self.run)) < number:
            assert self.agents[0].poll() is None and time.monotonic() < end, self._log.read_text()[-4000:]
            time.sleep(0.05)

    def kill(self, number: int) -> None:
        agent = self.agents[number]
        for pid in [agent.pid, *descendants(agent.pid)]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        agent.wait()


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    started = Nodes(tmp_path / "run")
    yield started
    for number in range(2):
        started.kill(number)


@pytest.mark.slow
def test_a_node_is_lost_and_megatron_goes_on_with_the_other(nodes: Nodes) -> None:
    run = nodes.run
    nodes.wait_for("commit", 1, attempt=1)
    nodes.wait_for("step", 14, attempt=1)
    nodes.kill(1)
    nodes.wait_for("step", 12, attempt=2)
    nodes.agents[0].send_signal(signal.SIGTERM)
    nodes.agents[0].wait(timeout=60)

    events = list(read_journal(run))
    assert [event["world_size"] for event in events if event["event"] == "start"] == [2, 1]
    before, after = ({e["step"]: e for e in events if e["event"] == "step" and e["attempt"] == n} for n in (1, 2))
    (resumed,) = (e["step"] for e in events if e["event"] == "resume" and e["attempt"] == 2)
    commits = [e["step"] for e in events if e["event"] == "commit" and e["attempt"] == 1]
    assert resumed == commits[-1] and min(after) == resumed + 1
    again = before.keys() & after.keys()
    assert again, "no step was trained again, so nothing was compared"
    for step in again:
        assert all(after[step][name] == before[step][name] for name in ("batch", "samples"))
        assert after[step]["loss"] == pytest.approx(before[step]["loss"], rel=5e-3)
    first, second = history(run)
    assert first.is_failure and second.kind == "preempted"
    assert decide(run).word == "restart"
