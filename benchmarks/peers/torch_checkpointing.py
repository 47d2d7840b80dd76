"""torch_checkpointing, torchtitan's new backend: asynchronous, staged off the device, written by a process."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from benchmarks.peers.peer import Peer
from benchmarks.suite.workloads import Workload


class TorchCheckpointing(Peer):
    """Every update of the real optimizer goes under its lock, as its documentation asks."""

    key = "torch-checkpointing"
    name = "torch_checkpointing, async"
    engines: ClassVar[frozenset[str]] = frozenset({"deepspeed"})
    note = (
        "the same tensors; returns before they are copied, an update has to wait for its lock; buffered writes, for "
        "its O_DIRECT ones are not aligned; its process's memory is not in the figure"
    )

    def __init__(self, workload: Workload, root: Path) -> None:
        super().__init__(workload, root)
        self._manager: Any = None
        self._future: Any = None
        self._lock: Any = None
        self._hooks: list[Any] = []

    def available(self) -> str | None:
        try:
            import torch_checkpointing  # type: ignore[import-not-found] # noqa: F401
        except Exception as error:
            return f"does not import: {error}"
        return None

    def save(self, step: int) -> None:
        if self._manager is None:
            self._manager = _manager()
            optimizer = self.workload.engine.optimizer.optimizer
            self._hooks.append(optimizer.register_step_pre_hook(self._before_update))
            self._hooks.append(optimizer.register_step_post_hook(self._after_update))
        folder = self.begin(step)
        self._future = self._manager.save(str(folder), {"state": self.workload.state(), "step": step})

    def _before_update(self, *_: Any) -> None:
        self._lock = self._manager.lock()
        self._lock.__enter__()

    def _after_update(self, *_: Any) -> None:
        self._lock.__exit__(None, None, None)

    def wait(self) -> None:
        future, self._future = self._future, None
        if future is not None:
            future.result()

    def load(self) -> Mapping[str, float]:
        self._manager.load(str(self.folder()), into={"state": self.workload.state(), "step": 0})
        return {}

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        if self._manager is not None:
            self._manager.close()


def _manager() -> Any:
    from torch_checkpointing import CheckpointManager
    from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig  # type: ignore[import-not-found]

    config = CheckpointManager.Config.with_async_save()
    config.storage_config = LocalFileSystemStorageConfig(use_direct_io=False)
    return CheckpointManager(config)
