"""A training loop on real ranks that tests stop in several ways; what it leaves is returned instead of exiting."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from tests.jobs import Job, build, live_digests


def train(rank: int, world_size: int, options: dict[str, Any], do: dict[str, Any] | None = None) -> dict[str, Any]:
    """Train to the end, or to where the kit stops it. `do`: options of the kit, and what happens on the way:

    at: [step, micro-batch within the accumulation, rank, what], see `_act`. early: the same before resume().
    """
    from launch.entry import seed_everything
    from resume_kit import ResumeKit, Saving
    from resume_kit.run.stopping import Preempted

    job, do = Job(**options), dict(do or {})
    at, early = do.pop("at", None), do.pop("early", None)
    engine, loader = build(rank, world_size, job)
    seed_everything(job.seed + 100 + rank)
    kit = ResumeKit(
        engine,
        loader,
        run_dir=job.run_dir,
        saving=Saving(**job.saving),
        timeout=job.timeout,
        show=lambda text: print(text, flush=True),
        **{"save_every": job.save_every or None, **do},
    )
    told: dict[str, Any] = {"records": [], "code": 0, "resumed_at": None}
    try:
        if early is not None and early[0] == rank:
            _act(early[1], kit)
        told["resumed_at"] = step = kit.resume()
        batches, micro = iter(loader), 0
        while step < job.steps:
            if at is not None and at[:3] == [step, micro, rank]:
                _act(at[3], kit)
            loss = engine(**next(batches)).loss
            engine.backward(loss)
            engine.step()
            record, micro = kit.step(loss), micro + 1
            if record:
                step, micro = record["step"], 0
                told["records"].append(record)
                print(f"step {step}", flush=True)
        kit.close()
    except Preempted as stop:
        told |= {"code": stop.code, "stopped_at": stop.step, "by": stop.by}
    loader.close()
    return {**told, "state": live_digests(kit)}


def _act(what: str, kit: Any) -> None:
    if what.startswith("SIG"):
        os.kill(os.getpid(), signal.Signals[what])
        time.sleep(0.2)  # until the thread that reads signals has had its turn
    elif what == "supersede":
        from resume_kit.recovery.attempts import Token

        Token.take(kit.run_dir, world_size=1, run_id=None, take_over=True)
    elif what == "sleep":
        sleep_where_a_person_should_look()
    elif what == "evaluate":
        for _ in range(30):
            time.sleep(0.1)
            kit.alive()
    elif what == "hold the interpreter":
        import ctypes

        time.sleep(0.6)  # until the watchdog has seen that the kit waits for nothing, and has set its timer anew
        ctypes.PyDLL(None).sleep(60)
    elif what == "raise":
        raise MemoryError("out of memory: tried to allocate 20.00 GiB\nmore about it")
    else:
        from resume_kit.checkpoint import canonical

        folder: Path = kit._attempt.folder
        part = folder / "stop.part"
        part.write_bytes(canonical.dumps({"reason": what, "time": time.time(), "by": "anna"}))
        part.rename(folder / "stop")
        time.sleep(3.0)  # longer than a beat


def sleep_where_a_person_should_look() -> None:
    time.sleep(60)
