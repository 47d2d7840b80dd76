"""Canonical JSON with a self-digest, and values that plain JSON cannot say.

A signed document is a JSON object whose key ``digest`` is the XXH3-128 of its canonical bytes without that key.
A file holds the canonical bytes and nothing else, so one flipped bit anywhere in it is seen.
"""

from __future__ import annotations

import base64
import errno
import json
import math
from pathlib import Path
from typing import Any

import xxhash

from resume_kit.errors import CheckpointDamaged, Problem, UsageError

RESTORE = "restore the file from a copy, or resume from an older checkpoint"

#: The check of a problem that says nothing of the bytes on disk.
UNREADABLE = "reading"
_MOMENTARY = frozenset(
    {
        *(errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO, errno.EAGAIN, errno.EINTR, errno.ENOLCK),
        *(errno.ENOMEM, errno.EMFILE, errno.ENFILE),
        *(errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH, errno.ENOTCONN, errno.ESHUTDOWN),
        *(errno.ECONNRESET, errno.ECONNABORTED, errno.ECONNREFUSED),
    }
)


def dumps(value: Any) -> bytes:
    """`value` as canonical JSON bytes: sorted keys, no spaces, ASCII, one newline at the end."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return text.encode("ascii") + b"\n"


def digest(data: bytes) -> str:
    """XXH3-128 of `data` in 32 hex digits: evidence against faults, not against a forger."""
    return xxhash.xxh3_128_hexdigest(data)


def value_digest(value: Any) -> str:
    """Digest of any value that `encode` takes; the order in which a dict was filled does not count."""
    return digest(dumps(_without_order(encode(value))))


def _without_order(encoded: Any) -> Any:
    if isinstance(encoded, list):
        return [_without_order(item) for item in encoded]
    if not isinstance(encoded, dict):
        return encoded
    plain = {key: _without_order(item) for key, item in encoded.items()}
    if "$items" in plain:
        plain["$items"].sort(key=dumps)
    return plain


def sign(document: dict[str, Any]) -> bytes:
    """The bytes of `document` with its own digest added."""
    return dumps({**document, "digest": digest(dumps(document))})


def read_signed(path: Path) -> dict[str, Any]:
    """Parse a signed document, raising `CheckpointDamaged` for anything but the bytes that `sign` wrote."""
    return parse_signed(read_bytes(path), path)


def read_bytes(path: Path) -> bytes:
    """The bytes of a small file; `CheckpointDamaged` names the file when it cannot be read."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise damaged(path, "the file is missing") from None
    except OSError as error:
        raise unread(path, error, f"the file cannot be read: {error.strerror or error}") from error


def parse_signed(raw: bytes, path: Path) -> dict[str, Any]:
    try:
        document = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"not valid JSON ({error})") from None
    if not isinstance(document, dict):
        raise damaged(path, "not a JSON object")
    stated = document.get("digest")
    unsigned = {key: value for key, value in document.items() if key != "digest"}
    try:
        actual, canonical = digest(dumps(unsigned)), dumps(document)
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"not canonical JSON ({error})") from None
    if stated != actual:
        raise damaged(path, f"its digest is {actual}, stated {stated}")
    if raw != canonical:
        raise damaged(path, "its bytes are not the canonical form of its content")
    return document


def unread(path: Path, error: OSError, what: str) -> CheckpointDamaged:
    """The damage of a file that could not be read. Where the fault may pass its check is `UNREADABLE`."""
    if error.errno not in _MOMENTARY:
        return damaged(path, what)
    problem = Problem(UNREADABLE, str(path), what, "look at the file system and at this host's mount of it")
    return CheckpointDamaged(f"{path.name} cannot be read", [problem])


def damaged(path: Path, what: str, remedy: str = RESTORE) -> CheckpointDamaged:
    return CheckpointDamaged(f"{path.name} is damaged", [Problem("integrity", str(path), what, remedy)])


def encode(value: Any, where: str = "value") -> Any:
    """`value` as plain JSON. Tuples, bytes, non-finite floats and non-string keys become tagged objects.

    Raises `UsageError` naming the place of anything else; nothing is ever pickled.
    """
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"$float": repr(float(value))}
    if isinstance(value, bytes):
        return {"$bytes": base64.b64encode(value).decode("ascii")}
    if isinstance(value, tuple):
        return {"$tuple": [encode(item, f"{where}[{i}]") for i, item in enumerate(value)]}
    if isinstance(value, list):
        return [encode(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, dict):
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: encode(item, f"{where}.{key}") for key, item in value.items()}
        return {"$items": [[encode(k, where), encode(v, f"{where}.{k}")] for k, v in value.items()]}
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return encode(value.item(), where)
    raise UsageError(
        f"{where} holds a {type(value).__name__}, which a checkpoint cannot store; "
        "give numbers, strings, lists, tuples and dicts"
    )


def decode(value: Any) -> Any:
    """The inverse of `encode`."""
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        tag, inner = next(iter(value.items()))
        if tag == "$float":
            return float(inner)
        if tag == "$bytes":
            return base64.b64decode(inner)
        if tag == "$tuple":
            return tuple(decode(item) for item in inner)
        if tag == "$items":
            return {decode(key): decode(item) for key, item in inner}
    return {key: decode(item) for key, item in value.items()}
