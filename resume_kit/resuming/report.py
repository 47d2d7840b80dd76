"""The account of a resume: every check with its figure and verdict, for people, JSON and the journal. No torch."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from resume_kit.errors import Problem

Verdict = Literal["pass", "warn", "fail"]
_MARKS = {"pass": "✓", "warn": "!", "fail": "✗"}


@dataclass(frozen=True)
class Check:
    """One check of a stage: what was looked at, the figure it came to, and the verdict."""

    stage: str
    name: str
    verdict: Verdict
    figure: str


@dataclass
class Report:
    """Grows as the resume goes on. `seconds` is wall time by stage on the reporting rank.

    `changes` are the differences that the policy allowed, `change_table` the same for people; `read` counts bytes.
    """

    run: str
    attempt: int
    checkpoint: str = ""
    step: int = 0
    decision: str = ""
    checks: list[Check] = field(default_factory=list)
    rejected: list[dict[str, Any]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    changes: list[dict[str, Any]] = field(default_factory=list)
    change_table: str = ""
    read: dict[str, Any] = field(default_factory=dict)

    def passed(self, stage: str, name: str, figure: str) -> None:
        self.checks.append(Check(stage, name, "pass", figure))

    def warned(self, stage: str, name: str, figure: str) -> None:
        self.checks.append(Check(stage, name, "warn", figure))

    def failed(self, stage: str, problems: tuple[Problem, ...]) -> None:
        self.checks += [Check(stage, problem.check, "fail", f"{problem.where}: {problem.what}") for problem in problems]

    def reject(self, checkpoint: str, problems: tuple[Problem, ...]) -> None:
        """Note that a newer checkpoint was damaged and left aside; its own checks are dropped."""
        self.rejected.append({"checkpoint": checkpoint, "problems": [asdict(problem) for problem in problems]})
        self.checks.clear()

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start

    def to_json(self) -> dict[str, Any]:
        """The report as plain values; the table says what `changes` says, so it is left out."""
        return {key: value for key, value in asdict(self).items() if key != "change_table"}

    def render(self) -> str:
        """The report as text for a console, one line a check."""
        lines = [f"resume of {self.run}, attempt {self.attempt}"]
        for rejected in self.rejected:
            lines.append(f"  ✗ {rejected['checkpoint']} is damaged and was left aside:")
            lines += [f"      {p['where']}: {p['what']}" for p in rejected["problems"]]
        if self.change_table:
            lines += ["  what the policy lets differ", *(f"    {line}" for line in self.change_table.splitlines())]
        stage = ""
        for check in self.checks:
            if check.stage != stage:
                stage = check.stage
                took = f" ({self.seconds[stage]:.2f} s)" if stage in self.seconds else ""
                lines.append(f"  {stage}{took}")
            lines.append(f"    {_MARKS[check.verdict]} {check.name:<22} {check.figure}")
        lines.append(f"  → {self.decision}")
        return "\n".join(lines)
