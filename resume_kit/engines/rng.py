"""Every random generator of a rank: Python, NumPy, torch CPU, every device, and the engine's own."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from resume_kit.checkpoint import canonical
from resume_kit.errors import Problem, ResumeRefused

Tracker = tuple[Callable[[], Any], Callable[[Any], None]]


def _torch_bytes(state: torch.Tensor) -> bytes:
    return state.numpy().tobytes()


def _torch_state(data: bytes) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(data, dtype=np.uint8).copy())


def _numpy_state(state: Any) -> dict[str, Any]:
    name, keys, position, has_gauss, gauss = state
    return {
        "name": str(name),
        "keys": np.asarray(keys, dtype=np.uint32).tobytes(),
        "position": int(position),
        "has_gauss": int(has_gauss),
        "gauss": float(gauss),
    }


def _set_numpy_state(state: Mapping[str, Any]) -> None:
    keys = np.frombuffer(state["keys"], dtype=np.uint32)
    np.random.set_state((state["name"], keys, state["position"], state["has_gauss"], state["gauss"]))


def capture(trackers: Mapping[str, Tracker]) -> dict[str, Any]:
    """The state of every generator of this rank, encoded for the rank index. Draws nothing."""
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": _numpy_state(np.random.get_state(legacy=True)),
        "torch": _torch_bytes(torch.get_rng_state()),
    }
    if torch.cuda.is_available():
        state["current_device"] = torch.cuda.current_device()
        for device in range(torch.cuda.device_count()):
            state[f"cuda:{device}"] = _torch_bytes(torch.cuda.get_rng_state(device))
    for name, (get, _) in trackers.items():
        state[f"engine:{name}"] = get()
    encoded: dict[str, Any] = canonical.encode(state, "rng")
    return encoded


def restore(encoded: Mapping[str, Any], trackers: Mapping[str, Tracker]) -> None:
    """Set every generator to a captured state.

    Raises `ResumeRefused` when the record lacks a generator that this rank has, or the other way round.
    """
    state = canonical.decode(dict(encoded))
    problems = compatibility(state, trackers)
    if problems:
        raise ResumeRefused("the RNG record does not fit this rank", problems)
    random.setstate(state["python"])
    _set_numpy_state(state["numpy"])
    torch.set_rng_state(_torch_state(state["torch"]))
    if torch.cuda.is_available():
        for device in range(torch.cuda.device_count()):
            torch.cuda.set_rng_state(_torch_state(state[f"cuda:{device}"]), device)
    for name, (_, put) in trackers.items():
        put(state[f"engine:{name}"])


def derived(generator: str, seed: int) -> Any:
    """The state of a generator that is freshly seeded, as `capture` holds it before encoding; draws nothing.

    A tracker's stream is of the current device where there is one.
    """
    if generator == "python":
        return random.Random(seed).getstate()
    if generator == "numpy":
        return _numpy_state(np.random.RandomState(seed % 2**32).get_state(legacy=True))
    on_device = generator != "torch" and torch.cuda.is_available()
    device = generator if generator.startswith("cuda:") else "cuda" if on_device else "cpu"
    return _torch_bytes(torch.Generator(device).manual_seed(seed).get_state())


def compatibility(recorded: Mapping[str, Any], trackers: Mapping[str, Tracker]) -> list[Problem]:
    """Generators that are recorded but not live, or live but not recorded."""
    live = {"python", "numpy", "torch", *(f"engine:{name}" for name in trackers)}
    if torch.cuda.is_available():
        live |= {"current_device", *(f"cuda:{device}" for device in range(torch.cuda.device_count()))}
    problems = [
        Problem("rng", name, "this rank has the generator, its record does not", "resume with the devices of the save")
        for name in sorted(live - set(recorded))
    ]
    problems += [
        Problem("rng", name, "recorded, but this rank has no such generator", "resume with the devices of the save")
        for name in sorted(set(recorded) - live)
    ]
    problems += [
        Problem("rng", name, "recorded on another kind of device", "resume with the devices of the save")
        for name, (get, _) in sorted(trackers.items())
        if f"engine:{name}" in recorded and len(recorded[f"engine:{name}"]) != len(get())
    ]
    if not problems and recorded.get("current_device") != (
        torch.cuda.current_device() if torch.cuda.is_available() else None
    ):
        problems.append(Problem("rng", "current_device", f"was cuda:{recorded['current_device']} at the save"))
    return problems


def digests(encoded: Mapping[str, Any]) -> dict[str, str]:
    """A digest per generator of a captured state."""
    return {name: canonical.value_digest(state) for name, state in encoded.items()}


def digest(encoded: Mapping[str, Any]) -> str:
    """One digest for all generators of a captured state."""
    return canonical.digest(canonical.dumps(dict(encoded)))


@contextmanager
def preserved(trackers: Mapping[str, Tracker]) -> Iterator[None]:
    """Whatever is drawn inside, every generator comes out as it went in."""
    before = capture(trackers)
    try:
        yield
    finally:
        restore(before, trackers)


def seed_all(seed: int) -> None:
    """Seed Python, NumPy, torch CPU and every device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
