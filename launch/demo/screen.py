"""What the demo shows while it runs: lines that stay, and one live line that is written over."""

from __future__ import annotations

import os
import shutil
import sys
import time
from typing import TextIO

_COLOURS = {"good": "32", "bad": "31", "dim": "2", "bold": "1"}


class Screen:
    """On a terminal the live line is overwritten; elsewhere it is printed at most every `every` seconds."""

    def __init__(self, stream: TextIO | None = None, *, every: float = 10.0) -> None:
        self._stream = stream or sys.stdout
        self._terminal = self._stream.isatty()
        self._coloured = self._terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        self._every = every
        self._last_shown = float("-inf")
        self._live = ""

    def say(self, text: str = "", style: str = "") -> None:
        """Text that stays."""
        if self._terminal and self._live:
            self._stream.write("\r\033[K")
        self._live = ""
        coloured = self._coloured and text and style
        print(f"\033[{_COLOURS[style]}m{text}\033[0m" if coloured else text, file=self._stream, flush=True)

    def live(self, text: str) -> None:
        """The state of what is running now."""
        now = time.monotonic()
        if now - self._last_shown < (0.1 if self._terminal else self._every) or text == self._live:
            return
        self._last_shown = now
        self._live = text
        if self._terminal:
            width = shutil.get_terminal_size().columns - 1
            self._stream.write(f"\r\033[K{text[:width]}")
        else:
            self._stream.write(f"{text}\n")
        self._stream.flush()
