"""The one place that reads environment variables, and the software and hardware that a run stands on. No torch."""

from __future__ import annotations

import os
import platform
import re
import socket
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from resume_kit.errors import UsageError

_PACKAGES = ("torch", "deepspeed", "megatron-core", "transformers", "numpy", "torchdata")
_IMPORTED = time.time()
_DRIVER = Path("/proc/driver/nvidia/version")


def software_versions() -> dict[str, str]:
    """Versions of what can change a trained number: packages, Python, GPU driver."""
    found = {"python": platform.python_version(), "driver": _driver()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found


def _driver() -> str:
    try:
        words = _DRIVER.read_text().split("\n", 1)[0].split()
    except OSError:
        return "none"
    return next((word for word in words if word[0].isdigit() and "." in word), "unknown")


def host_name() -> str:
    return socket.gethostname()


def local_rank() -> int:
    """Rank of this process on its host, as every launcher sets it; 0 without a launcher."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """Ranks on this host, as every launcher sets it; 1 without a launcher."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def under_torchrun() -> bool:
    """Whether torchrun started this process: it takes every exit code but 0 for a failure."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def deadline() -> float | None:
    """When this process is going to be ended, in Unix seconds: RESUME_KIT_DEADLINE, else the end of the SLURM job.

    None where neither tells. Raises `UsageError` for a RESUME_KIT_DEADLINE that is no number.
    """
    given = os.environ.get("RESUME_KIT_DEADLINE")
    try:
        return float(given or os.environ["SLURM_JOB_END_TIME"])
    except KeyError:
        return None
    except ValueError as error:
        if given:
            raise UsageError(f"RESUME_KIT_DEADLINE is {given!r}; give Unix seconds, as date +%s prints them") from error
        return None


def process_started() -> float:
    """When this process was started, in Unix seconds: before its interpreter, and before its imports."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        since_boot = float(Path("/proc/uptime").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return _IMPORTED
    return time.time() - since_boot + ticks / os.sysconf("SC_CLK_TCK")


def slurm_job() -> tuple[str | None, int]:
    """The SLURM job that this process belongs to (None outside SLURM), and how often it was requeued."""
    return os.environ.get("SLURM_JOB_ID"), int(os.environ.get("SLURM_RESTART_COUNT") or "0")


def elastic_run() -> tuple[str | None, int]:
    """torchrun's id of this run (None where it was given none), and how often it has restarted the ranks."""
    run = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return None if run == "none" else run, int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or "0")


def started_again() -> bool:
    """Whether SLURM or torchrun has started this again by itself, with the command that a person once gave."""
    return slurm_job()[1] > 0 or elastic_run()[1] > 0


def cores_per_rank() -> int:
    """This rank's share of the host's cores, at least 1."""
    return max(1, (os.cpu_count() or 1) // local_world_size())


def available_memory() -> int | None:
    """Bytes of host memory that can be had without swapping, on this host and in this process's cgroup.

    None where the system tells neither.
    """
    found = [bytes_ for bytes_ in (_free_on_host(), *_free_in_cgroups()) if bytes_ is not None]
    return min(found, default=None)


def _free_on_host() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


#: By the controller that /proc/self/cgroup names, none in version 2: where its hierarchy is mounted, the files of a
#: limit on memory and of what is used, and the line in memory.stat of page cache that can go.
_MEMORY_FILES = {
    "": (".", "memory.max", "memory.current", "inactive_file"),
    "memory": ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def _free_in_cgroups(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> Iterator[int]:
    """Bytes left under the limit of this process's cgroup and of each around it. Page cache is left."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return
    for _, controllers, place in (line.split(":", 2) for line in lines):
        for controller in _MEMORY_FILES.keys() & set(controllers.split(",")):
            hierarchy, *files = _MEMORY_FILES[controller]
            top = root / hierarchy
            here = top / place.lstrip("/")
            for group in (here, *here.parents):
                if group.is_relative_to(top):
                    yield from _free_in(group, *files)


def _free_in(group: Path, limit: str, used: str, cache: str) -> Iterator[int]:
    """Bytes left under the limit of one cgroup; nothing where it has none, or does not tell."""
    try:
        most = int((group / limit).read_text())  # "max" is no number
        taken = int((group / used).read_text())
        kept = re.search(rf"^{cache} (\d+)$", (group / "memory.stat").read_text(), re.MULTILINE)
    except (OSError, ValueError):
        return
    yield max(0, most - taken + (int(kept[1]) if kept else 0))
