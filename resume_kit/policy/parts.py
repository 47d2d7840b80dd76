"""Which part of a training run a pinned setting belongs to, and which field of the policy may let it differ."""

from __future__ import annotations

import re
from typing import Any, Literal, TypeAlias

from resume_kit.integrity.differences import ABSENT
from resume_kit.policy.policy import Offset, Policy

Part: TypeAlias = Literal[
    "topology",
    "global batch",
    "learning rate",
    "hyperparameters",
    "optimizer state",
    "rng",
    "data",
    "dtype",
    "versions",
    "configuration",
    "model",
]

#: Part → field of the policy, and the values that let it differ. The model never may.
LOOSENED_BY: dict[Part, tuple[str, tuple[str, ...]]] = {
    "topology": ("topology", ("reshard",)),
    "global batch": ("global_batch", ("change",)),
    "learning rate": ("learning_rate", ("override", "{offset: N}")),
    "hyperparameters": ("hyperparameters", ("live",)),
    "optimizer state": ("optimizer_state", ("reset",)),
    "rng": ("rng", ("derive",)),
    "data": ("data", ("keep_position", "restart")),
    "dtype": ("dtype", ("cast",)),
    "versions": ("versions", ("warn", "any")),
    "configuration": ("configuration", ("warn",)),
}

#: The factors of the global batch, wherever a configuration states them.
BATCH_FACTORS = frozenset(
    {
        "deepspeed.train_batch_size",
        "deepspeed.train_micro_batch_size_per_gpu",
        "deepspeed.gradient_accumulation_steps",
        "config.global_batch_size",
        "config.micro_batch_size",
        "config.gradient_accumulation_steps",
    }
)

_RATES = frozenset({"lr", "min_lr", "max_lr", "initial_lr", "lr_mult", "decoupled_lr", "decoupled_min_lr"})
_DECAYS = frozenset({"start_wd", "end_wd", "wd_incr_steps", "wd_incr_style"})
_DTYPES = frozenset({"dtype", "torch_dtype", "params_dtype", "pipeline_dtype", "autocast_dtype", "bf16", "fp16"})

#: Settings that decide, by being on or off, which tensors the optimizer keeps of a weight.
_STATE_SWITCHES = frozenset({"amsgrad", "centered", "momentum"})

_SECTIONS: tuple[tuple[str, Part], ...] = (
    ("deepspeed.zero_optimization", "topology"),
    ("deepspeed.scheduler", "learning rate"),
    ("deepspeed.optimizer.type", "optimizer state"),
    ("deepspeed.optimizer", "hyperparameters"),
    ("deepspeed.gradient_clipping", "hyperparameters"),
    ("deepspeed.bf16", "dtype"),
    ("deepspeed.fp16", "dtype"),
    ("parallel", "topology"),
    ("optimizer config", "hyperparameters"),
    ("optimizer", "optimizer state"),
    ("scheduler", "learning rate"),
    ("schedule", "learning rate"),
    ("geometry", "model"),
)


def part_of_setting(path: str, saved: Any, live: Any, *, same_global_batch: bool) -> Part:
    """The part of a pinned setting that differs. The factors of an equal global batch are a matter of topology."""
    if path in BATCH_FACTORS:
        return "topology" if same_global_batch else "global batch"
    section = next(
        (part for start, part in _SECTIONS if path == start or path.startswith((f"{start}.", f"{start}["))), None
    )
    leaf = _leaf(path)
    if section == "hyperparameters":
        return part_of_group_entry(leaf, saved, live)
    if section == "learning rate" and leaf in _DECAYS:
        return "hyperparameters"
    if section is None and leaf in _DTYPES and path.startswith(("model.", "config.model.")):
        return "dtype"
    return section or "configuration"


def part_of_group_entry(name: str, saved: Any, live: Any) -> Part:
    """The part of an entry of an optimizer's parameter group, or of its like in a configuration."""
    leaf = _leaf(name)
    if leaf in _RATES:
        return "learning rate"
    if leaf in _DTYPES:
        return "dtype"
    if leaf in _STATE_SWITCHES and _is_on(saved) != _is_on(live):
        return "optimizer state"
    return "hyperparameters"


def loosened(part: Part, policy: Policy) -> bool:
    """Whether the policy lets this part differ."""
    if part not in LOOSENED_BY:
        return False
    field, values = LOOSENED_BY[part]
    said = getattr(policy, field)
    return isinstance(said, Offset) or said in values


def remedy(undo: str, part: Part) -> str:
    """What to do about a difference that the policy forbids."""
    if part not in LOOSENED_BY:
        return undo
    field, values = LOOSENED_BY[part]
    said = " or ".join(f"`{field}: {value}`" for value in values)
    return f"{undo}, or allow it with the policy {said}"


def _within(path: str, section: str) -> bool:
    return path == section or path.startswith((f"{section}.", f"{section}["))


def _leaf(path: str) -> str:
    return re.sub(r"\[\d+\]", "", path).rsplit(".", 1)[-1]


def _is_on(value: Any) -> bool:
    return value != ABSENT and bool(value)
