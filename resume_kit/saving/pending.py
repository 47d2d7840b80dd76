"""A save under way: its thread, the fence, and its outcome."""

from __future__ import annotations

import atexit
import sys
import threading

import torch

from resume_kit.engines.coordination import Coordinator
from resume_kit.errors import Problem, SaveFailed
from resume_kit.saving.capture import Capture, FailedCapture
from resume_kit.saving.save import Commit, Progress, SaveJournal, finish
from resume_kit.saving.staging import on_stream


class Pending:
    """Runs `finish` in a thread of its own; `commit` or `failure` is set once it is `over`.

    A script that ends without taking the outcome still waits for it, within a bound, and a failure that
    nobody took is printed.
    """

    def __init__(
        self,
        capture: Capture | FailedCapture,
        coordinator: Coordinator,
        stream: torch.cuda.Stream | None,
        journal: SaveJournal,
        began: float,
    ) -> None:
        self.step = capture.account.request.step
        gate = capture.account.request.gate
        self.with_gate = gate is not None and gate.get("recorded") is not False
        self.commit: Commit | None = None
        self.failure: Exception | None = None
        self._capture = capture
        self._coordinator = coordinator
        self._stream = stream
        self._journal = journal
        self._progress = Progress(began, capture.account.request.gate_seconds)
        self._over = threading.Event()
        self._bound = 1.75 * coordinator.timeout  # less than what another rank waits for this one after its own end
        atexit.register(self._at_exit)
        threading.Thread(target=self._run, name=f"save of step {self.step}", daemon=True).start()

    @property
    def over(self) -> bool:
        return self._over.is_set()

    def fence(self) -> None:
        """Let no update pass before the state is copied: the device waits, or where the host copies, this thread."""
        if self._progress.staged.is_set() or isinstance(self._capture, FailedCapture):
            return
        if self._capture.staging.by_device_alone and self._capture.measured is not None:
            self._capture.staging.copied_on_device()
        else:
            self.wait_until_staged()

    def wait_until_staged(self) -> None:
        """Wait until every copy is done, or the save has failed. Bounded: some block must be copied in time."""
        self._hurry()
        seen = -1
        while not self._progress.staged.wait(self._bound):
            copied = 0 if isinstance(self._capture, FailedCapture) else self._capture.staging.copied
            if copied == seen:
                what = f"nothing of the state was copied within {self._bound:.0f} s"
                problem = Problem("save", f"step {self.step}", what, "look at the file system's health")
                raise SaveFailed(f"the save of step {self.step} hangs", [problem])
            seen = copied

    def wait(self, bound: float | None = None) -> bool:
        """Wait for the end, at most for `bound` seconds; whether it has come."""
        self._hurry()
        return self._over.wait(self._bound if bound is None else bound)

    def taken(self) -> None:
        """Somebody has looked at the outcome."""
        atexit.unregister(self._at_exit)

    def _hurry(self) -> None:
        if not isinstance(self._capture, FailedCapture):
            self._capture.staging.hurry()

    def _run(self) -> None:
        try:
            with on_stream(self._stream):
                self.commit = finish(self._capture, self._coordinator, self._journal, self._progress)
        except Exception as error:
            if isinstance(self._capture, Capture):
                self._capture.staging.abandon()
            if self._stream is not None:
                self._stream.synchronize()  # no copy may be under way when its memory is used again
            self.failure = error
        finally:
            self._progress.staged.set()
            self._over.set()

    def _at_exit(self) -> None:
        came = self.wait()
        if came and self.failure is None:
            self._coordinator.depart()
            return
        what = f"failed: {self.failure}" if came else "hangs; this process waits for it no longer"
        print(f"resume_kit: the save of step {self.step} {what}", file=sys.stderr, flush=True)
