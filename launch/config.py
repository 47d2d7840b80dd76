"""The configuration of a training run: YAML, `--set section.key=value`, and errors that name the nearest key."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import yaml

from resume_kit.errors import Problem, UsageError
from resume_kit.policy.policy import Policy
from resume_kit.run.retention import Retention
from resume_kit.run.schedule import Every
from resume_kit.saving.options import Saving


@dataclass
class RunConfig:
    """Where the run lives, how long it goes, what ends it; see `resume_kit.ResumeKit`. Changes no trained number.

    save_every: steps, or a time like "15m", or "auto".
    """

    dir: str = "runs/zero3"
    steps: int = 100
    save_every: int | str = 20
    mtbf_hours: float | None = None
    keep_last: int = 3
    keep_every: int | None = None
    timeout: float = 600.0
    hang_after: float | None = 1800.0
    deadline: float | None = None
    give_up_after: int = 3
    take_over: bool = False
    resume_at: int | None = None
    deterministic: bool = True


@dataclass
class DataConfig:
    """`path`: a text file or folder, a .npy or .bin file of token ids; null takes Python's standard library."""

    path: str | None = None
    sequence_length: int = 128
    max_bytes: int | None = None
    num_workers: int = 1


@dataclass
class SharedConfig:
    """What every training entry has. `policy` holds the fields of the kit's policy, a preset's name among them.

    `saving` says how saves go, see `resume_kit.Saving`.
    """

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    seed: int = 1234
    micro_batch_size: int = 4
    policy: dict[str, Any] = field(default_factory=dict)
    saving: Saving = field(default_factory=Saving)

    def problems(self) -> list[Problem]:
        """All values that cannot be meant."""
        run = self.run
        smallest = {"run.steps": run.steps, "run.give_up_after": run.give_up_after}
        found = at_least(1, {**smallest, "micro_batch_size": self.micro_batch_size})
        try:
            Every.parse(run.save_every)
        except UsageError as error:
            found.append(Problem("configuration", "", f"run.{error.headline}"))
        return found

    def for_the_kit(self) -> dict[str, Any]:
        """What the kit is given beside engine, data and policy."""
        run = self.run
        return {
            "run_dir": run.dir,
            "save_every": run.save_every,
            "mtbf_hours": run.mtbf_hours,
            "saving": self.saving,
            "retention": Retention(keep_last=run.keep_last, keep_every=run.keep_every),
            "config": self.pinned(),
            "timeout": run.timeout,
            "hang_after": run.hang_after,
            "deadline": run.deadline,
            "give_up_after": run.give_up_after,
            "take_over": run.take_over,
        }

    def pinned(self) -> dict[str, Any]:
        """What a checkpoint pins: all that shapes training."""
        raise NotImplementedError


@dataclass
class TrainConfig(SharedConfig):
    """`model` and `deepspeed` go to transformers and DeepSpeed as they are.

    global_batch_size: samples an optimizer step over all ranks; where it is given the accumulation follows from it and
    from the ranks there are, so that a job that comes back on fewer nodes trains the same.
    """

    gradient_accumulation_steps: int = 1
    global_batch_size: int | None = None
    model: dict[str, Any] = field(default_factory=dict)
    deepspeed: dict[str, Any] = field(default_factory=dict)

    def problems(self) -> list[Problem]:
        sizes = {
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
            "global_batch_size": self.global_batch_size,
        }
        return [*super().problems(), *at_least(1, sizes)]

    def accumulate_over(self, ranks: int) -> None:
        """Set the accumulation so that so many ranks take the global batch, if one is given. Raises `UsageError`."""
        if self.global_batch_size is None:
            return
        at_once = self.micro_batch_size * ranks
        if self.global_batch_size % at_once:
            what = f"{self.global_batch_size} samples are no multiple of {self.micro_batch_size} on {ranks} ranks"
            remedy = "choose micro_batch_size so that all numbers of ranks that may come divide it"
            raise UsageError("the global batch does not fit", [Problem("global_batch_size", "", what, remedy)])
        self.gradient_accumulation_steps = self.global_batch_size // at_once

    def pinned(self) -> dict[str, Any]:
        """What a checkpoint pins: all that shapes training. Where the data lies does not; its content does."""
        return {
            "seed": self.seed,
            "micro_batch_size": self.micro_batch_size,
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
            "deterministic": self.run.deterministic,
            "model": self.model,
        }


ConfigT = TypeVar("ConfigT", bound=SharedConfig)


def at_least(smallest: int, values: Mapping[str, int | None]) -> list[Problem]:
    """A problem for each named value that is given and too small."""
    return [
        Problem("configuration", "", f"{name} is {value}; it must be at least {smallest}")
        for name, value in values.items()
        if value is not None and value < smallest
    ]


class _Loader(yaml.SafeLoader):
    """Safe YAML in which 1e-4 is a number, as YAML 1.2 has it; YAML 1.1 reads a word."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+"), list("-+0123456789")
)


def parse_arguments(arguments: Sequence[str] | None = None) -> TrainConfig:
    """A DeepSpeed run's configuration from the command line, see `parse_as`."""
    return parse_as(TrainConfig, arguments)


def load(path: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """A DeepSpeed run's configuration from a file, see `load_as`."""
    return load_as(TrainConfig, path, overrides)


def parse_as(kind: type[ConfigT], arguments: Sequence[str] | None = None) -> ConfigT:
    """The configuration from `--config FILE` and any number of `--set key=value`. Raises `UsageError`."""
    parser = argparse.ArgumentParser(description="Train a causal LM; start and resume are the same command.")
    parser.add_argument("--config", required=True, type=Path, help="YAML file, see configs/")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="e.g. run.steps=200")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    options = parser.parse_args(arguments)
    return load_as(kind, options.config, options.set)


def load_as(kind: type[ConfigT], path: Path, overrides: Sequence[str] = ()) -> ConfigT:
    """Read a YAML file and apply `key=value` overrides, values in YAML. Raises `UsageError`."""
    try:
        content = yaml.load(path.read_text(), _Loader) or {}
    except OSError as error:
        raise UsageError(f"cannot read the configuration {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} must hold a mapping of keys, not a {type(content).__name__}")
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise UsageError(f"--set {override}: write key=value, for example --set run.steps=200")
        *parents, last = key.split(".")
        place = content
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise UsageError(f"--set {override}: {parent} is not a section")
        try:
            place[last] = yaml.load(text, _Loader)
        except yaml.YAMLError as error:
            raise UsageError(f"--set {override}: not valid YAML: {error}") from error
    config = build(kind, content)
    Policy.from_mapping(config.policy)
    if problems := config.problems():
        raise UsageError(f"{path} cannot be trained", problems)
    return config


def build(kind: type[ConfigT], content: Mapping[str, Any]) -> ConfigT:
    """A configuration from nested mappings; an unknown key or a value of another type is a `UsageError`."""
    config = _build(kind, content, "")
    assert isinstance(config, kind)
    return config


def _build(cls: type, content: Mapping[str, Any], path: str) -> Any:
    known = [item.name for item in fields(cls)]
    hints = get_type_hints(cls)
    values: dict[str, Any] = {}
    for key, value in content.items():
        where = f"{path}{key}"
        if key not in known:
            near = get_close_matches(str(key), known, n=1, cutoff=0.0)[0]
            raise UsageError(f"unknown configuration key {where!r}; did you mean {path + near!r}?")
        hint = hints[key]
        if is_dataclass(hint):
            if not isinstance(value, dict):
                raise UsageError(f"{where} must be a section of keys, not {value!r}")
            values[key] = _build(hint, value, f"{where}.")  # type: ignore[arg-type]
        else:
            values[key] = _converted(value, hint, where)
    return cls(**values)


def _converted(value: Any, hint: Any, where: str) -> Any:
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise UsageError(f"{where} is {value!r}; choose one of {', '.join(map(str, get_args(hint)))}")
        return value
    origin = get_origin(hint)
    allowed = (origin,) if origin in (dict, list) else get_args(hint) or (hint,)
    if float in allowed and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if (isinstance(value, bool) and bool not in allowed) or not isinstance(value, allowed):
        wanted = " or ".join(kind.__name__ for kind in allowed)
        raise UsageError(f"{where} is {value!r}; it must be {wanted}")
    return value
