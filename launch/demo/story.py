"""The demo's story: the reference, the kills, the resumes, the comparison."""

from __future__ import annotations

import json
import random
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from launch.demo import folder, tables, watching
from launch.demo.judging import Attempt, Findings, Kill, attempts_of, compare_checkpoints, judge
from launch.demo.processes import Launched, Machine, free_port
from launch.demo.screen import Screen
from resume_kit.checkpoint.manifest import read_manifest
from resume_kit.checkpoint.names import committed_steps, step_directory
from resume_kit.resuming.report import Check, Report
from resume_kit.run.journal import read_journal

CONFIG = Path("configs") / "demo_zero3.yaml"
MIN_STEPS = 18
SAVES = 6
MAX_STARTS = 6


class DemoFailed(Exception):
    """The demo cannot go on: a run ended otherwise than it should."""


class Demo:
    """The whole story, in one folder."""

    def __init__(
        self, out: Path, machine: Machine, *, steps: int, seed: int, data: Path | None, screen: Screen
    ) -> None:
        self.out = out
        self._machine = machine
        self._steps = steps
        self._save_every = steps // SAVES
        self._chance = random.Random(seed)
        self._data = data
        self._screen = screen
        self._port = free_port()
        self._kills: list[Kill] = []

    def run(self) -> Findings:
        """Both runs, the kills, the comparison and the picture. Raises `DemoFailed`."""
        self._train_reference()
        self._train_and_kill()
        findings = self._judge()
        self._show(findings)
        return findings

    def _train_reference(self) -> None:
        self._screen.say("\n[1/2] the reference: one run, never interrupted", "bold")
        self._start(folder.REFERENCE, 1)

    def _train_and_kill(self) -> None:
        """The second run: started by one command again and again, until both kinds of kill have hit."""
        self._screen.say(
            "\n[2/2] the same training in another folder, killed twice, always started by this command:",
            "bold",
        )
        self._screen.say(f"      $ {shown_command(self._command(folder.RESUMED))}", "dim")
        reference = list(read_journal(self.out / folder.REFERENCE))
        run = self.out / folder.RESUMED
        for number in range(1, MAX_STARTS + 1):
            trap: watching.Trap | None = None
            if not any(kill.torn_step is None for kill in self._kills):
                base = self._save_every * self._chance.choice((1, 2))
                after = base + self._chance.randint(1, self._save_every - 2)
                trap = watching.StepTrap(after, watching.step_seconds(reference), self._chance)
            elif not any(kill.torn_step is not None for kill in self._kills):
                reached = max(kill.last_step for kill in self._kills)
                place = min(reached // self._save_every + self._chance.choice((1, 2)), SAVES)
                first = place * self._save_every
                trap = watching.SaveTrap(run, first, watching.save_seconds(reference), self._chance)
            kill = self._start(folder.RESUMED, number, trap)
            if kill is None:
                return
            self._kills.append(kill)

    def _start(self, name: str, number: int, trap: watching.Trap | None = None) -> Kill | None:
        """One start of the launcher, to its end (None) or to its kill."""
        screen, run = self._screen, self.out / name
        aim = "to its end" if trap is None else f"to be killed {trap.aim}"
        screen.say(f"      attempt {number}, {aim}")
        log = self.out / f"{name}-attempt-{number}.log"
        begun = time.monotonic()
        tail = watching.Tail(run)
        with Launched(self._command(name), self._machine.environment(), log) as launched:
            try:
                kill = watching.follow(launched, tail, screen, steps=self._steps, trap=trap)
            except watching.Stalled as error:
                self._log_end(log)
                raise DemoFailed(f"{name}: {error}") from None
            code = launched.exit_code
        attempt = next((a for a in reversed(attempts_of(tail.events())) if a.number == number), None)
        if kill is None and code != 0:
            self._log_end(log)
            refused = f", refused: {attempt.refusal}" if attempt and attempt.refusal else ""
            raise DemoFailed(f"the {name} run, attempt {number}, exited with code {code}{refused}; log {shown(log)}")
        for step in trap.missed if trap else ():
            screen.say(f"      the save of step {step} was over before the kill could hit it")
        took = time.monotonic() - begun
        resumed = attempt.resumed_from if attempt else None
        origin = "" if resumed is None else f"resumed from step {resumed}; "
        if kill is None:
            screen.say(
                f"      ✓ {origin}{_steps_of(attempt)}, ended by itself, {took:.0f} s; log {shown(log)}",
                "good",
            )
        else:
            screen.say(f"      ✗ {origin}{_steps_of(attempt)}, {took:.0f} s; log {shown(log)}")
            screen.say(f"        SIGKILL to {kill.processes} processes at once, {kill.label}", "bad")
            if kill.torn:
                files = ", ".join(f"{file} ({size:,} bytes)" for file, size in kill.torn)
                screen.say(f"        the torn checkpoint it left: {files}; no manifest was committed")
            elif kill.torn_step is not None:
                screen.say("        the torn checkpoint it left is an empty staging directory")
        return kill

    def _command(self, name: str) -> list[str]:
        settings = {
            "run.dir": json.dumps(str(self.out / name)),
            "run.steps": str(self._steps),
            "run.save_every": str(self._save_every),
        }
        if self._data is not None:
            settings["data.path"] = json.dumps(str(self._data))
        return self._machine.command(self._port, CONFIG, settings)

    def _log_end(self, log: Path, lines: int = 30) -> None:
        self._screen.say(f"\nthe last lines of {shown(log)}:", "bad")
        self._screen.say("\n".join(f"  | {line}" for line in log.read_text(errors="replace").splitlines()[-lines:]))

    def _judge(self) -> Findings:
        reference, resumed = self.out / folder.REFERENCE, self.out / folder.RESUMED
        common = sorted({*committed_steps(reference)} & {*committed_steps(resumed)})
        checkpoints = [
            compare_checkpoints(*(read_manifest(run / step_directory(step)) for run in (reference, resumed)))
            for step in common
        ]
        return judge(self._steps, read_journal(reference), read_journal(resumed), self._kills, checkpoints)

    def _show(self, findings: Findings) -> None:
        screen = self._screen
        for attempt in findings.attempts:
            path = self.out / folder.RESUMED / f"resume-report-attempt-{attempt.number:04d}.json"
            if path.is_file():
                screen.say(f"\n{read_report(path).render()}")
        screen.say(f"\n{tables.kill_tables(findings)}")
        screen.say("\nthe killed run beside the reference", "bold")
        screen.say(tables.totals(findings))
        reference = attempts_of(read_journal(self.out / folder.REFERENCE))[0]
        what = "real text: Python's standard library" if self._data is None else f"data: {self._data.name}"
        subtitle = f"transformers GPT-2, DeepSpeed ZeRO-3, bf16, dropout on, {self._machine.label}; {what}"
        try:
            from launch.demo import picture

            picture.draw(findings, reference, self.out / folder.CURVES, subtitle=subtitle)
        except ImportError as error:
            raise DemoFailed(f"no picture without matplotlib ({error}); pip install matplotlib") from None
        screen.say(f"  {'picture':<15} {shown(self.out / folder.CURVES)}")
        last = findings.last_checkpoint
        if last is not None:
            runs = " ".join(shown(self.out / n / step_directory(last.step)) for n in (folder.REFERENCE, folder.RESUMED))
            screen.say(f"  {'look yourself':<15} {shown(Path(sys.executable))} -m resume_kit.cli diff {runs}")


def _steps_of(attempt: Attempt | None) -> str:
    if attempt is None or not attempt.order:
        return "no step"
    return f"steps {attempt.order[0]}–{attempt.order[-1]}"


def read_report(path: Path) -> Report:
    """The report of a resume, as the run kept it."""
    content = json.loads(path.read_text())
    return Report(**{**content, "checks": [Check(**check) for check in content["checks"]]})


def shown(path: Path) -> str:
    """A path as short as it can be typed here."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def shown_command(command: Sequence[str]) -> str:
    """The launcher's command as one would type it."""
    words = [Path(word).name if number == 1 and word.startswith("/") else word for number, word in enumerate(command)]
    return shlex.join(words[1:] if words[1] == "deepspeed" else words)
