"""Fingerprints on a GPU against a copy on that GPU, by dtype: `python -m benchmarks.fingerprints [--out FILE]`."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import hardware
from resume_kit.algebra.boxes import Box, flat_runs
from resume_kit.engines.fingerprint import FingerprintPlan, as_unsigned
from resume_kit.engines.fingerprint_torch import torch_sums

_BYTES = 1 << 30
_REPEATS = 15
_RUN = 1792  # elements of a row of a column slice
_CACHE = 256 << 20  # more than the L2 cache of any GPU so far


def measure(device: torch.device, nbytes: int = _BYTES, repeats: int = _REPEATS) -> dict[str, Any]:
    """GB/s, median (least, most): of the device's copy (read and written bytes), and of fingerprints (read bytes).

    Each plan is compared with the torch reference first. Raises `AssertionError` where they differ.
    """
    source = torch.randint(-128, 128, (nbytes,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    found = {"device copy": _rates(lambda: target.copy_(source), 2 * nbytes, device, repeats)}
    for dtype in (torch.bfloat16, torch.float32, torch.float64, torch.int8):
        data = source.view(dtype)
        rows = data.numel() // _RUN
        name = str(dtype).removeprefix("torch.")
        whole = data, (data.numel(),), Box.whole((data.numel(),))
        slices = data[: rows * _RUN], (rows, 8 * _RUN), Box((0, 0), (rows, _RUN))
        for what, piece in ((name, whole), (f"{name}, runs of {_RUN}", slices)):
            plan = FingerprintPlan([piece])
            assert as_unsigned(plan.run()) == as_unsigned(torch_sums(flat_runs(piece[1], piece[2]), [piece[0]])), what
            found[what] = _rates(plan.run, piece[0].numel() * dtype.itemsize, device, repeats)
    return found


def _rates(call: Callable[[], Any], nbytes: int, device: torch.device, repeats: int) -> list[float]:
    flushed = torch.empty(_CACHE, dtype=torch.uint8, device=device)
    call()
    events = []
    for _ in range(repeats):
        flushed.zero_()
        pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
        pair[0].record()
        call()
        pair[1].record()
        events.append(pair)
    torch.cuda.synchronize(device)
    rates = [nbytes / start.elapsed_time(end) / 1e6 for start, end in events]
    return [statistics.median(rates), min(rates), max(rates)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    arguments = parser.parse_args()
    found = measure(torch.device("cuda", 0))
    copy = found["device copy"][0]
    for what, (median, least, most) in found.items():
        print(f"{what:26} {median:5.0f} GB/s ({least:.0f}–{most:.0f}), {median / copy:.0%} of the copy")
    if arguments.out:
        facts = {"date": time.strftime("%Y-%m-%d"), **hardware(), "torch": torch.__version__, "GB/s": found}
        arguments.out.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
