"""What a rank that ends before its time leaves in the attempt's folder, for `resume-kit status`. No torch.

`rank-00003.json` says why; after a hang `rank-00003.stacks.txt` has the stacks of its threads.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import weakref
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Literal, Protocol

from resume_kit.checkpoint import files
from resume_kit.environment import host_name
from resume_kit.errors import CheckpointDamaged, Fenced, ResumeKitError, ResumeRefused, UsageError
from resume_kit.recovery.attempts import ASKED

Kind = Literal["failed", "hung", "fenced"]

#: Characters of an error that are kept: an allocator's message may have many.
_LONGEST = 500


class Endable(Protocol):
    """An attempt: `ended` says on rank 0 how it ended, on other ranks nothing."""

    @property
    def folder(self) -> Path: ...

    def ended(self, reason: str, *, step: int | None, by: str = "") -> None: ...


class LastWords:
    """Of one rank; the first are kept. From now on an uncaught exception has its words recorded too.

    `step`, the optimizer steps taken, is kept up by who counts them, and `training`: the resume is behind it. The
    attempt is not kept alive. A process that is forked off says nothing.
    """

    def __init__(self, attempt: Endable, rank: int) -> None:
        global _speaker
        self.path = attempt.folder / f"rank-{rank:05d}.json"
        self.stacks = attempt.folder / f"rank-{rank:05d}.stacks.txt"
        self.rank, self.step, self.training = rank, 0, False
        self._pid = os.getpid()
        self._attempt = weakref.ref(attempt)
        self._spoken = False
        self._previous_hook = sys.excepthook
        sys.excepthook = self._hook
        _speaker = self

    def record(self, error: BaseException | str, kind: Kind = "failed", step: int | None = None) -> None:
        """Write why this rank ends; on rank 0 also that the attempt does. Never raises: worse has happened."""
        if self._spoken or os.getpid() != self._pid:
            return
        self._spoken = True
        step = self.step if step is None else step
        if isinstance(error, Fenced):
            kind = "fenced"
        text = error if isinstance(error, str) else one_line(error)
        words = {"rank": self.rank, "step": step, "kind": kind, "error": text, "time": time.time()}
        with suppress(Exception):
            files.write_durably(self.path, json.dumps({**words, "host": host_name()}).encode())
        with suppress(Exception):
            if kind != "hung":
                self.stacks.unlink(missing_ok=True)
        with suppress(Exception):
            if attempt := self._attempt():
                attempt.ended(self._reason(error, kind), step=step, by=text)

    def asked(self, name: str) -> None:
        """Leave word of the signal that asked for a stop, unless another rank has. Should the scheduler kill the ranks
        before they have saved, it is known that they did not fail. Never raises."""
        with suppress(Exception):
            word = json.dumps({"signal": name, "rank": self.rank, "time": time.time()}).encode() + b"\n"
            descriptor = os.open(self.path.parent / ASKED, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
            try:
                os.write(descriptor, word)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def of_any(self) -> str:
        """The last words of some rank, if there are any."""
        with suppress(OSError, ValueError):
            for path in sorted(self.path.parent.glob("rank-*.json")):
                words = json.loads(path.read_bytes())
                return f"rank {words['rank']} {words['kind']}: {words['error']}"
        return ""

    def close(self) -> None:
        """The rank has come to its end: nothing more is recorded."""
        global _speaker
        if sys.excepthook == self._hook:
            sys.excepthook = self._previous_hook
        if _speaker is self:
            _speaker = None

    def _hook(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        self.record(error)
        with suppress(ValueError):  # in the main thread: what follows is clean-up, and a launcher may want to end that
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self._previous_hook(kind, error, trace)

    def _reason(self, error: BaseException | str, kind: Kind) -> str:
        """How the attempt ended, see `reason_of`."""
        return "fenced" if kind == "fenced" else reason_of(error, training=self.training)


_speaker: LastWords | None = None


def record(error: BaseException | str, kind: Kind = "failed", step: int | None = None) -> None:
    """The last words of this process's rank, where a kit has been made and has not been closed."""
    if _speaker is not None:
        _speaker.record(error, kind, step)


def one_line(error: BaseException) -> str:
    lines = (error.headline if isinstance(error, ResumeKitError) else str(error)).strip().splitlines()
    return ": ".join([type(error).__name__, *lines[:1]])[:_LONGEST]


def reason_of(error: BaseException | str, *, training: bool) -> str:
    """How an attempt ended. refused: by the checks of the configuration, the resume or the replay, so that starting
    again cannot mend it. What else goes wrong may pass, and is bounded by giving up.
    """
    lasting = ResumeRefused if training else ResumeRefused | CheckpointDamaged | UsageError
    return "refused" if isinstance(error, lasting) else "failed"
