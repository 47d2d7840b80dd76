"""An attempt of the run on all ranks: its number and folder, its signs of life, its part of the journal."""

from __future__ import annotations

import sys
import threading
import traceback
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from resume_kit.checkpoint import canonical, files, names
from resume_kit.engines.coordination import Coordinator
from resume_kit.environment import host_name, started_again
from resume_kit.errors import Fenced, Problem, ResumeKitError, SaveFailed, UsageError
from resume_kit.recovery import attempts, grounds
from resume_kit.recovery.attempts import Token
from resume_kit.resuming.report import Report
from resume_kit.run.journal import Journal, run_id_of
from resume_kit.run.last_words import one_line, reason_of
from resume_kit.run.retention import settle_leftovers


class Attempt:
    """One start of a run. Rank 0 takes the run directory and writes the journal; on other ranks `record` does nothing.

    folder: what this attempt leaves. ground: where it prepares checkpoints. token: on rank 0 only.
    """

    def __init__(
        self,
        run: Path,
        coordinator: Coordinator,
        *,
        take_over: bool = False,
        patience: float = 10.0,
        give_up_after: int | None = None,
    ) -> None:
        """Collective. `patience`: seconds without a sign of life after which an older attempt is taken over.
        `give_up_after`: written down for `resume-kit next`.

        Raises `RunTaken` while another attempt lives, `Fenced` when a newer one comes first, `UsageError` for a
        directory that cannot be used; alike on all ranks.
        """
        self.run = run
        self.token: Token | None = None
        self.failure: SaveFailed | Fenced | None = None
        self._coordinator = coordinator
        self._heartbeat: Heartbeat | None = None
        self._journal: Journal | None = None
        self.number, self.run_id = coordinator.on_rank_zero(
            "open the run directory", lambda: self._open(take_over, patience, give_up_after)
        )
        self.ground = names.ground(run, self.number)
        self.folder = self.ground.parent
        try:
            coordinator.round("share the run directory", self._require_shared, lambda _: None)
        except ResumeKitError as error:
            self._refused(error)
            raise

    def _refused(self, error: ResumeKitError | OSError) -> None:
        """Nobody else speaks for the attempt yet."""
        self.ended(reason_of(error, training=False), step=None, by=one_line(error))

    def _require_shared(self) -> None:
        if not files.is_visible(self.ground):
            what, remedy = f"{host_name()} does not see what rank 0 wrote there", "choose one that all hosts share"
            problem = Problem("run directory", str(self.run), what, remedy)
            raise UsageError("the run directory is not the same on every host", [problem])

    def _open(self, take_over: bool, patience: float, give_up_after: int | None) -> tuple[int, str]:
        files.require_writable(self.run)
        world_size, known = self._coordinator.world_size, run_id_of(self.run)
        token = Token.take(
            self.run,
            world_size=world_size,
            run_id=known,
            take_over=take_over and not self._repeated(),
            patience=patience,
            give_up_after=give_up_after,
        )
        self.token, self._heartbeat = token, Heartbeat(token)
        weakref.finalize(self, self._heartbeat.stop)
        try:
            self._clean_up(token)
        except (ResumeKitError, OSError) as error:
            self._refused(error)
            raise
        return token.number, token.run_id

    def _clean_up(self, token: Token) -> None:
        self._journal = Journal(self.run, attempt=token.number, fence=token.require)
        with attempts.fencing(token.ground):
            settle_leftovers(self.run, token.ground)
        for error in grounds.clear(token.ground):
            _warn(f"what a dead attempt left could not be deleted: {error}")

    def _repeated(self) -> bool:
        """Whether the order to take over was for an earlier start: obeyed at each, two jobs would fight for the run."""
        if started_again():
            _warn("take_over is for the first start of a job; this one was started again by SLURM or torchrun")
        return started_again()

    def watch(self, *, on_stop: Callable[[dict[str, Any]], None], on_superseded: Callable[[int], None]) -> None:
        """Have requests to stop, and that a newer attempt has come, told on rank 0: once each, from another thread."""
        if self._heartbeat is not None:
            self._heartbeat.watch(on_stop, on_superseded)

    def ended(self, reason: str, *, step: int | None, by: str = "") -> None:
        """Say how the attempt ended: rank 0 does, by its first word. It gives no sign of life any more."""
        if self.token is not None and self._heartbeat is not None:
            self.token.ended(reason, step=step, by=by)
            self._heartbeat.stop()

    def record(self, event: str, fields: Mapping[str, Any]) -> None:
        """Journal an event, durably. Collective: when it cannot be written, every rank raises `SaveFailed`, and
        `Fenced` when a newer attempt has come.

        So it does when an earlier one could not be, of which nobody has been told yet.
        """

        def write() -> None:
            if failure := self.take_failure():
                raise failure
            self._write(event, fields, durable=True)

        self._coordinator.on_rank_zero(f"journal {event}", write)

    def note(self, event: str, fields: Mapping[str, Any]) -> None:
        """Journal an event, durably, without telling other ranks. Raises as `record` does, on rank 0 alone."""
        self._write(event, fields, durable=True)

    def record_soon(self, event: str, fields: Mapping[str, Any]) -> None:
        """Journal an event without waiting for anyone. A failure is kept in `failure` until all can be told."""
        try:
            self._write(event, fields, durable=False)
        except (SaveFailed, Fenced) as error:
            self.failure = error

    def take_failure(self) -> SaveFailed | Fenced | None:
        """The failure of `record_soon`, once."""
        failure, self.failure = self.failure, None
        return failure

    def start(self, fields: Mapping[str, Any]) -> None:
        took_over = self.token.took_over if self.token else None
        self.record("start", {"run_id": self.run_id, "host": host_name(), "took_over": took_over, **fields})

    def refuse(self, error: ResumeKitError, report: Report) -> None:
        """Journal why training does not go on, with all problems and the checks made so far."""
        problems = [[p.check, p.where, p.what, p.remedy] for p in error.problems]
        fields = {"run_id": self.run_id, "reason": error.headline, "problems": problems, "report": report.to_json()}
        try:
            self._write("refuse", fields, durable=True)
            self._keep(report)
        except (SaveFailed, Fenced) as failure:
            report.warned("refused", "journal", f"this refusal could not be journaled: {failure.headline}")

    def resumed(self, report: Report, fields: Mapping[str, Any]) -> None:
        self.record("resume", {"run_id": self.run_id, **fields, "report": report.to_json()})
        self._coordinator.on_rank_zero("report", lambda: self._keep(report))

    def _write(self, event: str, fields: Mapping[str, Any], *, durable: bool) -> None:
        if self._journal is not None:
            self._journal.write(event, fields, durable=durable)

    def _keep(self, report: Report) -> None:
        if self._journal is not None:
            files.write_durably(
                self.run / f"resume-report-attempt-{self.number:04d}.json", canonical.dumps(report.to_json())
            )


class Heartbeat:
    """Gives signs of life on rank 0, in a thread of its own, and looks for what others put into the folder."""

    def __init__(self, token: Token) -> None:
        self._token = token
        self._over = threading.Event()
        self._on_stop: Callable[[dict[str, Any]], None] | None = None
        self._on_superseded: Callable[[int], None] | None = None
        threading.Thread(target=self._run, name="heartbeat", daemon=True).start()

    def watch(self, on_stop: Callable[[dict[str, Any]], None], on_superseded: Callable[[int], None]) -> None:
        self._on_stop, self._on_superseded = on_stop, on_superseded

    def stop(self) -> None:
        self._over.set()

    def _run(self) -> None:
        while not self._over.wait(attempts.BEAT_SECONDS):
            with suppress(OSError):  # a full disk or a dead server is no reason to end; a newer attempt will judge
                self._token.beat()
            try:
                self._look()
            except Exception:  # of a callback: without this thread nobody would see a newer attempt
                traceback.print_exc()

    def _look(self) -> None:
        if self._on_superseded and (newer := self._token.superseded()) is not None:
            tell, self._on_superseded = self._on_superseded, None
            tell(newer)
        if self._on_stop and (request := attempts.read_object(self._token.folder / attempts.STOP)) is not None:
            ask, self._on_stop = self._on_stop, None
            ask(request)


def _warn(text: str) -> None:
    print(f"resume_kit: warning: {text}", file=sys.stderr, flush=True)
