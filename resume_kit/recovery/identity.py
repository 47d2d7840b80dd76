"""Who runs an attempt, and what that tells at once about an older one: that it is dead, or that this is its restart."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from resume_kit.environment import elastic_run, host_name, slurm_job


@dataclass(frozen=True, kw_only=True)
class Identity:
    """The process of rank 0, and the job that it belongs to.

    pid_started: clock ticks from the host's boot to the process's start: a pid is used again, the pair is not.
    slurm_job, elastic_run: None outside SLURM, and where torchrun was given no id of its own. parent,
    parent_started: of the process that started it, under torchrun the node's agent; 0 where that is not known.
    """

    host: str
    boot_id: str
    pid_namespace: str
    pid: int
    pid_started: int
    slurm_job: str | None = None
    slurm_restarts: int = 0
    elastic_run: str | None = None
    elastic_restarts: int = 0
    parent: int = 0
    parent_started: int = 0

    @classmethod
    def of_this_process(cls) -> Identity:
        job, restarts = slurm_job()
        run, run_restarts = elastic_run()
        started, parent = _started(os.getpid()), os.getppid()
        return cls(
            host=host_name(),
            boot_id=_boot_id(),
            pid_namespace=_pid_namespace(),
            pid=os.getpid(),
            pid_started=0 if started is None else started,
            slurm_job=job,
            slurm_restarts=restarts,
            elastic_run=run,
            elastic_restarts=run_restarts,
            parent=parent,
            parent_started=_started(parent) or 0,
        )

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Identity:
        """Keys that a newer version wrote are left out. Raises `TypeError` where one is missing."""
        return cls(**{key: value[key] for key in cls.__dataclass_fields__ if key in value})

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        job = f", SLURM job {self.slurm_job}" if self.slurm_job else ""
        return f"process {self.pid} on {self.host}{job}"


def same_lineage(newer: Identity, older: Identity) -> bool:
    """Whether `newer` is what the launcher started in the place of `older`, so that `older` has to go.

    That is a later start of the same SLURM job, a restart by the same torchrun agent, or the very same process.
    torchrun's id alone says nothing: two jobs may have been given the same.
    """
    if _place(newer) == _place(older):
        return True
    if _same_job(newer, older) and newer.slurm_restarts != older.slurm_restarts:
        return newer.slurm_restarts > older.slurm_restarts
    return same_agent(newer, older) and newer.elastic_restarts > older.elastic_restarts


def same_agent(one: Identity, other: Identity) -> bool:
    """Whether the same process, a torchrun agent for instance, started both. False where that is not known."""
    return one.parent_started > 0 and _agent(one) == _agent(other)


def is_outdated(own: Identity, holder: Identity) -> bool:
    """Whether SLURM has started this very job again since `own` was started, and `holder` is of that later start."""
    return _same_job(own, holder) and own.slurm_restarts < holder.slurm_restarts


def is_dead(older: Identity) -> bool:
    """Whether the process of `older` is known to be gone. False where this host cannot tell."""
    if older.boot_id != _boot_id() or older.pid_namespace != _pid_namespace() or not older.boot_id:
        return False
    try:
        os.kill(older.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return _started(older.pid) not in (None, older.pid_started)


def _place(identity: Identity) -> tuple[str, str, str, int, int]:
    return identity.host, identity.boot_id, identity.pid_namespace, identity.pid, identity.pid_started


def _same_job(one: Identity, other: Identity) -> bool:
    return one.slurm_job is not None and one.slurm_job == other.slurm_job


def _agent(identity: Identity) -> tuple[object, ...]:
    return (*_place(identity)[:3], identity.parent, identity.parent_started, identity.elastic_run)


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _pid_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _started(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; -1 for one that is dead and not yet waited for.

    None where the system does not tell.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text[text.rindex(")") + 1 :].split()  # the name before may hold anything
    return -1 if fields[0] in "ZX" else int(fields[19])
