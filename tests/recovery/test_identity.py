"""What the identity of a process tells of another: dead, a restart of the same job, or nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from resume_kit.recovery.identity import Identity, is_dead, same_lineage

SOMEBODY = Identity(host="n1", boot_id="b1", pid_namespace="pid:[1]", pid=100, pid_started=5000)
ANOTHER = replace(SOMEBODY, host="n2", boot_id="b2", pid=7)


def of_process(pid: int) -> Identity:
    """The identity of another process of this host."""
    text = Path(f"/proc/{pid}/stat").read_text()
    return replace(
        Identity.of_this_process(), pid=pid, pid_started=int(text[text.rindex(")") + 1 :].split()[19]), slurm_job=None
    )


@contextmanager
def sleeping() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        try:
            yield process
        finally:
            process.kill()


def test_a_process_that_runs_is_not_dead_and_one_that_ended_is() -> None:
    with sleeping() as process:
        identity = of_process(process.pid)
        assert not is_dead(identity)
        assert is_dead(replace(identity, pid_started=identity.pid_started - 1)), "its pid was given to another process"
        process.kill()
        while not is_dead(identity):  # nobody has waited for it yet: first it runs, then it is a zombie
            pass
        process.wait()
        assert is_dead(identity)


def test_nothing_is_known_of_a_process_elsewhere() -> None:
    with sleeping() as process:
        identity = of_process(process.pid)
        process.kill()
        process.wait()
    assert is_dead(identity)
    assert not is_dead(replace(identity, boot_id="another host"))
    assert not is_dead(replace(identity, pid_namespace="pid:[7]"))
    assert not is_dead(SOMEBODY)


@pytest.mark.parametrize(
    ("newer", "older", "same"),
    [
        ({}, {}, False),
        ({"slurm_job": "12", "slurm_restarts": 1}, {"slurm_job": "12"}, True),
        ({"slurm_job": "12"}, {"slurm_job": "12", "slurm_restarts": 1}, False),
        ({"slurm_job": "12"}, {"slurm_job": "12"}, False),
        ({"slurm_job": "13", "slurm_restarts": 1}, {"slurm_job": "12"}, False),
        # Requeued: torchrun counts from 0 again.
        ({"slurm_job": "12", "slurm_restarts": 1}, {"slurm_job": "12", "elastic_restarts": 2}, True),
        # torchrun's id and count alone: two jobs may have been given the same.
        ({"slurm_job": "12", "elastic_run": "a", "elastic_restarts": 1}, {"slurm_job": "12"}, False),
        ({"elastic_run": "100", "elastic_restarts": 1}, {"elastic_run": "100"}, False),
        ({"elastic_restarts": 1}, {}, False),
    ],
)
def test_a_later_start_of_the_same_job_is_of_its_lineage(
    newer: dict[str, Any], older: dict[str, Any], same: bool
) -> None:
    assert same_lineage(replace(ANOTHER, **newer), replace(SOMEBODY, **older)) is same


AGENT = {"parent": 50, "parent_started": 4000, "elastic_run": "100"}


@pytest.mark.parametrize(
    ("newer", "older", "same"),
    [
        ({"elastic_restarts": 1}, {}, True),
        ({"elastic_restarts": 1, "slurm_job": "12"}, {"slurm_job": "12"}, True),
        ({}, {}, False),
        ({}, {"elastic_restarts": 1}, False),
        ({"elastic_restarts": 1, "parent": 51}, {}, False),
        ({"elastic_restarts": 1, "parent_started": 4001}, {}, False),
        ({"elastic_restarts": 1, "host": "n2"}, {}, False),
        ({"elastic_restarts": 1, "boot_id": "b2"}, {}, False),
        ({"elastic_restarts": 1, "pid_namespace": "pid:[2]"}, {}, False),
        ({"elastic_restarts": 1, "elastic_run": "101"}, {}, False),
        ({"elastic_restarts": 1, "parent_started": 0}, {"parent_started": 0}, False),
    ],
)
def test_what_the_same_torchrun_agent_starts_again_is_of_its_lineage(
    newer: dict[str, Any], older: dict[str, Any], same: bool
) -> None:
    later, earlier = replace(SOMEBODY, **{"pid": 101, **AGENT, **newer}), replace(SOMEBODY, **{**AGENT, **older})
    assert same_lineage(later, earlier) is same


def test_a_process_is_of_its_own_lineage() -> None:
    assert same_lineage(SOMEBODY, SOMEBODY)


def test_this_process_knows_its_job_and_can_be_read_back(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    plain = Identity.of_this_process()
    assert (plain.slurm_job, plain.elastic_run, plain.slurm_restarts, plain.elastic_restarts) == (None, None, 0, 0)
    assert not is_dead(plain) and plain.boot_id and plain.pid_started > 0
    assert plain.parent == os.getppid() and 0 < plain.parent_started <= plain.pid_started
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    ours = Identity.of_this_process()
    assert (ours.slurm_job, ours.slurm_restarts, ours.elastic_run, ours.elastic_restarts) == ("12", 3, None, 2)
    assert Identity.from_json({**ours.to_json(), "of a newer version": 1}) == ours
    assert str(ours) == f"process {ours.pid} on {ours.host}, SLURM job 12"
