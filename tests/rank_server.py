"""The fork server behind `tests.ranks`: it imports the heavy packages once, then forks one process per rank.

It is one thread that answers the requests of the pytest process over a socket, so a fork is always safe:

    ("spawn", Spawn)     -> pid
    ("poll", [pid, ...]) -> {pid: exit code, or None while it runs}

A rank leads its own session. When a rank has ended, what it left running (data workers, helpers) is killed
with it, as a scheduler does with the remains of a task. When the pytest process goes away, so does everything
here.
"""

from __future__ import annotations

import atexit
import ctypes
import faulthandler
import gc
import importlib
import os
import pickle
import signal
import sys
import threading
import traceback
import warnings
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

PRELOAD = (
    "torch",
    "torch.distributed",
    "deepspeed",
    "transformers.models.gpt2.modeling_gpt2",
    "megatron.core.distributed",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.models.gpt.gpt_model",
    "megatron.core.optimizer",
    "megatron.core.optimizer_param_scheduler",
    "megatron.core.pipeline_parallel.schedules",
    "torchdata.stateful_dataloader",
    "safetensors.torch",
    "hypothesis",
    "pytest",
)
STACKS_SIGNAL = signal.SIGRTMIN + 7
"""Makes a rank write the stacks of its threads to its `.stacks` file. Not SIGUSR1: jobs use that one."""

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Spawn:
    """All that one rank needs. `call` is the pickled (fn, args); `base` is the path its files start with."""

    rank: int
    world_size: int
    call: bytes
    base: str
    environment: dict[str, str]
    search_path: list[str]
    folder: str


def serve(connection: Connection) -> None:
    """Answer requests until the pytest process closes the socket or is gone."""
    parent = os.getppid()
    for name in PRELOAD:
        importlib.import_module(name)
    # The interpreter's own garbage never has to be looked at again, so that forks share its pages.
    gc.collect()
    gc.freeze()
    connection.send("ready")
    running: dict[int, int | None] = {}
    try:
        while os.getppid() == parent:
            if not connection.poll(1.0):
                continue
            verb, subject = connection.recv()
            if verb == "spawn":
                pid = _fork(subject, connection)
                running[pid] = None
                connection.send(pid)
            else:
                # Ranks of an earlier server died with it.
                running |= {pid: -signal.SIGKILL for pid in subject if pid not in running}
                running |= {pid: _reap(pid) for pid in subject if running[pid] is None}
                connection.send({pid: running[pid] for pid in subject})
    except (EOFError, ConnectionError):
        pass
    finally:
        for pid in [pid for pid, code in running.items() if code is None]:
            _kill_session(pid)


def _reap(pid: int) -> int | None:
    """Exit code of a rank as `subprocess` gives it, or None while it runs.

    The rest of its session is killed while its pid is still taken, so that no stranger can be hit.
    """
    if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        return None
    _kill_session(pid)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _kill_session(pid: int) -> None:
    # Between fork and setsid there is no group of that number yet.
    for kill in (os.killpg, os.kill):
        with suppress(ProcessLookupError, PermissionError):
            kill(pid, signal.SIGKILL)


def _fork(spawn: Spawn, connection: Connection) -> int:
    server = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        connection.close()
        _become_rank(spawn, server)
        code = _call(spawn)
        # What an interpreter does at its end, less tearing down the imported modules.
        threading._shutdown()
        atexit._run_exitfuncs()
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _become_rank(spawn: Spawn, server: int) -> None:
    os.setsid()
    _die_with_parent(server)
    log = os.open(f"{spawn.base}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    sys.stdout.reconfigure(line_buffering=True)
    stacks = open(f"{spawn.base}.stacks", "w")  # noqa: SIM115 - must stay open as long as the process
    faulthandler.enable()
    faulthandler.register(STACKS_SIGNAL, file=stacks, all_threads=True)

    os.environ.clear()
    os.environ.update(spawn.environment)
    os.chdir(spawn.folder)
    sys.path[:] = spawn.search_path
    # pytest's filters do not reach a rank, so that the kit's own warnings are made errors here.
    warnings.filterwarnings("error", module=r"resume_kit(\.|$)")
    import numpy as np
    import torch

    np.random.seed()  # as in a fresh interpreter: otherwise all ranks would start from one state
    torch.set_num_threads(1)


def _die_with_parent(server: int) -> None:
    """The kernel kills this process when the server ends; without prctl, the server's clean-up has to do."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != server:
        os._exit(1)


def _call(spawn: Spawn) -> int:
    """Run the function and leave its outcome, whole or not at all, in the rank's `.result` file."""
    outcome: tuple[str, Any]
    try:
        fn, args = pickle.loads(spawn.call)
        outcome = ("value", fn(spawn.rank, spawn.world_size, *args))
        content = pickle.dumps(outcome)
    except BaseException as error:
        kind = type(error)
        name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
        outcome = ("error", (name, str(error), traceback.format_exc()))
        content = pickle.dumps(outcome)
    part = f"{spawn.base}.part"
    with open(part, "wb") as file:
        file.write(content)
    os.replace(part, f"{spawn.base}.result")
    return 0 if outcome[0] == "value" else 1


if __name__ == "__main__":
    # The classes that travel over the socket belong to the importable module, not to __main__.
    from tests import rank_server

    rank_server.serve(Connection(int(sys.argv[1])))
