"""Data order, token samples and the loader that can be entered at any sample position.

Imports are lazy (PEP 562): `resume_kit.data.permutation` stays importable without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from resume_kit.data.loader import ResumableLoader
    from resume_kit.data.permutation import ShuffledOrder
    from resume_kit.data.tokens import TokenDataset, standard_library_path

__all__ = ["ResumableLoader", "ShuffledOrder", "TokenDataset", "standard_library_path"]

_HOME = {
    "ResumableLoader": "resume_kit.data.loader",
    "ShuffledOrder": "resume_kit.data.permutation",
    "TokenDataset": "resume_kit.data.tokens",
    "standard_library_path": "resume_kit.data.tokens",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
