"""The staged proof from election to gate. Training goes on only from what this returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from resume_kit.checkpoint import canonical, names
from resume_kit.checkpoint.index import RankIndex
from resume_kit.checkpoint.manifest import Manifest, read_manifest
from resume_kit.engines import rng
from resume_kit.engines.adapter import EngineAdapter, GateResult
from resume_kit.engines.coordination import Coordinator
from resume_kit.errors import CheckpointDamaged, Problem, ResumeRefused, UsageError
from resume_kit.resuming import load, prove
from resume_kit.resuming.policy import Policy, agrees
from resume_kit.resuming.preflight import (
    LiveRun,
    ReadOrder,
    check_own_records,
    check_whole,
    compare_runs,
    plan_reading,
    state_to_restore,
)
from resume_kit.resuming.report import Report


@dataclass(frozen=True)
class Resumption:
    """A proved checkpoint: its manifest, and the RNG digests that this rank must have at its first batch."""

    directory: Path
    manifest: Manifest
    rng_digests: Mapping[str, str]


@dataclass(frozen=True)
class _Examined:
    directory: Path
    manifest: Manifest
    index: RankIndex
    order: ReadOrder
    staged: load.StagedState
    state: Mapping[str, Any]


class Resumer:
    """One attempt to resume. `gate` runs the pinned forward/backward, None where the policy has it off.

    `restore_run` puts back what is not the engine's: data position and the user's own state.
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
        restore_run: Callable[[Manifest], None],
        data_position: Callable[[], int],
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
        self._at = at

    def resume(self, last_commit: int | None) -> Resumption | None:
        """The newest good checkpoint, loaded and proved; None for a run that has none yet. Collective.

        `last_commit` is the newest commit that the journal tells of: a run that has committed never starts anew.
        Raises `ResumeRefused` when a check says no, and `CheckpointDamaged` when no good checkpoint is left or the
        policy forbids to fall back.
        """
        examined = self._elect(last_commit)
        if examined is None:
            self._report.decision = "no checkpoint yet: training starts at step 0"
            return None
        self._load(examined)
        self._prove(examined)
        self._run_gate(examined)
        return self._hand_over(examined)

    def _elect(self, last_commit: int | None) -> _Examined | None:
        candidates = self._coordinator.on_rank_zero("elect", lambda: names.checkpoint_steps(self._run)[::-1])
        if self._at is not None:
            if self._at not in candidates:
                raise UsageError(f"there is no checkpoint of step {self._at}; there are {candidates or 'none'}")
            candidates = [self._at]
        damage: list[Problem] = []
        for step in candidates:
            directory = self._run / names.step_directory(step)
            try:
                return self._examine(directory)
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
        return None

    def _examine(self, directory: Path) -> _Examined:
        """Preflight and reading, up to the point where every rank holds all of its own bytes, checked."""
        report, coordinator, rank = self._report, self._coordinator, self._coordinator.rank
        report.checkpoint = directory.name
        with report.timed("preflight"):
            manifest = read_manifest_alike(directory, coordinator)
            refusals, warnings = compare_runs(manifest, self._live, self._policy)

            def local() -> None:
                problems = list(refusals)
                damaged: list[Problem] = []
                if not any(problem.check == "topology" for problem in refusals):
                    try:
                        found.append(plan_reading(directory, manifest, self._adapter, rank))
                        problems += check_own_records(manifest, found[0].indices[rank], self._adapter)
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
                        f"{directory.name} must not be resumed by this run", [*_no_twins(problems), *damaged]
                    )

            found: list[ReadOrder] = []
            coordinator.round("preflight", local, _nothing)
        for problem in warnings:
            report.warned("preflight", problem.check, f"{problem.where}: {problem.what}")
        report.passed("preflight", "ownership", f"{len(manifest.tensors)} tensors, each element owned exactly once")
        report.passed("preflight", "model and optimizer", f"{len(self._live.description.weights)} weights as saved")
        report.passed("preflight", "data", f"dataset and order as saved, position {manifest.data['position']:,}")
        report.passed("preflight", "rng records", f"{manifest.world_size} ranks")
        with report.timed("load"):
            staged: list[load.StagedState] = []
            coordinator.round("read", lambda: staged.append(load.stage_reading(directory, found[0])), _nothing)
        state = state_to_restore(manifest, self._live.description, self._adapter.state())
        return _Examined(directory, manifest, found[0].indices[rank], found[0], staged[0], state)

    def _load(self, examined: _Examined) -> None:
        report, coordinator = self._report, self._coordinator
        with report.timed("load"):
            coordinator.round(
                "write",
                lambda: load.write(self._adapter, examined.manifest, examined.staged, coordinator.rank),
                _nothing,
            )
            self._adapter.publish()
            coordinator.round("state", lambda: self._adapter.load_state(examined.state), _nothing)
            read = sum(coordinator.gather("bytes", lambda: examined.order.nbytes))
        report.passed("load", "bytes read", f"{read:,} over all ranks, every block's digest checked")

    def _prove(self, examined: _Examined, stage: str = "prove") -> None:
        report, coordinator, manifest = self._report, self._coordinator, examined.manifest
        with report.timed(stage):
            measured: list[prove.Measurement] = []
            coordinator.round("measure", lambda: measured.append(prove.measure(self._adapter, manifest)), _nothing)
            proof = prove.judge(measured[0], manifest, examined.index)
            problems = [*proof.problems, *prove.prove_state(self._adapter, examined.state, coordinator.rank)]
            coordinator.round(stage, lambda: _refuse_if(problems, "the live state is not the saved state"), _nothing)
            coordinator.round(
                f"{stage}: steps",
                lambda: [self._adapter.step, self._adapter.learning_rate],
                prove.all_agree("step and LR"),
            )
        report.passed(
            stage, "fingerprints", f"{proof.tensors} tensors over all ranks, {proof.copies} whole copies a rank"
        )
        report.passed(
            stage,
            "steps, LR, groups",
            f"step {self._adapter.step}, LR {self._adapter.learning_rate:.6g}, equal on all ranks",
        )

    def _run_gate(self, examined: _Examined) -> None:
        report, recorded = self._report, examined.manifest.gate
        if self._gate is None:
            report.warned("gate", "forward/backward", "switched off by the policy")
            return
        if recorded is None:
            what = "the checkpoint was saved with the gate off and holds no record of it"
            remedy = "set the policy `gate: false` for this resume; the next save records it"
            raise ResumeRefused("the gate cannot run", [Problem("gate", examined.directory.name, what, remedy)])
        expected = canonical.decode(recorded)
        tolerance, reason = choose_tolerance(self._policy, self._adapter.device)
        before = rng.capture(self._adapter.rng_trackers())
        position = self._data_position()
        with report.timed("gate"):
            result = self._gate()
            found = {"loss": result.loss, "grad_norm": result.grad_norm}
            problems = [
                Problem(
                    "gate",
                    name,
                    f"{value!r}, at the save {expected[name]!r} (tolerance {tolerance}: {reason})",
                    "the state is as saved, so the computation differs: model code, attention, kernels or flags",
                )
                for name, value in found.items()
                if not (value == value and agrees(value, expected[name], tolerance))
            ]
            if rng.capture(self._adapter.rng_trackers()) != before:
                problems.append(Problem("gate", "side effects", "the forward/backward changed the RNG", "report this"))
            if self._data_position() != position:
                problems.append(Problem("gate", "side effects", "the forward/backward moved the data position"))
            self._coordinator.round(
                "gate", lambda: _refuse_if(problems, "the forward/backward is not as recorded"), _nothing
            )
            self._coordinator.round("gate: alike", lambda: found, _alike(tolerance))
        report.passed("gate", "loss", f"{result.loss!r} ({tolerance}: {reason})")
        report.passed("gate", "gradient norm", f"{result.grad_norm!r}")
        self._prove(examined, "prove again")

    def _hand_over(self, examined: _Examined) -> Resumption:
        """Data position, user state and, last of all, RNG."""
        report, coordinator, manifest = self._report, self._coordinator, examined.manifest
        trackers = self._adapter.rng_trackers()

        def restore() -> str:
            self._restore_run(manifest)
            rng.restore(examined.index.rng, trackers)
            live = rng.digest(rng.capture(trackers))
            if live != manifest.ranks[coordinator.rank].rng_digest:
                problem = Problem("rng", f"rank {coordinator.rank}", "the generators are not as saved", "report this")
                raise ResumeRefused("the RNG could not be restored", [problem])
            return live

        coordinator.round("hand-over", restore, _nothing)
        report.passed("hand-over", "data", f"position {manifest.data['position']:,}, next batch as saved")
        report.passed("hand-over", "rng digests", f"{coordinator.world_size} ranks, taken after all set-up")
        report.step = manifest.step
        report.decision = f"training goes on after step {manifest.step}, proved"
        return Resumption(examined.directory, manifest, rng.digests(examined.index.rng))


def read_manifest_alike(directory: Path, coordinator: Coordinator) -> Manifest:
    """The manifest, read by every rank; all must see the same bytes and the same place."""
    mine: list[Manifest] = []

    def local() -> list[str]:
        mine.append(read_manifest(directory))
        return [directory.name, canonical.digest(mine[0].to_bytes())]

    coordinator.round("manifest", local, prove.all_agree("the manifest (is the run directory shared by all hosts?)"))
    return mine[0]


def choose_tolerance(policy: Policy, device: torch.device) -> tuple[str, str]:
    """(name of the tolerance, why): `auto` is exact where the hardware repeats itself bit for bit."""
    if policy.tolerance != "auto":
        return policy.tolerance, "set by the policy"
    if device.type == "cpu":
        return "exact", "on CPUs"
    if torch.are_deterministic_algorithms_enabled():
        return "exact", "deterministic mode"
    return "standard", "deterministic algorithms are off"


def _alike(tolerance: str) -> Callable[[list[dict[str, float]]], None]:
    def combine(found: list[dict[str, float]]) -> None:
        for rank, values in enumerate(found):
            for name, value in values.items():
                if not agrees(value, found[0][name], tolerance):
                    what = f"{name} {value!r}, on rank 0 {found[0][name]!r}, for the same batch and seed"
                    raise ResumeRefused(
                        "the ranks compute different things",
                        [Problem("gate", f"rank {rank}", what, "a rank runs other code, flags or hardware")],
                    )

    return combine


def _nothing(_: list[Any]) -> None:
    """The combiner of rounds whose point is that every rank got here."""


def _refuse_if(problems: list[Problem], headline: str) -> None:
    if problems:
        raise ResumeRefused(headline, problems)


def _no_twins(problems: list[Problem]) -> list[Problem]:
    return list(dict.fromkeys(problems))
