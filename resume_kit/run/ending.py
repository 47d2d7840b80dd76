"""Ends a process that must not go on, whatever hangs in it: its standard error, and the file system. No torch."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

#: Seconds that the last acts of a process may take.
WITHIN = 10.0


def end_process(code: int, text: str, leave: Callable[[], object] = lambda: None) -> NoReturn:
    """Say why, `leave` what is to be left, and end at once: no clean-up runs. From any thread."""

    def last_acts() -> None:
        with suppress(OSError, ValueError):
            print(text, file=sys.stderr, flush=True)
        leave()

    try:
        thread = threading.Thread(target=last_acts, daemon=True)
        thread.start()
        thread.join(WITHIN)
    finally:
        os._exit(code)
