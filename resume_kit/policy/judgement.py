"""The verdict on two runs: every difference is either allowed, with what is then done, or refused. Pure; no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from resume_kit.checkpoint import canonical
from resume_kit.checkpoint.manifest import Manifest
from resume_kit.checkpoint.records import TensorKey, TensorSpec
from resume_kit.errors import Problem
from resume_kit.integrity.differences import ABSENT, brief, differences
from resume_kit.policy.parts import Part, loosened, part_of_group_entry, part_of_setting, remedy
from resume_kit.policy.policy import Offset, Policy, Rewarm

#: Kinds of tensors that are not the optimizer's.
MODEL_KINDS = frozenset({"param", "master", "buffer"})

#: Entries of a topology that leave every rank in its place.
_PLACE_KEEPING = frozenset({"engine", "zero_stage", "virtual_pipeline", "sequence_parallel", "distributed_optimizer"})

#: What the data loader's order is made from.
_ORDER = frozenset({"fingerprint.seed", "fingerprint.num_samples"})

#: Changes with the same values that a table still shows one by one.
_APART = 3

_BUILD = "build the model of the save"
_BUILD_OPTIMIZER = "build the optimizer of the save"


@dataclass(frozen=True)
class RunFacts:
    """What is compared of a run. `pinned` is without groups and versions; `data` without any position.

    `groups` are the optimizer's parameter groups as constructed, with their `members`. `carried` are the topologies of
    which the checkpoint has RNG records besides its own.
    """

    topology: Mapping[str, Any]
    pinned: Mapping[str, Any]
    groups: Sequence[Mapping[str, Any]]
    versions: Mapping[str, str]
    data: Mapping[str, Any]
    tensors: Mapping[TensorKey, TensorSpec]
    aliases: Mapping[str, str]
    carried: Sequence[Mapping[str, Any]] = ()

    @classmethod
    def of_manifest(cls, manifest: Manifest) -> RunFacts:
        pinned: dict[str, Any] = canonical.decode(manifest.pinned)
        tensors = {}
        for entry in manifest.tensors:
            kind, name = entry.spec.key
            if kind in MODEL_KINDS:
                plain = TensorKey(kind, name.split("@rank")[0] if kind == "buffer" else name)
                tensors[plain] = TensorSpec(plain, entry.spec.dtype, entry.spec.shape)
        return cls(
            topology=manifest.engine,
            pinned={k: v for k, v in pinned.items() if k not in ("groups", "versions")},
            groups=tuple(pinned["groups"]),
            versions=pinned["versions"],
            data={k: v for k, v in canonical.decode(manifest.data).items() if k not in ("position", "next_batch")},
            tensors=tensors,
            aliases=manifest.aliases,
            carried=manifest.carried,
        )


@dataclass(frozen=True)
class Change:
    """An allowed difference, or something that the policy asks for, and what the resume does about it."""

    part: Part
    path: str
    before: Any
    after: Any
    action: str

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, values that JSON cannot say in the tagged form of `canonical`."""
        values = {"before": canonical.encode(self.before), "after": canonical.encode(self.after)}
        return {"part": self.part, "path": self.path, **values, "action": self.action}

    def __str__(self) -> str:
        return f"{self.path}: {_shown(self.before)} → {_shown(self.after)}; {self.action}"


@dataclass(frozen=True)
class Judgement:
    """A resume goes on only where there are no refusals. `warnings` are to be read although it goes on."""

    changes: tuple[Change, ...]
    refusals: tuple[Problem, ...]
    warnings: tuple[Problem, ...]

    def changes_of(self, part: Part) -> tuple[Change, ...]:
        return tuple(change for change in self.changes if change.part == part)


@dataclass(frozen=True)
class _Difference:
    """A finding before the policy has spoken. `action` is what is done where the policy allows it."""

    part: Part
    check: str
    where: str
    what: str
    before: Any
    after: Any
    undo: str
    action: str = "the live value is taken"
    path: str = ""
    never: bool = False

    def allowed(self, policy: Policy) -> bool:
        return not self.never and loosened(self.part, policy)

    def change(self) -> Change:
        return Change(self.part, self.path or self.where, self.before, self.after, self.action)

    def refusal(self) -> Problem:
        return Problem(self.check, self.where, self.what, self.undo if self.never else remedy(self.undo, self.part))

    def warning(self) -> Problem:
        return Problem(self.check, self.where, self.what)


def judge(saved: RunFacts, live: RunFacts, policy: Policy) -> Judgement:
    """Every difference of two runs under a policy, all at once."""
    found = list(_differences(saved, live, policy))
    allowed = [one for one in found if one.allowed(policy)]
    changes = [one.change() for one in allowed]
    warned = [one for one in allowed if _field_says_warn(one.part, policy)]
    return Judgement(
        changes=(*changes, *_asked_for(policy, changes)),
        refusals=tuple(one.refusal() for one in found if not one.allowed(policy)),
        warnings=(*(one.warning() for one in warned), *_cautions(policy, changes)),
    )


def ranks_move(saved: Mapping[str, Any], live: Mapping[str, Any]) -> bool:
    """Whether ranks have another place in the live topology, so that their RNG records are not their own."""
    return any(saved.get(key) != live.get(key) for key in {*saved, *live} - _PLACE_KEEPING)


def changes_table(changes: Sequence[Change]) -> str:
    """What changes, before and after, and what is done about it, in aligned columns. Many alike take one line.

    Empty where nothing changes.
    """
    if not changes:
        return ""
    alike: dict[tuple[str, str, str, str], list[str]] = {}
    for one in changes:
        alike.setdefault((one.part, _shown(one.before), _shown(one.after), one.action), []).append(one.path)
    rows = [("what", "before", "after", "what is done")]
    for (_, before, after, action), paths in alike.items():
        shown = paths if len(paths) <= _APART else [f"{paths[0]} (and {len(paths) - 1} alike)"]
        rows += [(path, before, after, action) for path in shown]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _differences(saved: RunFacts, live: RunFacts, policy: Policy) -> Iterator[_Difference]:
    if saved.topology.get("engine") != live.topology.get("engine"):
        yield _other_engine(saved, live)
    else:
        yield from _topology(saved, live)
        yield from _tensors(saved, live)
        yield from _pinned(saved, live, policy)
        yield from _groups(saved, live, policy)
    yield from _data(saved, live, policy)
    yield from _versions(saved, live)


def _other_engine(saved: RunFacts, live: RunFacts) -> _Difference:
    old, new = saved.topology.get("engine"), live.topology.get("engine")
    undo = f"start the job with engine = {old}; the engines do not name and cut tensors alike"
    return _Difference("topology", "topology", "engine", f"saved with {old}, live {new}", old, new, undo, never=True)


def _topology(saved: RunFacts, live: RunFacts) -> Iterator[_Difference]:
    for path, old, new in differences(dict(saved.topology), dict(live.topology)):
        undo = f"start the job on {old} ranks" if path == "world_size" else f"start the job with {path} = {old}"
        action = "every rank reads its own part of the new layout"
        yield _Difference("topology", "topology", path, f"saved with {old}, live {new}", old, new, undo, action)
    if ranks_move(saved.topology, live.topology) and dict(live.topology) not in saved.carried:
        what = "ranks have a new place in the topology, for which there is no RNG record"
        undo = "start the job in the topology of the save"
        action = "streams come from run seed, step and the rank's coordinates"
        yield _Difference("rng", "topology", "rng", what, "recorded", "derived where new", undo, action)


def _tensors(saved: RunFacts, live: RunFacts) -> Iterator[_Difference]:
    old, new = saved.tensors, live.tensors
    for key in sorted(old.keys() - new.keys()):
        frozen = key.kind == "master" and key._replace(kind="param") in new
        what = "in the checkpoint, missing in the live model" + (": it is frozen now" if frozen else "")
        yield _model(str(key), what, old[key], ABSENT, "freeze what was frozen at the save" if frozen else _BUILD)
    for key in sorted(new.keys() - old.keys()):
        thawed = key.kind == "master" and key._replace(kind="param") in old
        what = "additional in the live model, not in the checkpoint" + (": it was frozen at the save" if thawed else "")
        yield _model(str(key), what, ABSENT, new[key], "freeze what was frozen at the save" if thawed else _BUILD)
    for key in sorted(old.keys() & new.keys()):
        if old[key] != new[key]:
            yield _respecified(old[key], new[key], has_master=key._replace(kind="master") in old)
    for path, a, b in differences(dict(saved.aliases), dict(live.aliases)):
        yield _model(path, f"tied to {a} in the checkpoint, to {b} live", a, b, "tie the same weights")


def _respecified(old: TensorSpec, new: TensorSpec, *, has_master: bool) -> _Difference:
    what = f"saved as {old.dtype}{list(old.shape)}, live {new.dtype}{list(new.shape)}"
    floats = all(spec.dtype.startswith(("float", "bfloat")) for spec in (old, new))
    if old.shape != new.shape or not floats:
        return _model(str(old.key), what, old, new, _BUILD)
    never, undo, action = False, _BUILD, ""
    if old.key.kind == "master":
        never, undo = True, "keep the dtype of the masters: they are the state itself"
    elif old.key.kind == "buffer":
        never, undo = True, "keep the dtype of the buffers: they have no master to be cast from"
    elif old.key.kind == "param":
        never, action = not has_master, "cast from the same master"
        if never:
            undo = "keep the dtype of frozen weights: they have no master to be cast from"
    return _Difference("dtype", "tensors", str(old.key), what, old.dtype, new.dtype, undo, action, never=never)


def _model(where: str, what: str, before: Any, after: Any, undo: str) -> _Difference:
    return _Difference("model", "tensors", where, what, before, after, undo, never=True)


def _pinned(saved: RunFacts, live: RunFacts, policy: Policy) -> Iterator[_Difference]:
    same_batch = saved.data.get("global_batch_size") == live.data.get("global_batch_size")
    for path, old, new in _leaves(dict(saved.pinned), dict(live.pinned)):
        part = part_of_setting(path, old, new, same_global_batch=same_batch)
        undo = _BUILD if part == "model" else "undo the change"
        what = f"saved with {_brief(old)}, live {_brief(new)}"
        yield _Difference(part, part, path, what, old, new, undo, _action(part, policy), never=part == "model")


def _groups(saved: RunFacts, live: RunFacts, policy: Policy) -> Iterator[_Difference]:
    check = "optimizer groups"
    if len(saved.groups) != len(live.groups):
        counts = len(saved.groups), len(live.groups)
        what = f"{counts[0]} parameter groups were saved, {counts[1]} are live"
        yield _Difference("model", check, "optimizer", what, *counts, _BUILD_OPTIMIZER, never=True)
        return
    ordered = saved.topology == live.topology
    for number, (old, new) in enumerate(zip(saved.groups, live.groups, strict=True)):
        where = f"group {number}"
        before, after = list(old["members"]), list(new["members"])
        if before != after if ordered else sorted(before) != sorted(after):
            moved = sorted(set(before) ^ set(after))
            what = f"members differ: {brief(moved) if moved else 'another order'}"
            yield _Difference("model", check, where, what, before, after, _BUILD_OPTIMIZER, never=True)
        for path, a, b in _leaves(_without_members(old), _without_members(new)):
            part = part_of_group_entry(path, a, b)
            what = f"{path} was {_brief(a)} as constructed, now {_brief(b)}"
            action = _action(part, policy)
            yield _Difference(part, check, where, what, a, b, "undo the change", action, path=f"{where}.{path}")


def _data(saved: RunFacts, live: RunFacts, policy: Policy) -> Iterator[_Difference]:
    for path, old, new in _leaves(dict(saved.data), dict(live.data)):
        part: Part = "global batch" if path == "global_batch_size" else "data"
        undo = "resume on the dataset of the save"
        if part == "global batch":
            undo = "choose micro-batch, accumulation and ranks so that the global batch is the same"
        what = f"saved with {_brief(old)}, live {_brief(new)}"
        yield _Difference(part, part, path, what, old, new, undo, _action(part, policy))


def _versions(saved: RunFacts, live: RunFacts) -> Iterator[_Difference]:
    for path, old, new in differences(dict(saved.versions), dict(live.versions)):
        what = f"saved with {old}, live {new}" if ABSENT not in (old, new) else f"{old} → {new}"
        undo = "install the version of the save"
        yield _Difference("versions", "versions", path, what, old, new, undo, "the live version is used")


def _action(part: Part, policy: Policy) -> str:
    """What is done about a setting that may differ."""
    if part == "global batch":
        return "the live batch is taken, the sample position kept"
    if part == "learning rate":
        if isinstance(policy.learning_rate, Offset):
            return f"live schedule, {policy.learning_rate.offset:+} steps from the saved position"
        return "live schedule and LR, at the saved position"
    if part == "optimizer state":
        return "moments and step start from zero"
    if part == "data":
        return "live data, from sample 0" if policy.data == "restart" else "live data, at the saved sample position"
    return "the live value is taken"


def _asked_for(policy: Policy, changes: Sequence[Change]) -> Iterator[Change]:
    """What the policy has done to the run although nothing differs."""
    rate = policy.learning_rate
    if isinstance(rate, Rewarm):
        action = "the LR rises from 0 to the saved schedule"
        yield Change("learning rate", "schedule", "as saved", f"rewarmed over {rate.rewarm} steps", action)
    if isinstance(rate, Offset) and not any(one.part == "learning rate" for one in changes):
        action = f"saved schedule, {rate.offset:+} steps from the saved position"
        yield Change("learning rate", "schedule", "as saved", f"shifted by {rate.offset:+} steps", action)
    if policy.optimizer_state == "reset":
        yield Change("optimizer state", "moments and step", "as saved", "zero", _action("optimizer state", policy))


def _cautions(policy: Policy, changes: Sequence[Change]) -> Iterator[Problem]:
    if policy.data == "keep_position" and any(one.path in _ORDER for one in changes):
        what = "the sample order is another one: samples of this epoch may come twice or not at all"
        yield Problem("data", "position", what, "to begin an epoch of the new order, set the policy `data: restart`")


def _field_says_warn(part: Part, policy: Policy) -> bool:
    says = {"configuration": policy.configuration, "versions": policy.versions}
    return says.get(part) == "warn"


def _leaves(old: Any, new: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """`differences`, going on into a section that only one side has."""
    for place, a, b in differences(old, new, path):
        if a == ABSENT and isinstance(b, dict) and b:
            yield from _leaves({}, b, place)
        elif b == ABSENT and isinstance(a, dict) and a:
            yield from _leaves(a, {}, place)
        else:
            yield place, a, b


def _without_members(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "members"}


def _brief(value: Any) -> str:
    return ABSENT if value == ABSENT else brief(value)


def _shown(value: Any) -> str:
    return value if isinstance(value, str) and value.isprintable() else brief(value, 40)
