"""A step's record: its figures over all ranks, and the word that all ranks are at the same place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from resume_kit.engines.adapter import EngineAdapter
from resume_kit.errors import InconsistentState, Problem, ResumeRefused, SaveFailed, UsageError
from resume_kit.run.attempt import Attempt
from resume_kit.run.protocols import ResumableData
from resume_kit.run.stopping import Agreed, Stop, Wish, agree
from resume_kit.saving.saver import SaveState


class Steps:
    """Collects the losses of a step's micro-batches and makes the record of each optimizer step."""

    def __init__(self, adapter: EngineAdapter, data: ResumableData, attempt: Attempt) -> None:
        self._adapter, self._data, self._attempt = adapter, data, attempt
        self._losses: list[torch.Tensor] = []
        self.start()

    def start(self) -> None:
        """Steps are counted from the engine's step and the data position as they are now."""
        self._losses.clear()
        self._position, self._counted = self._data.position, self._adapter.step

    def add(self, loss: torch.Tensor | float | None) -> None:
        if loss is not None:
            self._losses.append(torch.as_tensor(loss).detach().to(torch.float64))

    def record(self, lr_factor: float, saved: SaveState, wish: Wish) -> tuple[dict[str, Any], StepFigures]:
        """The record of the step just taken, and what the ranks told each other. Collective, see `step_figures`.

        Raises `UsageError` for a step that the kit was not told of, `ResumeRefused` for data that is not the kit's.
        """
        adapter, start, size = self._adapter, self._position, self._data.global_batch_size
        taken = adapter.step - self._counted
        self._position, self._counted = self._data.position, adapter.step  # whatever the exchange raises
        figures = step_figures(self._losses, adapter, self._position, self._attempt, saved=saved, wish=wish)
        if taken != 1:
            what = f"since the last step() the engine has counted {taken} optimizer steps"
            remedy = "call step() once after every optimizer step; with Megatron call engine.stepped() before it"
            raise UsageError("the kit is not told of every step", [Problem("steps", "", what, remedy)])
        if self._position != start + size:
            headline = f"step {adapter.step} consumed {self._position - start} samples of the kit's data, not {size}"
            what, remedy = "the loop takes its batches from elsewhere", "iterate over the loader given to the kit"
            rank = dist.get_rank() if dist.is_initialized() else 0
            raise ResumeRefused(headline, [Problem("data", f"rank {rank}", what, remedy)])
        record = {
            "step": adapter.step,
            "loss": figures.loss,
            "grad_norm": adapter.grad_norm,
            "lr": adapter.learning_rate * lr_factor,
            "samples": self._position,
            "batch": self._data.batch_digest(start),
        }
        return record, figures


@dataclass(frozen=True)
class StepFigures:
    """A step over all ranks. `saved`: DONE where the pending save is on every rank, FAILED where it has on one.

    agreed: what all ranks do once the step is journaled.
    """

    loss: float
    saved: SaveState
    agreed: Agreed


def step_figures(
    losses: list[torch.Tensor], adapter: EngineAdapter, position: int, attempt: Attempt, *, saved: SaveState, wish: Wish
) -> StepFigures:
    """Mean of a step's losses over micro-batches, then over the ranks that report one, in rank order. Collective.

    In double precision; empties `losses`. `saved`: how this rank's part of the pending save stands; `wish`: whether
    this rank would stop, or save.

    The step and data position travel along: ranks that disagree on either raise `InconsistentState` at once.
    So does word of a journal that could not be written, which all ranks raise as `SaveFailed`; but not where a newer
    attempt is the reason, which is agreed on.
    """
    counts = float(adapter.reports_loss and bool(losses))
    nothing = torch.zeros((), dtype=torch.float64, device=adapter.device)
    loss = torch.stack([loss.to(adapter.device) for loss in losses] or [nothing]).mean()
    losses.clear()
    if not dist.is_initialized():
        if wish.stop is not Stop.SUPERSEDED and (failure := attempt.take_failure()):
            raise failure
        return StepFigures(float(loss), saved, agree([wish]))
    failed = float(attempt.failure is not None)
    figures = (adapter.step, position, failed, counts, float(saved), float(wish.stop), wish.age, float(wish.save))
    mine = torch.stack([loss, *(loss.new_tensor(value) for value in figures)])
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(every, mine)
    values, steps, positions, failures, counted, states, *wishes = torch.stack(every).T.tolist()
    agreed = agree([Wish(Stop(int(stop)), age, bool(save)) for stop, age, save in zip(*wishes, strict=True)])
    if any(failures) and agreed.stop is not Stop.SUPERSEDED:
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
    return StepFigures(float(torch.tensor(kept, dtype=torch.float64).mean()), _together(states), agreed)


def _together(states: list[float]) -> SaveState:
    return SaveState.FAILED if SaveState.FAILED in states else SaveState(int(min(states)))
