"""ByteCheckpoint: named so that its absence is told. Its 0.0.2 takes torch up to 2.5 and FSDP or DDP models."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, requires, version

from benchmarks.peers.peer import Peer


class ByteCheckpoint(Peer):
    key = "bytecheckpoint"
    name = "ByteCheckpoint"

    def available(self) -> str | None:
        try:
            wanted = next((line for line in requires("bytecheckpoint") or () if line.startswith("torch")), "torch")
            return f"bytecheckpoint {version('bytecheckpoint')} takes FSDP and DDP models, with {wanted}"
        except PackageNotFoundError:
            return "is not installed"

    def save(self, step: int) -> None:
        raise NotImplementedError(self.available())

    def load(self) -> Mapping[str, float]:
        raise NotImplementedError(self.available())
