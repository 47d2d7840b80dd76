"""A step's figures over all ranks, and the word that all ranks are at the same place."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from resume_kit.engines.adapter import EngineAdapter
from resume_kit.errors import InconsistentState, Problem, SaveFailed, UsageError
from resume_kit.run.attempt import Attempt
from resume_kit.saving.saver import SaveState


@dataclass(frozen=True)
class StepFigures:
    """A step over all ranks. `saved`: DONE where the pending save is on every rank, FAILED where it has on one."""

    loss: float
    saved: SaveState


def step_figures(
    losses: list[torch.Tensor], adapter: EngineAdapter, position: int, attempt: Attempt, *, saved: SaveState
) -> StepFigures:
    """Mean of a step's losses over micro-batches, then over the ranks that report one, in rank order. Collective.

    In double precision; empties `losses`. `saved`: how this rank's part of the pending save stands.

    The step and data position travel along: ranks that disagree on either raise `InconsistentState` at once.
    So does word of a journal that could not be written, which all ranks raise as `SaveFailed`.
    """
    counts = float(adapter.reports_loss and bool(losses))
    nothing = torch.zeros((), dtype=torch.float64, device=adapter.device)
    loss = torch.stack([loss.to(adapter.device) for loss in losses] or [nothing]).mean()
    losses.clear()
    if not dist.is_initialized():
        if failure := attempt.take_failure():
            raise failure
        return StepFigures(float(loss), saved)
    failed = float(attempt.failure is not None)
    figures = (adapter.step, position, failed, counts, float(saved))
    mine = torch.stack([loss, *(loss.new_tensor(value) for value in figures)])
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(every, mine)
    values, steps, positions, failures, counted, states = torch.stack(every).T.tolist()
    if any(failures):
        raise attempt.take_failure() or SaveFailed("rank 0 cannot write the journal; see its error")
    for what, found in (("step", steps), ("data position", positions)):
        odd = [rank for rank, value in enumerate(found) if value != found[0]]
        if odd:
            text = f"rank {odd[0]} is at {what} {found[odd[0]]:.0f}, rank 0 at {what} {found[0]:.0f}"
            remedy = "resume from the last commit; find out which rank went astray"
            raise InconsistentState("the ranks disagree", [Problem("agreement", what, text, remedy)])
    kept = [value for value, counts_ in zip(values, counted, strict=True) if counts_]
    if not kept:
        raise UsageError("no rank told the step's loss; give it to step() on the ranks of the last stage")
    return StepFigures(float(torch.tensor(kept, dtype=torch.float64).mean()), _together(states))


def _together(states: list[float]) -> SaveState:
    return SaveState.FAILED if SaveState.FAILED in states else SaveState(int(min(states)))
