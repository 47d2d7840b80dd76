"""One description of the model from those of ranks that each hold a part of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from resume_kit.checkpoint.records import TensorKey, TensorSpec
from resume_kit.engines.adapter import ModelDescription
from resume_kit.errors import Problem, UsageError


def to_plain(part: ModelDescription) -> dict[str, Any]:
    """A description as plain values, for a round among ranks."""
    return {
        "weights": [_row(spec) for spec in part.weights],
        "buffers": [_row(spec) for spec in part.buffers],
        "trainable": sorted(part.trainable),
        "master_dtypes": dict(part.master_dtypes),
        "aliases": dict(part.aliases),
        "groups": [dict(group) for group in part.groups],
        "pinned": dict(part.pinned),
    }


def united(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The whole model from every rank's `to_plain`: tensors and members are united, the rest must be the same.

    Raises `UsageError` naming rank and place of everything that two ranks say differently.
    """
    problems: list[Problem] = []
    whole: dict[str, Any] = {"weights": [], "buffers": [], "trainable": [], "groups": []}
    for key in ("weights", "buffers"):
        rows: dict[str, tuple[int, list[Any]]] = {}
        for rank, part in enumerate(parts):
            for row in part[key]:
                first, known = rows.setdefault(row[1], (rank, list(row)))
                if known != list(row):
                    what = f"rank {first} has it as {known[2:]}, rank {rank} as {list(row)[2:]}"
                    problems.append(Problem("model", str(row[1]), what, "build the same model on every rank"))
        whole[key] = [row for _, (_, row) in sorted(rows.items())]
    whole["trainable"] = sorted({name for part in parts for name in part["trainable"]})
    for key in ("master_dtypes", "aliases", "pinned"):
        whole[key] = {}
        for rank, part in enumerate(parts):
            _merge(whole[key], part[key], key, rank, problems)
    for number, group in enumerate(parts[0]["groups"]):
        members: set[str] = set()
        for rank, part in enumerate(parts):
            same = len(part["groups"]) == len(parts[0]["groups"])
            other = part["groups"][number] if same else {"members": []}
            members |= set(other["members"])
            if not same or {**other, "members": 0} != {**group, "members": 0}:
                what = "its parameter groups are not rank 0's"
                problems.append(Problem("model", f"rank {rank}", what, "build the same optimizer on every rank"))
        whole["groups"].append({**group, "members": sorted(members)})
    if problems:
        raise UsageError("the ranks did not build one model", problems)
    return whole


def from_plain(plain: Mapping[str, Any]) -> ModelDescription:
    return ModelDescription(
        weights=tuple(_spec(row) for row in plain["weights"]),
        trainable=frozenset(plain["trainable"]),
        master_dtypes=plain["master_dtypes"],
        buffers=tuple(_spec(row) for row in plain["buffers"]),
        aliases=plain["aliases"],
        groups=tuple(plain["groups"]),
        pinned=plain["pinned"],
        partial=True,
    )


def _row(spec: TensorSpec) -> list[Any]:
    return [spec.key.kind, spec.key.name, spec.dtype, list(spec.shape)]


def _spec(row: Sequence[Any]) -> TensorSpec:
    kind, name, dtype, shape = row
    return TensorSpec(TensorKey(kind, name), dtype, tuple(shape))


def _merge(whole: dict[str, Any], part: Mapping[str, Any], path: str, rank: int, problems: list[Problem]) -> None:
    for key, value in part.items():
        known = whole.setdefault(key, {} if isinstance(value, Mapping) else value)
        if isinstance(value, Mapping) and isinstance(known, dict):
            _merge(known, value, f"{path}.{key}", rank, problems)
        elif known != value:
            what = f"rank {rank} has {value!r}, a rank before it {known!r}"
            problems.append(Problem("model", f"{path}.{key}", what, "build the same model on every rank"))
