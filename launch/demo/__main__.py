"""Kill a real ZeRO-3 run within a step and within a save, resume it, and compare it bit for bit.

make demo
python -m launch.demo --data my_text.txt --seed 7
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn, TextIO

import yaml

from launch.demo import folder
from launch.demo.processes import REPOSITORY, Machine
from launch.demo.screen import Screen
from launch.demo.story import CONFIG, MIN_STEPS, SAVES, Demo, DemoFailed, shown
from resume_kit.errors import ResumeKitError


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m launch.demo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=REPOSITORY / "runs" / "demo",
        help="folder (default runs/demo); an earlier demo in it is replaced",
    )
    parser.add_argument(
        "--data",
        type=Path,
        help="a text file or folder, or a .npy or .bin file of token ids; default: Python's standard library",
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=60,
        help=f"optimizer steps, at least {MIN_STEPS} (default 60); there are {SAVES} saves",
    )
    parser.add_argument("--ranks", type=int, help="ranks (default: all visible NVIDIA GPUs, or 2 on the CPU)")
    parser.add_argument("--seed", type=int, help="of the kills' instants (default: another each time)")
    options = parser.parse_args(arguments)
    if options.steps < MIN_STEPS:
        parser.error(f"--steps {options.steps}; two kills and {SAVES} saves need at least {MIN_STEPS}")
    if options.ranks is not None and options.ranks < 1:
        parser.error(f"--ranks {options.ranks}; give at least 1")
    if options.data is not None and not options.data.exists():
        parser.error(f"--data {options.data}: no such file or folder")
    return options


def _terminate(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0: PASS; 1: FAIL; 2: wrong usage; 130: interrupted. No child outlives it."""
    options = parse_arguments(arguments)
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    for name in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, _terminate)
    screen = Screen()
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(10**6)
    out = options.out.absolute()
    try:
        machine = Machine.choose(options.ranks)
        mark = folder.claim(out)
    except (ValueError, folder.FolderRefused) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    begun = time.monotonic()
    with mark:
        introduce(screen, machine, options, out, seed)
        data = options.data.absolute() if options.data else None
        demo = Demo(out, machine, steps=options.steps, seed=seed, data=data, screen=screen)
        try:
            findings = demo.run()
            problems = list(findings.problems)
            kills = [asdict(kill) for kill in findings.kills]
        except (DemoFailed, ResumeKitError) as error:
            problems, kills = [str(error)], []
        except KeyboardInterrupt:
            screen.say("\ndemo: interrupted; all its processes have ended", "bad")
            return 130
        return conclude(screen, mark, problems, kills, seconds=time.monotonic() - begun, seed=seed)


def introduce(screen: Screen, machine: Machine, options: argparse.Namespace, out: Path, seed: int) -> None:
    """What will be done, with what, where."""
    model = yaml.safe_load((REPOSITORY / CONFIG).read_text())["model"]
    text = "the source of Python's standard library, as bytes" if options.data is None else str(options.data)
    screen.say("resume_kit demo: kill a sharded training run twice, resume it, compare it bit for bit", "bold")
    for name, value in (
        ("machine", machine.label),
        (
            "training",
            f"DeepSpeed ZeRO-3, bf16, {options.steps} steps, a checkpoint every {options.steps // SAVES}",
        ),
        (
            "model",
            f"transformers {model['type']}, {model['n_layer']} layers, {model['n_embd']} wide, dropout on",
        ),
        ("text", text),
        ("folder", shown(out)),
        ("kill seed", str(seed)),
    ):
        screen.say(f"  {name:<10} {value}")


def conclude(
    screen: Screen,
    mark: TextIO,
    problems: list[str],
    kills: list[dict[str, object]],
    *,
    seconds: float,
    seed: int,
) -> int:
    """The verdict, on the screen and in the folder's mark."""
    verdict = "FAIL" if problems else "PASS"
    folder.write_mark(
        mark,
        {
            "verdict": verdict,
            "problems": problems,
            "kills": kills,
            "seconds": round(seconds, 1),
            "seed": seed,
        },
    )
    screen.say(f"  {'wall time':<15} {seconds // 60:.0f} min {seconds % 60:.0f} s\n")
    for problem in problems[1:]:
        screen.say(f"also: {problem}", "bad")
    if problems:
        reason = problems[0].splitlines()[0]
        screen.say(f"demo: FAIL {reason}", "bad")
        return 1
    screen.say("demo: PASS", "good")
    return 0


if __name__ == "__main__":
    sys.exit(main())
