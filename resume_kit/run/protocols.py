"""What the kit needs of the user's data and of the user's own state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol


class ResumableData(Protocol):
    """What the kit needs of the training data; `ResumableLoader` is one."""

    before_first_fetch: Callable[[], None] | None

    @property
    def position(self) -> int:
        """Samples consumed by all ranks together."""

    @property
    def global_batch_size(self) -> int: ...

    def seek(self, position: int) -> None: ...

    def fingerprint(self) -> dict[str, str | int]: ...

    def batch_digest(self, position: int | None = None) -> str: ...

    def pinned_batch(self, size: int) -> Any: ...


class Stateful(Protocol):
    """The user's own state: plain values in, plain values out."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...
