"""Preflight: everything that can be known wrong before the live engine is touched, collected and shown together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resume_kit.checkpoint import canonical, names
from resume_kit.checkpoint.index import RankIndex
from resume_kit.checkpoint.manifest import Manifest
from resume_kit.checkpoint.reading import check_data_file, read_index
from resume_kit.checkpoint.records import TensorKey, TensorSpec
from resume_kit.engines import rng
from resume_kit.engines.adapter import EngineAdapter, ModelDescription
from resume_kit.environment import available_memory, local_world_size
from resume_kit.errors import CheckpointDamaged, Problem
from resume_kit.integrity.assembly import assemble, require_state
from resume_kit.integrity.differences import ABSENT, brief, differences
from resume_kit.planning.reads import ReadPart, StoredPieces, missing_elements, ranges_by_rank
from resume_kit.resuming.policy import Policy
from resume_kit.resuming.wanted import MODEL_KINDS, Want, optimizer_kinds, wants_of


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


def compare_runs(manifest: Manifest, live: LiveRun, policy: Policy) -> tuple[list[Problem], list[Problem]]:
    """(refusals, warnings) from comparing what the checkpoint pins with the live run. Reads no file."""
    refusals: list[Problem] = list(_topology(manifest, live))
    warnings: list[Problem] = []
    refusals += _tensors(manifest, live.description)
    refusals += _data(manifest, live)
    configuration = [*_configuration(manifest, live), *_groups(manifest, live)]
    versions = list(_versions(manifest, live))
    (refusals if policy.configuration == "equal" else warnings).extend(configuration)
    (refusals if policy.versions == "equal" else warnings).extend(versions)
    return refusals, warnings


def _topology(manifest: Manifest, live: LiveRun) -> Iterator[Problem]:
    for path, old, new in differences(manifest.engine, dict(live.topology)):
        remedy = f"start the job with {path} = {old}"
        if path == "world_size":
            remedy = (
                f"start the job on {old} ranks; changing the world size (resharding) is not supported by this version"
            )
        yield Problem("topology", path, f"saved with {old}, live {new}", remedy)


def _tensors(manifest: Manifest, description: ModelDescription) -> Iterator[Problem]:
    saved: dict[TensorKey, TensorSpec] = {}
    for entry in manifest.tensors:
        if entry.spec.key.kind in MODEL_KINDS:
            kind, name = entry.spec.key
            plain = TensorKey(kind, name.split("@rank")[0] if kind == "buffer" else name)
            saved[plain] = TensorSpec(plain, entry.spec.dtype, entry.spec.shape)
    live = {spec.key: spec for spec in (*description.weights, *description.buffers)}
    for spec in description.weights:
        if spec.key.name in description.trainable:
            key = TensorKey("master", spec.key.name)
            live[key] = TensorSpec(key, description.master_dtypes[spec.key.name], spec.shape)
    for key in sorted(saved.keys() - live.keys()):
        yield Problem(
            "tensors", str(key), "in the checkpoint, missing in the live model", "build the model of the save"
        )
    for key in sorted(live.keys() - saved.keys()):
        yield Problem(
            "tensors", str(key), "additional in the live model, not in the checkpoint", "build the model of the save"
        )
    for key in sorted(saved.keys() & live.keys()):
        if saved[key] != live[key]:
            old, new = saved[key], live[key]
            what = f"saved as {old.dtype}{list(old.shape)}, live {new.dtype}{list(new.shape)}"
            yield Problem("tensors", str(key), what, "build the model of the save")
    for path, old, new in differences(dict(manifest.aliases), dict(description.aliases)):
        yield Problem("tensors", path, f"tied to {old} in the checkpoint, to {new} live", "tie the same weights")


def _data(manifest: Manifest, live: LiveRun) -> Iterator[Problem]:
    saved, now = canonical.decode(manifest.data), dict(live.data)
    for path, old, new in differences(saved, now):
        if path in ("position", "next_batch"):
            continue
        what = f"saved with {brief(old)}, live {brief(new)}"
        remedy = "resume on the dataset of the save"
        if path == "global_batch_size":
            remedy = "choose micro-batch, accumulation and ranks so that the global batch is the same"
        yield Problem("data", path, what, remedy)


def _configuration(manifest: Manifest, live: LiveRun) -> Iterator[Problem]:
    saved = {k: v for k, v in canonical.decode(manifest.pinned).items() if k not in ("versions", "groups")}
    now = {
        k: v
        for k, v in canonical.decode(canonical.encode(dict(live.pinned))).items()
        if k not in ("versions", "groups")
    }
    for path, old, new in differences(saved, now):
        remedy = "undo the change, or allow it with the policy `configuration: warn`"
        yield Problem("configuration", path, f"saved with {brief(old)}, live {brief(new)}", remedy)


def _groups(manifest: Manifest, live: LiveRun) -> Iterator[Problem]:
    saved = canonical.decode(manifest.pinned)["groups"]
    now = [dict(group) for group in live.description.groups]
    if len(saved) != len(now):
        what = f"{len(saved)} parameter groups were saved, {len(now)} are live"
        yield Problem("optimizer groups", "optimizer", what, "build the optimizer of the save")
        return
    for number, (old, new) in enumerate(zip(saved, now, strict=True)):
        old_members, new_members = old.pop("members"), list(new.pop("members"))
        if old_members != new_members:
            moved = sorted(set(old_members) ^ set(new_members))
            what = f"members differ: {brief(moved) if moved else 'another order'}"
            yield Problem("optimizer groups", f"group {number}", what, "build the optimizer of the save")
        for path, a, b in differences(old, new):
            what = f"{path} was {brief(a)} as constructed, now {brief(b)}"
            remedy = "undo the change, or allow it with the policy `configuration: warn`"
            yield Problem("optimizer groups", f"group {number}", what, remedy)


def _versions(manifest: Manifest, live: LiveRun) -> Iterator[Problem]:
    saved = canonical.decode(manifest.pinned)["versions"]
    for path, old, new in differences(saved, dict(live.versions)):
        what = f"saved with {old}, live {new}" if ABSENT not in (old, new) else f"{old} → {new}"
        yield Problem("versions", path, what, "install the version of the save, or set the policy `versions: warn`")


def state_to_restore(manifest: Manifest, description: ModelDescription, live: Mapping[str, Any]) -> dict[str, Any]:
    """The saved shared state; where the policy let a hyperparameter differ, with the live run's value.

    Hyperparameters differ as constructed, before any scheduler changed them. A scheduler of another class keeps
    its fresh state.
    """
    state: dict[str, Any] = canonical.decode(manifest.state)
    constructed = canonical.decode(manifest.pinned)["groups"]
    for old, new, saved, now in zip(constructed, description.groups, state["groups"], live["groups"], strict=True):
        for key in new.keys() - {"members"}:
            if any(differences(old.get(key, ABSENT), new[key])):
                saved[key] = now[key]
    classes = [part and part["class"] for part in (state["scheduler"], live["scheduler"])]
    if classes[0] != classes[1]:
        state["scheduler"] = live["scheduler"]
    return state


def plan_reading(directory: Path, manifest: Manifest, adapter: EngineAdapter, rank: int) -> ReadOrder:
    """Which parts of which files this rank reads, from the indices of the ranks that can hold them.

    Raises `CheckpointDamaged` collecting every index that is not what was committed, every data file of the wrong
    size, and every wanted element that no file holds.
    """
    entries = manifest.by_key()
    wants = list(wants_of(adapter, manifest, rank))
    sources = {rank} | {
        entry.owner for want in wants if (entry := entries.get(want.spec.key)) and entry.owner is not None
    }
    problems: list[Problem] = []
    indices: dict[int, RankIndex] = {}
    for source in sorted(sources):
        try:
            indices[source] = read_index(directory, manifest, source)
            check_data_file(directory, manifest, source)
        except CheckpointDamaged as damage:
            problems += damage.problems
    if problems:
        raise CheckpointDamaged(f"{directory.name} is damaged", problems)
    stored = StoredPieces(indices.values())
    order = []
    for want in wants:
        parts = tuple(stored.parts(want.spec.key, want.box))
        if want.required and (missing := missing_elements(want.box, parts)):
            what = f"{missing:,} of the {want.box.numel:,} elements [{want.box}] that rank {rank} owns are in no file"
            problems.append(Problem("ownership", str(want.spec.key), what, "resume from an older checkpoint"))
        order.append((want, parts))
    if problems:
        raise CheckpointDamaged(f"{directory.name} does not hold all that rank {rank} needs", problems)
    return ReadOrder(tuple(order), indices)


def check_own_records(manifest: Manifest, index: RankIndex, adapter: EngineAdapter) -> list[Problem]:
    """This rank's RNG record, and room in host memory for its bytes."""
    problems = []
    if not index.rng:
        what = "the checkpoint has no RNG record of this rank"
        problems.append(Problem("rng", f"rank {index.rank}", what, "resume from a checkpoint that has one"))
    else:
        if rng.digest(index.rng) != manifest.ranks[index.rank].rng_digest:
            what = "the RNG record is not the one in the manifest"
            problems.append(Problem("rng", f"rank {index.rank}", what, "resume from an older checkpoint"))
        problems += rng.compatibility(canonical.decode(index.rng), adapter.rng_trackers())
    memory = available_memory()
    needed = index.data.size * local_world_size()
    if memory is not None and memory < needed:
        what = f"staging on this host needs {needed:,} bytes of memory, {memory:,} are available"
        problems.append(Problem("memory", f"rank {index.rank}", what, "free memory on this host, or use a larger one"))
    return problems


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
    updates = counters.get("global_steps", manifest.step) - counters.get("skipped_steps", 0)
    problems += require_state(manifest.tensors, weights, description.groups, updates)
    kinds = optimizer_kinds(manifest)
    for name in sorted(set(kinds) - set(description.trainable)):
        problems.append(
            Problem("optimizer layout", name, "has optimizer tensors but is not trainable in the live model")
        )
    counted = counters.get("global_steps", manifest.step)
    if counted != manifest.step:
        what = f"the engine's counter says {counted}, the manifest step {manifest.step}"
        problems.append(Problem("step", names.step_directory(manifest.step), what, "resume from an older checkpoint"))
    return problems
