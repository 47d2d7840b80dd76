"""The shared state that a resume restores: the saved one, with what the policy takes from the live run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from resume_kit.checkpoint import canonical
from resume_kit.checkpoint.manifest import Manifest
from resume_kit.engines.adapter import EngineAdapter
from resume_kit.errors import Problem
from resume_kit.integrity.differences import ABSENT, differences
from resume_kit.policy.judgement import Judgement
from resume_kit.policy.parts import part_of_group_entry
from resume_kit.policy.policy import Offset, Policy, Rewarm
from resume_kit.resuming.preflight import LiveRun

#: Settings of DeepSpeed's loss scaler, which it keeps beside the values that it moves.
_SCALER_SETTINGS = frozenset(
    {
        "dynamic",
        "scale_factor",
        "scale_window",
        "min_scale",
        "delayed_shift",
        "consecutive_hysteresis",
        "raise_error_at_min_scale",
    }
)

#: What the kit keeps in the shared state besides the engine's own.
KIT_STATE = ("scalars", "user", "applied", "moments_since", "rewarm", "lineage")


def effective(policy: Policy, manifest: Manifest, judgement: Judgement) -> Policy:
    """`policy` without what it asks for once and what has been done to this checkpoint's run already.

    So a job that is started again with the same policy does not shift, rewarm or reset a second time; but another
    optimizer than at the save is a new reason to reset. `judgement` is that of the whole policy.
    """
    done = canonical.decode(manifest.state).get("applied", {})
    wanted = policy.to_mapping()
    once: dict[str, Any] = {}
    if isinstance(policy.learning_rate, Offset | Rewarm) and wanted["learning_rate"] == done.get("learning_rate"):
        once["learning_rate"] = "keep"
    other_optimizer = len(judgement.changes_of("optimizer state")) > 1
    if policy.optimizer_state == "reset" and done.get("optimizer_state") == "reset" and not other_optimizer:
        once["optimizer_state"] = "keep"
    return replace(policy, **once)


def applied(policy: Policy) -> dict[str, Any]:
    """What has been done once to the run, now or before. What the policy no longer asks for is forgotten."""
    done: dict[str, Any] = {}
    if isinstance(policy.learning_rate, Offset | Rewarm):
        done["learning_rate"] = policy.to_mapping()["learning_rate"]
    if policy.optimizer_state == "reset":
        done["optimizer_state"] = "reset"
    return done


def takes_live_schedule(policy: Policy, judgement: Judgement) -> bool:
    """Whether the LR comes from the live schedule, advanced to the saved position."""
    if isinstance(policy.learning_rate, Offset):
        return True
    return policy.learning_rate == "override" and bool(judgement.changes_of("learning rate"))


def schedule_problems(
    manifest: Manifest, run: LiveRun, adapter: EngineAdapter, policy: Policy, judgement: Judgement
) -> list[Problem]:
    """Why the live schedule cannot be advanced to where the effective `policy` wants it. Touches nothing."""
    if not takes_live_schedule(policy, judgement):
        return []
    return adapter.schedule_problems(canonical.decode(manifest.state), _offset(policy), _samples_per_step(run))


def state_to_restore(
    manifest: Manifest,
    run: LiveRun,
    adapter: EngineAdapter,
    policy: Policy,
    judgement: Judgement,
    asked: Policy,
) -> dict[str, Any]:
    """The state to write into the engine, under the effective `policy` out of what was `asked`.

    Advances the live schedule where the policy takes the LR from it. Hyperparameters differ as constructed, before
    any schedule changed them.
    """
    state: dict[str, Any] = canonical.decode(manifest.state)
    live = adapter.state()
    from_live_schedule = takes_live_schedule(policy, judgement)
    if from_live_schedule:
        adapter.advance_schedule(state, _offset(policy), _samples_per_step(run))
        live = adapter.state()
        state["scheduler"] = live["scheduler"]
    elif _class(state["scheduler"]) != _class(live["scheduler"]):
        state["scheduler"] = live["scheduler"]
    elif live["scheduler"]:
        for name in _live_in_schedule(judgement) & live["scheduler"]["state"].keys():
            state["scheduler"]["state"][name] = live["scheduler"]["state"][name]
    constructed = canonical.decode(manifest.pinned)["groups"]
    for old, new, saved, now in zip(constructed, run.description.groups, state["groups"], live["groups"], strict=True):
        for key in new.keys() - {"members"}:
            scheduled = part_of_group_entry(key, old.get(key, ABSENT), new[key]) == "learning rate"
            if (scheduled and from_live_schedule) or any(differences(old.get(key, ABSENT), new[key])):
                saved[key] = now[key]
    if policy.optimizer_state == "reset":
        state["scalars"] = {}
        state["moments_since"] = _updates(state, manifest)
        for saved, now in zip(state["groups"], live["groups"], strict=True):
            _reset_step(saved, now)
    if isinstance(policy.learning_rate, Rewarm):
        state["rewarm"] = {"steps": policy.learning_rate.rewarm, "from_step": manifest.step}
    if _form(state["scaler"]) != _form(live["scaler"]):
        state["scaler"] = live["scaler"]
    elif judgement.changes_of("dtype"):
        state["scaler"] = _scaler_as_set(state["scaler"], live["scaler"])
    state["applied"] = applied(asked)
    return state


def _live_in_schedule(judgement: Judgement) -> set[str]:
    """What a schedule has of hyperparameters that may differ: Megatron's sets the weight decay at every step."""
    changes = judgement.changes_of("hyperparameters")
    return {change.path.removeprefix("schedule.") for change in changes if change.path.startswith("schedule.")}


def engine_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """The engine's own part of a shared state."""
    return {part: value for part, value in state.items() if part not in KIT_STATE}


def _class(scheduler: Mapping[str, Any] | None) -> Any:
    return scheduler and scheduler["class"]


def _form(scaler: Mapping[str, Any] | None) -> list[str]:
    """What a loss scaler has: a dynamic one, of fp16, more than a constant one."""
    return sorted(scaler or {})


def _scaler_as_set(saved: Mapping[str, Any] | None, live: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """The saved values of a loss scaler that moves its scale, under the live settings; a constant one as it is live."""
    if saved is None or live is None or not (saved.get("dynamic", True) and live.get("dynamic", True)):
        return live
    return {**saved, **{name: value for name, value in live.items() if name in _SCALER_SETTINGS}}


def _reset_step(saved: dict[str, Any], now: Mapping[str, Any]) -> None:
    """Fused optimizers count their steps in the group; one that has made none does not have the entry."""
    saved.pop("step", None)
    if "step" in now:
        saved["step"] = 0


def _offset(policy: Policy) -> int:
    return policy.learning_rate.offset if isinstance(policy.learning_rate, Offset) else 0


def _samples_per_step(run: LiveRun) -> int:
    return int(run.data["global_batch_size"])


def _updates(state: Mapping[str, Any], manifest: Manifest) -> int:
    counters = state["counters"]
    steps = counters.get("global_steps", counters.get("steps", manifest.step))
    return int(steps - counters.get("skipped_steps", 0))
