"""What a command found, as one JSON document or as text; and the words for sizes, times and problems."""

from __future__ import annotations

import base64
import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from resume_kit.errors import Problem

FINE, BAD, USAGE, INTERRUPTED = 0, 1, 2, 130

_UNITS = ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB"))
_AGES = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))
#: Width for a pipe or a file: wide enough that no line is ever folded.
_UNFOLDED = 100_000


@dataclass(frozen=True)
class Outcome:
    """The result of a command: its exit code, and the same findings for programs and for people.

    note: a word to people who read along while a program takes stdout; goes to stderr.
    """

    exit_code: int
    document: Mapping[str, Any]
    text: Sequence[RenderableType]
    note: str = ""


def emit(outcome: Outcome, *, as_json: bool) -> None:
    """Write the outcome to stdout. A reader that hangs up (``| head``) is no error."""
    write_out(to_json(outcome.document) if as_json else render(outcome.text))
    if outcome.note and not as_json:
        complain(outcome.note)


def complain(text: str) -> None:
    """Write to stderr, if there is one."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            print("\n".join(printable(line) for line in f"resume-kit: {text}".split("\n")), file=sys.stderr)


def to_json(document: Mapping[str, Any]) -> str:
    return json.dumps(jsonable(document), indent=2, allow_nan=False) + "\n"


def write_out(text: str) -> None:
    """Write to stdout and flush. OSError when the disk behind it is full."""
    if sys.stdout is None:  # closed by the caller: `>&-`
        return
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        _discard_rest()
    except OSError:
        _discard_rest()
        raise


def _discard_rest() -> None:
    """What is still buffered must not fail once more when the interpreter exits."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def render(parts: Iterable[RenderableType]) -> str:
    """The text for stdout: colours and folding on a terminal, plain unfolded lines elsewhere."""
    terminal = sys.stdout is not None and sys.stdout.isatty()
    console = Console(
        file=sys.stdout, width=None if terminal else _UNFOLDED, markup=False, highlight=False, emoji=False
    )
    with console.capture() as captured:
        for part in parts:
            console.print(part, soft_wrap=isinstance(part, str | Text))
    text = captured.get()
    return text if terminal else "".join(f"{line.rstrip()}\n" for line in text.split("\n")[:-1])


def table(headings: Sequence[str], rows: Iterable[Sequence[object]], *, right: Iterable[str] = ()) -> Table:
    """A table of plain cells; the columns named in `right` are aligned to the right."""
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    numeric = set(right)
    for heading in headings:
        grid.add_column(heading, justify="right" if heading in numeric else "left", overflow="fold")
    for row in rows:
        grid.add_row(*(cell if isinstance(cell, Text) else Text(printable(str(cell))) for cell in row))
    return grid


def facts(rows: Iterable[tuple[str, object]]) -> Table:
    """Names and values side by side, without heading."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in rows:
        grid.add_row(Text(printable(name)), value if isinstance(value, Text) else Text(printable(str(value))))
    return grid


def heading(text: str) -> Text:
    return Text(f"\n{printable(text)}", style="bold")


def printable(text: str) -> str:
    """`text` with everything a terminal might obey, and half characters of strange file names, escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def jsonable(value: object) -> object:
    """`value` in plain JSON: tuples as lists, bytes as base64, NaN and infinities as in the journal."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def size_text(nbytes: int | None) -> str:
    """Bytes in decimal units, ``1.5 MB``; a question mark for None."""
    if nbytes is None:
        return "?"
    unit, name = next(((unit, name) for unit, name in _UNITS if nbytes >= unit), (1, "B"))
    tenths = (10 * nbytes + unit // 2) // unit  # in integers: a damaged file may state any number
    return f"{nbytes} B" if unit == 1 else f"{tenths // 10}.{tenths % 10} {name}"


def time_text(seconds: float | None) -> str:
    """A moment in local time, with its age."""
    if seconds is None:
        return "?"
    try:
        moment = datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M:%S")
    except (ValueError, OverflowError, OSError):
        return f"at {seconds} s"
    return f"{moment} ({age_text(time.time() - seconds)})"


def age_text(seconds: float) -> str:
    if seconds < -1:
        return "in the future"
    unit, name = next(((unit, name) for unit, name in _AGES if seconds >= unit), (1, "s"))
    return f"{max(0, int(seconds // unit))} {name} ago"


def span_text(seconds: float | None) -> str:
    """A duration: ``8.4 s``, ``12 min``, ``3.1 h``, ``2.4 d``; a dash for None."""
    if seconds is None:
        return "–"
    for unit, name, text in ((86400, "d", ".1f"), (3600, "h", ".1f"), (60, "min", ".0f")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:{text}} {name}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"


def counted(number: int, noun: str) -> str:
    """``1 failure``, ``2 failures``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def problem_block(problems: Iterable[Problem]) -> Text:
    """Each problem as a block: where, what, and the remedy."""
    lines = Text()
    for problem in problems:
        lines.append(f"  ✗ {printable(problem.where or problem.check)}\n", style="bold red")
        lines.append(f"      {printable(problem.what)} [{printable(problem.check)}]\n")
        if problem.remedy:
            lines.append(f"      → {printable(problem.remedy)}\n")
    lines.rstrip()
    return lines


def problem_documents(problems: Iterable[Problem]) -> list[dict[str, str]]:
    return [asdict(problem) for problem in problems]
