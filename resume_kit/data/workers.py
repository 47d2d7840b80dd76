"""Data workers leave a scheduler's signals to the rank, which saves and then ends them itself."""

from __future__ import annotations

import os
import signal
import threading

#: Seconds between two looks for the rank.
_LOOK = 0.5


def leave_signals_to_the_rank(_worker: int) -> None:
    """The data loader's worker_init_fn. A scheduler signals every process of a job; a rank whose workers die fails.

    SIGTERM ends a worker only when its own rank sends it. It also ends soon after its rank: it holds the rank's
    connections open, by whose end the other ranks learn that it is gone.
    """
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_obey, args=(os.getppid(),), name="signals", daemon=True).start()


def _obey(rank: int) -> None:
    while os.getppid() == rank:
        found = signal.sigtimedwait({signal.SIGTERM}, _LOOK)
        if found is not None and found.si_pid == rank:
            break
    os._exit(0)
