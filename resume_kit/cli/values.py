"""Values from a manifest, for showing: decoded where they can be, tolerated where they are unexpected."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from resume_kit.checkpoint import canonical


def decoded(value: object) -> Any:
    """`value` without the tags of `canonical.encode`; as it is where `encode` never wrote it."""
    try:
        return canonical.decode(value)
    except (ValueError, TypeError, KeyError, RecursionError):
        return value


def mapping(value: object) -> Mapping[str, Any]:
    """`value` if it is a mapping, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def sequence(value: object) -> list[Any]:
    """`value` if it is a list, else an empty one."""
    return value if isinstance(value, list) else []


def in_line(value: object) -> str:
    """A mapping as ``key value, key value``; anything else as it prints."""
    if not isinstance(value, Mapping):
        return str(value)
    return ", ".join(f"{key} {in_line(item)}" for key, item in value.items()) or "none"
