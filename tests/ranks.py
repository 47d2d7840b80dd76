"""Run a function on N real ranks, one forked process each, in a fraction of a second.

    values = run_ranks(train, 2, config)            # [train(0, 2, config), train(1, 2, config)]

    with start_ranks(train, 2, config) as group:    # when ranks are to be killed
        group.wait_for("step 3", rank=1)
        group.kill(1)
        codes = group.wait(timeout=60)

The function must be importable by name; its arguments and its value must survive pickling. A rank is a fresh
process: what a test has imported or patched does not reach it; what is in `os.environ` does.
"""

from __future__ import annotations

import atexit
import os
import pickle
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any

from tests.rank_server import STACKS_SIGNAL, Spawn

ROOT = Path(__file__).resolve().parent.parent
_POLL = 0.005
_START_LIMIT = 300.0
_ANSWER_LIMIT = 60.0
_LOG_TAIL = 40

RANK_ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
}


@dataclass(frozen=True)
class Outcome:
    """How one rank ended. `exit_code` is negative for a signal, and None while the rank runs."""

    rank: int
    exit_code: int | None
    value: Any = None
    finished: bool = False
    error_type: str = ""
    error: str = ""
    traceback: str = ""
    stopped: bool = False
    stacks: str = ""
    log: str = ""

    @property
    def verdict(self) -> str:
        if self.stacks or self.exit_code is None:
            return "hung"
        if self.stopped:
            return "still running when another rank failed; stopped by the harness"
        if self.error_type:
            return f"raised {self.error_type}: {self.error}"
        if self.exit_code < 0:
            return f"killed by {signal.Signals(-self.exit_code).name}"
        if self.exit_code > 0:
            return f"exited with code {self.exit_code}"
        return "finished" if self.finished else "exited with code 0, but without a result"

    @property
    def good(self) -> bool:
        return self.finished and self.exit_code == 0


class RankFailure(RuntimeError):
    """At least one rank did not return. `outcomes` holds how each rank ended, in rank order."""

    def __init__(self, headline: str, outcomes: Iterable[Outcome]) -> None:
        self.outcomes = tuple(outcomes)
        super().__init__("\n".join([headline, *(_describe(outcome) for outcome in self.outcomes)]))

    @property
    def failed(self) -> dict[int, Outcome]:
        """The ranks that failed by themselves."""
        return {o.rank: o for o in self.outcomes if not o.good and not o.stopped}

    @property
    def exit_codes(self) -> list[int | None]:
        return [outcome.exit_code for outcome in self.outcomes]

    @property
    def error_types(self) -> dict[int, str]:
        """Full name of the exception that each raising rank raised; a builtin one goes without its module."""
        return {o.rank: o.error_type for o in self.outcomes if o.error_type}


class RankTimeout(RankFailure):
    """Ranks were still running at the time limit; each one's stacks are in its outcome."""

    @property
    def hung(self) -> list[int]:
        return [outcome.rank for outcome in self.outcomes if outcome.verdict == "hung"]


def _describe(outcome: Outcome) -> str:
    lines = [f"--- rank {outcome.rank}: {outcome.verdict} (exit code {outcome.exit_code})"]
    if outcome.good:
        return lines[0]
    sections = {
        "traceback": outcome.traceback,
        "stacks when stopped": outcome.stacks,
        "end of its log": outcome.log,
    }
    for title, text in sections.items():
        if text.strip():
            tail = text.rstrip().splitlines()
            lines += [
                f"{title}:",
                *(f"    {line}" for line in (tail[-_LOG_TAIL:] if "log" in title else tail)),
            ]
    return "\n".join(lines)


class ForkServer:
    """The client's side of `tests.rank_server`. Starts on the first use, and again if it has died."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._log: IO[bytes] | None = None

    def ask(self, verb: str, subject: Any) -> Any:
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._start()
            assert self._connection is not None
            self._connection.send((verb, subject))
            return self._answer(_ANSWER_LIMIT)

    def warm_up(self) -> None:
        self.ask("poll", [])

    def close(self) -> None:
        """End the server and, with it, every rank."""
        if self._connection is not None:
            self._connection.close()
        if self._process is not None:
            self._process.wait(timeout=30)
        if self._log is not None:
            self._log.close()
        self._process = self._connection = self._log = None

    def _start(self) -> None:
        self.close()
        ours, theirs = socket.socketpair()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the server
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.rank_server", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            cwd=ROOT,
            env={**os.environ, **RANK_ENVIRONMENT},
            start_new_session=True,
        )
        theirs.close()
        self._connection = Connection(ours.detach())
        self._answer(_START_LIMIT)

    def _answer(self, limit: float) -> Any:
        assert self._connection is not None
        assert self._process is not None
        assert self._log is not None
        try:
            if self._connection.poll(limit):
                return self._connection.recv()
            what = f"gave no answer within {limit:.0f} s"
        except (EOFError, ConnectionError):
            what = "ended"
        self._process.kill()
        self._process.wait()
        self._log.seek(0)
        wrote = self._log.read().decode(errors="replace")
        self.close()
        raise RuntimeError(f"the fork server {what}; it wrote:\n{wrote}")


SERVER = ForkServer()
atexit.register(SERVER.close)


class RankGroup:
    """Ranks under way. Leaving its `with` block kills what still runs and removes the logs."""

    def __init__(
        self, fn: Callable[..., Any], world_size: int, args: tuple[Any, ...], env: Mapping[str, str] | None
    ) -> None:
        call = pickle.dumps((fn, args))
        self.world_size = world_size
        self._folder = Path(tempfile.mkdtemp(prefix="ranks-"))
        self._codes: list[int | None] = [None] * world_size
        self._stopped: set[int] = set()
        shared = {**RANK_ENVIRONMENT, "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world_size)}
        shared["LOCAL_WORLD_SIZE"] = str(world_size)
        pids = []
        for rank in range(world_size):
            environment = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank), **(env or {})}
            base = str(self._folder / f"rank-{rank}")
            spawn = Spawn(rank, world_size, call, base, environment, [str(ROOT), *sys.path], os.getcwd())
            pids.append(SERVER.ask("spawn", spawn))
        self.pids: tuple[int, ...] = tuple(pids)

    def __enter__(self) -> RankGroup:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def alive(self) -> list[int]:
        """Ranks that run."""
        waiting = [rank for rank, code in enumerate(self._codes) if code is None]
        if waiting:
            found = SERVER.ask("poll", [self.pids[rank] for rank in waiting])
            for rank in waiting:
                self._codes[rank] = found[self.pids[rank]]
        return [rank for rank in waiting if self._codes[rank] is None]

    def kill(self, rank: int | None = None, signum: int = signal.SIGKILL) -> None:
        """Send a signal to one rank, or to all; a rank that has ended is left alone."""
        for each in self.alive() if rank is None else [rank]:
            # A pid is not given to another process before `alive` has seen its end.
            if self._codes[each] is None:
                os.kill(self.pids[each], signum)

    def wait(self, timeout: float = 120.0) -> list[int]:
        """Exit codes once all ranks have ended; at the limit, kill all and raise `RankTimeout`."""
        self._wait_until(lambda alive: not alive, timeout)
        return [code for code in self._codes if code is not None]

    def wait_for(self, text: str, *, rank: int = 0, timeout: float = 120.0) -> None:
        """Wait until a rank has printed `text`."""
        self._wait_until(lambda alive: text in self.log(rank) or rank not in alive, timeout)
        if text not in self.log(rank):
            raise RankFailure(f"rank {rank} ended without printing {text!r}", self.outcomes())

    def results(self, timeout: float = 120.0, *, grace: float | None = None) -> list[Any]:
        """Values in rank order once all ranks have ended; `RankFailure` if any rank did not return.

        With a `grace`, the others are stopped that many seconds after the first rank has failed.
        """
        end = time.monotonic() + timeout
        failed = any(code != 0 for code in self._wait_until(lambda alive: self._some_failed() or not alive, timeout))
        if failed and grace is not None:
            deadline = time.monotonic() + min(grace, max(end - time.monotonic(), 0))
            while self.alive() and time.monotonic() < deadline:
                time.sleep(_POLL)
            self._stopped |= set(self.alive())
            self.kill()
        self.wait(max(end - time.monotonic(), _POLL) if grace is None else 30.0)
        outcomes = self.outcomes()
        if not all(outcome.good for outcome in outcomes):
            names = ", ".join(f"rank {o.rank}" for o in outcomes if not o.good and not o.stopped)
            raise RankFailure(f"{names} of {self.world_size} failed", outcomes)
        return [outcome.value for outcome in outcomes]

    def log(self, rank: int) -> str:
        """What a rank has written to stdout and stderr."""
        return self._read(rank, "log")

    def outcomes(self) -> list[Outcome]:
        """How each rank stands now, in rank order."""
        self.alive()
        return [self._outcome(rank) for rank in range(self.world_size)]

    def close(self) -> None:
        self.kill()
        self.wait(timeout=30)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _some_failed(self) -> bool:
        return any(code not in (0, None) for code in self._codes)

    def _wait_until(self, condition: Callable[[list[int]], bool], timeout: float) -> list[int | None]:
        end = time.monotonic() + timeout
        while not condition(alive := self.alive()):
            if time.monotonic() >= end:
                self._fail_hung(alive, timeout)
            time.sleep(_POLL)
        return self._codes

    def _fail_hung(self, hung: list[int], timeout: float) -> None:
        for rank in hung:
            with suppress(ProcessLookupError):
                os.kill(self.pids[rank], STACKS_SIGNAL)
        end = time.monotonic() + 2.0
        while time.monotonic() < end and not all("most recent call first" in self._read(r, "stacks") for r in hung):
            time.sleep(_POLL)
        time.sleep(0.1)
        self.kill()
        while self.alive():
            time.sleep(_POLL)
        names = ", ".join(f"rank {rank}" for rank in hung)
        raise RankTimeout(f"{names} of {self.world_size} still running after {timeout:g} s", self.outcomes())

    def _outcome(self, rank: int) -> Outcome:
        shared: dict[str, Any] = {
            "rank": rank,
            "exit_code": self._codes[rank],
            "stopped": rank in self._stopped,
            "stacks": self._read(rank, "stacks"),
            "log": self.log(rank),
        }
        try:
            verdict, content = pickle.loads((self._folder / f"rank-{rank}.result").read_bytes())
        except FileNotFoundError:
            return Outcome(**shared)
        if verdict == "value":
            return Outcome(**shared, value=content, finished=True)
        error_type, error, trace = content
        return Outcome(**shared, error_type=error_type, error=error, traceback=trace)

    def _read(self, rank: int, ending: str) -> str:
        with suppress(FileNotFoundError):
            return (self._folder / f"rank-{rank}.{ending}").read_text(errors="replace")
        return ""


def start_ranks(fn: Callable[..., Any], world_size: int, *args: Any, env: Mapping[str, str] | None = None) -> RankGroup:
    """Start `fn(rank, world_size, *args)` on every rank and return at once.

    `env` is added to each rank's environment.
    """
    return RankGroup(fn, world_size, args, env)


def run_ranks(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 120.0,
    env: Mapping[str, str] | None = None,
    grace: float = 3.0,
) -> list[Any]:
    """Run `fn(rank, world_size, *args)` on every rank; the values in rank order.

    Once a rank has failed, the others have `grace` seconds to end by themselves. Raises `RankFailure`, or
    `RankTimeout` for ranks that are still running at the limit.
    """
    with start_ranks(fn, world_size, *args, env=env) as group:
        return group.results(timeout, grace=grace)


_given_ports: set[int] = set()


def free_port() -> int:
    """A free port, never the same one twice, below the range of the kernel's outgoing connections."""
    for port in random.SystemRandom().sample(range(20_000, 32_000), 500):
        if port in _given_ports:
            continue
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            _given_ports.add(port)
            return port
    raise RuntimeError("no free port between 20000 and 32000")
