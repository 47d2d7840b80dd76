"""torch.distributed.checkpoint: plain, asynchronous by thread and by process, and with the pinned stager."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver

from benchmarks.peers.peer import Peer
from benchmarks.suite.workloads import Workload


class Dcp(Peer):
    """Every rank's masters and moments as plain tensors under names of its own."""

    key = "dcp"
    name = "torch DCP save"
    note = "each rank's masters and moments under its own keys: the same bytes, not reshardable so"

    def save(self, step: int) -> None:
        state_dict_saver.save(self.workload.state(), checkpoint_id=str(self.begin(step)))

    def load(self) -> Mapping[str, float]:
        state_dict_loader.load(self.workload.state(), checkpoint_id=str(self.folder()))
        return {}


class DcpThread(Dcp):
    """`async_save` in a thread, over a gloo group of its own."""

    key = "dcp-thread"
    name = "torch DCP async_save, thread"
    loads: ClassVar[bool] = False
    checkpointer: ClassVar[str] = "THREAD"

    def __init__(self, workload: Workload, root: Path) -> None:
        super().__init__(workload, root)
        self._group: Any = None
        self._answer: Any = None

    def _stager(self) -> Any:
        return None

    def save(self, step: int) -> None:
        if self._group is None:
            self._group = dist.new_group(backend="gloo")
        self._answer = state_dict_saver.async_save(
            self.workload.state(),
            checkpoint_id=str(self.begin(step)),
            process_group=self._group,
            async_checkpointer_type=state_dict_saver.AsyncCheckpointerType[self.checkpointer],
            async_stager=self._stager(),
        )

    def wait(self) -> None:
        answer, self._answer = self._answer, None
        if answer is not None:
            getattr(answer, "upload_completion", answer).result()


class DcpProcess(DcpThread):
    """The same in a process of its own."""

    key = "dcp-process"
    name = "torch DCP async_save, process"
    checkpointer = "PROCESS"
    note = "the first save starts the processes; their memory is not in the figure"


class DcpPinned(DcpThread):
    """The same with the stager that keeps pinned memory and copies without blocking."""

    key = "dcp-pinned"
    name = "torch DCP async_save, pinned stager"

    def __init__(self, workload: Workload, root: Path) -> None:
        super().__init__(workload, root)
        self._kept: Any = None

    def available(self) -> str | None:
        return None if torch.cuda.is_available() else "pinned memory needs a GPU"

    def _stager(self) -> Any:
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        if self._kept is None:
            self._kept = DefaultStager(
                StagingOptions(
                    use_pinned_memory=True,
                    use_shared_memory=False,
                    use_async_staging=False,
                    use_non_blocking_copy=True,
                )
            )
        return self._kept

    def close(self) -> None:
        if self._kept is not None:
            self._kept.close()
