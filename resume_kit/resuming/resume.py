"""The staged proof from election to gate. Training goes on only from what this returns."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resume_kit.checkpoint import canonical, names
from resume_kit.checkpoint.carrying import ReadAccount
from resume_kit.checkpoint.index import RankIndex
from resume_kit.checkpoint.manifest import Manifest, read_manifest
from resume_kit.checkpoint.node import Node
from resume_kit.checkpoint.reading import read_index
from resume_kit.engines import rng
from resume_kit.engines.adapter import EngineAdapter, GateResult
from resume_kit.engines.coordination import Coordinator
from resume_kit.errors import CheckpointDamaged, Problem, ResumeRefused, TooLittleMemory, UsageError
from resume_kit.planning.holders import format_ranks
from resume_kit.policy.judgement import Judgement, changes_table
from resume_kit.policy.policy import Policy
from resume_kit.resuming import prove
from resume_kit.resuming.gating import choose_tolerance, gate_problems, moves_the_computation, ranks_agree
from resume_kit.resuming.load import load
from resume_kit.resuming.neighbours import read_with_neighbours
from resume_kit.resuming.patience import patiently
from resume_kit.resuming.preflight import (
    LiveRun,
    ReadOrder,
    check_memory,
    check_whole,
    compare_runs,
    plan_reading,
)
from resume_kit.resuming.reading import verify_unread
from resume_kit.resuming.report import Report
from resume_kit.resuming.restored import effective, schedule_problems, state_to_restore
from resume_kit.resuming.streams import Carried, Streams, carried_along, streams
from resume_kit.resuming.wanted import plain_key

#: Checks whose refusal means that this rank cannot even tell what it would read.
_FOREIGN = frozenset({"topology", "tensors"})


@dataclass(frozen=True)
class Resumption:
    """A proved checkpoint: what was restored, what changed, and the RNG digests that this rank must keep.

    `state` is the shared state as restored; `carried` RNG records that a save before the first step carries along.
    """

    directory: Path
    manifest: Manifest
    state: Mapping[str, Any]
    judgement: Judgement
    rng_digests: Mapping[str, str]
    carried: tuple[Carried, ...]


@dataclass(frozen=True)
class _Examined:
    directory: Path
    manifest: Manifest
    policy: Policy
    judgement: Judgement
    order: ReadOrder
    account: ReadAccount
    streams: Streams
    carried: tuple[Carried, ...]

    @property
    def moments(self) -> bool:
        return self.policy.optimizer_state == "keep"


class Resumer:
    """One attempt to resume. `gate` runs the pinned forward/backward, None where the policy has it off.

    `restore_run` puts back what is not the engine's: data position and the user's own state. `seed` is the run's, for
    RNG streams of ranks whose place is new.
    """

    def __init__(
        self,
        run: Path,
        *,
        adapter: EngineAdapter,
        coordinator: Coordinator,
        policy: Policy,
        live: LiveRun,
        report: Report,
        gate: Callable[[], GateResult] | None,
        restore_run: Callable[[Manifest, Judgement], None],
        data_position: Callable[[], int],
        seed: int,
        at: int | None = None,
    ) -> None:
        self._run = run
        self._adapter = adapter
        self._coordinator = coordinator
        self._policy = policy
        self._live = live
        self._report = report
        self._gate = gate
        self._restore_run = restore_run
        self._data_position = data_position
        self._seed = seed
        self._at = at
        self._constructed: dict[str, Any] = {}

    def resume(self, last_commit: int | None) -> Resumption | None:
        """The newest good checkpoint, loaded and proved; None for a run that has none yet. Collective.

        `last_commit` is the newest commit that the journal tells of: a run that has committed never starts anew.
        Raises `ResumeRefused` when a check says no, `CheckpointDamaged` when no good checkpoint is left or the policy
        forbids to fall back, `Unreadable` for one that cannot be read now, `TooLittleMemory`.
        """
        with self._report.timed("elect"):
            candidates = self._coordinator.on_rank_zero("elect", lambda: names.checkpoint_steps(self._run)[::-1])
        if self._at is not None:
            if self._at not in candidates:
                raise UsageError(f"there is no checkpoint of step {self._at}; there are {candidates or 'none'}")
            candidates = [self._at]
        damage: list[Problem] = []
        self._coordinator.round("as constructed", lambda: self._constructed.update(self._adapter.state()), _nothing)
        for step in candidates:
            directory = self._run / names.step_directory(step)
            try:
                return patiently(functools.partial(self._take, directory), directory.name, self._report)
            except CheckpointDamaged as error:
                damage += error.problems
                self._report.reject(directory.name, error.problems)
                if not self._policy.fallback:
                    raise CheckpointDamaged(
                        f"{directory.name} is damaged and the policy forbids to fall back", damage
                    ) from error
        if candidates:
            raise CheckpointDamaged(f"none of the {len(candidates)} checkpoints in {self._run} is good", damage)
        if last_commit is not None:
            what = f"the journal says that step {last_commit} was committed, but there is no checkpoint"
            remedy = "put the step-… directories back (look in set-aside/), or start a new run in another directory"
            raise CheckpointDamaged("all checkpoints are gone", [Problem("elect", str(self._run), what, remedy)])
        self._report.decision = "no checkpoint yet: training starts at step 0"
        return None

    def _take(self, directory: Path) -> Resumption:
        examined = self._examine(directory)
        state = self._load(examined)
        self._prove(examined, state)
        self._run_gate(examined, state)
        return self._hand_over(examined, state)

    def _examine(self, directory: Path) -> _Examined:
        """Preflight, then the reading, up to the point where every rank has all of its own bytes in its live tensors.

        Damage that is met while reading leaves the engine written in part: another checkpoint is then loaded, or the
        resume raises and nothing trains on.
        """
        report, coordinator, rank = self._report, self._coordinator, self._coordinator.rank
        report.checkpoint = directory.name
        with report.timed("preflight"):
            manifest = read_manifest_alike(directory, coordinator)
            policy = effective(self._policy, manifest, compare_runs(manifest, self._live, self._policy))
            judgement = compare_runs(manifest, self._live, policy)
            refusals = judgement.refusals

            def local() -> None:
                problems, memory = list(refusals), list[Problem]()
                damaged: list[Problem] = []
                if not any(problem.check in _FOREIGN for problem in refusals):
                    try:
                        orders.append(plan_reading(directory, manifest, self._adapter, rank))
                        read = _reader(directory, manifest, orders[0])
                        found.append(self._streams(manifest, policy, read))
                        carried.extend(carried_along(manifest, dict(self._live.topology), rank, read))
                        problems += found[0].problems
                        memory += check_memory(directory, orders[0], rank)
                        problems += schedule_problems(manifest, self._live, self._adapter, policy, judgement)
                    except CheckpointDamaged as damage:
                        damaged += damage.problems
                    if rank == 0:
                        try:
                            problems += check_whole(directory, manifest, self._live.description)
                        except CheckpointDamaged as damage:
                            damaged += [p for p in damage.problems if p not in damaged]
                if damaged and not refusals:
                    raise CheckpointDamaged(f"{directory.name} is damaged", damaged)
                if problems or damaged:
                    raise ResumeRefused(
                        f"{directory.name} must not be resumed by this run", [*_no_twins(problems), *damaged, *memory]
                    )
                if memory:
                    raise TooLittleMemory(f"too little memory to read {directory.name}", memory)

            orders: list[ReadOrder] = []
            found: list[Streams] = []
            carried: list[Carried] = []
            coordinator.round("preflight", local, _nothing)
        report.changes = [change.to_json() for change in judgement.changes]
        report.change_table = changes_table(judgement.changes) if judgement.changes else ""
        for problem in judgement.warnings:
            report.warned("preflight", problem.check, f"{problem.where}: {problem.what}")
        report.passed("preflight", "ownership", f"{len(manifest.tensors)} tensors, each element owned exactly once")
        report.passed("preflight", "model and optimizer", f"{len(self._live.description.weights)} weights as saved")
        report.passed("preflight", "data", f"position {manifest.data['position']:,}")
        report.passed("preflight", "rng records", f"{manifest.world_size} ranks")
        moments = policy.optimizer_state == "keep"
        scalars = canonical.decode(manifest.state)["scalars"] if moments else {}

        def read_tensors(node: Node | None) -> None:
            order, adapter = orders[0], self._adapter
            accounts.append(load(adapter, directory, manifest, order, scalars, rank, moments=moments, node=node))

        accounts: list[ReadAccount] = []
        with report.timed("load"):
            read_with_neighbours(coordinator, report, directory, read_tensors)
        return _Examined(directory, manifest, policy, judgement, orders[0], accounts[0], found[0], tuple(carried))

    def _streams(self, manifest: Manifest, policy: Policy, read: Callable[[int], RankIndex]) -> Streams:
        derive = policy.rng == "derive"
        return streams(manifest, self._adapter, self._coordinator.rank, self._seed, read, derive=derive)

    def _load(self, examined: _Examined) -> dict[str, Any]:
        """Bring what follows from the tensors up to date, and restore the shared state, which is returned."""
        report, coordinator, adapter, manifest = self._report, self._coordinator, self._adapter, examined.manifest
        with report.timed("load"):

            def shared() -> None:
                run, policy = self._live, examined.policy
                adapter.load_state(self._constructed)  # a candidate before may have been written, and rejected
                state.update(state_to_restore(manifest, run, adapter, policy, examined.judgement, self._policy))
                adapter.load_state(state)

            state: dict[str, Any] = {}
            adapter.publish()
            coordinator.round("state", shared, _nothing)
            account = examined.account
            sizes = coordinator.gather(
                "bytes", lambda: [account.wanted_bytes, account.read_bytes, account.verified_bytes]
            )
        wanted, read, verified = (sum(column) for column in zip(*sizes, strict=True))
        report.read = {"wanted_bytes": wanted, "read_bytes": read, "verified_bytes": verified, "by_rank": sizes}
        how = "every block's digest checked"
        if verified < read:
            how = f"digests checked for {verified:,}, the rest by the fingerprints"
        report.passed("load", "bytes read", f"{read:,} over all ranks for {wanted:,} wanted; {how}")
        return state

    def _prove(self, examined: _Examined, state: Mapping[str, Any], stage: str = "prove") -> None:
        report, coordinator, manifest = self._report, self._coordinator, examined.manifest
        same = dict(self._live.topology) == manifest.engine
        index = examined.order.indices[coordinator.rank] if same else None
        with report.timed(stage):
            measured: list[prove.Measurement] = []
            coordinator.round("measure", lambda: measured.append(prove.measure(self._adapter, manifest)), _nothing)
            proof = prove.judge(
                measured[0],
                manifest,
                index=index,
                moments=examined.moments,
                adapter=self._adapter,
                coordinator=coordinator,
            )
            problems = [*proof.problems, *prove.prove_state(self._adapter, state, coordinator.rank)]
            if proof.from_disk:
                account = examined.account
                coordinator.round(
                    "diagnose", lambda: verify_unread(examined.directory, examined.order, account), _nothing
                )
            coordinator.round(stage, lambda: _refuse_if(problems, "the live state is not the saved state"), _nothing)
            coordinator.round(
                f"{stage}: steps",
                lambda: [self._adapter.step, self._adapter.learning_rate],
                prove.all_agree("step and LR"),
            )
        report.passed(stage, "fingerprints", f"{proof.tensors} tensors over all ranks, {proof.copies} further copies")
        report.passed(
            stage,
            "steps, LR, groups",
            f"step {self._adapter.step}, LR {self._adapter.learning_rate:.6g}, equal on all ranks",
        )

    def _run_gate(self, examined: _Examined, state: Mapping[str, Any]) -> None:
        report, recorded = self._report, examined.manifest.gate
        if self._gate is None:
            report.warned("gate", "forward/backward", "switched off by the policy")
            return
        if recorded is None:
            what = "the checkpoint was saved with the gate off and holds no record of it"
            remedy = "set the policy `gate: false` for this resume; the next save records it"
            raise ResumeRefused("the gate cannot run", [Problem("gate", examined.directory.name, what, remedy)])
        tolerance, reason = choose_tolerance(examined.policy, self._adapter.device, examined.judgement)
        other_data = bool(examined.judgement.changes_of("data"))
        left_out = recorded.get("recorded") is False
        expected = None if other_data or left_out else canonical.decode(recorded)
        before = rng.capture(self._adapter.rng_trackers())
        position = self._data_position()
        with report.timed("gate"):
            result = self._gate()
            found = {"loss": result.loss, "grad_norm": result.grad_norm}
            problems = gate_problems(found, expected, tolerance, reason)
            differing: list[Problem] = []
            if moves_the_computation(examined.judgement):
                differing, problems = problems, gate_problems(found, None, tolerance, reason)
            if rng.capture(self._adapter.rng_trackers()) != before:
                problems.append(Problem("gate", "side effects", "the forward/backward changed the RNG", "report this"))
            if self._data_position() != position:
                problems.append(Problem("gate", "side effects", "the forward/backward moved the data position"))
            self._coordinator.round(
                "gate", lambda: _refuse_if(problems, "the forward/backward is not as recorded"), _nothing
            )
            self._coordinator.round("gate: alike", lambda: found, ranks_agree(tolerance))
        if other_data:
            report.warned("gate", "loss", f"{result.loss!r}: finite, but not to compare, the data is another version")
        elif left_out:
            report.warned("gate", "loss", f"{result.loss!r}: finite, but not to compare, this save recorded no gate")
        elif differing:
            for problem in differing:
                report.warned("gate", problem.where, f"{problem.what}: finite; the configuration differs")
        else:
            report.passed("gate", "loss", f"{result.loss!r} ({tolerance}: {reason})")
            report.passed("gate", "gradient norm", f"{result.grad_norm!r}")
        self._prove(examined, state, "prove again")

    def _hand_over(self, examined: _Examined, state: Mapping[str, Any]) -> Resumption:
        """Data position, user state and, last of all, RNG."""
        report, coordinator, manifest = self._report, self._coordinator, examined.manifest
        trackers = self._adapter.rng_trackers()
        wanted = examined.streams.state

        def restore() -> list[str]:
            self._restore_run(manifest, examined.judgement)
            rng.restore(wanted, trackers)
            if rng.digest(rng.capture(trackers)) != rng.digest(wanted):
                problem = Problem("rng", f"rank {coordinator.rank}", "the generators are not as wanted", "report this")
                raise ResumeRefused("the RNG could not be restored", [problem])
            return list(examined.streams.new)

        new = coordinator.gather("hand-over", restore)
        report.passed("hand-over", "data", f"position {self._data_position():,}")
        report.passed("hand-over", "rng digests", f"{coordinator.world_size} ranks, taken after all set-up")
        if any(new):
            ranks = [rank for rank, names_ in enumerate(new) if names_]
            what = f"new streams from seed {self._seed} on ranks {format_ranks(ranks)}: their place is new"
            report.warned("hand-over", "rng streams", what)
        own_versions = {plain_key(e.spec.key) for e in manifest.tensors if plain_key(e.spec.key) != e.spec.key}
        if own_versions and manifest.world_size != coordinator.world_size:
            what = f"{len(own_versions)} differ between ranks: a new rank takes rank 0's, those of ranks gone are lost"
            report.warned("hand-over", "buffers", what)
        report.step = manifest.step
        report.decision = f"training goes on after step {manifest.step}, proved"
        digests = rng.digests(wanted)
        return Resumption(examined.directory, manifest, state, examined.judgement, digests, examined.carried)


def _reader(directory: Path, manifest: Manifest, order: ReadOrder) -> Callable[[int], RankIndex]:
    """Indices by rank; those that the reading needs are there already."""

    def read(rank: int) -> RankIndex:
        if rank not in known:
            known[rank] = read_index(directory, manifest, rank)
        return known[rank]

    known = dict(order.indices)
    return read


def read_manifest_alike(directory: Path, coordinator: Coordinator) -> Manifest:
    """The manifest, read by every rank; all must see the same bytes and the same place."""
    mine: list[Manifest] = []

    def local() -> list[str]:
        mine.append(read_manifest(directory))
        return [directory.name, canonical.digest(mine[0].to_bytes())]

    coordinator.round("manifest", local, prove.all_agree("the manifest (is the run directory shared by all hosts?)"))
    return mine[0]


def _nothing(_: list[Any]) -> None:
    """The combiner of rounds whose point is that every rank got here."""


def _refuse_if(problems: list[Problem], headline: str) -> None:
    if problems:
        raise ResumeRefused(headline, problems)


def _no_twins(problems: list[Problem]) -> list[Problem]:
    return list(dict.fromkeys(problems))
