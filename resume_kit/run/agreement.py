"""What must hold on all ranks before a run may start or a checkpoint be taken."""

from __future__ import annotations

import math
from typing import Any

from resume_kit.engines.adapter import GateResult
from resume_kit.errors import InconsistentState, Problem, UsageError


def require_finite(gate: GateResult | None) -> None:
    """A state whose forward/backward is not finite is not worth keeping, and must not push good ones out."""
    if gate is not None and not (math.isfinite(gate.loss) and math.isfinite(gate.grad_norm)):
        what = f"loss {gate.loss!r}, gradient norm {gate.grad_norm!r}"
        remedy = "training has diverged or memory is corrupt; resume from the last commit"
        raise InconsistentState("the gate is not finite; nothing was saved", [Problem("gate", "", what, remedy)])


def gate_record(gate: GateResult | None, *, switched_on: bool) -> dict[str, Any] | None:
    """What a manifest says of the gate: its figures, that this save did not take them, or None where it is off."""
    if gate is None:
        return {"recorded": False} if switched_on else None
    return {"loss": gate.loss, "grad_norm": gate.grad_norm}


def one_run(identities: list[dict[str, str]]) -> None:
    """Every rank was given the same configuration, data, policy and directory; `UsageError` says where not."""
    problems = [
        Problem(
            "agreement", f"rank {rank}, {name}", "differs from rank 0's", "start every rank alike, on the same data"
        )
        for rank, identity in enumerate(identities)
        for name, digest in identity.items()
        if digest != identities[0].get(name)
    ]
    if problems:
        raise UsageError("the ranks were not given the same run", problems)
