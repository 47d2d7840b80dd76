"""The topology matrix on real engines: from A to B, back to A, and on in B, for every trip of the table.

    python -m benchmarks.topologies --out benchmarks/results/NAME [--only zero-4-3 megatron-tp-pp]
    python -m benchmarks.topologies --out benchmarks/results/NAME --page        # its table into docs/topologies.md

Models are tiny and ranks are processes on this host's CPUs: this shows what is exact, not how fast it is. Exit code 1
if any trip fails.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT, hardware
from benchmarks.topologies_report import line, markdown, with_table
from resume_kit.environment import software_versions
from resume_kit.policy.policy import TOLERANCES
from tests.jobs import text_file
from tests.ranks import Outcome as RankOutcome
from tests.ranks import RankFailure
from tests.resharding.travel import FORWARD_STEPS, HOME_STEPS, LEFT_AT, Outcome, Traveller
from tests.resharding.trips import TRIPS, AnyJob, Trip

PAGE = ROOT / "docs/topologies.md"

_SHOWN = 5  # problems of a trip on the console; the JSON has them all


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--out", type=Path, required=True, help="where topologies.json and topologies.md go")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=list(TRIPS), default=list(TRIPS))
    parser.add_argument(
        "--page", action="store_true", help="run nothing; put the table of --out into docs/topologies.md"
    )
    options = parser.parse_args(arguments)
    if options.page:
        result = json.loads((options.out / "topologies.json").read_text())
        PAGE.write_text(with_table(PAGE.read_text(), result))
        return 0
    began = time.perf_counter()
    rows = list(go_on_all(TRIPS[name] for name in options.only))
    failed = [row["name"] for row in rows if row["problems"]]
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "command": "python -m benchmarks.topologies",
        "hardware": hardware(),
        "versions": software_versions(),
        "method": {
            "checkpoint of A": f"after step {LEFT_AT} of {HOME_STEPS}, dropout on",
            "steps compared back in A": HOME_STEPS - LEFT_AT,
            "steps compared in B": f"{FORWARD_STEPS}, dropout off",
            "tolerances (absolute, relative)": {name: list(TOLERANCES[name]) for name in ("standard", "relaxed")},
        },
        "seconds": time.perf_counter() - began,
        "failed": failed,
        "trips": rows,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "topologies.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    (options.out / "topologies.md").write_text(markdown(result))
    print(f"{len(rows) - len(failed)} of {len(rows)} trips exact in {result['seconds']:.0f} s; see {options.out}")
    return 1 if failed else 0


def go_on_all(trips: Iterable[Trip]) -> Iterable[dict[str, Any]]:
    """Each trip's row, as soon as it is made. One that raises is a row too."""
    with tempfile.TemporaryDirectory(prefix="topologies-", dir=_memory()) as name:
        traveller = Traveller(Path(name), text_file(Path(name)))
        for trip in trips:
            try:
                row = row_of(traveller.go(trip))
            except RankFailure as error:
                row = {**_places(trip), "problems": [_verdict(o) for o in error.failed.values()], "log": str(error)}
            except AssertionError:
                row = {**_places(trip), "problems": ["the trip did not go as planned"], "log": traceback.format_exc()}
            print("\n    ".join([line(row), *row["problems"][:_SHOWN]]), flush=True)
            yield row


def _verdict(outcome: RankOutcome) -> str:
    return f"rank {outcome.rank} {outcome.verdict}"


def row_of(outcome: Outcome) -> dict[str, Any]:
    """An outcome in plain values."""
    forward, read = outcome.forward, outcome.read
    return {
        **_places(outcome.trip),
        "tensors": outcome.tensors,
        "fingerprints equal": not outcome.changed,
        "back bit-identical": not outcome.astray,
        "forward": {
            "steps": forward.steps,
            "max relative loss difference": forward.max_relative,
            "max absolute loss difference": forward.max_absolute,
            "tolerance": outcome.trip.tolerance,
            "within tolerance": not forward.out_of_tolerance,
            "samples equal": not forward.other_samples,
        },
        "read": {
            **{key: read[key] for key in ("wanted_bytes", "read_bytes", "verified_bytes")},
            "by rank: wanted, read, verified": read["by_rank"],
        },
        "seconds": outcome.seconds,
        "problems": outcome.problems,
    }


def _places(trip: Trip) -> dict[str, Any]:
    return {
        "name": trip.name,
        "engine": trip.engine,
        "from": trip.start.label,
        "to": trip.goal.label,
        "ranks": [trip.start.world, trip.goal.world],
        "note": trip.note,
        "precision": trip.start.job.precision,
        "jobs": [_told(place.job) for place in (trip.start, trip.goal)],
    }


def _told(job: AnyJob) -> dict[str, Any]:
    """What a job says that is not its kind's default."""
    return {name: value for name, value in asdict(job).items() if value != getattr(type(job), name, None)}


def _memory() -> str | None:
    """A memory file system where there is one: what is shown here does not depend on the disk."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


if __name__ == "__main__":
    sys.exit(main())
