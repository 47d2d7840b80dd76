"""From all rank indices to one account of the tensors: exact-once coverage, summed fingerprints, agreed scalars."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from resume_kit.algebra import fingerprint
from resume_kit.checkpoint import canonical
from resume_kit.checkpoint.index import RankIndex, StoredPiece
from resume_kit.checkpoint.manifest import TensorEntry
from resume_kit.checkpoint.records import TensorKey, TensorSpec
from resume_kit.errors import Problem
from resume_kit.planning.coverage import find_coverage_problem


@dataclass(frozen=True)
class Assembly:
    """The tensors of a checkpoint, their optimizer scalars by tensor name, and all that is wrong with them."""

    tensors: tuple[TensorEntry, ...]
    scalars: dict[str, Any]
    problems: tuple[Problem, ...]


def assemble(indices: Sequence[RankIndex], replicated: Iterable[TensorKey]) -> Assembly:
    """Check that every element of every tensor is owned exactly once, and sum the fingerprints.

    `replicated` names tensors that every rank holds whole: one rank must own each.
    """
    whole = set(replicated)
    claims: dict[TensorKey, list[tuple[int, StoredPiece]]] = {}
    for index in indices:
        for piece in index.pieces:
            claims.setdefault(piece.key, []).append((index.rank, piece))
    problems: list[Problem] = []
    tensors = []
    for key in sorted(claims):
        ranks, pieces = zip(*claims[key], strict=True)
        spec = pieces[0].spec
        problems += _disagreement(spec, ranks, pieces) or _coverage(spec, ranks, pieces)
        total = fingerprint.combine(fingerprint.from_hex(piece.fingerprint) for piece in pieces)
        tensors.append(
            TensorEntry(
                spec,
                fingerprint.to_hex(total),
                stored=all(piece.stored for piece in pieces),
                owner=ranks[0] if key in whole else None,
            )
        )
    scalars, conflicts = _merge_scalars(indices)
    return Assembly(tuple(tensors), scalars, (*problems, *conflicts))


def require_state(
    tensors: Iterable[TensorEntry], weights: Iterable[str], groups: Iterable[Mapping[str, Any]], updates: int
) -> list[Problem]:
    """What a checkpoint of this model must hold and does not: weights, masters, the optimizer's tensors.

    `groups` are the optimizer's parameter groups with their `members`. After the first update every member of a
    group has the same optimizer tensors, Adam's betas and SGD's momentum have some, and not all are zero.
    """
    by_name: dict[str, dict[str, TensorEntry]] = {}
    for entry in tensors:
        by_name.setdefault(entry.spec.key.name, {})[entry.spec.key.kind] = entry
    problems = [
        Problem("required state", f"param/{name}", "no rank owns any of it")
        for name in weights
        if "param" not in by_name.get(name, {})
    ]
    for number, group in enumerate(groups):
        problems += _group_state(f"group {number}", group, by_name, updates)
    return problems


def _group_state(
    where: str, group: Mapping[str, Any], by_name: Mapping[str, Mapping[str, TensorEntry]], updates: int
) -> Iterator[Problem]:
    members: list[str] = list(group["members"])
    moments: dict[str, list[TensorEntry]] = {}
    for name in members:
        kinds = by_name.get(name, {})
        if "master" not in kinds:
            yield Problem("required state", f"master/{name}", "no rank owns any of it")
        for kind, entry in kinds.items():
            if kind not in ("param", "master", "buffer"):
                moments.setdefault(kind, []).append(entry)
    if updates > 0 and members and not moments and ("betas" in group or group.get("momentum")):
        what = f"no optimizer tensors after {updates} updates"
        yield Problem("required state", where, what, "find out where the optimizer state was lost")
    for kind, entries in moments.items():
        lacking = sorted(set(members) - {entry.spec.key.name for entry in entries})
        if lacking:
            what = f"{len(lacking)} of {len(members)} weights of {where} have no {kind}"
            yield Problem("required state", f"{kind}/{lacking[0]}", what)
        if updates > 0 and all(fingerprint.from_hex(entry.fingerprint) == 0 for entry in entries):
            what = f"every element of every {kind} is zero after {updates} updates: the moments were lost"
            remedy = "find out where the optimizer state was reset before saving"
            yield Problem("required state", f"{where}, {kind}", what, remedy)


def _disagreement(spec: TensorSpec, ranks: Sequence[int], pieces: Sequence[StoredPiece]) -> list[Problem]:
    for rank, piece in zip(ranks, pieces, strict=True):
        if piece.spec != spec:
            what = f"rank {ranks[0]} has it as {spec}, rank {rank} as {piece.spec}"
            return [Problem("ownership", str(spec.key), what, "every rank must build the same model")]
    return []


def _coverage(spec: TensorSpec, ranks: Sequence[int], pieces: Sequence[StoredPiece]) -> list[Problem]:
    fault = find_coverage_problem(spec.shape, [piece.box for piece in pieces])
    if fault is None:
        return []
    owners = sorted({ranks[i] for i in fault.owners})
    what = {
        "gap": f"elements [{fault.box}] are owned by no rank",
        "overlap": f"elements [{fault.box}] are claimed by ranks {', '.join(map(str, owners))}",
        "outside": f"rank {owners[0] if owners else '?'} claims [{fault.box}], outside of shape {list(spec.shape)}",
    }[fault.kind]
    return [Problem("ownership", str(spec.key), what, "each element must have exactly one owner; check the partition")]


def _merge_scalars(indices: Sequence[RankIndex]) -> tuple[dict[str, Any], list[Problem]]:
    merged: dict[str, Any] = {}
    source: dict[str, int] = {}
    problems = []
    for index in indices:
        for name, values in index.scalars.items():
            if name not in merged:
                merged[name], source[name] = values, index.rank
            elif merged[name] != values:
                what = f"rank {source[name]} has {_brief(merged[name])}, rank {index.rank} {_brief(values)}"
                problems.append(
                    Problem("optimizer scalars", name, what, "the ranks have taken different numbers of steps")
                )
    distinct = {canonical.dumps(values): name for name, values in merged.items()}
    if len(distinct) > 1 and not problems:
        names = list(distinct.values())
        what = f"{names[0]} has {_brief(merged[names[0]])}, {names[1]} {_brief(merged[names[1]])}"
        problems.append(Problem("optimizer scalars", names[1], what, "tensors of one optimizer disagree on the step"))
    return merged, problems


def _brief(values: Any) -> str:
    if not isinstance(values, dict):
        return str(values)
    return ", ".join(f"{key}={v['value'] if isinstance(v, dict) else v}" for key, v in values.items()) or "nothing"
