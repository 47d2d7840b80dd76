"""How saves go: when training may go on, what a busy disk does, how much host memory they take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from resume_kit.checkpoint.blocks import BLOCK_BYTES
from resume_kit.errors import UsageError

Returns = Literal["overlapped", "staged", "committed"]
Busy = Literal["wait", "skip"]
StagingMode = Literal["full", "bounded"]


@dataclass(frozen=True, kw_only=True)
class Saving:
    """Options of saving. The defaults never stall training for a disk.

    returns: when a scheduled save lets training go on. "overlapped": at once; the state is copied to the host beneath
        the next forward/backward, and the next optimizer update waits for the copy. "staged": once the copy is done.
        "committed": once the checkpoint is durable. In the first two, a failure is raised by a later `step()`.
    when_busy: what a scheduled save does while the one before is still being written: "wait" for it, or "skip".
    staging: "full": host memory for all that the rank saves. "bounded": `host_bytes` of it, used again and again while
        the file is written, so that the next update may have to wait for the disk.
    host_bytes: bound of the host memory a rank stages in, in bytes; None for as much as it takes.
    gate_every: record the gate's forward/backward in every n-th save; the others are resumed on their fingerprints,
        and the gate has to be finite.

    Raises `UsageError` for values that cannot be meant.
    """

    returns: Returns = "overlapped"
    when_busy: Busy = "wait"
    staging: StagingMode = "full"
    host_bytes: int | None = None
    gate_every: int = 1

    def __post_init__(self) -> None:
        for name, kind in (("returns", Returns), ("when_busy", Busy), ("staging", StagingMode)):
            if getattr(self, name) not in get_args(kind):
                raise UsageError(f"saving.{name} is {getattr(self, name)!r}; it is one of {', '.join(get_args(kind))}")
        if self.gate_every < 1:
            raise UsageError(f"saving.gate_every is {self.gate_every}; it counts saves, from 1")
        if self.staging == "bounded" and self.host_bytes is None:
            raise UsageError('saving.staging is "bounded"; say by how many bytes in saving.host_bytes')
        if self.host_bytes is not None and self.host_bytes < 2 * BLOCK_BYTES:
            least = 2 * BLOCK_BYTES
            raise UsageError(f"saving.host_bytes is {self.host_bytes:,}; two blocks, {least:,} bytes, are the least")

    def arena_bytes(self, image_bytes: int) -> int:
        """Host memory for a file image, in whole blocks. Raises `UsageError` where the bound does not allow it."""
        whole = -(-image_bytes // BLOCK_BYTES) * BLOCK_BYTES
        if self.host_bytes is None or whole <= self.host_bytes:
            return whole
        if self.staging == "full":
            raise UsageError(
                f"this rank saves {image_bytes:,} bytes, saving.host_bytes allows {self.host_bytes:,}: raise it, or set"
                ' saving.staging to "bounded"'
            )
        return self.host_bytes // BLOCK_BYTES * BLOCK_BYTES
