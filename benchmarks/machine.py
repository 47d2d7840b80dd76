"""Where a benchmark runs: this repository's folder, and the machine."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def hardware() -> dict[str, Any]:
    """Cores, architecture and GPUs, one line each."""
    found: dict[str, Any] = {"host cores": os.cpu_count(), "machine": platform.machine()}
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=True).stdout
        found["gpus"] = [line.strip() for line in answer.splitlines()]
    except (OSError, subprocess.CalledProcessError):
        found["gpus"] = []
    return found
