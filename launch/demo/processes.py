"""A training run under the `deepspeed` launcher, in a process group that never outlives the demo."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import psutil

REPOSITORY = Path(__file__).resolve().parents[2]

# Reads until the demo is gone, however it went, then ends the group.
_GUARD = "import os, sys; sys.stdin.buffer.read(); os.killpg(int(sys.argv[1]), 9)"
_OF_ANOTHER_JOB = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Machine:
    """What the ranks run on; `visible` are the GPUs that the user has picked, None for all."""

    cuda: bool
    ranks: int
    visible: tuple[str, ...] | None = None

    @classmethod
    def choose(cls, ranks: int | None) -> Machine:
        """All visible GPUs, else two ranks on the CPU. Raises ValueError for more ranks than GPUs."""
        import torch

        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count == 0:
            return cls(False, ranks or 2)
        if ranks and ranks > count:
            raise ValueError(f"--ranks {ranks}, but {count} GPUs are visible; NCCL takes one rank a GPU")
        picked = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        return cls(True, ranks or count, tuple(picked[: ranks or count]) or None)

    @property
    def label(self) -> str:
        ranks = f"{self.ranks} rank{'s' if self.ranks > 1 else ''}"
        return f"{ranks} on {'NVIDIA GPUs, NCCL, deterministic mode' if self.cuda else 'the CPU, gloo'}"

    def environment(self) -> dict[str, str]:
        """The environment of the launcher."""
        kept = {key: value for key, value in os.environ.items() if key not in _OF_ANOTHER_JOB}
        kept["PYTHONUNBUFFERED"] = "1"
        if self.visible:
            kept["CUDA_VISIBLE_DEVICES"] = ",".join(self.visible)
        if not self.cuda:
            kept.pop("CUDA_VISIBLE_DEVICES", None)
            kept["DS_ACCELERATOR"] = "cpu"
            kept.setdefault("OMP_NUM_THREADS", "1")
            if sys.platform == "linux":
                kept.setdefault("GLOO_SOCKET_IFNAME", "lo")
        return kept

    def command(self, port: int, config: Path, settings: Mapping[str, str]) -> list[str]:
        """The `deepspeed` command of this Python's environment, without a hostfile: local ranks only."""
        script = Path(sys.executable).with_name("deepspeed")
        return [
            sys.executable,
            *([str(script)] if script.is_file() else ["-m", "deepspeed.launcher.runner"]),
            "--hostfile=/dev/null",
            *([] if self.visible else ["--num_gpus", str(self.ranks)]),
            "--master_port",
            str(port),
            "launch/train_zero3.py",
            "--config",
            str(config),
            *(word for key, value in settings.items() for word in ("--set", f"{key}={value}")),
        ]


def free_port() -> int:
    """A port below those that the system hands out by itself, so that it is still free at the next start."""
    while True:
        port = random.randrange(20000, 32000)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", port))
                return port


class Launched:
    """One start of the launcher. Leaving the `with` block ends everything that it started."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self.log = log
        self._family: set[psutil.Process] = set()
        with log.open("wb") as output:
            self._launcher = psutil.Popen(
                command,
                cwd=REPOSITORY,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._guard = subprocess.Popen(
            [sys.executable, "-S", "-c", _GUARD, str(self._launcher.pid)],
            stdin=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def __enter__(self) -> Launched:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        self._guard.kill()
        self._guard.wait()
        assert self._guard.stdin is not None
        self._guard.stdin.close()

    @property
    def exit_code(self) -> int | None:
        """None while the launcher runs."""
        code: int | None = self._launcher.poll()
        return code

    def note_family(self) -> None:
        """Look up all descendants now, so that a kill need not search for them first."""
        with contextlib.suppress(psutil.Error):
            self._family.update(self._launcher.children(recursive=True))

    def kill(self) -> int:
        """SIGKILL to the launcher and all its descendants at once. Returns their number once they have ended."""
        family = {process for process in self._family if process.is_running()}
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._launcher.pid, signal.SIGKILL)
        for process in family:
            with contextlib.suppress(psutil.Error):
                process.kill()
        self._launcher.wait()
        _wait_for_end(family)
        return 1 + len(family)


def _wait_for_end(family: set[psutil.Process], seconds: float = 30.0) -> None:
    """Zombies have ended too: nobody may be there to reap them."""
    waiting = set(family)
    for _ in range(int(seconds / 0.01)):
        waiting = {process for process in waiting if not _ended(process)}
        if not waiting:
            return
        psutil.wait_procs(list(waiting), timeout=0.01)
    raise RuntimeError(f"processes {sorted(process.pid for process in waiting)} survive SIGKILL")


def _ended(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
