"""The benchmark suite: the kit, its peers and the machine's floors, side by side in one run.

python -m benchmarks run --preset cpu-tiny --out DIR
python -m benchmarks compare A B
python -m benchmarks report DIR [--readme]
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.machine import hardware
from benchmarks.suite import parts
from benchmarks.suite.adjusting import adjusted
from benchmarks.suite.compare import comparison
from benchmarks.suite.presets import PRESETS, Preset
from benchmarks.suite.report import write_report, write_to_readme
from benchmarks.suite.results import FILE, Results, read_results
from launch.slurm import adopt_slurm
from resume_kit.environment import software_versions
from resume_kit.errors import UsageError


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0: done; 1: a part of a run failed, or the kit in it; 2: wrong usage."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(given)
    try:
        if options.command == "compare":
            print("\n".join(comparison(read_results(options.before), read_results(options.after))))
            return 0
        if options.command == "report":
            return _report(options)
        return _run(options, given[1:])
    except UsageError as error:
        print(f"ERROR: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").split("\n", 1)[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="measure a preset; under torchrun or srun, one of its parts")
    run.add_argument("--preset", required=True, choices=list(PRESETS))
    run.add_argument("--out", required=True, type=Path, help="where results go")
    run.add_argument("--work", nargs="+", type=Path, metavar="DIR", help="file systems to measure; default: OUT/work")
    run.add_argument("--peers", help="names with commas, or none; default: the preset's")
    run.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="repeats=3, zero3.model.n_layer=4")
    run.add_argument("--ranks", type=int, help="of every workload; default: the preset's")
    run.add_argument("--budget", type=float, metavar="SECONDS", help="begin no repeat after its share of this time")
    run.add_argument("--only", nargs="+", default=[], metavar="PART", help="parts of the preset")
    run.add_argument("--part", help=argparse.SUPPRESS)
    run.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    compare = commands.add_parser("compare", help="same rows of two results side by side")
    compare.add_argument("before", type=Path)
    compare.add_argument("after", type=Path)
    report = commands.add_parser("report", help="make results.md and the charts anew from results.json")
    report.add_argument("folder", type=Path)
    report.add_argument("--readme", action="store_true", help="put its table between the marks of README.md")
    return parser


def _run(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    preset = adjusted(PRESETS[options.preset], options.set, peers=options.peers, ranks=options.ranks)
    parts.hide_gpus(preset)
    adopt_slurm(os.environ)
    options.work = options.work or [options.out / "work"]
    for folder in options.work:
        folder.mkdir(parents=True, exist_ok=True)
    if "RANK" in os.environ:
        return _rank(options, preset)
    results = Results(
        options.preset,
        date=time.strftime("%Y-%m-%d"),
        commands=[f"python -m benchmarks run {shlex.join(arguments)}"],
        hardware=hardware(),
        versions=software_versions(),
        settings={"peers": options.peers, "set": options.set, "ranks": options.ranks, "budget": options.budget}
        | {name: getattr(preset, name) for name in ("about", "repeats", "phases", "phase_steps", "save_every")},
    )
    results.write(options.out)
    failures = parts.run_parts(preset, arguments, options.only, options.budget)
    parts.clean(preset, options.work)
    if not any((options.out / "work").glob("*")):
        shutil.rmtree(options.out / "work", ignore_errors=True)
    results = read_results(options.out)
    for part, problem in failures.items():
        results.parts.setdefault(part, {})["failure"] = problem
    results.write(options.out)
    print(f"see {write_report(options.out, results)}")
    failed = [row for row in results.rows if row.group in ("ours", "reshard", "continuation") and row.failure]
    for row in failed:
        print(f"{row.part}, {row.target}, {row.system} failed: {row.failure}")
    return 1 if failures or failed else 0


def _rank(options: argparse.Namespace, preset: Preset) -> int:
    """As a rank of a process group that a launcher has started."""
    from benchmarks.suite.account import Job
    from benchmarks.suite.worker import run

    only = [options.part] if options.part else options.only
    named = parts.parts_of(preset, only)
    if len(named) != 1:
        names = ", ".join(name for name, _ in named)
        raise UsageError(f"one process group measures one part: say --only PART, of {names}")
    ((_, (spec, leg)),) = named
    deadline = options.deadline or (time.time() + options.budget if options.budget else None)
    results = read_results(options.out) if (options.out / FILE).exists() else _started(options)
    run(Job(preset, spec, options.work, options.out, results, leg, deadline))
    if os.environ["RANK"] == "0" and not options.part:
        if not spec.legs or leg == spec.legs[-1]:  # until then its legs resume what it left
            parts.clean(replace(preset, workloads=(spec,)), options.work)
        print(f"see {write_report(options.out, read_results(options.out))}")
    return 0


def _started(options: argparse.Namespace) -> Results:
    """Results of a run whose ranks a launcher has started."""
    return Results(
        options.preset,
        date=time.strftime("%Y-%m-%d"),
        commands=[f"torchrun … -m benchmarks {shlex.join(sys.argv[1:])}"],
        hardware=hardware(),
        versions=software_versions(),
    )


def _report(options: argparse.Namespace) -> int:
    print(f"see {write_report(options.folder, read_results(options.folder))}")
    if options.readme:
        write_to_readme(options.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
