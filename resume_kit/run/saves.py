"""The saves of a run: when one is taken, what happens while one is under way, their journal and retention."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from resume_kit.engines.adapter import EngineAdapter, ModelDescription
from resume_kit.engines.coordination import Coordinator
from resume_kit.errors import Fenced, ResumeKitError
from resume_kit.recovery.attempts import fencing
from resume_kit.run.attempt import Attempt
from resume_kit.run.retention import Retention, prune
from resume_kit.saving.capture import SaveRequest
from resume_kit.saving.options import Returns, Saving
from resume_kit.saving.save import Commit
from resume_kit.saving.saver import Saver, SaveState


class Saves:
    """Every method is collective. `build(with_gate)` makes the request of a save, on every rank.

    last: the newest commit whose outcome has been taken.
    """

    def __init__(
        self,
        run: Path,
        adapter: EngineAdapter,
        coordinator: Coordinator,
        description: ModelDescription,
        options: Saving,
        *,
        attempt: Attempt,
        retention: Retention,
        build: Callable[[bool], SaveRequest],
        show: Callable[[str], None],
    ) -> None:
        self.last: Commit | None = None
        self._run = run
        self._options = options
        self._attempt = attempt
        self._retention = retention
        self._build = build
        self._show = show
        self._first = coordinator.rank == 0
        self._prepared = False
        self._noted = False
        self._skipped: int | None = None
        self._since_gate: int | None = None
        self._saver = Saver(adapter, coordinator, description, options, journal=self)

    def forget(self) -> None:
        """Let go of the engine's tensors before a load."""
        self._saver.forget()

    def require_memory(self) -> None:
        """Raise `TooLittleMemory` when this host cannot hold what its ranks will stage. Before any training."""
        self._saver.require_memory()

    def stepped(self, saved: SaveState, *, updated: bool, stopping: bool = False) -> None:
        """After each optimizer step. `saved`: how the pending save stands, taken over all ranks. `updated`: some step
        has updated the weights, so that the optimizer has its state. `stopping`: the run stops here.

        Raises that save's failure, alike on all ranks; not where the run stops, since it is then saved once more.
        """
        self._saver.stepped()
        if saved is not SaveState.RUNNING:
            (self.settle if stopping else self.wait)(failed=saved is SaveState.FAILED)
        if not self._prepared and updated:
            self.prepare()

    def prepare(self) -> None:
        """The optimizer's state exists: allocate the host memory in the background."""
        self._prepared = True
        self._saver.prepare()

    @property
    def busy(self) -> bool:
        """Whether a save is under way."""
        return self._saver.busy

    @property
    def state(self) -> SaveState:
        """How this rank's part of a pending save stands."""
        return self._saver.state

    def scheduled(self, step: int, begun: Callable[[], None] = lambda: None, *, insists: bool = False) -> None:
        """A save that the schedule asks for; `begun` is called when there is one. `insists`: it asks at every step."""
        if self._saver.busy:
            if self._options.when_busy == "skip":
                pending = self._saver.pending_step
                if insists and pending == self._skipped:
                    return
                self._skipped = pending
                self._say(f"step {step}: no save, that of step {pending} is still being written")
                self._attempt.record_soon("skip", {"step": step, "pending": pending})
                return
            began = time.perf_counter()
            self.wait()
            self._say(f"step {step}: waited {time.perf_counter() - began:.1f} s for the save before")
        begun()
        self.now(self._options.returns)

    def now(self, returns: Returns) -> Commit | None:
        """Save; wait for a pending one first. Returns the commit where it waits for it."""
        self.wait()
        with_gate = self._since_gate in (None, self._options.gate_every - 1)
        self._saver.begin(lambda: self._build(with_gate), returns)
        return self.wait() if returns == "committed" else None

    def wait(self, *, failed: bool = False) -> Commit | None:
        """Wait for the pending save; its commit, or None where none is pending. Raises its failure."""
        if not self._saver.busy:
            return None
        self.last, with_gate = self._saver.take(failed=failed)
        self._since_gate = 0 if with_gate else (self._since_gate or 0) + 1
        if self._saver.note and not self._noted:
            self._noted = True
            self._say(f"warning: {self._saver.note}")
        return self.last

    def settle(self, *, failed: bool = False) -> None:
        """Wait for the pending save; its failure is told, and not raised."""
        try:
            self.wait(failed=failed)
        except Fenced:
            raise
        except ResumeKitError as error:
            self._say(f"warning: the save before failed: {error.headline}")

    def close(self) -> None:
        """Wait for the pending save and give the host memory back."""
        try:
            self.wait()
        finally:
            self._saver.close()

    def begun(self, request: SaveRequest) -> None:
        """On rank 0, in the background."""
        self._attempt.note("save", {"step": request.step})

    def published(self, request: SaveRequest, commit: Commit) -> None:
        """On rank 0, in the background, once the checkpoint stands."""
        self._attempt.note(
            "commit",
            {
                "step": request.step,
                "bytes": commit.total_bytes,
                "seconds": dict(commit.seconds),
                "gate": request.gate,
            },
        )
        try:
            with fencing(self._attempt.ground):
                prune(self._run, self._retention, self._attempt.ground)
        except OSError as error:
            self._say(f"warning: old checkpoints could not be deleted: {error}")

    def _say(self, text: str) -> None:
        if self._first:
            self._show(text)
