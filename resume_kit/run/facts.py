"""What an attempt trains: pinned by its checkpoints, compared on resume, and alike on all ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from resume_kit.checkpoint import canonical
from resume_kit.engines.adapter import EngineAdapter, ModelDescription
from resume_kit.engines.coordination import Coordinator
from resume_kit.engines.description import from_plain, to_plain, united
from resume_kit.resuming.preflight import LiveRun
from resume_kit.run.protocols import ResumableData


@dataclass(frozen=True, eq=False)
class Facts:
    """`pinned` holds what a checkpoint pins, `fingerprint` what the data is."""

    description: ModelDescription
    versions: Mapping[str, str]
    pinned: Mapping[str, Any]
    fingerprint: Mapping[str, Any]
    global_batch_size: int
    world_size: int
    topology: Mapping[str, Any]

    @classmethod
    def gather(
        cls,
        adapter: EngineAdapter,
        coordinator: Coordinator,
        data: ResumableData,
        config: Mapping[str, Any],
        versions: Mapping[str, str],
    ) -> Facts:
        """Ask engine and data; the parts of a pipeline's stages are united. Collective."""
        description = adapter.describe()
        if description.partial:
            part = to_plain(description)
            description = from_plain(coordinator.round("describe the model", lambda: part, united))
        pinned = {
            **description.pinned,
            "config": canonical.decode(canonical.encode(dict(config), "config")),
            "groups": [dict(group) for group in description.groups],
            "versions": versions,
        }
        return cls(
            description,
            versions,
            pinned,
            data.fingerprint(),
            data.global_batch_size,
            coordinator.world_size,
            adapter.topology,
        )

    def data(self) -> dict[str, Any]:
        return {"fingerprint": self.fingerprint, "global_batch_size": self.global_batch_size}

    def live(self) -> LiveRun:
        return LiveRun(self.description, self.pinned, self.versions, self.data(), self.topology)

    def journaled(self) -> dict[str, Any]:
        return {
            "dataset": self.fingerprint,
            "global_batch_size": self.global_batch_size,
            "world_size": self.world_size,
            "versions": self.versions,
        }

    def digests(self, given: Mapping[str, Any]) -> dict[str, str]:
        """Digests of all that every rank must have been given alike, `given` among it."""
        every = {**self.pinned, "dataset": self.fingerprint, "global batch size": self.global_batch_size, **given}
        return {name: canonical.value_digest(value) for name, value in every.items()}
