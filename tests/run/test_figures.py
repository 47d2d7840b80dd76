"""A step's record, and what it stands on once the exchange has raised."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from resume_kit.errors import Fenced, SaveFailed, UsageError
from resume_kit.run.figures import Steps
from resume_kit.run.stopping import Stop, Wish
from resume_kit.saving.saver import SaveState


class FakeRun:
    """A run of one rank whose journal fails when `failure` is set."""

    def __init__(self) -> None:
        self.failure: Exception | None = None
        self.adapter: Any = SimpleNamespace(
            step=0, reports_loss=True, device=torch.device("cpu"), grad_norm=1.0, learning_rate=0.1
        )
        self.data: Any = SimpleNamespace(position=0, global_batch_size=4, batch_digest=lambda start: f"from {start}")
        attempt: Any = self
        self.steps = Steps(self.adapter, self.data, attempt)

    def take_failure(self) -> Exception | None:
        failure, self.failure = self.failure, None
        return failure

    def train(self, wish: Wish | None = None, steps: int = 1) -> dict[str, Any]:
        self.adapter.step += steps
        self.data.position += 4 * steps
        self.steps.add(2.0)
        record, figures = self.steps.record(1.0, SaveState.RUNNING, wish or Wish())
        return {**record, "stop": figures.agreed.stop}


def test_a_journal_failure_that_a_script_catches_does_not_make_the_next_step_count_twice() -> None:
    run = FakeRun()
    run.train()
    run.failure = SaveFailed("no space left")
    with pytest.raises(SaveFailed):
        run.train()
    record = run.train()
    assert (record["step"], record["samples"], record["batch"]) == (3, 12, "from 8")


def test_a_step_that_the_kit_was_not_told_of_is_a_mistake() -> None:
    with pytest.raises(UsageError, match="has counted 2 optimizer steps"):
        FakeRun().train(steps=2)


def test_where_a_newer_attempt_is_why_the_journal_fails_that_is_agreed_on() -> None:
    run = FakeRun()
    run.failure = Fenced("attempt 2 took over")
    assert run.train(Wish(Stop.SUPERSEDED))["stop"] is Stop.SUPERSEDED
