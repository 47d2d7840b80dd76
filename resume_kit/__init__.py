"""Save anywhere, resume anywhere, with proof. The names below are the public API; they load on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from resume_kit.data import ResumableLoader, TokenDataset
    from resume_kit.errors import ResumeKitError
    from resume_kit.policy.policy import Policy
    from resume_kit.run.kit import ResumeKit
    from resume_kit.run.retention import Retention
    from resume_kit.saving.options import Saving

__version__ = "0.1.0"

_HOMES = {
    "Policy": "resume_kit.policy.policy",
    "ResumableLoader": "resume_kit.data",
    "ResumeKit": "resume_kit.run.kit",
    "ResumeKitError": "resume_kit.errors",
    "Retention": "resume_kit.run.retention",
    "Saving": "resume_kit.saving.options",
    "TokenDataset": "resume_kit.data",
}

__all__ = [
    "Policy",
    "ResumableLoader",
    "ResumeKit",
    "ResumeKitError",
    "Retention",
    "Saving",
    "TokenDataset",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
