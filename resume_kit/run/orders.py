"""Orders that a person gave once, in a command that SLURM and torchrun repeat by themselves. No torch."""

from __future__ import annotations

from pathlib import Path

from resume_kit.checkpoint import names
from resume_kit.recovery.attempts import AttemptRecord
from resume_kit.recovery.events import JournalLines
from resume_kit.recovery.identity import Identity, same_agent


def obeyed_before(run: Path, at: int) -> int | None:
    """The earlier attempt that went back to step `at` by the very order that this process has been started with.

    That is one of an earlier start of the same SLURM job, or that the same torchrun has started the ranks again after.
    None where a person gives the order anew. Raises `CheckpointDamaged` where the journal cannot be read.
    """
    own = Identity.of_this_process()
    obeyed = [e["attempt"] for e in JournalLines(run, {"resume"}) if e["event"] == "resume" and e.get("at") == at]
    return next((number for number in reversed(obeyed) if _repeats(own, _identity_of(run, number))), None)


def _repeats(own: Identity, older: Identity | None) -> bool:
    if older is None:
        return False
    later = (own.slurm_restarts, own.elastic_restarts) > (older.slurm_restarts, older.elastic_restarts)
    same_job = own.slurm_job is not None and own.slurm_job == older.slurm_job
    return later and (same_job or same_agent(own, older))


def _identity_of(run: Path, attempt: int) -> Identity | None:
    folder = run / names.ATTEMPTS / names.attempt_directory(attempt)
    return AttemptRecord.of(folder).identity if folder.is_dir() else None
