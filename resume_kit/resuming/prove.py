"""Prove: the live engine's tensors, scalars and counters are those that were saved, on every rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from resume_kit.algebra import fingerprint
from resume_kit.algebra.boxes import Box
from resume_kit.checkpoint import canonical
from resume_kit.checkpoint.index import RankIndex
from resume_kit.checkpoint.manifest import Manifest
from resume_kit.checkpoint.records import TensorKey
from resume_kit.engines.adapter import EngineAdapter, LivePiece, Replica
from resume_kit.engines.fingerprint import as_unsigned, fingerprints
from resume_kit.errors import Problem, ResumeRefused
from resume_kit.integrity.differences import brief, differences
from resume_kit.resuming.wanted import stored_key

_REMEDY = "do not train on; resume again, and if it repeats suspect this rank's memory or GPU"


@dataclass(frozen=True)
class Proof:
    """What a proof compared: sharded tensors over all ranks, whole copies on this rank, and what was wrong."""

    tensors: int
    copies: int
    problems: tuple[Problem, ...]


@dataclass(frozen=True)
class Measurement:
    """Fingerprints of this rank's live pieces and whole copies; `unknown` pieces are not in the manifest."""

    pieces: tuple[LivePiece, ...]
    partial: torch.Tensor
    replicas: tuple[Replica, ...]
    whole: tuple[int, ...]
    unknown: tuple[TensorKey, ...]


def measure(adapter: EngineAdapter, manifest: Manifest) -> Measurement:
    """Take the fingerprints of everything live on this rank. No communication."""
    entries = manifest.by_key()
    pieces, replicas = adapter.pieces(), adapter.replicas()
    known = tuple(piece for piece in pieces if piece.spec.key in entries)
    partial = fingerprints((p.data, p.spec.shape, p.box) for p in known).to(adapter.device)
    whole = fingerprints((r.data.reshape(-1), r.spec.shape, Box.whole(r.spec.shape)) for r in replicas)
    unknown = tuple(piece.spec.key for piece in pieces if piece.spec.key not in entries)
    return Measurement(known, partial, tuple(replicas), tuple(as_unsigned(whole)), unknown)


def judge(found: Measurement, manifest: Manifest, index: RankIndex) -> Proof:
    """Live fingerprints against the manifest's. Collective: one all-reduce of 8 bytes a tensor.

    A tensor that is wrong is blamed on the rank whose own piece differs from `index`, its record of the save.
    """
    rank = index.rank
    entries = manifest.by_key()
    known, partial = found.pieces, found.partial
    sharded = [entry for entry in manifest.tensors if entry.owner is None]
    number = {entry.spec.key: i for i, entry in enumerate(sharded)}
    problems = [Problem("fingerprint", str(key), "live, but not in the manifest", _REMEDY) for key in found.unknown]
    sums = torch.zeros(len(sharded), dtype=torch.int64, device=partial.device)
    sums.index_add_(
        0, torch.tensor([number[p.spec.key] for p in known], dtype=torch.int64, device=sums.device), partial
    )
    if dist.is_initialized():
        dist.all_reduce(sums)
    wrong = {
        entry.spec.key: value
        for entry, value in zip(sharded, as_unsigned(sums), strict=True)
        if fingerprint.to_hex(value) != entry.fingerprint
    }
    recorded = {(piece.key, piece.box): piece.fingerprint for piece in index.pieces}
    for piece, value in zip(known, as_unsigned(partial), strict=True):
        if piece.spec.key in wrong:
            own = recorded.get((piece.spec.key, piece.box))
            if own is None:
                total, stated = wrong[piece.spec.key], entries[piece.spec.key].fingerprint
                problems += _compare(str(piece.spec.key), total, stated, "over all ranks")
            else:
                problems += _compare(f"rank {rank}, {piece.spec.key} [{piece.box}]", value, own, "live")
    if wrong and not problems and rank == 0:
        first, others = next(iter(wrong)), len(wrong) - 1
        where = f"{first} and {others} more" if others else str(first)
        problems.append(Problem("fingerprint", where, "the sum over all ranks is not the saved one", _REMEDY))
    for replica, value in zip(found.replicas, found.whole, strict=True):
        key = stored_key(replica.spec.key, entries, rank)
        problems += _compare(f"rank {rank}, {key}", value, entries[key].fingerprint, "this whole copy")
    return Proof(len(sharded), len(found.replicas), tuple(problems))


def _compare(name: str, actual: int, stated: str, whose: str) -> list[Problem]:
    if fingerprint.to_hex(actual) == stated:
        return []
    return [Problem("fingerprint", name, f"{whose} {fingerprint.to_hex(actual)}, saved {stated}", _REMEDY)]


def prove_state(adapter: EngineAdapter, restored: Mapping[str, Any], rank: int) -> list[Problem]:
    """Steps, LR, param groups, scheduler, scaler and optimizer scalars of this rank against what was restored."""
    saved = {part: value for part, value in restored.items() if part not in ("scalars", "user")}
    scalars = restored["scalars"]
    live = _plain(adapter.state())
    problems = [
        Problem("state", f"rank {rank}, {path}", f"live {brief(new)}, saved {brief(old)}", _REMEDY)
        for path, old, new in differences(_plain(saved), live)
    ]
    for name, values in adapter.scalars().items():
        problems += [
            Problem(
                "optimizer scalars", f"rank {rank}, {name}.{path}", f"live {brief(new)}, saved {brief(old)}", _REMEDY
            )
            for path, old, new in differences(scalars.get(name), _plain(values))
        ]
    return problems


def _plain(value: Any) -> Any:
    return canonical.decode(canonical.encode(value))


def all_agree(what: str) -> Callable[[list[Any]], None]:
    """A combiner that raises unless all ranks computed the same value."""

    def combine(values: list[Any]) -> None:
        odd = [rank for rank, value in enumerate(values) if value != values[0]]
        if odd:
            text = f"{brief(values[odd[0]])}, rank 0 has {brief(values[0])}"
            problem = Problem("agreement", f"rank {odd[0]}, {what}", text, _REMEDY)
            raise ResumeRefused(f"the ranks disagree on {what}", [problem])

    return combine
