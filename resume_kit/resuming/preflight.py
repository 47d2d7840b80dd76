"""Preflight: everything that can be known wrong before the live engine is touched, collected and shown together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resume_kit.checkpoint import canonical, names
from resume_kit.checkpoint.carrying import reader_count
from resume_kit.checkpoint.filesystems import in_memory
from resume_kit.checkpoint.index import RankIndex
from resume_kit.checkpoint.manifest import Manifest
from resume_kit.checkpoint.pages import filled
from resume_kit.checkpoint.reading import check_data_file, read_index
from resume_kit.checkpoint.records import TensorKey, TensorSpec
from resume_kit.checkpoint.sharing import default_windows
from resume_kit.engines.adapter import EngineAdapter, ModelDescription
from resume_kit.environment import available_memory, local_world_size
from resume_kit.errors import CheckpointDamaged, Problem
from resume_kit.integrity.assembly import assemble, require_state
from resume_kit.planning.holders import parse_ranks
from resume_kit.planning.reads import ReadPart, StoredPieces, missing_elements, piece_bytes, ranges_by_rank
from resume_kit.policy.judgement import Judgement, RunFacts, judge
from resume_kit.policy.policy import Policy
from resume_kit.resuming.wanted import Want, optimizer_kinds, wants_of


@dataclass(frozen=True)
class LiveRun:
    """The run that wants to resume, as it stands before any load. `data` is the live loader's description."""

    description: ModelDescription
    pinned: Mapping[str, Any]
    versions: Mapping[str, str]
    data: Mapping[str, Any]
    topology: Mapping[str, Any]


@dataclass(frozen=True)
class ReadOrder:
    """What to read: the parts that fill each wanted box, and the indices that tell where they lie."""

    wants: tuple[tuple[Want, tuple[ReadPart, ...]], ...]
    indices: Mapping[int, RankIndex]

    @property
    def nbytes(self) -> int:
        return sum(stop - start for spans in self.ranges().values() for start, stop in spans)

    def ranges(self) -> dict[int, list[tuple[int, int]]]:
        return ranges_by_rank(part for _, parts in self.wants for part in parts)


def compare_runs(manifest: Manifest, live: LiveRun, policy: Policy) -> Judgement:
    """Judge what the checkpoint pins and the live run under the policy. Reads no file."""
    return judge(RunFacts.of_manifest(manifest), live_facts(live), policy)


def live_facts(live: LiveRun) -> RunFacts:
    """The live run as it would be found in a manifest."""
    description = live.description
    tensors = {spec.key: spec for spec in (*description.weights, *description.buffers)}
    for spec in description.weights:
        if spec.key.name in description.trainable:
            key = TensorKey("master", spec.key.name)
            tensors[key] = TensorSpec(key, description.master_dtypes[spec.key.name], spec.shape)
    pinned = {key: value for key, value in live.pinned.items() if key not in ("groups", "versions")}
    return RunFacts(
        topology=live.topology,
        pinned=canonical.decode(canonical.encode(pinned)),
        groups=description.groups,
        versions=live.versions,
        data=live.data,
        tensors=tensors,
        aliases=description.aliases,
    )


def plan_reading(directory: Path, manifest: Manifest, adapter: EngineAdapter, rank: int) -> ReadOrder:
    """Which parts of which files this rank reads, from the indices of the ranks that can hold them.

    Raises `CheckpointDamaged` collecting every index that is not what was committed, every data file of the wrong
    size, and every wanted element that no file holds.
    """
    entries = manifest.by_key()
    wants = list(wants_of(adapter, manifest, rank))
    owners = {e.owner for want in wants if (e := entries.get(want.spec.key)) and e.owner is not None}
    if rank < manifest.world_size:
        owners.add(rank)
    indices = _read_indices(directory, manifest, owners)
    order = _order(wants, indices)
    lacking = {want.spec.key.name for want, parts in order if want.required and missing_elements(want.box, parts)}
    if lacking:
        more = {source for name in lacking for source in _holders(manifest, name)} - indices.keys()
        indices |= _read_indices(directory, manifest, more)
        order = _order(wants, indices)
    problems = []
    for want, parts in order:
        if want.required and (missing := missing_elements(want.box, parts)):
            what = f"{missing:,} of the {want.box.numel:,} elements [{want.box}] that rank {rank} owns are in no file"
            problems.append(Problem("ownership", str(want.spec.key), what, "resume from an older checkpoint"))
    if problems:
        raise CheckpointDamaged(f"{directory.name} does not hold all that rank {rank} needs", problems)
    return ReadOrder(tuple(order), indices)


def _order(wants: Sequence[Want], indices: Mapping[int, RankIndex]) -> list[tuple[Want, tuple[ReadPart, ...]]]:
    stored = StoredPieces(indices.values())
    return [(want, tuple(stored.parts(want.spec.key, want.box))) for want in wants]


def _holders(manifest: Manifest, name: str) -> list[int]:
    """Ranks whose files may hold pieces of a tensor."""
    if name not in manifest.holders:
        return [*range(manifest.world_size)]
    try:
        return parse_ranks(manifest.holders[name], below=manifest.world_size)
    except ValueError as error:
        raise canonical.damaged(Path(names.MANIFEST), f"holders of {name}: {error}") from None


def _read_indices(directory: Path, manifest: Manifest, ranks: Iterable[int]) -> dict[int, RankIndex]:
    problems: list[Problem] = []
    indices: dict[int, RankIndex] = {}
    for rank in sorted(ranks):
        try:
            indices[rank] = read_index(directory, manifest, rank)
            check_data_file(directory, manifest, rank)
        except CheckpointDamaged as damage:
            problems += damage.problems
    if problems:
        raise CheckpointDamaged(f"{directory.name} is damaged", problems)
    return indices


def check_memory(directory: Path, order: ReadOrder, rank: int) -> list[Problem]:
    """Room in host memory for all windows that the ranks of this host may read through, if each wants as much as this
    one: a window for each thread that reads, and those that they share. Threads that take have none of their own."""
    memory, ranks = available_memory(), local_world_size()
    block = max((min(index.data.block_bytes, index.data.size) for index in order.indices.values()), default=0)
    together = ranks > 1 and not in_memory(directory)
    readers = reader_count(piece_bytes((want.spec, want.box) for want, parts in order.wants if parts), block)
    needed = filled(block) * (readers + (default_windows() if together else 0)) * ranks
    if memory is None or memory >= needed:
        return []
    what = f"reading on this host needs {needed:,} bytes of memory, {memory:,} are available"
    return [Problem("memory", f"rank {rank}", what, "free memory on this host, or use a larger one")]


def check_whole(directory: Path, manifest: Manifest, description: ModelDescription) -> list[Problem]:
    """Rank 0's look at all indices: exact-once ownership, fingerprint sums, required state. Reads no data.

    Raises `CheckpointDamaged` naming the indices that cannot be read.
    """
    indices: list[RankIndex] = []
    problems: list[Problem] = []
    for rank in range(manifest.world_size):
        try:
            indices.append(read_index(directory, manifest, rank))
            check_data_file(directory, manifest, rank)
        except CheckpointDamaged as damage:
            problems += damage.problems
    if problems:
        raise CheckpointDamaged(f"{directory.name} is damaged", problems)
    owned = {entry.spec.key for entry in manifest.tensors if entry.owner is not None}
    assembly = assemble(indices, owned)
    problems += assembly.problems
    if assembly.tensors != manifest.tensors:
        stated = manifest.by_key()
        for entry in assembly.tensors:
            if stated.get(entry.spec.key) != entry:
                what = "the indices and the manifest tell different things of it"
                problems.append(Problem("ownership", str(entry.spec.key), what, canonical.RESTORE))
    weights = [spec.key.name for spec in description.weights]
    counters = canonical.decode(manifest.state).get("counters", {})
    counted = counters.get("global_steps", counters.get("steps", manifest.step))
    updates = counted - counters.get("skipped_steps", 0) - canonical.decode(manifest.state).get("moments_since", 0)
    problems += require_state(manifest.tensors, weights, description.groups, updates)
    kinds = optimizer_kinds(manifest)
    for name in sorted(set(kinds) - set(description.trainable)):
        problems.append(
            Problem("optimizer layout", name, "has optimizer tensors but is not trainable in the live model")
        )
    if counted != manifest.step:
        what = f"the engine's counter says {counted}, the manifest step {manifest.step}"
        problems.append(Problem("step", names.step_directory(manifest.step), what, "resume from an older checkpoint"))
    return problems
