"""The attempts of a run: taking the run directory, shutting older attempts out, and what each of them left. No torch.

The number of an attempt's folder is its fencing token: `mkdir` gives each number once, and the highest holds the run.
What an attempt prepares or takes apart lies in the `ground` of its folder, and it commits and deletes by renames out of
there and into there. A newer attempt renames the ground: from that instant those renames fail, however late the old
process wakes up.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resume_kit.checkpoint import files, names
from resume_kit.errors import CheckpointDamaged, Fenced, Problem, RunTaken, SaveFailed, UsageError
from resume_kit.recovery import grounds
from resume_kit.recovery.events import JournalLines, last_number
from resume_kit.recovery.identity import Identity, is_dead, is_outdated, same_lineage

RECORD, ALIVE, STOP, ASKED, ENDED = "attempt.json", "alive", "stop", "asked.json", "ended.json"
#: Seconds between two signs of life.
BEAT_SECONDS = 2.0
_LOOK_SECONDS = 0.1


@dataclass(frozen=True, kw_only=True)
class AttemptRecord:
    """What the folder of one attempt tells; None for what is not there or cannot be read.

    alive: the newest sign of life, {"beat", "time"}. stop: a request to stop. asked: the first signal to stop that came
    to a rank, {"signal", "rank", "time"}. ended: {"reason", "step", "time", "by"}. last_words: of the ranks that had
    any, in the order of ranks. took_over: the attempt that had not ended when this one began. fenced_by: the attempt
    that shut this one out. give_up_after: as the run was configured.
    """

    number: int
    folder: Path
    run_id: str | None
    started: float | None
    identity: Identity | None
    world_size: int | None
    took_over: int | None
    fenced_by: int | None
    give_up_after: int | None
    alive: Mapping[str, Any] | None
    stop: Mapping[str, Any] | None
    asked: Mapping[str, Any] | None
    ended: Mapping[str, Any] | None
    last_words: tuple[Mapping[str, Any], ...]

    @classmethod
    def of(cls, folder: Path) -> AttemptRecord:
        record = read_object(folder / RECORD) or {}
        spoken = (read_object(path) for path in sorted(folder.glob("rank-[0-9]*.json")))
        return cls(
            number=int(folder.name),
            folder=folder,
            run_id=record.get("run_id"),
            started=record.get("started"),
            identity=_identity(record),
            world_size=record.get("world_size"),
            took_over=record.get("took_over"),
            fenced_by=max((n for path in folder.iterdir() if (n := names.parse_fenced(path.name))), default=None),
            give_up_after=record.get("give_up_after"),
            alive=read_object(folder / ALIVE),
            stop=read_object(folder / STOP),
            asked=read_object(folder / ASKED),
            ended=read_object(folder / ENDED),
            last_words=tuple(words for words in spoken if words is not None),
        )


def read_attempts(run: Path) -> list[AttemptRecord]:
    """All attempts that have a folder, oldest first; none for a run of before there were any."""
    return [AttemptRecord.of(run / names.ATTEMPTS / names.attempt_directory(n)) for n in names.attempt_numbers(run)]


def newest_attempt(run: Path) -> AttemptRecord | None:
    """The newest attempt, if there is any: in a run of thousands the others need not be read for it."""
    newest = max(names.attempt_numbers(run), default=None)
    return None if newest is None else AttemptRecord.of(run / names.ATTEMPTS / names.attempt_directory(newest))


def shows_life(folder: Path, seconds: float) -> bool:
    """Whether the attempt of `folder` gives a sign of life within `seconds`.

    That its file changes while one looks is the sign: the clocks of two hosts need not agree.
    """
    deadline, seen = time.monotonic() + seconds, _raw(folder / ALIVE)
    while time.monotonic() < deadline:
        time.sleep(min(_LOOK_SECONDS, seconds))
        now = _raw(folder / ALIVE)
        if now is not None and now != seen:
            return True
    return False


class Token:
    """The right to write to a run: held on rank 0, for as long as no newer attempt has come. See `take`."""

    def __init__(self, run: Path, number: int, run_id: str, took_over: int | None) -> None:
        self.run, self.number, self.run_id, self.took_over = run, number, run_id, took_over
        self.folder = run / names.ATTEMPTS / names.attempt_directory(number)
        self.ground = self.folder / names.GROUND
        self._beats = 0

    @classmethod
    def take(
        cls,
        run: Path,
        *,
        world_size: int,
        run_id: str | None,
        take_over: bool,
        patience: float = 10.0,
        give_up_after: int | None = None,
    ) -> Token:
        """Begin the next attempt of `run`, a directory that exists, and shut out all older ones.

        An older attempt that has not ended is taken over at once where it is known to be dead, where this process is
        its restart, and with `take_over`; else where it shows no life for `patience` seconds. Raises `RunTaken` where
        it does, `Fenced` where a newer one has come meanwhile, `SaveFailed` where the disk says no, and
        `UsageError` where `attempts/` lies on another file system.
        """
        identity = Identity.of_this_process()
        token = None
        while token is None:
            journaled = last_number(run)  # first: an attempt has its folder before it writes a line
            newest = max(names.attempt_numbers(run), default=0)
            open_ended = _require_free(run, newest, identity, take_over, patience)
            token = _make(run, 1 + max(newest, journaled), run_id, newest, open_ended)
        record = {
            "attempt": token.number,
            "run_id": token.run_id,
            "started": time.time(),
            "identity": identity.to_json(),
            "world_size": world_size,
            "took_over": token.took_over,
            "give_up_after": give_up_after,
        }
        token.beat()
        files.write_durably(token.folder / RECORD, _line(record))
        files.fsync_directory(token.folder)
        files.fsync_directory(token.folder.parent)
        files.fsync_directory(run)
        token.require()  # before the first use of a ground that came after the newer attempt had looked for it
        _shut_out_older(token)
        token.require()
        return token

    def superseded(self) -> int | None:
        """The number of a newer attempt; None while there is none. One look at one name."""
        following = names.attempt_directory(self.number + 1)
        return self.number + 1 if (self.run / names.ATTEMPTS / following).exists() else None

    def require(self) -> None:
        """Raise `Fenced`, which names the newer attempt, once there is one."""
        if self.superseded() is not None:
            raise fenced(self.ground)

    def beat(self) -> None:
        """Give a sign of life. Raises OSError."""
        self._beats += 1
        data = _line({"beat": self._beats, "time": time.time()})
        # Written in place: a client of NFS that holds the file's name in its cache sees new content when it opens it.
        descriptor = os.open(self.folder / ALIVE, os.O_CREAT | os.O_WRONLY, 0o644)
        try:
            os.pwrite(descriptor, data, 0)
            os.ftruncate(descriptor, len(data))
        finally:
            os.close(descriptor)

    def ended(self, reason: str, *, step: int | None, by: str = "") -> None:
        """Say how the attempt ended. The first word stands; where the disk takes none, it died without a word."""
        said = {"reason": reason, "step": step, "time": time.time(), "by": by}
        with suppress(OSError):
            descriptor = os.open(self.folder / ENDED, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
            try:
                os.write(descriptor, _line(said))
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            files.fsync_directory(self.folder)


def fenced(ground: Path) -> Fenced:
    """The error of an attempt whose `ground` was taken away, with who holds the run now."""
    run, own, newer = ground.parent.parent.parent, int(ground.parent.name), _newest(ground)
    if newer is None:
        what, remedy = "its ground is gone, and no newer attempt is to be seen", "find out who deleted it; start again"
        return Fenced(f"attempt {own} has lost the run directory", [Problem("fence", str(ground), what, remedy)])
    identity = _identity(read_object(run / names.ATTEMPTS / names.attempt_directory(newer) / RECORD) or {})
    what = f"attempt {newer} took over ({identity or 'by whom is not known yet'})"
    remedy = "nothing is lost: the newer attempt goes on from the last commit; end this one, do not start it again"
    return Fenced(f"attempt {own} no longer holds the run directory", [Problem("fence", str(run), what, remedy)])


def _newest(ground: Path) -> int | None:
    """The newest attempt, where that is another than the one whose `ground` it is."""
    newest = max(names.attempt_numbers(ground.parent.parent.parent), default=0)
    return newest if newest > int(ground.parent.name) else None


@contextmanager
def fencing(ground: Path) -> Iterator[None]:
    """Work on what lies in `ground`: an error that comes of its being taken away is raised as `Fenced`."""
    try:
        yield
    except (OSError, SaveFailed, CheckpointDamaged) as error:
        if ground.is_dir() and _newest(ground) is None:
            raise
        raise fenced(ground) from error


def read_object(path: Path) -> dict[str, Any] | None:
    """A small JSON object; None where there is none, or it is half written."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _require_free(run: Path, newest: int, own: Identity, take_over: bool, patience: float) -> bool:
    """Whether attempt `newest` is to be taken over: it has not ended. Raises `RunTaken` while it lives.

    So it does where that was made by a later start of this very job, even if it has ended: a node that was cut off may
    start its ranks again behind the cut.
    """
    if newest == 0:
        return False
    older = AttemptRecord.of(run / names.ATTEMPTS / names.attempt_directory(newest))
    who = older.identity
    if who is not None and is_outdated(own, who):
        what = f"attempt {newest} is of a later start of this very job ({who}): this one has been replaced"
        remedy = "nothing is to be done: the later start goes on, or has finished; this one ends"
        raise RunTaken("this start of the job is out of date", [Problem("fence", str(run), what, remedy)])
    if older.ended is not None or older.fenced_by is not None:
        return False
    gone = who is not None and (is_dead(who) or same_lineage(own, who))
    if gone or take_over or not shows_life(older.folder, patience):
        return True
    what = f"attempt {newest} is alive ({who or 'of an unknown process'}{_since(older)}{_at_step(run, newest)})"
    remedy = f"wait until it ends, end it (resume-kit stop {run}), or take it over: --set run.take_over=true"
    raise RunTaken("another attempt holds the run directory", [Problem("fence", str(run), what, remedy)])


def _since(older: AttemptRecord) -> str:
    if older.started is None:
        return ""
    return f", since {time.strftime('%Y-%m-%d %H:%M:%S %Z', time.localtime(older.started))}"


def _at_step(run: Path, attempt: int) -> str:
    steps = (e.get("step") for e in JournalLines(run, {"step"}) if e["attempt"] == attempt)
    last = max((step for step in steps if isinstance(step, int)), default=None)
    return "" if last is None else f", at step {last}"


def _make(run: Path, number: int, run_id: str | None, newest: int, open_ended: bool) -> Token | None:
    """The folder of attempt `number`; None where another process has just made it."""
    token = Token(run, number, run_id or os.urandom(6).hex(), newest if open_ended else None)
    try:
        token.folder.parent.mkdir(exist_ok=True)
        if newest and number > newest + 1:  # a version without folders ran between; `newest` looks for this name
            token.folder.with_name(names.attempt_directory(newest + 1)).mkdir(exist_ok=True)
        token.folder.mkdir()
    except FileExistsError:
        return None
    except OSError as error:
        raise files.write_failed(token.folder, error, 0) from error
    try:
        token.ground.mkdir()
    except OSError as error:
        raise files.write_failed(token.ground, error, 0) from error
    if token.ground.stat().st_dev != run.stat().st_dev:
        what, remedy = "lies on another file system than the run directory", "let it be a plain directory there"
        problem = Problem("run directory", str(token.folder.parent), what, remedy)
        raise UsageError("the run directory cannot be used", [problem])
    return token


def _shut_out_older(token: Token) -> None:
    """Take the grounds of all older attempts away, and that of a `prune` which is under way."""
    run = token.run
    places: list[tuple[Path, Path | None]] = [
        (place, None) for place in (run / names.PRUNING,) if place.is_dir() and not place.is_symlink()
    ]
    for older in names.attempt_numbers(run):
        if older < token.number:
            folder = run / names.ATTEMPTS / names.attempt_directory(older)
            places += [(place, folder / names.fenced_ground(token.number)) for place in names.grounds(folder)]
    for place, mark in places:
        try:
            grounds.take_away(place, run, token.ground, mark=mark)
        except FileNotFoundError:
            token.require()  # an attempt newer than this one was faster
        except OSError as error:
            what = f"cannot be taken away ({error.strerror or error}), so its process could still commit and delete"
            remedy = "give the job's user write permission on the run directory"
            raise RunTaken(
                "an older attempt cannot be shut out", [Problem("fence", str(place), what, remedy)]
            ) from error


def _identity(record: Mapping[str, Any]) -> Identity | None:
    try:
        return Identity.from_json(record["identity"])
    except (KeyError, TypeError, AttributeError):
        return None


def _raw(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _line(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True).encode() + b"\n"
