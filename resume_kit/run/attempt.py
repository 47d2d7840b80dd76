"""Opening a run directory: run id, attempt number, the journal, and what dead attempts left behind."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from resume_kit.checkpoint import canonical, files
from resume_kit.engines.coordination import Coordinator
from resume_kit.environment import host_name
from resume_kit.errors import ResumeKitError, SaveFailed
from resume_kit.resuming.report import Report
from resume_kit.run.journal import Journal, last_attempt, run_id_of
from resume_kit.run.retention import settle_leftovers


class Attempt:
    """One start of a run. Rank 0 writes the journal; on other ranks `record` does nothing."""

    def __init__(self, run: Path, coordinator: Coordinator) -> None:
        self.run = run
        self._coordinator = coordinator
        self.number, self.run_id = coordinator.on_rank_zero("open the run directory", self._open)
        self.failure: SaveFailed | None = None
        self._journal = Journal(run, attempt=self.number) if coordinator.rank == 0 else None

    def _open(self) -> tuple[int, str]:
        files.require_writable(self.run)
        settle_leftovers(self.run)
        return last_attempt(self.run) + 1, run_id_of(self.run) or uuid.uuid4().hex[:12]

    def record(self, event: str, fields: Mapping[str, Any]) -> None:
        """Journal an event, durably. Collective: when it cannot be written, every rank raises `SaveFailed`.

        So it does when an earlier one could not be, of which nobody has been told yet.
        """

        def write() -> None:
            if failure := self.take_failure():
                raise failure
            self._write(event, fields, durable=True)

        self._coordinator.on_rank_zero(f"journal {event}", write)

    def note(self, event: str, fields: Mapping[str, Any]) -> None:
        """Journal an event, durably, without telling other ranks. Raises `SaveFailed`, on rank 0 alone."""
        self._write(event, fields, durable=True)

    def record_soon(self, event: str, fields: Mapping[str, Any]) -> None:
        """Journal an event without waiting for anyone. A failure is kept in `failure` until all can be told."""
        try:
            self._write(event, fields, durable=False)
        except SaveFailed as error:
            self.failure = error

    def take_failure(self) -> SaveFailed | None:
        """The failure of `record_soon`, once."""
        failure, self.failure = self.failure, None
        return failure

    def start(self, fields: Mapping[str, Any]) -> None:
        self.record("start", {"run_id": self.run_id, "host": host_name(), **fields})

    def refuse(self, error: ResumeKitError, report: Report) -> None:
        """Journal why training does not go on, with all problems and the checks made so far."""
        problems = [[p.check, p.where, p.what, p.remedy] for p in error.problems]
        fields = {"run_id": self.run_id, "reason": error.headline, "problems": problems, "report": report.to_json()}
        try:
            self._write("refuse", fields, durable=True)
            self._keep(report)
        except SaveFailed as failure:
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
