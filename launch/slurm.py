"""Ranks that srun starts get the variables that torchrun sets."""

from __future__ import annotations

import re
from collections.abc import MutableMapping

from resume_kit.errors import UsageError

_FIRST_PORT, _PORTS = 20_000, 10_000


def adopt_slurm(environment: MutableMapping[str, str]) -> None:
    """Set rank, world size and meeting point from SLURM's variables, where no other launcher has set them.

    Raises `UsageError` where SLURM's variables are there and not enough.
    """
    if "RANK" in environment or "SLURM_PROCID" not in environment:
        return
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    try:
        found = {
            "RANK": environment["SLURM_PROCID"],
            "WORLD_SIZE": environment["SLURM_NTASKS"],
            "LOCAL_RANK": environment["SLURM_LOCALID"],
            "LOCAL_WORLD_SIZE": _tasks_here(environment),
            "MASTER_ADDR": first_host(nodes),
            "MASTER_PORT": str(_FIRST_PORT + int(environment["SLURM_JOB_ID"]) % _PORTS),
        }
    except KeyError as missing:
        raise UsageError(f"SLURM did not set {missing.args[0]}; start the ranks with srun inside a job") from missing
    for name, value in found.items():
        environment.setdefault(name, value)


def _tasks_here(environment: MutableMapping[str, str]) -> str:
    """This node's number of tasks, from a list like `4(x2),3`."""
    counts: list[str] = []
    for entry in environment["SLURM_STEP_TASKS_PER_NODE"].split(","):
        tasks, _, times = entry.partition("(x")
        counts += [tasks] * int(times.rstrip(")") or 1)
    return counts[int(environment["SLURM_NODEID"])]


def first_host(nodes: str) -> str:
    """The first host of a SLURM list like `gpu[07-09,12],login1`."""
    match = re.match(r"([^\[,]+)(?:\[([^],-]+)[^]]*\])?([^\[,]*)", nodes)
    if match is None:
        raise UsageError("SLURM named no nodes; start the ranks with srun inside a job, or set MASTER_ADDR")
    return "".join(part or "" for part in match.groups())
