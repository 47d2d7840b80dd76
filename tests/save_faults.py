"""Faults of saves: disks and copies that take their time, hang or fail, each in the way that real ones do."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from resume_kit.errors import Problem, SaveFailed

_FOR_EVER = 120.0  # seconds; longer than any test


def apply(everywhere: set[str], mine: set[str], engine: Any) -> None:
    """Arrange for the named faults: `everywhere` are those of any rank, `mine` those of this one."""
    _disks(everywhere, mine)
    _captures(mine)
    _others(everywhere, mine, engine)


def _disks(everywhere: set[str], mine: set[str]) -> None:
    from resume_kit.checkpoint import files
    from resume_kit.checkpoint.writing import ImageFile

    read = files.read_when_visible
    if "late-index-once" in everywhere:

        def never(path: Path, nbytes: int, deadline: float) -> bytes:
            files.read_when_visible = read
            return read(path.with_name("not-here-yet"), nbytes, min(deadline, time.monotonic() + 0.1))

        files.read_when_visible = never

    finish = ImageFile.finish
    if "slow-disk" in everywhere:

        def slow(image: ImageFile) -> Any:
            time.sleep(1.5)
            return finish(image)

        ImageFile.finish = slow
    if "broken-disk" in mine:

        def broken(image: ImageFile) -> Any:
            finish(image)
            raise SaveFailed("cannot write", [Problem("write", str(image._path), "the disk is gone", "call someone")])

        ImageFile.finish = broken
    if "crash-in-the-background" in mine:

        def crash(image: ImageFile) -> Any:
            finish(image)
            raise ZeroDivisionError("a bug")

        ImageFile.finish = crash
    if "hung-disk" in mine:
        ImageFile.finish = lambda _: time.sleep(_FOR_EVER)


def _captures(mine: set[str]) -> None:
    """What fails at the first save, and not any more at the second."""
    import resume_kit.saving.plan as plan
    import resume_kit.saving.saver as saver
    from resume_kit.saving.arena import Arena
    from resume_kit.saving.measure import Gauges

    if "no-measuring-once" in mine:
        _fail_once(Gauges, "measuring", RuntimeError("out of device memory"))
    if "no-account-once" in mine:
        _fail_once(saver, "take_account", ZeroDivisionError("no account"))
    if "no-agreement-once" in mine:
        _fail_once(plan, "copies_of", ZeroDivisionError("no agreement"))
    if "no-plan-once" in mine:
        _fail_once(saver, "plan_save", ValueError("no plan"))
    if "no-arena-once" in mine:
        _fail_once(Arena, "memory", SaveFailed("no host memory for the save", [Problem("host memory", "", "all gone")]))


def _fail_once(owner: Any, name: str, error: Exception) -> None:
    works = getattr(owner, name)

    def fail(*_: Any) -> Any:
        setattr(owner, name, works)
        raise error

    setattr(owner, name, fail)


def _others(everywhere: set[str], mine: set[str], engine: Any) -> None:
    import resume_kit.run.saves as saves
    import resume_kit.saving.saver as saver
    from resume_kit.engines.coordination import Coordinator
    from resume_kit.run.attempt import Attempt
    from resume_kit.run.journal import Journal
    from resume_kit.saving.pending import Pending
    from resume_kit.saving.staging import Staging

    blocks, write, wait = Staging.blocks, Journal.write, Coordinator._wait
    if "no-memory" in everywhere:
        saver.available_memory = lambda: 1000
    if "slow-copies" in everywhere:

        def late(staging: Staging, header: bytes) -> Any:
            time.sleep(1.0)
            yield from blocks(staging, header)

        Staging.blocks = late
    if "no-fence" in everywhere:
        Pending.fence = Pending.wait_until_staged = lambda _: None
    if "unhooked" in everywhere:
        engine.optimizer.optimizer._optimizer_step_pre_hooks.clear()
        engine.optimizer.optimizer._optimizer_step_post_hooks.clear()
    if "no-prune" in mine:

        def refuse(*_: Any) -> Any:
            raise PermissionError(13, "Permission denied")

        saves.prune = refuse
    if "no-commit-event" in mine:
        note = Attempt.note

        def lost(attempt: Attempt, event: str, fields: Any) -> None:
            if event == "commit":
                raise SaveFailed("cannot write journal.jsonl")
            note(attempt, event, fields)

        Attempt.note = lost
    if "no-skip-event" in mine:

        def full(journal: Journal, event: str, *arguments: Any, **options: Any) -> None:
            if event == "skip":
                raise SaveFailed("cannot write journal.jsonl", [Problem("write", "", "no space left")])
            write(journal, event, *arguments, **options)

        Journal.write = full
    if "slow-to-hear" in mine:

        def later(coordinator: Coordinator, key: str, *arguments: Any) -> Any:
            if "published" in key:
                time.sleep(1.5)
            return wait(coordinator, key, *arguments)

        Coordinator._wait = later
    if "no-farewell" in everywhere:
        acknowledge = Coordinator._acknowledge

        def without(coordinator: Coordinator, prefix: str, *bound: float) -> None:
            if prefix != "depart":
                acknowledge(coordinator, prefix, *bound)

        Coordinator._acknowledge = without
