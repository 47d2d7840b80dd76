"""The kit: what a training script holds. Make it from engine, data and policy; resume; tell it each step's loss."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from resume_kit.checkpoint import canonical
from resume_kit.checkpoint.manifest import Manifest
from resume_kit.engines.adapter import Forward, GateResult
from resume_kit.engines.choose import adapter_for
from resume_kit.engines.coordination import Coordinator
from resume_kit.engines.description import from_plain, to_plain, united
from resume_kit.engines.forward import to_device
from resume_kit.environment import software_versions
from resume_kit.errors import Problem, ResumeKitError, ResumeRefused, UsageError
from resume_kit.policy.judgement import Judgement
from resume_kit.policy.policy import Policy
from resume_kit.resuming.audit import Lineage, ReplayAudit, recorded_steps
from resume_kit.resuming.gating import choose_tolerance
from resume_kit.resuming.preflight import LiveRun
from resume_kit.resuming.report import Report
from resume_kit.resuming.restored import applied
from resume_kit.resuming.resume import Resumer, Resumption
from resume_kit.resuming.streams import Carried, overwritten
from resume_kit.run.agreement import gate_record, one_run, require_finite
from resume_kit.run.attempt import Attempt
from resume_kit.run.figures import Steps
from resume_kit.run.hand_over import restore_data_and_user_state
from resume_kit.run.journal import last_commit, number, read_journal, unreadable_lines
from resume_kit.run.kept import KeptState
from resume_kit.run.protocols import ResumableData, Stateful
from resume_kit.run.retention import Retention, set_aside
from resume_kit.run.saves import Saves
from resume_kit.saving.capture import SaveRequest
from resume_kit.saving.options import Returns, Saving
from resume_kit.saving.save import Commit


class ResumeKit:
    """Saves on a schedule, resumes with proof, journals every step. Make it before any training, on every rank.

    engine: what `deepspeed.initialize` returned, or a `MegatronEngine`.
    data: the `ResumableLoader` that feeds the training loop.
    policy: what may differ on resume; the default is strict.
    run_dir: a directory that all ranks share.
    save_every: optimizer steps between saves; None leaves saving to `save()`.
    saving: how saves go; by default they overlap training.
    forward: `forward(module, batch) -> loss` for the gate; the default suits transformers models with DeepSpeed and
        GPT models with Megatron, where stages before the last return their hidden state.
    config: the run's own configuration, pinned and compared on resume. Plain values.
    state: further objects with state_dict/load_state_dict of plain values, alike on all ranks. They come back as
        plain Python values with sorted keys.
    timeout: bound in seconds of every wait for another rank.
    show: called on rank 0 with the text of each report.

    Raises `UsageError` for an engine, directory or configuration that cannot be used.
    """

    GATE_SAMPLES = 1

    def __init__(
        self,
        engine: Any,
        data: ResumableData,
        policy: Policy | None = None,
        *,
        run_dir: str | Path,
        save_every: int | None = None,
        saving: Saving | None = None,
        retention: Retention | None = None,
        forward: Forward | None = None,
        config: Mapping[str, Any] | None = None,
        state: Mapping[str, Stateful] | None = None,
        timeout: float = 600.0,
        show: Callable[[str], None] = print,
    ) -> None:
        if save_every is not None and save_every < 1:
            raise UsageError(f"save_every is {save_every}; give a number of steps, or leave it out")
        self.policy = policy or Policy()
        self.report: Report | None = None
        self._adapter = adapter_for(engine)
        self._coordinator = Coordinator.of_default_group(timeout=timeout)
        self._data = data
        self._save_every = save_every
        self._saving = saving or Saving()
        self._forward = forward or self._adapter.default_forward
        self._user_state = dict(state or {})
        self._show = show
        self._description = self._adapter.describe()
        if self._description.partial:
            part = to_plain(self._description)
            self._description = from_plain(self._coordinator.round("describe the model", lambda: part, united))
        self._versions = software_versions()
        self._pinned = {
            **self._description.pinned,
            "config": canonical.decode(canonical.encode(dict(config or {}), "config")),
            "groups": [dict(group) for group in self._description.groups],
            "versions": self._versions,
        }
        self._fingerprint = data.fingerprint()
        self._coordinator.round("same run on every rank", lambda: self._identity(str(run_dir)), one_run)
        self._attempt = Attempt(Path(run_dir), self._coordinator)
        self._attempt.start(
            {
                **self._what_runs(),
                "topology": self._adapter.topology,
                "config": canonical.encode(self._pinned["config"], "config"),
            }
        )
        self._audit: ReplayAudit | None = None
        self._unchecked_rng = False
        self._carried: tuple[Carried, ...] = ()
        self._lineage = Lineage()
        self._steps = Steps(self._adapter, data, self._attempt)
        self._kept = KeptState()
        self._adapter.before_update(self._kept.scale_rates)
        self._saves = Saves(
            self.run_dir,
            self._adapter,
            self._coordinator,
            self._description,
            self._saving,
            attempt=self._attempt,
            retention=retention or Retention(),
            build=self._request,
            show=show,
        )

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

        `at` names the step of the checkpoint to take instead of the newest good one. Collective.
        Raises `ResumeRefused` or `CheckpointDamaged`, alike on all ranks, when training must not go on.
        """
        self._saves.wait()
        self._saves.forget()
        self._audit = None  # no step() before this has come to a good end
        report = Report(run=str(self.run_dir), attempt=self.attempt)
        self.report = report
        resumer = Resumer(
            self.run_dir,
            adapter=self._adapter,
            coordinator=self._coordinator,
            policy=self.policy,
            live=LiveRun(self._description, self._pinned, self._versions, self._data_now(), self._adapter.topology),
            report=report,
            gate=self._run_gate if self.policy.gate else None,
            restore_run=self._restore_run,
            data_position=lambda: self._data.position,
            seed=int(self._fingerprint.get("seed", 0)),
            at=at,
        )
        try:
            self._coordinator.round("host memory", self._saves.require_memory, lambda _: None)
            resumption = resumer.resume(
                self._coordinator.on_rank_zero("last commit", lambda: last_commit(self.run_dir))
            )
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
            self._lineage = Lineage.of_state(canonical.decode(resumption.manifest.state)).after(
                resumption.judgement, step
            )
        recorded, unreadable = self._coordinator.on_rank_zero(
            "journal", lambda: (_recorded(self.run_dir, step, self._lineage), unreadable_lines(self.run_dir))
        )
        whole = sum("loss" in event for event in recorded)
        what = f"{whole} with all figures, tolerance {tolerance}; {len(recorded) - whole} with their samples only"
        report.passed("replay audit", "steps to compare", what)
        if unreadable:
            report.warned("replay audit", "journal", f"{unreadable} lines cannot be read; their steps are not compared")
        if resumption is None:
            self._kept.begin(applied(self.policy))
        else:
            self._go_on_from(resumption, report)
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
        micro-batches and ranks), grad_norm, lr, samples, batch. Saves when the schedule says so.
        """
        if self._audit is None:
            raise UsageError("call resume() before the first step(); it returns 0 for a new run")
        self._steps.add(loss)
        if not self._adapter.at_step_boundary:
            return None
        if self._unchecked_rng:
            raise UsageError("the first batch did not come from an iterator of the kit's data made after resume()")
        self._carried = ()
        self._kept.reached(self._adapter.step)
        record, saved = self._steps.record(self._kept.factor(self._adapter.step), self._saves.state)
        warnings = self._audited(record)
        self._attempt.record_soon("step", record)
        for problem in warnings:
            if self._coordinator.rank == 0:
                self._show(f"warning: {problem}")
        self._saves.stepped(saved, updated=self._adapter.updates > 0)
        if self._save_every and record["step"] % self._save_every == 0:
            self._saves.scheduled(record["step"])
        return record

    def save(self, *, returns: Returns = "committed") -> Commit | None:
        """Take a checkpoint now, between optimizer steps. Collective. Waits for a save that is under way.

        Returns once it is committed, or with `returns` earlier and nothing, see `Saving`; `wait()` gets the commit.
        Raises `InconsistentState` or `SaveFailed`, alike on all ranks; the last commit stands.
        """
        if self._audit is None:
            raise UsageError("call resume() before save()")
        return self._saves.now(returns)

    def wait(self) -> Commit | None:
        """Wait until the save that is under way is committed; None where there is none. Collective.

        A `step()` may have found it committed already, see `last_commit`. Raises its failure, alike on all ranks.
        """
        return self._saves.wait()

    def _request(self, with_gate: bool) -> SaveRequest:
        """This rank's part of a save, apart from the engine's tensors."""
        step = self._adapter.step
        self._adapter.settle()
        began = time.perf_counter()
        gate = self._run_gate() if self.policy.gate and with_gate else None
        gate_seconds = time.perf_counter() - began
        require_finite(gate)
        return SaveRequest(
            directory=self.run_dir,
            run_id=self._attempt.run_id,
            attempt=self.attempt,
            step=step,
            description=self._description,
            state={
                **self._adapter.state(),
                **self._kept.to_plain(),
                "lineage": self._lineage.to_plain(),
                "user": {name: s.state_dict() for name, s in self._user_state.items()},
            },
            updates=self._adapter.updates - self._kept.moments_since,
            carried=self._carried,
            data={
                **self._data_now(),
                "position": self._data.position,
                "next_batch": self._data.batch_digest(self._data.position),
            },
            pinned=self._pinned,
            gate=gate_record(gate, switched_on=self.policy.gate),
            gate_seconds=gate_seconds,
        )

    def close(self) -> None:
        """Wait for a save that is under way, and journal the end of the run. Call it once training is done."""
        self._saves.close()
        replayed = self._audit.checked if self._audit else 0
        self._attempt.record(
            "end", {"step": self._adapter.step, "samples": self._data.position, "steps_replayed": replayed}
        )
        self._coordinator.depart()

    def _go_on_from(self, resumption: Resumption, report: Report) -> None:
        manifest = resumption.manifest
        self._kept.restore(resumption.state, manifest.step)
        self._carried = resumption.carried
        aside = self._coordinator.on_rank_zero(
            "set aside", lambda: set_aside(self.run_dir, after=manifest.step, attempt=self.attempt)
        )
        if aside:
            steps = ", ".join(map(str, aside))
            report.warned("hand-over", "set aside", f"later checkpoints of steps {steps} moved to set-aside/")
        self._attempt.resumed(
            report,
            {
                **self._what_runs(),
                "step": manifest.step,
                "target_step": manifest.step + 1,
                "lineage": self._lineage.to_plain(),
            },
        )
        self._data.before_first_fetch = lambda: self._check_rng(resumption)
        self._unchecked_rng = True

    def _check_rng(self, resumption: Resumption) -> None:
        """At the first batch: nobody has touched a generator since it was restored."""

        def local() -> None:
            problems = overwritten(self._adapter, resumption.rng_digests, self._coordinator.rank)
            if problems:
                raise ResumeRefused("the restored RNG was overwritten", problems)

        self._unchecked_rng = False
        self._data.before_first_fetch = None
        try:
            self._coordinator.round("first batch", local, lambda _: None)
        except ResumeKitError as error:
            assert self.report is not None
            self._attempt.refuse(error, self.report)
            raise

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

    def _identity(self, run_dir: str) -> dict[str, str]:
        """Digests of all that every rank must have been given alike."""
        user = {name: holder.state_dict() for name, holder in self._user_state.items()}
        given = {
            **self._pinned,
            "dataset": self._fingerprint,
            "global batch size": self._data.global_batch_size,
            "policy": self.policy.to_mapping(),
            "save_every": self._save_every,
            "saving": asdict(self._saving),
            "run_dir": run_dir,
            "state=": user,
        }
        return {name: canonical.value_digest(value) for name, value in given.items()}

    def _data_now(self) -> dict[str, Any]:
        return {"fingerprint": self._fingerprint, "global_batch_size": self._data.global_batch_size}

    def _what_runs(self) -> dict[str, Any]:
        return {
            "dataset": self._fingerprint,
            "global_batch_size": self._data.global_batch_size,
            "world_size": self._coordinator.world_size,
            "versions": self._versions,
        }


def _recorded(run: Path, step: int, lineage: Lineage) -> list[dict[str, Any]]:
    recorded = recorded_steps(read_journal(run), step, lineage)
    return [{name: number(value) for name, value in event.items()} for event in recorded]
