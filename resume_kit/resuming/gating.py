"""What the gate's figures are held against, and how near is near enough."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch

from resume_kit.errors import Problem, ResumeRefused
from resume_kit.policy.judgement import Judgement
from resume_kit.policy.policy import Policy, agrees

#: Entries of a topology that change how one sample's forward is computed.
_SPLITTING = frozenset(
    {
        "tensor_parallel",
        "pipeline_parallel",
        "virtual_pipeline",
        "expert_parallel",
        "expert_tensor_parallel",
        "sequence_parallel",
    }
)


def choose_tolerance(policy: Policy, device: torch.device, judgement: Judgement | None = None) -> tuple[str, str]:
    """(name of the tolerance, why): `auto` is exact where the hardware repeats itself bit for bit.

    Where Megatron's ranks split the computation another way, or weights are cast anew, sums are rounded otherwise.
    """
    if policy.tolerance != "auto":
        return policy.tolerance, "set by the policy"
    changes = judgement.changes if judgement is not None else ()
    if any(change.part == "dtype" for change in changes):
        return "relaxed", "weights are in another dtype"
    if any(change.part == "topology" and change.path in _SPLITTING for change in changes):
        return "relaxed", "the computation is split another way"
    if device.type == "cpu":
        return "exact", "on CPUs"
    if torch.are_deterministic_algorithms_enabled():
        return "exact", "deterministic mode"
    return "standard", "deterministic algorithms are off"


def moves_the_computation(judgement: Judgement) -> bool:
    """Whether a setting of model or engine differs, as the policy allows; the run's own `config` moves nothing."""
    return any(not change.path.startswith("config.") for change in judgement.changes_of("configuration"))


def ranks_agree(tolerance: str) -> Callable[[list[dict[str, float]]], None]:
    def combine(found: list[dict[str, float]]) -> None:
        for rank, values in enumerate(found):
            for name, value in values.items():
                if not agrees(value, found[0][name], tolerance):
                    what = f"{name} {value!r}, on rank 0 {found[0][name]!r}, for the same batch and seed"
                    raise ResumeRefused(
                        "the ranks compute different things",
                        [Problem("gate", f"rank {rank}", what, "a rank runs other code, flags or hardware")],
                    )

    return combine


def gate_problems(
    found: Mapping[str, float], expected: Mapping[str, float] | None, tolerance: str, reason: str
) -> list[Problem]:
    """Figures of the gate that are not finite, or not as recorded. No record: other data, nothing to compare."""
    problems = []
    for name, value in found.items():
        if expected is None:
            if not math.isfinite(value):
                problems.append(Problem("gate", name, f"{value!r}: not finite", "do not train on from this state"))
        elif not (value == value and agrees(value, expected[name], tolerance)):
            what = f"{value!r}, at the save {expected[name]!r} (tolerance {tolerance}: {reason})"
            causes = "model code, attention, kernels, flags or threads (OMP_NUM_THREADS)"
            remedy = f"the state is as saved, so the computation differs: {causes}"
            problems.append(Problem("gate", name, what, remedy))
    return problems
