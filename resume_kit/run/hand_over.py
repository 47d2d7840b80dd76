"""What is not the engine's comes back last: data position and the user's state; then training goes on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from resume_kit.checkpoint import canonical
from resume_kit.checkpoint.manifest import Manifest
from resume_kit.engines.coordination import Coordinator
from resume_kit.errors import Problem, ResumeKitError, ResumeRefused
from resume_kit.policy.judgement import Judgement
from resume_kit.policy.policy import Policy
from resume_kit.resuming.report import Report
from resume_kit.resuming.resume import Resumption
from resume_kit.resuming.streams import overwritten
from resume_kit.run.contents import Contents
from resume_kit.run.protocols import ResumableData, Stateful
from resume_kit.run.retention import set_aside


@dataclass(eq=False)
class HandOver:
    """Leads from a proved checkpoint to its next step. `unchecked`: the first batch has not been asked for yet."""

    contents: Contents
    coordinator: Coordinator
    unchecked: bool = False

    def go_on_from(
        self, resumption: Resumption, report: Report, seconds: Mapping[str, float], *, at: int | None = None
    ) -> None:
        """Journal the resume; `seconds` by phase, besides the report's. `at`: the step that was asked for by number.
        The RNG is looked at once more at the first batch. Collective.
        """
        contents, attempt, manifest = self.contents, self.contents.attempt, resumption.manifest
        contents.kept.restore(resumption.state, manifest.step)
        contents.carried = resumption.carried
        aside = self.coordinator.on_rank_zero(
            "set aside", lambda: set_aside(attempt.run, after=manifest.step, attempt=attempt.number)
        )
        if aside:
            steps = ", ".join(map(str, aside))
            report.warned("hand-over", "set aside", f"later checkpoints of steps {steps} moved to set-aside/")
        attempt.resumed(
            report,
            {
                **contents.facts.journaled(),
                "step": manifest.step,
                "at": at,
                "target_step": manifest.step + 1,
                "lineage": contents.lineage.to_plain(),
                "seconds": {**seconds, **report.seconds},
            },
        )
        contents.data.before_first_fetch = lambda: self._check_rng(resumption, report)
        self.unchecked = True

    def _check_rng(self, resumption: Resumption, report: Report) -> None:
        """At the first batch: nobody has touched a generator since it was restored."""

        def local() -> None:
            problems = overwritten(self.contents.adapter, resumption.rng_digests, self.coordinator.rank)
            if problems:
                raise ResumeRefused("the restored RNG was overwritten", problems)

        self.unchecked = False
        self.contents.data.before_first_fetch = None
        try:
            self.coordinator.round("first batch", local, lambda _: None)
        except ResumeKitError as error:
            self.contents.attempt.refuse(error, report)
            raise


def restore_data_and_user_state(
    data: ResumableData,
    user_state: Mapping[str, Stateful],
    manifest: Manifest,
    judgement: Judgement,
    policy: Policy,
) -> None:
    """Put the loader at the saved position and the user's objects in their saved state, and prove both.

    Raises `ResumeRefused` where either did not come back.
    """
    other_data = bool(judgement.changes_of("data"))
    position = 0 if other_data and policy.data == "restart" else int(manifest.data["position"])
    data.seek(position)
    problems = []
    found = {"position": data.position, "next batch": data.batch_digest(data.position)}
    wanted = {"position": position, "next batch": manifest.data["next_batch"]}
    if other_data or judgement.changes_of("global batch"):
        del wanted["next batch"]  # another batch is what the policy asked for
    for what, saved in wanted.items():
        if found[what] != saved:
            remedy = "the loader did not follow seek(); no step may be trained from it"
            problems.append(Problem("data", what, f"after seek() it is {found[what]}, saved {saved}", remedy))
    state: dict[str, Any] = canonical.decode(manifest.state)["user"]
    if set(state) != set(user_state):
        what = f"saved {sorted(state)}, live {sorted(user_state)}"
        problems.append(Problem("user state", "state=", what, "give the objects of the save"))
    for name in sorted(state.keys() & user_state.keys()):
        user_state[name].load_state_dict(state[name])
        if canonical.value_digest(user_state[name].state_dict()) != canonical.value_digest(state[name]):
            what = "after load_state_dict() its state_dict() is not the saved one"
            problems.append(Problem("user state", name, what, "mend its load_state_dict()"))
    if problems:
        raise ResumeRefused("data or user state did not come back", problems)
