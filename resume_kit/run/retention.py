"""Which checkpoints stay. A policy returns decisions; deleting them is a second step. No torch."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from resume_kit.checkpoint import files, names
from resume_kit.errors import UsageError
from resume_kit.integrity.verify import quick_problems
from resume_kit.recovery import grounds
from resume_kit.recovery.attempts import fencing


@dataclass(frozen=True, kw_only=True)
class Retention:
    """Keep the newest `keep_last` checkpoints, and for ever those whose step is a multiple of `keep_every`.

    `keep_last` must be at least 2: with one, a checkpoint that turns out damaged leaves nothing to fall back to.
    """

    keep_last: int = 3
    keep_every: int | None = None

    def __post_init__(self) -> None:
        if self.keep_last < 2:
            raise UsageError(f"keep_last is {self.keep_last}; keep at least 2, so that a damaged one leaves another")
        if self.keep_every is not None and self.keep_every < 1:
            raise UsageError(f"keep_every is {self.keep_every}; give a number of steps, or leave it out")

    def expendable(self, steps: Iterable[int]) -> list[int]:
        """The steps, of those committed, that may be deleted, oldest first."""
        ordered = sorted(steps)
        kept = set(ordered[-self.keep_last :])
        if self.keep_every is not None:
            kept |= {step for step in ordered if step % self.keep_every == 0}
        return [step for step in ordered if step not in kept]


def prune(run: Path, retention: Retention, ground: Path, *, dry_run: bool = False) -> list[int]:
    """Delete the expendable checkpoints of `run`, by way of `ground`; return their steps.

    Directories without a manifest do not count as kept and are not touched. The newest checkpoint that passes a
    quick verification stays, whatever the policy says. Raises OSError, also where `ground` was
    taken away.
    """
    committed = names.committed_steps(run)
    good = next((step for step in reversed(committed) if not quick_problems(run / names.step_directory(step))), None)
    doomed = [step for step in retention.expendable(committed) if step != good]
    doomed = [step for step in doomed if not (run / names.step_directory(step)).is_symlink()]
    if not dry_run:
        for step in doomed:
            files.remove_checkpoint(run / names.step_directory(step), ground)
    return doomed


def settle_leftovers(run: Path, ground: Path) -> list[str]:
    """Clean up after attempts of versions that had no ground: put back a checkpoint whose replacement never came,
    delete torn ones. Returns the names that were there. Raises OSError.
    """
    leftovers = sorted(entry.name for entry in run.iterdir() if names.is_leftover(entry.name) and entry.is_dir())
    for name in leftovers:
        step = names.replaced_step(name)
        if step is not None and not (run / names.step_directory(step)).exists():
            os.rename(run / name, run / names.step_directory(step))
            files.fsync_directory(run)
        elif not (run / name).is_symlink():
            files.remove_checkpoint(run / name, ground)
    return leftovers


def set_aside(run: Path, *, after: int, attempt: int) -> list[int]:
    """Move checkpoints later than step `after` out of the run's line; return their steps.

    Called once a resume at `after` is proved: what is later was damaged or belongs to a branch that was left.
    Nothing is deleted: they wait in `set-aside/`. Raises `Fenced` once a newer attempt has come.
    """
    ground = names.ground(run, attempt)
    later = [step for step in names.checkpoint_steps(run) if step > after]
    with fencing(ground):
        for step in later:
            name = names.step_directory(step)
            grounds.set_aside(run / name, f"{name}.attempt-{attempt}", run, ground)
        if later:
            files.fsync_directory(run)
    return later
