"""A preset as the command line asks for it: other peers, ranks, repeats, sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from difflib import get_close_matches

from benchmarks.suite.presets import Preset, WorkloadSpec
from resume_kit.errors import UsageError

_NUMBERS = ("repeats", "phases", "phase_steps", "save_every")


def adjusted(preset: Preset, settings: Sequence[str], *, peers: str | None = None, ranks: int | None = None) -> Preset:
    """The preset with `key=value` of its own numbers, `WORKLOAD.key=value` of a workload's configuration, other peers
    (`a,b` or `none`), another number of ranks. Raises `UsageError`.
    """
    numbers: dict[str, int] = {}
    workloads = {spec.name: spec for spec in preset.workloads}
    for setting in settings:
        key, equals, text = setting.partition("=")
        owner, _, rest = key.partition(".")
        if not equals:
            raise UsageError(f"--set {setting}: write key=value, for example --set repeats=3")
        if rest and owner in workloads:
            spec = workloads[owner]
            workloads[owner] = replace(spec, settings=(*spec.settings, f"{rest}={text}"))
        elif key not in _NUMBERS:
            known = [*_NUMBERS, *(f"{name}.KEY" for name in workloads)]
            raise UsageError(f"--set {setting}: unknown; choose one of {', '.join(known)}")
        elif not text.isdecimal() or (int(text) == 0 and key == "save_every"):
            raise UsageError(f"--set {setting}: {key} is a whole number")
        else:
            numbers[key] = int(text)
    changed = [_with_peers(spec, peers) for spec in workloads.values()]
    if ranks is not None:
        changed = [replace(spec, ranks=ranks) for spec in changed]
    return replace(preset, workloads=tuple(changed), **numbers)  # type: ignore[arg-type] # all are int fields


def _with_peers(spec: WorkloadSpec, peers: str | None) -> WorkloadSpec:
    if peers is None:
        return spec
    from benchmarks.peers.registry import PEERS

    names = [] if peers == "none" else peers.split(",")
    for name in names:
        if name not in PEERS:
            near = get_close_matches(name, list(PEERS), n=1, cutoff=0.0)[0]
            raise UsageError(f"--peers: {name!r} is unknown; did you mean {near!r}? All: {', '.join(PEERS)}")
    return replace(spec, peers=tuple(name for name in names if spec.engine in PEERS[name].engines))
