"""The manifest: the whole checkpoint's account, written last. A directory without it is torn."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from resume_kit.checkpoint import canonical, names
from resume_kit.checkpoint.records import TensorKey, TensorSpec
from resume_kit.errors import CheckpointDamaged, Problem, ResumeRefused

FORMAT = "resume_kit"
SCHEMA = 2

#: Features a manifest may require of its reader. A reader refuses a checkpoint that requires another.
KNOWN_FEATURES = frozenset({"cast-of-master"})


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A logical tensor: its fingerprint over all ranks, whether its bytes are stored, and the replica's owner.

    `owner` is the rank whose file holds a tensor that every rank holds whole; None for a sharded one.
    """

    spec: TensorSpec
    fingerprint: str
    stored: bool
    owner: int | None = None


@dataclass(frozen=True, slots=True)
class RankEntry:
    """Sizes in bytes and digests of one rank's two files, and the digest of its RNG record."""

    rank: int
    data_bytes: int
    data_digest: str
    index_bytes: int
    index_digest: str
    rng_digest: str


@dataclass(frozen=True)
class Manifest:
    """`state` holds what every rank shares: param groups, scheduler, counters, scaler, optimizer scalars.

    `pinned` is what a resume compares with the live run: configuration, model, optimizer groups, versions, data.
    `holders` tells by tensor name which ranks' files hold pieces of it (as `planning.holders` writes it); a manifest
    without it says nothing of them. `carried` are the topologies whose RNG records the indices carry along.
    """

    run_id: str
    attempt: int
    step: int
    created: float
    engine: dict[str, Any]
    tensors: tuple[TensorEntry, ...]
    ranks: tuple[RankEntry, ...]
    aliases: dict[str, str]
    state: dict[str, Any]
    data: dict[str, Any]
    pinned: dict[str, Any]
    gate: dict[str, Any] | None
    requires: tuple[str, ...] = field(default=())
    holders: dict[str, str] = field(default_factory=dict)
    carried: tuple[dict[str, Any], ...] = ()

    @property
    def world_size(self) -> int:
        return len(self.ranks)

    @property
    def total_bytes(self) -> int:
        """Bytes of all data and index files."""
        return sum(entry.data_bytes + entry.index_bytes for entry in self.ranks)

    def by_key(self) -> dict[TensorKey, TensorEntry]:
        return {entry.spec.key: entry for entry in self.tensors}

    def to_bytes(self) -> bytes:
        return canonical.sign(
            {
                "format": FORMAT,
                "schema": SCHEMA,
                "requires": sorted(self.requires),
                "run_id": self.run_id,
                "attempt": self.attempt,
                "step": self.step,
                "created": self.created,
                "engine": self.engine,
                "tensors": [
                    [
                        entry.spec.key.kind,
                        entry.spec.key.name,
                        entry.spec.dtype,
                        list(entry.spec.shape),
                        entry.fingerprint,
                        entry.stored,
                        entry.owner,
                    ]
                    for entry in self.tensors
                ],
                "ranks": [
                    {
                        "data": {"file": names.data_file(r.rank), "bytes": r.data_bytes, "digest": r.data_digest},
                        "index": {"file": names.index_file(r.rank), "bytes": r.index_bytes, "digest": r.index_digest},
                        "rng": r.rng_digest,
                    }
                    for r in self.ranks
                ],
                "aliases": self.aliases,
                "state": self.state,
                "data": self.data,
                "pinned": self.pinned,
                "gate": self.gate,
                "holders": self.holders,
                "carried": list(self.carried),
            }
        )


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a committed checkpoint.

    Raises `CheckpointDamaged` when its bytes are not those that were committed, and `ResumeRefused` when they
    are but this version cannot read them (schema, required feature).
    """
    path = directory / names.MANIFEST
    raw = canonical.read_bytes(path)
    try:
        document = canonical.parse_signed(raw, path)
    except CheckpointDamaged as damage:
        raise _with_schema(damage, raw, path) from None
    try:
        _require_readable(document, path)
        manifest = _from_document(document)
        expected = names.step_directory(manifest.step)
        wrong = next(_misshapen(manifest), None)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise canonical.damaged(path, f"a field is missing or malformed: {error!r}") from None
    if wrong is not None:
        raise canonical.damaged(path, f"{wrong} is not what the format says")
    if directory.name != expected and names.parse_step(directory.name) is not None:
        raise canonical.damaged(
            path, f"it says step {manifest.step}, its directory says {directory.name}", "undo the rename"
        )
    return manifest


def _with_schema(damage: CheckpointDamaged, raw: bytes, path: Path) -> CheckpointDamaged:
    """`damage`, with a word on the schema where the unreadable manifest states a strange one."""
    try:
        stated = json.loads(raw).get("schema", SCHEMA)
    except (ValueError, AttributeError, RecursionError):
        return damage
    if stated == SCHEMA:
        return damage
    note = Problem("schema", str(path), f"it states schema version {stated}; this resume_kit reads version {SCHEMA}")
    return CheckpointDamaged(damage.headline, [*damage.problems, note])


def _require_readable(document: dict[str, Any], path: Path) -> None:
    problems = []
    if document.get("format") != FORMAT:
        problems.append(Problem("schema", str(path), f"format is {document.get('format')!r}, not {FORMAT!r}"))
    elif document.get("schema") != SCHEMA:
        problems.append(
            Problem(
                "schema",
                str(path),
                f"schema version {document.get('schema')}; this resume_kit reads version {SCHEMA}",
                "use the version of resume_kit that wrote it",
            )
        )
    unknown = sorted(set(document.get("requires", [])) - KNOWN_FEATURES)
    if unknown:
        problems.append(
            Problem(
                "schema",
                str(path),
                f"requires features that this resume_kit does not know: {', '.join(map(str, unknown))}",
                "update resume_kit",
            )
        )
    if problems:
        raise ResumeRefused(f"{path} cannot be read by this version", problems)


def _from_document(document: dict[str, Any]) -> Manifest:
    return Manifest(
        run_id=document["run_id"],
        attempt=document["attempt"],
        step=document["step"],
        created=document["created"],
        engine=document["engine"],
        tensors=tuple(
            TensorEntry(TensorSpec(TensorKey(kind, name), dtype, tuple(shape)), fingerprint, stored, owner)
            for kind, name, dtype, shape, fingerprint, stored, owner in document["tensors"]
        ),
        ranks=tuple(
            RankEntry(
                rank,
                entry["data"]["bytes"],
                entry["data"]["digest"],
                entry["index"]["bytes"],
                entry["index"]["digest"],
                entry["rng"],
            )
            for rank, entry in enumerate(document["ranks"])
        ),
        aliases=document["aliases"],
        state=document["state"],
        data=document["data"],
        pinned=document["pinned"],
        gate=document["gate"],
        requires=tuple(document["requires"]),
        holders=document.get("holders", {}),
        carried=tuple(document.get("carried", ())),
    )


def _misshapen(manifest: Manifest) -> Iterator[str]:
    """Names of fields whose type is not the format's."""
    whole: dict[str, type | tuple[type, ...]] = {
        "run_id": str,
        "attempt": int,
        "step": int,
        "created": (int, float),
    }
    whole |= dict.fromkeys(("engine", "aliases", "state", "data", "pinned", "holders"), dict)
    whole |= {"gate": (dict, type(None))}
    for name, kind in whole.items():
        if not isinstance(getattr(manifest, name), kind):
            yield name
    for number, entry in enumerate(manifest.tensors):
        texts = (*entry.spec.key, entry.fingerprint)
        owner = entry.owner is None or isinstance(entry.owner, int)
        shape = all(isinstance(extent, int) and extent >= 0 for extent in entry.spec.shape)
        if not (all(isinstance(text, str) for text in texts) and isinstance(entry.stored, bool) and owner and shape):
            yield f"tensors[{number}]"
    for rank in manifest.ranks:
        texts = (rank.data_digest, rank.index_digest, rank.rng_digest)
        sizes = (rank.data_bytes, rank.index_bytes)
        if not (all(isinstance(t, str) for t in texts) and all(isinstance(n, int) and n >= 0 for n in sizes)):
            yield f"ranks[{rank.rank}]"
    if not all(isinstance(name, str) and isinstance(ranks, str) for name, ranks in manifest.holders.items()):
        yield "holders"
    for place, topology in (("engine", manifest.engine), *(("carried", carried) for carried in manifest.carried)):
        if not (isinstance(topology, dict) and _tells_sizes(topology)):
            yield place
    if not all(isinstance(feature, str) for feature in manifest.requires):
        yield "requires"


def _tells_sizes(topology: dict[str, Any]) -> bool:
    """Whether a topology has a world size, and only numbers and flags besides its engine's name."""
    return "world_size" in topology and all(isinstance(n, int) for axis, n in topology.items() if axis != "engine")
