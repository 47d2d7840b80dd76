"""Time from a failure to the first new step, on a SLURM cluster of this machine's own: `--out DIR` takes the results.

python -m benchmarks.recovery --out runs/recovery      (as root; `make cluster-tools` installs what it needs)

A ZeRO-3 run of two ranks on two hosts is disturbed in each of three ways, in turns. `detect` lasts until its launcher
or SLURM has noticed, `schedule` until the new processes start, `start` until the kit is made (imports, engine), and the
kit's own stages follow, from its journal. Imports and SlurmdTimeout dominate here; a real model loads for longer.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.machine import hardware
from resume_kit.environment import software_versions
from resume_kit.recovery.history import history
from tests.cluster.cluster import Cluster, missing_parts
from tests.cluster.runs import ZERO3, Run

STAGES = ("detect", "schedule", "start", "open", "elect", "preflight", "load", "prove", "gate", "other", "first step")


@dataclass(frozen=True)
class Recovery:
    """Seconds from a failure to the first step of the next attempt; `lost_steps`: trained again."""

    scenario: str
    total: float
    lost_steps: int
    parts: Mapping[str, float]


def rank_killed(run: Run, job: int) -> Callable[[], bool]:
    run.kill_rank(1, 0)
    return lambda: any(one.get("TORCHELASTIC_RESTART_COUNT") == "1" for one in run.processes_on(1).values())


def node_killed(run: Run, job: int) -> Callable[[], bool]:
    run.cluster.kill_node(2)
    return lambda: not run.job_is(job, "RUNNING", restarts=0)


def preempted(run: Run, job: int) -> Callable[[], bool]:
    run.cluster.run(None, "scancel", "--batch", "--signal=USR1", str(job))
    return lambda: bool(run.ended(1))


SCENARIOS = {
    "a rank killed, torchrun starts it again": rank_killed,
    "a node's power lost, SLURM queues the job again": node_killed,
    "stopped before the time limit, queued again": preempted,
}


def measure(cluster: Cluster, folder: Path, scenario: str) -> Recovery:
    """One run, disturbed once; it takes a step every half second."""
    run = Run(cluster, folder, ZERO3, ("run.steps=400", "run.save_every=4", "micro_batch_size=1", "policy.gate=true"))
    job = run.submit(RANKS_PER_NODE="1")
    run.train_to(10)
    failed = time.time()
    noticed_by = SCENARIOS[scenario](run, job)
    run.walk("the failure to be noticed", noticed_by, last=100)
    noticed = time.time()
    run.walk("the first new step", lambda: 2 in run.first_steps(), last=400, timeout=240)
    old, new = history(run.directory)
    began = next(e for e in run.events("start") if e["attempt"] == 2)["process_started"]
    first = next(e for e in run.steps() if e["attempt"] == 2)["time"]
    stages = {name: new.phases[name] for name in STAGES if name in new.phases}
    parts = {"detect": noticed - failed, "schedule": max(0.0, began - noticed), **stages}
    cluster.run(None, "scancel", "--signal=KILL", "--full", str(job), check=False)
    cluster.run(None, "scancel", str(job), check=False)
    cluster.repair()
    return Recovery(scenario, first - failed, old.lost_steps, parts)


def table(recoveries: list[Recovery]) -> str:
    """Markdown, a line a scenario: the median of its repeats, in seconds; least and most of the whole."""
    names = [name for name in STAGES if any(name in one.parts for one in recoveries)]
    lines = [f"| failure | first new step after | {' | '.join(names)} | steps lost |", "|---" * (len(names) + 3) + "|"]
    for scenario in SCENARIOS:
        repeats = [one for one in recoveries if one.scenario == scenario]
        totals = sorted(one.total for one in repeats)
        parts = []
        for name in names:
            found = [one.parts[name] for one in repeats if name in one.parts]
            parts.append(f"{statistics.median(found):.2f}" if found else "")
        lost = statistics.median(one.lost_steps for one in repeats)
        whole = f"{statistics.median(totals):.1f} s ({totals[0]:.1f}–{totals[-1]:.1f})"
        lines.append(f"| {scenario} | {whole} | {' | '.join(parts)} | {lost:g} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recovery", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="results.json and results.md go here")
    parser.add_argument("--repeats", type=int, default=3, help="of each scenario, in turns (default 3)")
    options = parser.parse_args()
    if missing := missing_parts():
        print("No cluster can be started here:\n  " + "\n  ".join(missing), file=sys.stderr)
        return 1
    options.out.mkdir(parents=True, exist_ok=True)
    found = []
    with tempfile.TemporaryDirectory(prefix="recovery-") as name, Cluster(Path(name) / "cluster") as cluster:
        for repeat in range(options.repeats):
            for number, scenario in enumerate(SCENARIOS):
                found.append(measure(cluster, Path(name) / f"run-{repeat}-{number}", scenario))
                print(f"{scenario}: {found[-1].total:.1f} s", flush=True)
    versions = software_versions()
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "command": f"python -m benchmarks.recovery --repeats {options.repeats}",
        "hardware": hardware(),
        "versions": versions,
        "cluster": "two ranks on two hosts (namespaces of one machine), SlurmdTimeout 10 s",
        "recoveries": [asdict(one) for one in found],
    }
    (options.out / "results.json").write_text(json.dumps(result, indent=1) + "\n")
    software = ", ".join(f"{name} {versions[name]}" for name in ("python", "torch", "deepspeed"))
    (options.out / "results.md").write_text(
        f"# Time to recover\n\n{result['date']}; {os.cpu_count()} cores; {software}; {result['cluster']}. "
        f"`{result['command']}`. Seconds, medians of {options.repeats} repeats.\n\n{table(found)}\n"
    )
    print((options.out / "results.md").read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
