"""What is not the engine's comes back last: the data position and the user's own state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from resume_kit.checkpoint import canonical
from resume_kit.checkpoint.manifest import Manifest
from resume_kit.errors import Problem, ResumeRefused
from resume_kit.policy.judgement import Judgement
from resume_kit.policy.policy import Policy
from resume_kit.run.protocols import ResumableData, Stateful


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
