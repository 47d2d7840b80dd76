"""Prove: the live engine's tensors, scalars and counters are those that were saved, on every rank."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from resume_kit.algebra import fingerprint
from resume_kit.algebra.boxes import Box
from resume_kit.checkpoint import canonical
from resume_kit.checkpoint.index import RankIndex
from resume_kit.checkpoint.manifest import Manifest, TensorEntry
from resume_kit.checkpoint.records import TensorKey
from resume_kit.engines.adapter import EngineAdapter, LivePiece, Replica
from resume_kit.engines.casts import cast_mismatches
from resume_kit.engines.coordination import Coordinator
from resume_kit.engines.fingerprint import as_unsigned, fingerprints
from resume_kit.engines.totals import UNCOVERED, copies_of, guilty, totals
from resume_kit.errors import Problem, ResumeRefused
from resume_kit.integrity.differences import brief, differences
from resume_kit.policy.judgement import MODEL_KINDS
from resume_kit.resuming.restored import engine_state
from resume_kit.resuming.wanted import plain_key, stored_key

_REMEDY = "do not train on; resume again, and if it repeats suspect this rank's memory or GPU"


@dataclass(frozen=True)
class Proof:
    """What a proof compared: sharded tensors over all ranks, whole copies on this rank, and what was wrong.

    `from_disk`: on some rank, the problems are of tensors that were read, so a damaged disk may be behind them.
    """

    tensors: int
    copies: int
    problems: tuple[Problem, ...]
    from_disk: bool


@dataclass(frozen=True)
class Measurement:
    """Fingerprints of this rank's live pieces and whole copies; `unknown` pieces are not in the manifest.

    `recast` are low-precision weights that were saved in another dtype: what counts is their master.
    """

    pieces: tuple[LivePiece, ...]
    values: torch.Tensor
    replicas: tuple[Replica, ...]
    whole: tuple[int, ...]
    unknown: tuple[TensorKey, ...]
    recast: frozenset[TensorKey]


def measure(adapter: EngineAdapter, manifest: Manifest) -> Measurement:
    """Take the fingerprints of everything live on this rank. No communication."""
    entries = manifest.by_key()
    pieces, replicas = adapter.pieces(), adapter.replicas()
    known = tuple(p for p in pieces if p.spec.key in entries and p.copy is not None)
    values = fingerprints((p.data, p.spec.shape, p.box) for p in known)
    whole = fingerprints((r.data.reshape(-1), r.spec.shape, Box.whole(r.spec.shape)) for r in replicas)
    unknown = tuple(piece.spec.key for piece in pieces if piece.spec.key not in entries)
    recast = frozenset(p.spec.key for p in known if p.spec.dtype != entries[p.spec.key].spec.dtype)
    return Measurement(known, values, tuple(replicas), tuple(as_unsigned(whole)), unknown, recast)


def judge(
    found: Measurement,
    manifest: Manifest,
    *,
    index: RankIndex | None,
    moments: bool,
    adapter: EngineAdapter,
    coordinator: Coordinator,
) -> Proof:
    """Live fingerprints against the manifest's, of every copy of every tensor over all ranks. Collective.

    `index` is this rank's record of the save, where the topology is that of the save: then a wrong tensor is blamed
    on the rank whose own piece differs. `moments` is False where the policy has reset the optimizer's state.
    """
    rank, entries = coordinator.rank, manifest.by_key()
    recast = {key for row in coordinator.gather("prove: recast", lambda: _rows(found.recast)) for key in _keys(row)}
    whole = {replica.spec.key for replica in found.replicas} - recast
    sharded = [
        entry
        for entry in manifest.tensors
        if plain_key(entry.spec.key) not in whole and (moments or entry.spec.key.kind in MODEL_KINDS)
    ]
    keys = [entry.spec.key for entry in sharded]
    copies = coordinator.round("prove: copies", lambda: copies_of(found.pieces), lambda counts: max(counts))
    sums = totals(found.pieces, found.values, keys, copies, adapter.device)
    numel = {entry.spec.key: entry.spec.numel for entry in sharded}
    expected = {e.spec.key: fingerprint.from_hex(e.fingerprint) for e in sharded}
    expected |= {key: sums.owned[key] for key in recast}
    covered = dict(zip(keys, sums.elements[0], strict=True))
    wrong = {k: v for k, v in sums.owned.items() if v != expected[k] or covered[k] != numel[k]}
    problems = [Problem("fingerprint", str(key), "live, but not in the manifest", _REMEDY) for key in found.unknown]
    if not moments:
        left = sorted({str(p.spec.key) for p in found.pieces if p.spec.key.kind not in MODEL_KINDS})
        problems += [Problem("optimizer state", f"rank {rank}, {key}", "live after its reset", _REMEDY) for key in left]
    problems += _wrong_owners(found, wrong, entries, index, rank)
    problems += _wrong_casts(found.pieces, recast, rank)
    odd = [(str(key), copy) for key, copy in sums.odd_copies(expected, numel) if key not in wrong]
    if odd:
        problems += _wrong_copies(found, odd, coordinator)
    whole_wrong: list[Problem] = []
    for replica, value in zip(found.replicas, found.whole, strict=True):
        key = stored_key(replica.spec.key, entries, rank)
        stated = fingerprint.to_hex(expected[key]) if key in recast else entries[key].fingerprint
        whole_wrong += _compare(f"rank {rank}, {key}", value, stated, "this whole copy")
    from_disk = coordinator.round("prove: verdict", lambda: bool(wrong or odd or whole_wrong), lambda every: any(every))
    return Proof(len(sharded), copies - 1 + len(found.replicas), (*problems, *whole_wrong), from_disk)


def _wrong_owners(
    found: Measurement,
    wrong: Mapping[TensorKey, int],
    entries: Mapping[TensorKey, TensorEntry],
    index: RankIndex | None,
    rank: int,
) -> list[Problem]:
    recorded = {(p.key, p.box): p.fingerprint for p in index.pieces} if index is not None else {}
    problems = []
    for piece, value in zip(found.pieces, as_unsigned(found.values), strict=True):
        own = recorded.get((piece.spec.key, piece.box))
        if piece.owned and piece.spec.key in wrong and own is not None:
            problems += _compare(f"rank {rank}, {piece.spec.key} [{piece.box}]", value, own, "live")
    if wrong and index is not None and not problems and rank == 0:
        first, others = next(iter(wrong)), len(wrong) - 1
        where = f"{first} and {others} more" if others else str(first)
        problems.append(Problem("fingerprint", where, "the sum over all ranks is not the saved one", _REMEDY))
    if index is None and rank == 0:
        for key, value in wrong.items():
            what = f"over all ranks {fingerprint.to_hex(value)}, saved {entries[key].fingerprint}"
            problems.append(Problem("fingerprint", str(key), what, _REMEDY))
    return problems


def _wrong_casts(pieces: Sequence[LivePiece], recast: set[TensorKey], rank: int) -> list[Problem]:
    pairs = [(p, p.cast_of.data) for p in pieces if p.spec.key in recast and p.cast_of is not None]
    mismatches = cast_mismatches([(piece.data, master) for piece, master in pairs]).tolist()
    return [
        Problem("cast of master", f"rank {rank}, {piece.spec.key} [{piece.box}]", "is not its master's cast", _REMEDY)
        for (piece, _), bad in zip(pairs, mismatches, strict=True)
        if bad
    ]


def _wrong_copies(found: Measurement, odd: list[tuple[str, int]], coordinator: Coordinator) -> list[Problem]:
    """The same problems on every rank: which ranks' memory makes a further copy differ from the owners'."""
    wanted = {name for name, _ in odd}
    rows = coordinator.gather(
        "prove: which copy",
        lambda: [
            (str(piece.spec.key), str(piece.box), piece.copy, fingerprint.to_hex(value))
            for piece, value in zip(found.pieces, as_unsigned(found.values), strict=True)
            if str(piece.spec.key) in wanted
        ],
    )
    problems = [
        Problem("fingerprint", f"rank {rank}, {name} [{box}]", "this copy is not what was saved", _REMEDY)
        for rank, name, box in guilty(rows, odd)
    ]
    return problems or [Problem("fingerprint", name, f"copy {copy} {UNCOVERED}", _REMEDY) for name, copy in odd]


def _rows(keys: Iterable[TensorKey]) -> list[list[str]]:
    return sorted(list(key) for key in keys)


def _keys(rows: Iterable[Sequence[str]]) -> list[TensorKey]:
    return [TensorKey(kind, name) for kind, name in rows]


def _compare(name: str, actual: int, stated: str, whose: str) -> list[Problem]:
    if fingerprint.to_hex(actual) == stated:
        return []
    return [Problem("fingerprint", name, f"{whose} {fingerprint.to_hex(actual)}, saved {stated}", _REMEDY)]


def prove_state(adapter: EngineAdapter, restored: Mapping[str, Any], rank: int) -> list[Problem]:
    """Steps, LR, param groups, scheduler, scaler and optimizer scalars of this rank against what was restored."""
    saved, scalars = engine_state(restored), restored["scalars"]
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
            for path, old, new in differences(scalars.get(name, {}), _plain(values))
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
