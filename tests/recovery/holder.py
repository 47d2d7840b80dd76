"""A process that holds a run directory and stops itself (SIGSTOP) where a test wants it. Run as a module."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from resume_kit.checkpoint import files, names
from resume_kit.recovery.attempts import Token, fencing
from resume_kit.run.retention import Retention, prune, set_aside
from tests.checkpoints import Recipe, stage


def stop_before_rename(number: int) -> None:
    """Stop this process just before its rename `number`, counted from 0: after every check, and before the act."""
    rename, seen = os.rename, iter(range(10**6))

    def act(*arguments: Any, **options: Any) -> None:
        if next(seen) == number:
            say("stopped")
            os.kill(os.getpid(), signal.SIGSTOP)
        rename(*arguments, **options)

    os.rename = act


def say(word: str) -> None:
    print(word, flush=True)


def beat(token: Token) -> None:
    while True:
        token.beat()
        time.sleep(0.02)


def act(token: Token, what: str, stop_at: int) -> None:
    run, ground = token.run, token.ground
    deeds: dict[str, Callable[[], object]] = {
        "hold": lambda: time.sleep(60),
        "commit": lambda: files.publish(ground / names.step_directory(50), run / names.step_directory(50)),
        "prune": lambda: prune(run, Retention(keep_last=2), ground),
        "set aside": lambda: set_aside(run, after=20, attempt=token.number),
    }
    if what == "commit":
        stage(run, Recipe(50, attempt=token.number, seed=9))
    token.require()
    say("ready")
    stop_before_rename(stop_at)
    with fencing(ground):
        deeds[what]()


if __name__ == "__main__":
    taken = Token.take(Path(sys.argv[1]), world_size=1, run_id=None, take_over=False)
    threading.Thread(target=beat, args=(taken,), daemon=True).start()
    try:
        act(taken, sys.argv[2], int(sys.argv[3]))
    except Exception as error:
        say(f"{type(error).__name__}: {error}")
    else:
        say("done")
