"""One save, from live state to a committed checkpoint, in two rounds: all agree, all have written."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from resume_kit.algebra import fingerprint
from resume_kit.algebra.boxes import Box
from resume_kit.checkpoint import canonical, files, names
from resume_kit.checkpoint.index import RankIndex, parse_index
from resume_kit.checkpoint.layout import plan_file
from resume_kit.checkpoint.manifest import Manifest, RankEntry
from resume_kit.checkpoint.records import TensorKey
from resume_kit.engines import rng
from resume_kit.engines.adapter import EngineAdapter, LivePiece, ModelDescription, Replica
from resume_kit.engines.coordination import Coordinator
from resume_kit.engines.fingerprint import as_unsigned, fingerprints
from resume_kit.engines.totals import UNCOVERED, copies_of, guilty, totals
from resume_kit.errors import InconsistentState, Problem, SaveFailed
from resume_kit.integrity.assembly import assemble, require_state
from resume_kit.planning.holders import format_ranks, holders_of, parse_ranks
from resume_kit.planning.reads import piece_bytes
from resume_kit.saving.staging import Arena, cast_matches, stage


@dataclass(frozen=True)
class SaveRequest:
    """What a save writes besides the engine's tensors. `directory` is the run directory.

    `updates` counts those that the optimizer's state must show; `carried` are this rank's share of RNG records of
    other topologies.
    """

    directory: Path
    run_id: str
    attempt: int
    step: int
    description: ModelDescription
    state: Mapping[str, Any]
    data: Mapping[str, Any]
    pinned: Mapping[str, Any]
    gate: Mapping[str, Any] | None
    updates: int
    carried: Sequence[CarriedRecords] = ()


class CarriedRecords(Protocol):
    """RNG records of another topology: rank (as text) → record."""

    @property
    def topology(self) -> Mapping[str, Any]: ...

    @property
    def records(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class Commit:
    """A committed checkpoint: where it is, its bytes over all ranks, and seconds by phase on this rank."""

    directory: Path
    step: int
    total_bytes: int
    seconds: Mapping[str, float]


def save(request: SaveRequest, adapter: EngineAdapter, coordinator: Coordinator, arena: Arena) -> Commit:
    """Write and commit a checkpoint. Collective.

    Raises the same error on every rank: `InconsistentState` when the live state contradicts itself, `SaveFailed`
    when it could not be written. Either way nothing was committed and older checkpoints stand.
    """
    clock = _Clock()
    staging = request.directory / names.staging_directory(request.step, request.attempt)
    replicas = adapter.replicas()
    pieces = adapter.pieces()
    owned = [piece for piece in pieces if piece.owned]
    _require_equal_copies(pieces, request.description, adapter, coordinator)
    differing = coordinator.round(
        "save: agree",
        lambda: _account(request, adapter, pieces, replicas),
        lambda accounts: _agree(accounts, replicas, request.directory, staging),
    )
    clock.lap("agree")
    try:
        result = coordinator.round(
            "save: commit",
            lambda: _write(
                request, adapter, coordinator, [*owned, *_shares(replicas, differing, coordinator)], arena, clock
            ),
            lambda written: _commit(request, adapter, written, staging, replicas, differing),
        )
    except Exception:
        if coordinator.rank == 0 and staging.is_dir():
            with suppress(OSError):  # what cannot be removed now is a torn directory; the next start removes it
                files.remove_checkpoint(staging)
        raise
    clock.lap("commit")
    return Commit(request.directory / names.step_directory(request.step), request.step, result, clock.seconds)


class _Clock:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now


def _account(
    request: SaveRequest, adapter: EngineAdapter, pieces: Sequence[LivePiece], replicas: Sequence[Replica]
) -> dict[str, Any]:
    """What the ranks compare before anything is written."""
    if not adapter.at_step_boundary:
        raise InconsistentState("a checkpoint can only be taken between optimizer steps; gradients are pending")
    specs = [*(piece.spec for piece in pieces), *(replica.spec for replica in replicas)]
    buffers = {spec for spec in specs if spec.key.kind == "buffer"}
    known = set(request.description.buffers)
    strange = buffers - known if request.description.partial else buffers ^ known
    if strange:
        what = "registered, removed or reshaped after the kit was made"
        problems = [
            Problem("buffers", str(spec), what, "build the whole model first") for spec in sorted(strange, key=str)
        ]
        raise InconsistentState("the model is not the one that the kit was made for", problems)
    values = as_unsigned(fingerprints((r.data.reshape(-1), r.spec.shape, Box.whole(r.spec.shape)) for r in replicas))
    shared = {"step": request.step, **request.state, "data position": request.data["position"]}
    return {
        "parts": {part: canonical.value_digest(value) for part, value in shared.items()},
        "step": request.step,
        "replicas": [[str(r.spec), fingerprint.to_hex(v)] for r, v in zip(replicas, values, strict=True)],
        "bytes": piece_bytes((p.spec, p.box) for p in pieces if p.owned)
        + piece_bytes((r.spec, Box.whole(r.spec.shape)) for r in replicas if r.restored),
    }


def _agree(accounts: list[dict[str, Any]], replicas: Sequence[Replica], directory: Path, staging: Path) -> list[str]:
    """Compare the ranks' accounts; return the names of per-rank tensors that do differ. Makes the directory."""
    first = accounts[0]
    problems = []
    for rank, account in enumerate(accounts):
        for part, digest in account["parts"].items():
            if digest != first["parts"].get(part):
                what = "differs from rank 0's"
                if part == "step":
                    what = f"rank {rank} is at step {account['step']}, rank 0 at step {first['step']}"
                problems.append(Problem("agreement", f"rank {rank}, {part}", what, "find out which rank went astray"))
        if [name for name, _ in account["replicas"]] != [name for name, _ in first["replicas"]]:
            problems.append(Problem("agreement", f"rank {rank}", "it holds other tensors than rank 0"))
    if problems:
        raise InconsistentState("the ranks disagree; nothing was saved", problems)
    differing = []
    for number, replica in enumerate(replicas):
        odd = [r for r, a in enumerate(accounts) if a["replicas"][number][1] != first["replicas"][number][1]]
        if odd and replica.per_rank:
            differing.append(str(replica.spec.key))
        elif odd:
            what = f"rank {odd[0]}'s copy is not rank 0's: the replicas have drifted apart"
            problems.append(
                Problem("replicas", str(replica.spec.key), what, "resume from the last commit; suspect that GPU")
            )
    if problems:
        raise InconsistentState("replicas have drifted apart; nothing was saved", problems)
    files.require_space(directory, sum(account["bytes"] for account in accounts))
    if staging.is_dir():
        files.remove_checkpoint(staging)
    try:
        staging.mkdir()
    except OSError as error:
        raise files.write_failed(staging, error, 0) from error
    return differing


def _require_equal_copies(
    pieces: Sequence[LivePiece], description: ModelDescription, adapter: EngineAdapter, coordinator: Coordinator
) -> None:
    """Every further copy of a tensor equals what its owners hold. Collective.

    Raises `InconsistentState` naming the ranks and boxes that drifted.
    """
    tensors = sorted({spec.key.name for spec in (*description.weights, *description.buffers)})
    number = {name: i for i, name in enumerate(tensors)}
    mine: dict[str, set[int]] = {}
    for piece in pieces:
        if piece.copy and piece.spec.key.name in number:  # a tensor that came later is refused when all agree
            mine.setdefault(piece.spec.key.kind, set()).add(number[piece.spec.key.name])
    every = coordinator.gather(
        "save: copies", lambda: ({kind: format_ranks(found) for kind, found in mine.items()}, copies_of(pieces))
    )
    copied = {(kind, i) for rows, _ in every for kind, text in rows.items() for i in parse_ranks(text)}
    keys = [TensorKey(kind, tensors[i]) for kind, i in sorted(copied)]
    if not keys:
        return
    known = set(keys)
    looked = [p for p in pieces if p.copy is not None and p.spec.key in known]
    values = fingerprints((p.data, p.spec.shape, p.box) for p in looked)
    found = totals(looked, values, keys, max(count for _, count in every), adapter.device)
    numel = dict(zip(keys, found.elements[0], strict=True))
    odd = [(str(key), copy) for key, copy in found.odd_copies(found.owned, numel)]
    if not odd:
        return
    wanted = {name for name, _ in odd}

    def evidence() -> tuple[list[Any], list[str]]:
        rows = [
            (str(p.spec.key), str(p.box), p.copy, fingerprint.to_hex(value))
            for p, value in zip(looked, as_unsigned(values), strict=True)
            if str(p.spec.key) in wanted
        ]
        suspects = [p for p in pieces if p.cast_of is not None and str(p.spec.key) in wanted]
        matches = cast_matches(suspects)
        return rows, [f"{p.spec.key} [{p.box}]" for p, same in zip(suspects, matches, strict=True) if not same]

    def blame(every: list[tuple[list[Any], list[str]]]) -> None:
        """In a round, so that every rank has read the error before any ends. A weight that is not its master's cast
        is to blame wherever it is; only without one, the copies that have no sound twin are."""
        miscast = [(rank, where) for rank, (_, found) in enumerate(every) for where in found]
        drifted = [(rank, f"{name} [{box}]") for rank, name, box in guilty([rows for rows, _ in every], odd)]
        what = "is not its master's cast" if miscast else "is not the owners'"
        problems = [
            Problem(
                "replicas",
                f"rank {rank}, {where}",
                f"rank {rank}'s copy {what}: the replicas have drifted apart",
                "resume from the last commit; suspect that GPU",
            )
            for rank, where in miscast or drifted
        ]
        problems = problems or [Problem("replicas", name, f"copy {copy} {UNCOVERED}") for name, copy in odd]
        raise InconsistentState("replicas have drifted apart; nothing was saved", problems)

    coordinator.round("save: which copy", evidence, blame)


def _own_name(replica: Replica, rank: int) -> Replica:
    """A tensor that differs between ranks, under this rank's own name."""
    key = TensorKey(replica.spec.key.kind, f"{replica.spec.key.name}@rank{rank}")
    return replace(replica, spec=replace(replica.spec, key=key))


def _shares(replicas: Sequence[Replica], differing: Sequence[str], coordinator: Coordinator) -> list[LivePiece]:
    """The whole tensors that this rank saves: its own versions, and its share of those that all hold alike.

    Each goes to the rank with the least so far, so that all write about the same.
    """
    load = [0] * coordinator.world_size
    mine = []
    for replica in replicas:
        if not replica.restored:
            continue
        if str(replica.spec.key) in differing:
            mine.append(_own_name(replica, coordinator.rank))
            continue
        owner = load.index(min(load))
        load[owner] += replica.spec.numel * replica.spec.itemsize
        if owner == coordinator.rank:
            mine.append(replica)
    return [LivePiece(r.spec, Box.whole(r.spec.shape), r.data.detach().reshape(-1)) for r in mine]


def _write(
    request: SaveRequest,
    adapter: EngineAdapter,
    coordinator: Coordinator,
    owned: Sequence[LivePiece],
    arena: Arena,
    clock: _Clock,
) -> dict[str, Any]:
    """Stage and write this rank's data file and index; return what the manifest says of them."""
    rank, world_size = coordinator.rank, coordinator.world_size
    staging = request.directory / names.staging_directory(request.step, request.attempt)
    unstored = _casts(owned, rank)
    layout = plan_file(
        ((p.spec, p.box) for number, p in enumerate(owned) if number not in unstored),
        {"format": "resume_kit", "step": str(request.step), "rank": str(rank), "world_size": str(world_size)},
    )
    staged = stage(arena, layout, owned, unstored)
    clock.lap("stage")
    digests = files.write_image(staging / names.data_file(rank), staged.image)
    index = RankIndex(
        run_id=request.run_id,
        attempt=request.attempt,
        step=request.step,
        rank=rank,
        world_size=world_size,
        data=digests,
        pieces=staged.pieces,
        scalars=canonical.encode(adapter.scalars(), "optimizer scalars"),
        rng=rng.capture(adapter.rng_trackers()),
        carried=tuple(dict(carried.records) for carried in request.carried),
    )
    raw = index.to_bytes()
    files.write_durably(staging / names.index_file(rank), raw)
    files.fsync_directory(staging)
    clock.lap("write")
    return {"bytes": len(raw), "digest": canonical.digest(raw)}


def _casts(owned: Sequence[LivePiece], rank: int) -> frozenset[int]:
    """Numbers of the low-precision weights, each proved to be the cast of its master, bit for bit."""
    matches = cast_matches(owned)
    problems = [
        Problem(
            "cast of master",
            f"rank {rank}, {piece.spec.key} [{piece.box}]",
            "the weight is not its master's cast",
            "resume from the last commit; suspect this rank's memory, or code that writes to weights",
        )
        for piece, same in zip(owned, matches, strict=True)
        if piece.cast_of is not None and not same
    ]
    if problems:
        raise InconsistentState("low-precision weights and masters disagree; nothing was saved", problems)
    return frozenset(number for number, same in enumerate(matches) if same)


def _commit(
    request: SaveRequest,
    adapter: EngineAdapter,
    written: list[dict[str, Any]],
    staging: Path,
    replicas: Sequence[Replica],
    differing: Sequence[str],
) -> int:
    """On rank 0, after all have written: check the whole, write the manifest, publish. Returns total bytes."""
    indices = [_read_back(staging, rank, account) for rank, account in enumerate(written)]
    whole = {r.spec.key for r in replicas if r.restored and str(r.spec.key) not in differing}
    own = {
        _own_name(r, rank).spec.key for r in replicas if str(r.spec.key) in differing for rank in range(len(written))
    }
    assembly = assemble(indices, whole | own)
    description = request.description
    problems = [
        *assembly.problems,
        *require_state(
            assembly.tensors,
            (spec.key.name for spec in description.weights),
            description.groups,
            request.updates,
        ),
    ]
    if problems:
        raise InconsistentState("the checkpoint would not be whole; nothing was committed", problems)
    manifest = Manifest(
        run_id=request.run_id,
        attempt=request.attempt,
        step=request.step,
        created=time.time(),
        engine=adapter.topology,
        tensors=assembly.tensors,
        ranks=tuple(
            RankEntry(
                index.rank,
                index.data.size,
                index.data.whole,
                account["bytes"],
                account["digest"],
                rng.digest(index.rng),
            )
            for index, account in zip(indices, written, strict=True)
        ),
        aliases=dict(description.aliases),
        state=canonical.encode({**request.state, "scalars": assembly.scalars}, "state"),
        data=canonical.encode(dict(request.data), "data"),
        pinned=canonical.encode(dict(request.pinned), "pinned"),
        gate=canonical.encode(request.gate, "gate"),
        requires=("cast-of-master",) if any(not entry.stored for entry in assembly.tensors) else (),
        holders=holders_of(indices),
        carried=tuple(dict(carried.topology) for carried in request.carried),
    )
    files.write_durably(staging / names.MANIFEST, manifest.to_bytes())
    final = request.directory / names.step_directory(request.step)
    try:
        files.publish(staging, final, request.directory / names.replaced_directory(request.step, request.attempt))
    except OSError as error:
        raise files.write_failed(final, error, manifest.total_bytes) from error
    return manifest.total_bytes


def _read_back(staging: Path, rank: int, account: Mapping[str, Any]) -> RankIndex:
    path = staging / names.index_file(rank)
    raw = canonical.read_bytes(path)
    if canonical.digest(raw) != account["digest"]:
        raise SaveFailed(
            "an index did not arrive as it was written",
            [Problem("commit", f"rank {rank}, {path}", "rank 0 reads other bytes", "check the shared file system")],
        )
    return parse_index(raw, path)
