"""A training loop by hand on a real rank, for tests that do something between its steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tests.jobs import Job, build


class Loop:
    """Engine, data and kit of a job; already resumed. `faults` as in `tests.faults`."""

    def __init__(self, rank: int, world_size: int, options: dict[str, Any], faults: Sequence[str] = ()) -> None:
        from launch.entry import seed_everything
        from resume_kit import ResumeKit, Saving
        from tests.faults import Faults

        job = Job(**options)
        self.engine, loader = build(rank, world_size, job)
        seed_everything(job.seed + 100 + rank)
        self.kit = ResumeKit(
            self.engine,
            loader,
            run_dir=job.run_dir,
            save_every=job.save_every or None,
            saving=Saving(**job.saving),
            timeout=job.timeout,
            show=lambda text: print(text, flush=True),
        )
        Faults(list(faults), rank).before_resume(self.engine, self.kit)
        self.kit.resume()
        self._loader = loader
        self._batches = iter(loader)

    def resume(self, at: int) -> None:
        self.kit.resume(at=at)
        self._batches = iter(self._loader)

    def steps(self, number: int) -> None:
        for _ in range(number):
            loss = self.engine(**next(self._batches)).loss
            self.engine.backward(loss)
            self.engine.step()
            self.kit.step(loss)


def told(action: Callable[[], Any]) -> str:
    """The error that `action` raises, as 'Class: text'; empty where it raises none."""
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""
