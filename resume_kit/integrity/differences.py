"""Differences between two nested configurations, as paths with both values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

ABSENT = "(absent)"


def differences(old: Any, new: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield (path, old value, new value) for every leaf in which two JSON-like values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}, key=str):
            yield from differences(old.get(key, ABSENT), new.get(key, ABSENT), f"{path}.{key}" if path else str(key))
    elif isinstance(old, list | tuple) and isinstance(new, list | tuple) and len(old) == len(new):
        for number, (a, b) in enumerate(zip(old, new, strict=True)):
            yield from differences(a, b, f"{path}[{number}]")
    elif isinstance(old, float) and isinstance(new, float) and old != old and new != new:
        return
    elif type(old) is not type(new) or old != new:
        same_sequence = isinstance(old, list | tuple) and isinstance(new, list | tuple) and list(old) == list(new)
        if not same_sequence:
            yield path, old, new


def brief(value: Any, width: int = 60) -> str:
    """A value short enough for one line of an error."""
    text = repr(value)
    return text if len(text) <= width else text[: width - 1] + "…"
