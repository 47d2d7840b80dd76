"""DeepSpeed's own `save_checkpoint` and `load_checkpoint`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from benchmarks.peers.peer import Peer


class DeepSpeedNative(Peer):
    key = "deepspeed"
    name = "DeepSpeed save_checkpoint"
    engines: ClassVar[frozenset[str]] = frozenset({"deepspeed"})
    note = "masters, moments and 16-bit weights; not reshardable before a conversion"

    def save(self, step: int) -> None:
        self.begin(step)
        self.workload.engine.save_checkpoint(str(self._root), tag=f"step-{step}")

    def load(self) -> Mapping[str, float]:
        path, _ = self.workload.engine.load_checkpoint(str(self._root), tag=f"step-{self._step}")
        if path is None:
            raise RuntimeError("load_checkpoint found nothing")
        return {}
