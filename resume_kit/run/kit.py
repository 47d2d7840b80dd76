"""The kit: what a training script holds. Make it from engine, data and policy; resume; tell it each step's loss."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch

from resume_kit.checkpoint import canonical
from resume_kit.checkpoint.manifest import Manifest
from resume_kit.engines.adapter import Forward, GateResult
from resume_kit.engines.choose import adapter_for
from resume_kit.engines.coordination import Coordinator
from resume_kit.engines.forward import to_device
from resume_kit.environment import process_started, software_versions
from resume_kit.errors import CheckpointDamaged, Problem, ResumeKitError, Unreadable, UsageError
from resume_kit.policy.judgement import Judgement
from resume_kit.policy.policy import Policy
from resume_kit.recovery.events import JournalLines
from resume_kit.recovery.intervals import blended_mtbf
from resume_kit.recovery.rules import require_hope
from resume_kit.resuming.audit import Lineage, ReplayAudit, recorded_steps
from resume_kit.resuming.gating import choose_tolerance
from resume_kit.resuming.report import Report
from resume_kit.resuming.restored import applied
from resume_kit.resuming.resume import Resumer
from resume_kit.run.agreement import one_run
from resume_kit.run.attempt import Attempt
from resume_kit.run.boundary import Boundary
from resume_kit.run.contents import Contents, states_of
from resume_kit.run.facts import Facts
from resume_kit.run.figures import Steps
from resume_kit.run.guards import Guards
from resume_kit.run.hand_over import HandOver, restore_data_and_user_state
from resume_kit.run.journal import last_commit, number
from resume_kit.run.orders import obeyed_before
from resume_kit.run.protocols import ResumableData, Stateful
from resume_kit.run.retention import Retention
from resume_kit.run.saves import Saves
from resume_kit.run.schedule import Every
from resume_kit.run.stopping import Deadline
from resume_kit.saving.options import Returns, Saving
from resume_kit.saving.save import Commit

T = TypeVar("T")


class ResumeKit:
    """Saves on a schedule, resumes with proof, journals every step. Make it before any training, on every rank.

    engine: what `deepspeed.initialize` returned, or a `MegatronEngine`.
    data: the `ResumableLoader` that feeds the training loop.
    policy: what may differ on resume; the default is strict.
    run_dir: a directory that all ranks share.
    save_every: optimizer steps between saves; or a time between them, "90s", "15m", "2h"; or "auto", as often as the
        measured cost of a save and the failures to expect call for. None leaves saving to `save()`.
    mtbf_hours: hours between failures of this job, for "auto"; None judges by the run's own record.
    saving: how saves go; by default they overlap training.
    forward: `forward(module, batch) -> loss` for the gate; the default suits transformers models with DeepSpeed and
        GPT models with Megatron, where stages before the last return their hidden state.
    config: the run's own configuration, pinned and compared on resume. Plain values.
    state: further objects with state_dict/load_state_dict of plain values, alike on all ranks. They come back as
        plain Python values with sorted keys.
    timeout: bound in seconds of every wait for another rank.
    hang_after: seconds without progress after which a rank ends itself, with its stacks; None never does.
    deadline: Unix seconds by which this process will be ended: the run is saved and stops before. None takes
        RESUME_KIT_DEADLINE or the end of the SLURM job from the environment; `math.inf` stops for neither.
    give_up_after: so many attempts that failed at the same step are followed by no other.
    take_over: take the run directory from an attempt that seems alive; a start that SLURM or torchrun repeats does not.
    show: called on rank 0 with the text of each report.

    SIGTERM, SIGUSR1, SIGUSR2, `resume-kit stop` and the deadline make all ranks save at the end of the step and raise
    `Preempted`, a SystemExit. Without a `close()` the signals stay with the kit.

    Raises `UsageError` for an engine, directory or configuration that cannot be used, `RunTaken` where another attempt
    holds the run directory, `GivenUp` where another start is pointless.
    """

    GATE_SAMPLES = 1

    def __init__(
        self,
        engine: Any,
        data: ResumableData,
        policy: Policy | None = None,
        *,
        run_dir: str | Path,
        save_every: int | str | None = None,
        mtbf_hours: float | None = None,
        saving: Saving | None = None,
        retention: Retention | None = None,
        forward: Forward | None = None,
        config: Mapping[str, Any] | None = None,
        state: Mapping[str, Stateful] | None = None,
        timeout: float = 600.0,
        hang_after: float | None = None,
        deadline: float | None = None,
        give_up_after: int = 3,
        take_over: bool = False,
        show: Callable[[str], None] = print,
    ) -> None:
        if give_up_after < 1:
            raise UsageError(f"give_up_after is {give_up_after}; it must be at least 1")
        began, every, ends = time.time(), Every.parse(save_every), Deadline.of(deadline)
        self.policy = policy or Policy()
        self.report: Report | None = None
        self._adapter = adapter_for(engine)
        self._coordinator = Coordinator.of_default_group(timeout=timeout)
        self._data = data
        self._saving = saving or Saving()
        self._forward = forward or self._adapter.default_forward
        self._user_state = dict(state or {})
        self._show = show
        self._facts = Facts.gather(self._adapter, self._coordinator, data, config or {}, software_versions())
        given = {
            "policy": self.policy.to_mapping(),
            "save_every": save_every,
            "saving": asdict(self._saving),
            "run_dir": str(run_dir),
            "mtbf_hours": mtbf_hours,
            "timeout": timeout,
            "hang_after": hang_after is None,
            "give_up_after": give_up_after,
        }
        self._coordinator.round(
            "same run on every rank",
            lambda: self._facts.digests({**given, "state=": states_of(self._user_state)}),
            one_run,
        )
        ranks = self._coordinator.world_size
        mtbf = self._coordinator.on_rank_zero(
            "earlier attempts", lambda: blended_mtbf(require_hope(Path(run_dir), give_up_after).pasts, ranks)
        )
        self._attempt = Attempt(Path(run_dir), self._coordinator, take_over=take_over, give_up_after=give_up_after)
        self._guards = Guards(self._attempt, self._coordinator, hang_after)
        self._attempt.start(
            {
                **self._facts.journaled(),
                "topology": self._facts.topology,
                "config": canonical.encode(self._facts.pinned["config"], "config"),
                "process_started": process_started(),
            }
        )
        self._audit: ReplayAudit | None = None
        self._contents = Contents(
            self._attempt,
            self._adapter,
            data,
            self._facts,
            self._user_state,
            self._run_gate if self.policy.gate else None,
        )
        self._hand_over = HandOver(self._contents, self._coordinator)
        self._steps = Steps(self._adapter, data, self._attempt)
        self._adapter.before_update(self._contents.kept.scale_rates)
        self._saves = Saves(
            self.run_dir,
            self._adapter,
            self._coordinator,
            self._facts.description,
            self._saving,
            attempt=self._attempt,
            retention=retention or Retention(),
            build=self._contents.request,
            show=show,
        )
        self._boundary = Boundary(
            self._attempt,
            self._coordinator,
            self._saves,
            self._guards,
            every=every,
            deadline=ends,
            mtbf=mtbf if mtbf_hours is None else mtbf_hours * 3600,
            show=show,
        )
        self._seconds = {"before_kit": began - process_started(), "opening": time.time() - began}

    @property
    def run_dir(self) -> Path:
        return self._attempt.run

    @property
    def attempt(self) -> int:
        """Number of this start of the run, counted from 1."""
        return self._attempt.number

    @property
    def step_number(self) -> int:
        """Optimizer steps taken so far."""
        return self._adapter.step

    @property
    def last_commit(self) -> Commit | None:
        """The newest checkpoint that this attempt is known to have committed."""
        return self._saves.last

    def resume(self, *, at: int | None = None) -> int:
        """Bring the run back and prove it; return the number of optimizer steps already taken (0 for a new run).

        `at` names the step of the checkpoint to take instead of the newest good one. Where SLURM or torchrun starts the
        same command again it is not obeyed once more: the run then goes on from the newest. Collective.
        Raises `ResumeRefused` or `CheckpointDamaged`, alike on all ranks, when training must not go on, `Unreadable` or
        `TooLittleMemory` for what may pass, and `Preempted` when a stop was asked for meanwhile.
        """
        report = Report(run=str(self.run_dir), attempt=self.attempt)
        self._guards.watchdog.arm()
        with self._guards.waiting("in resume()", sign=lambda: len(report.checks)):
            step = self._resume(report, at)
            self._boundary.begin(step)
        return step

    def _resume(self, report: Report, at: int | None) -> int:
        began = time.time()
        self._saves.wait()
        self._saves.forget()
        self._audit = None  # no step() before this has come to a good end
        self.report = report
        before = None if at is None else self._of_journal("orders", lambda: obeyed_before(self.run_dir, at))
        order = at if before is None else None
        resumer = Resumer(
            self.run_dir,
            adapter=self._adapter,
            coordinator=self._coordinator,
            policy=self.policy,
            live=self._facts.live(),
            report=report,
            gate=self._contents.gate,
            restore_run=self._restore_run,
            data_position=lambda: self._data.position,
            seed=int(self._facts.fingerprint.get("seed", 0)),
            at=order,
        )
        try:
            self._coordinator.round("host memory", self._saves.require_memory, lambda _: None)
            resumption = resumer.resume(self._of_journal("last commit", lambda: last_commit(self.run_dir)))
        except ResumeKitError as error:
            report.failed("refused", error.problems)
            report.decision = f"refused: {error.headline}"
            self._attempt.refuse(error, report)
            if self._coordinator.rank == 0:
                self._show(report.render())
            raise
        step = resumption.manifest.step if resumption else 0
        judgement = resumption.judgement if resumption else None
        tolerance, _ = choose_tolerance(self.policy, self._adapter.device, judgement)
        if resumption is not None:
            self._contents.lineage = Lineage.of_state(canonical.decode(resumption.manifest.state)).after(
                resumption.judgement, step
            )
        recorded, unreadable = self._of_journal(
            "journal", lambda: _recorded(self.run_dir, step, self._contents.lineage)
        )
        whole = sum("loss" in event for event in recorded)
        what = f"{whole} with all figures, tolerance {tolerance}; {len(recorded) - whole} with their samples only"
        report.passed("replay audit", "steps to compare", what)
        if unreadable:
            report.warned("replay audit", "journal", f"{unreadable} lines cannot be read; their steps are not compared")
        if resumption is None:
            self._contents.kept.begin(applied(self.policy))
        else:
            if before is not None:
                what = f"step {at}: attempt {before} of this very job went back there; this one goes on from the newest"
                report.warned("hand-over", "asked for", what)
            seconds = {**self._seconds, "resume": time.time() - began}
            self._hand_over.go_on_from(resumption, report, seconds, at=order)
            self._saves.prepare()
        self._steps.start()
        self._audit = ReplayAudit(
            {int(event["step"]): event for event in recorded}, tolerance, self.policy.replay == "stop"
        )
        if self._coordinator.rank == 0:
            self._show(report.render())
        return step

    def step(self, loss: torch.Tensor | float | None) -> dict[str, Any] | None:
        """Tell the kit the loss of a micro-batch, after `engine.step()`. Collective.

        With Megatron: the mean over the step's micro-batches, once a step; None on ranks that have no loss.
        Returns None inside an accumulation, else the journaled record of the optimizer step: step, loss (mean over
        micro-batches and ranks), grad_norm, lr, samples, batch. Saves when the schedule says so. Where the run is to
        stop it saves and raises `Preempted`, and `Fenced` where a newer attempt has taken over; alike on all ranks.
        """
        if self._audit is None:
            raise UsageError("call resume() before the first step(); it returns 0 for a new run")
        self._steps.add(loss)
        self.alive()
        if not self._adapter.at_step_boundary:
            return None
        if self._hand_over.unchecked:
            raise UsageError("the first batch did not come from an iterator of the kit's data made after resume()")
        self._contents.carried = ()
        self._contents.kept.reached(self._adapter.step)
        with self._guards.watchdog.within("in the step's exchange"):
            wish = self._boundary.wish(self._adapter.step)
            record, figures = self._steps.record(
                self._contents.kept.factor(self._adapter.step), self._saves.state, wish
            )
        warnings = self._audited(record)
        self._attempt.record_soon("step", record)
        for problem in warnings:
            if self._coordinator.rank == 0:
                self._show(f"warning: {problem}")
        with self._guards.waiting("saving"):
            stopping = bool(figures.agreed.stop)
            self._saves.stepped(figures.saved, updated=self._adapter.updates > 0, stopping=stopping)
            self._boundary.passed(record["step"], figures.agreed)
        return record

    def alive(self) -> None:
        """Tell the watchdog that this rank makes progress, in loops that do not call `step()`. Local, and free."""
        self._guards.watchdog.alive()

    def save(self, *, returns: Returns = "committed") -> Commit | None:
        """Take a checkpoint now, between optimizer steps. Collective. Waits for a save that is under way.

        Returns once it is committed, or with `returns` earlier and nothing, see `Saving`; `wait()` gets the commit.
        Raises `InconsistentState` or `SaveFailed`, alike on all ranks; the last commit stands.
        """
        if self._audit is None:
            raise UsageError("call resume() before save()")
        with self._guards.waiting("in save()"):
            return self._saves.now(returns)

    def wait(self) -> Commit | None:
        """Wait until the save that is under way is committed; None where there is none. Collective.

        A `step()` may have found it committed already, see `last_commit`. Raises its failure, alike on all ranks.
        """
        with self._guards.waiting("in wait()"):
            return self._saves.wait()

    def close(self) -> None:
        """Wait for a save that is under way, and journal the end of the run. Call it once training is done."""
        step, replayed = self._adapter.step, self._audit.checked if self._audit else 0
        with self._guards.waiting("in close()"):
            self._saves.close()
            self._attempt.record("end", {"step": step, "samples": self._data.position, "steps_replayed": replayed})
        self._attempt.ended("finished", step=step)
        self._contents.kept.end()
        self._guards.close()
        self._coordinator.depart()

    def _of_journal(self, name: str, read: Callable[[], T]) -> T:
        """What rank 0 reads in the journal. Torn lines are passed over: a fault is not of what was written there."""

        def on_rank_zero() -> T:
            try:
                return read()
            except CheckpointDamaged as error:
                raise Unreadable(error.headline, error.problems) from error

        return self._coordinator.on_rank_zero(name, on_rank_zero)

    def _audited(self, record: Mapping[str, Any]) -> list[Problem]:
        assert self._audit is not None
        try:
            return self._audit.compare(record)
        except ResumeKitError as error:
            assert self.report is not None
            self._attempt.refuse(error, self.report)
            raise

    def _run_gate(self) -> GateResult:
        batch = self._data.pinned_batch(self.GATE_SAMPLES)
        return self._adapter.run_gate(self._forward, to_device(batch, self._adapter.device))

    def _restore_run(self, manifest: Manifest, judgement: Judgement) -> None:
        restore_data_and_user_state(self._data, self._user_state, manifest, judgement, self.policy)


def _recorded(run: Path, step: int, lineage: Lineage) -> tuple[list[dict[str, Any]], int]:
    """What is recorded of the steps after `step`, and how many lines cannot be read: in one pass."""
    lines = JournalLines(run, steps_after=step)
    recorded = recorded_steps(lines, step, lineage)
    return [{name: number(value) for name, value in event.items()} for event in recorded], lines.unreadable
