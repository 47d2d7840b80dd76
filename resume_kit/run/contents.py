"""What a checkpoint holds besides the engine's tensors, gathered anew for each save."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from resume_kit.engines.adapter import EngineAdapter, GateResult
from resume_kit.resuming.audit import Lineage
from resume_kit.resuming.streams import Carried
from resume_kit.run.agreement import gate_record, require_finite
from resume_kit.run.attempt import Attempt
from resume_kit.run.facts import Facts
from resume_kit.run.kept import KeptState
from resume_kit.run.protocols import ResumableData, Stateful
from resume_kit.saving.capture import SaveRequest


@dataclass(eq=False)
class Contents:
    """`gate` is None where the policy switched it off. `carried`: RNG records of other topologies, until a step."""

    attempt: Attempt
    adapter: EngineAdapter
    data: ResumableData
    facts: Facts
    user_state: Mapping[str, Stateful]
    gate: Callable[[], GateResult] | None
    kept: KeptState = field(default_factory=KeptState)
    lineage: Lineage = field(default_factory=Lineage)
    carried: tuple[Carried, ...] = ()

    def request(self, with_gate: bool) -> SaveRequest:
        """This rank's part of a save, apart from the engine's tensors. Collective."""
        step = self.adapter.step
        self.adapter.settle()
        began = time.perf_counter()
        gate = self.gate() if self.gate and with_gate else None
        gate_seconds = time.perf_counter() - began
        require_finite(gate)
        return SaveRequest(
            directory=self.attempt.run,
            ground=self.attempt.ground,
            run_id=self.attempt.run_id,
            attempt=self.attempt.number,
            step=step,
            description=self.facts.description,
            state={
                **self.adapter.state(),
                **self.kept.to_plain(),
                "lineage": self.lineage.to_plain(),
                "user": states_of(self.user_state),
            },
            updates=self.adapter.updates - self.kept.moments_since,
            carried=self.carried,
            data={
                **self.facts.data(),
                "position": self.data.position,
                "next_batch": self.data.batch_digest(self.data.position),
            },
            pinned=self.facts.pinned,
            gate=gate_record(gate, switched_on=self.gate is not None),
            gate_seconds=gate_seconds,
        )


def states_of(holders: Mapping[str, Stateful]) -> dict[str, dict[str, Any]]:
    return {name: holder.state_dict() for name, holder in holders.items()}
