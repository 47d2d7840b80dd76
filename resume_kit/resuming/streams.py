"""The state of every random generator with which this rank goes on, and records carried for ranks that are away.

In the topology of the save, a rank gets its own record. In another, a stream goes to the rank that now has the
stream's place, and a place that is new gets a stream of its own, derived from run seed, step and coordinates. While
no step has been trained, the records of the topology before are carried along, so that going back to it goes on as
if nothing had happened.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from resume_kit.checkpoint import canonical, names
from resume_kit.checkpoint.index import RankIndex
from resume_kit.checkpoint.manifest import Manifest
from resume_kit.engines import rng
from resume_kit.engines.adapter import EngineAdapter
from resume_kit.errors import Problem

ReadIndex = Callable[[int], RankIndex]


@dataclass(frozen=True)
class Streams:
    """`state` is what this rank's generators get, encoded as `rng.capture` does; `new` are those derived."""

    state: Mapping[str, Any]
    new: tuple[str, ...]
    problems: tuple[Problem, ...] = ()


@dataclass(frozen=True)
class Carried:
    """RNG records of another topology of which this rank carries a share: rank (as text) → record."""

    topology: Mapping[str, Any]
    records: Mapping[str, Any]


def streams(
    manifest: Manifest, adapter: EngineAdapter, rank: int, seed: int, read: ReadIndex, *, derive: bool
) -> Streams:
    """This rank's streams after a resume from `manifest`; `read` gives a rank's index.

    Unless the policy lets streams `derive`, a generator without a record, or a record without a generator, is a
    problem.
    """
    live = dict(adapter.topology)
    if live == manifest.engine:
        return _of_record(read(rank).rng, rank, manifest.ranks[rank].rng_digest, adapter)
    for number, topology in enumerate(manifest.carried):
        if live == topology:
            return _of_record(_carried_record(manifest, number, rank, read), rank, None, adapter)
    current = canonical.decode(rng.capture(adapter.rng_trackers()))
    state: dict[str, Any] = {}
    new: list[str] = []
    for generator, value in current.items():
        if generator == "current_device":
            state[generator] = value
            continue
        found = _recorded(generator, current, manifest, adapter, read)
        if found is None:
            new.append(generator)
            found = rng.derived(generator, derived_seed(seed, manifest.step, generator, adapter.rng_stream(generator)))
        state[generator] = found
    problems = () if derive else (*_unrecorded(new, rank), *_unused(current, manifest, rank, read))
    return Streams(canonical.encode(state, "rng"), tuple(new), problems)


def derived_seed(seed: int, step: int, generator: str, stream: str) -> int:
    """The seed of a new stream: alike for the ranks that share it, and for nothing else."""
    kind = "cuda" if generator.startswith("cuda:") else generator
    return xxhash.xxh3_64_intdigest(canonical.dumps([seed, step, kind, stream]))


def carried_along(manifest: Manifest, topology: Mapping[str, Any], rank: int, read: ReadIndex) -> list[Carried]:
    """This rank's share of the records that a save at the step of the resume carries along."""
    world = int(topology["world_size"])
    found = []
    if manifest.engine != topology:
        mine = range(rank, manifest.world_size, world)
        found.append(Carried(manifest.engine, {str(r): read(r).rng for r in mine}))
    for number, other in enumerate(manifest.carried):
        if other != topology:
            mine = range(rank, int(other["world_size"]), world)
            records = {str(r): _carried_record(manifest, number, r, read) for r in mine}
            found.append(Carried(other, records))
    return found


def _carried_record(manifest: Manifest, number: int, rank: int, read: ReadIndex) -> Mapping[str, Any]:
    """The record of a rank of the carried topology of this number."""
    index = read(rank % manifest.world_size)
    found: Mapping[str, Any] | None = index.carried[number].get(str(rank)) if number < len(index.carried) else None
    if found is None:
        what = f"no RNG record of rank {rank} of a topology that the manifest says is carried along"
        raise canonical.damaged(Path(names.index_file(index.rank)), what)
    return found


def overwritten(adapter: EngineAdapter, restored: Mapping[str, str], rank: int) -> list[Problem]:
    """Generators that are not what they were restored to, by the digests of then."""
    live = rng.digests(rng.capture(adapter.rng_trackers()))
    what = "changed between resume() and the first batch: something seeded or drew after the load"
    return [
        Problem("rng", f"rank {rank}, {name}", what, "seed before making the kit, never after resume()")
        for name, digest in restored.items()
        if live.get(name) != digest
    ]


def _of_record(record: Mapping[str, Any], rank: int, stated: str | None, adapter: EngineAdapter) -> Streams:
    where = f"rank {rank}"
    if not record:
        what = "the checkpoint has no RNG record of this rank"
        return Streams({}, (), (Problem("rng", where, what, "resume from a checkpoint that has one"),))
    problems = rng.compatibility(canonical.decode(dict(record)), adapter.rng_trackers())
    if stated is not None and rng.digest(record) != stated:
        problems.append(
            Problem("rng", where, "the RNG record is not the one in the manifest", "resume from an older checkpoint")
        )
    return Streams(record, (), tuple(problems))


def _unrecorded(new: list[str], rank: int) -> list[Problem]:
    what = "this rank has the generator, the save has no record of its stream"
    return [Problem("rng", f"rank {rank}, {name}", what, "set the policy `rng: derive`") for name in new]


def _unused(current: Mapping[str, Any], manifest: Manifest, rank: int, read: ReadIndex) -> list[Problem]:
    recorded = set(read(rank).rng) if rank < manifest.world_size else set()
    what = "recorded, but this rank has no such generator"
    return [
        Problem("rng", f"rank {rank}, {name}", what, "set the policy `rng: derive`")
        for name in sorted(recorded - set(current))
    ]


def _recorded(
    generator: str, current: Mapping[str, Any], manifest: Manifest, adapter: EngineAdapter, read: ReadIndex
) -> Any:
    """The saved state of this rank's stream of a generator, or None where the save had no such stream.

    A state of another size is that of another kind of device.
    """
    try:
        source = adapter.rank_of_stream(generator, manifest.engine)
    except (KeyError, ZeroDivisionError) as error:
        raise canonical.damaged(Path(names.MANIFEST), f"engine tells no topology: {error!r}") from None
    if source is None:
        return None
    if source >= manifest.world_size:
        raise canonical.damaged(Path(names.MANIFEST), f"engine tells of rank {source}, of {manifest.world_size} ranks")
    record = canonical.decode(read(source).rng)
    recorded = generator
    if generator.startswith("cuda:"):
        if generator != f"cuda:{current['current_device']}":
            return None
        recorded = f"cuda:{record.get('current_device')}"
    found, live = record.get(recorded), current[generator]
    if isinstance(live, bytes) and len(found or b"") != len(live):
        return None
    return found
