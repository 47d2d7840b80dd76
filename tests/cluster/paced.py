"""A training entry whose steps wait for a test: step N ends once the file $PACE says N or more.

So a test disturbs a run at a step that it knows, and a reference needs no more steps than that. `ENTRY` names the
entry, as a module. All else is the entry's own.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))


class Pace:
    """The test's side of the file, and the ranks'."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def allow(self, step: int) -> None:
        beside = self._file.with_suffix(".new")
        beside.write_text(str(step))
        beside.replace(self._file)

    @property
    def allowed(self) -> int:
        return int(self._file.read_text())


def main() -> int:
    from resume_kit import ResumeKit

    pace, step = Pace(Path(os.environ["PACE"])), ResumeKit.step

    def paced(kit: ResumeKit, *arguments: Any) -> Any:
        while pace.allowed < kit.step_number:
            kit.alive()  # a rank that waits for a test does not hang
            time.sleep(0.02)
        return step(kit, *arguments)

    ResumeKit.step = paced
    return int(importlib.import_module(os.environ["ENTRY"]).main())


if __name__ == "__main__":
    sys.exit(main())
