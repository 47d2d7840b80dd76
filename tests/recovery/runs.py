"""Runs to look at: journals through the real `Journal`, attempt folders as an attempt leaves them, no training."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from resume_kit.checkpoint import names
from resume_kit.run.journal import Journal

START = 1_700_000_000.0
BATCH = 8
TOPOLOGY = {"engine": "deepspeed", "world_size": 4, "zero_stage": 3}


@dataclass
class Written:
    """An attempt that is being written: its clock goes on with each step. `folder` is None for an old-style run."""

    run: Path
    number: int
    time: float
    folder: Path | None
    step: int = 0
    seconds: float = 2.0
    journal: Journal = field(init=False)

    def __post_init__(self) -> None:
        self.journal = Journal(self.run, attempt=self.number)

    def note(self, event: str, **fields: Any) -> None:
        self.journal.write(event, {"time": self.time, **fields})

    def resume(self, step: int, **fields: Any) -> Written:
        self.step = step
        self.note("resume", step=step, target_step=step + 1, **fields)
        return self

    def train(self, until: int, *, save_every: int = 10) -> Written:
        """Steps up to `until`, each two seconds, with a commit one second after every `save_every`th."""
        for step in range(self.step + 1, until + 1):
            self.time += self.seconds
            self.note("step", step=step, loss=1.0, grad_norm=1.0, lr=0.1, samples=step * BATCH, batch="ab")
            self.step = step
            if step % save_every == 0:
                self.commit(step)
        return self

    def commit(self, step: int) -> Written:
        seconds = {"gate": 0.1, "capture": 0.3, "stage": 0.2, "write": 0.3, "commit": 0.1, "durable": 1.0}
        self.note("commit", step=step, bytes=1000, seconds=seconds, gate=None)
        directory = self.run / names.step_directory(step)
        directory.mkdir(exist_ok=True)
        (directory / names.MANIFEST).write_text("{}")
        return self

    def ended(self, reason: str, by: str = "") -> Written:
        self._put("ended.json", {"reason": reason, "step": self.step, "time": self.time, "by": by})
        return self

    def asked(self, signal: str = "SIGTERM", rank: int = 3) -> Written:
        self._put("asked.json", {"signal": signal, "rank": rank, "time": self.time})
        return self

    def words(self, rank: int, error: str, *, kind: str = "failed", host: str = "n1", after: float = 0.0) -> Written:
        word = {"rank": rank, "step": self.step, "kind": kind, "error": error, "time": self.time + after, "host": host}
        self._put(f"rank-{rank:05d}.json", word)
        return self

    def beat(self, beat: int = 1) -> Written:
        self._put("alive", {"beat": beat, "time": self.time})
        return self

    def _put(self, name: str, content: dict[str, Any]) -> None:
        assert self.folder is not None
        (self.folder / name).write_text(json.dumps(content))


def attempt(
    run: Path,
    number: int,
    *,
    at: float = 0.0,
    host: str = "n1",
    ranks: int = 4,
    folder: bool = True,
    job: tuple[str | None, int] | None = None,
    give_up_after: object = None,
    **start: Any,
) -> Written:
    """Begin attempt `number`, `at` seconds after START, of a process that cannot be found any more.

    `job`: of SLURM, and how often it was started again; by default each attempt is of another start of one job.
    """
    time, path = START + at, None
    run.mkdir(exist_ok=True)
    if folder:
        path = run / names.ATTEMPTS / names.attempt_directory(number)
        path.mkdir(parents=True)
        identity = {"host": host, "boot_id": "elsewhere", "pid_namespace": "pid:[1]", "pid": 7, "pid_started": 1}
        slurm_job, restarts = job or ("41", number - 1)
        identity |= {"slurm_job": slurm_job, "slurm_restarts": restarts}
        record = {"attempt": number, "run_id": "abc", "started": time, "identity": identity, "world_size": ranks}
        (path / "attempt.json").write_text(json.dumps({**record, "took_over": None, "give_up_after": give_up_after}))
    written = Written(run, number, time, path)
    about = {"run_id": "abc", "host": host, "world_size": ranks, "global_batch_size": BATCH, "topology": TOPOLOGY}
    written.note("start", **{**about, **start})
    return written


@contextmanager
def beating(written: Written) -> Iterator[None]:
    """A thread that gives signs of life, as rank 0 does."""
    done = threading.Event()

    def beat() -> None:
        number = 0
        while not done.wait(0.02):
            number += 1
            written.beat(number)

    thread = threading.Thread(target=beat)
    thread.start()
    yield
    done.set()
    thread.join()
