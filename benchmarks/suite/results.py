"""What a run of the suite leaves: `results.json`, with every raw sample. No torch."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from resume_kit.errors import UsageError

SCHEMA = 1
FILE = "results.json"

Group = Literal["ours", "peer", "floor", "training", "rate", "planning", "reshard", "continuation"]


@dataclass(frozen=True)
class Spread:
    """Median, least and largest of some samples."""

    median: float
    least: float
    most: float


@dataclass
class Row:
    """What one system took in one part of a preset, on one file system.

    part: name of the workload, or of a leg that reshards its checkpoint. target: label of the file system, empty
    where none is used. nbytes: what the system moved, over all ranks. first, samples: seconds by metric, the first
    repeat apart. figures: anything else, bytes for instance. failure: why it has no samples, or no more.
    """

    part: str
    target: str
    group: Group
    system: str
    nbytes: int = 0
    note: str = ""
    failure: str = ""
    first: dict[str, float] = field(default_factory=dict)
    samples: dict[str, list[float]] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, str, str]:
        return (self.part, self.target, self.group, self.system)

    def add(self, seconds: Mapping[str, float], *, first: bool = False) -> None:
        """Take a repeat's seconds by metric."""
        for metric, value in seconds.items():
            if first:
                self.first[metric] = value
            else:
                self.samples.setdefault(metric, []).append(value)

    def most(self, figures: Mapping[str, float]) -> None:
        """Keep the larger of each figure."""
        for name, value in figures.items():
            self.figures[name] = max(value, self.figures.get(name, value))

    def spread(self, metric: str) -> Spread | None:
        """Median and range without the first repeat; None where the metric was not measured again."""
        values = self.samples.get(metric)
        return Spread(statistics.median(values), min(values), max(values)) if values else None

    def rate(self, metric: str) -> float | None:
        """Bytes a second at the median."""
        spread = self.spread(metric)
        return self.nbytes / spread.median if spread and spread.median and self.nbytes else None


@dataclass
class Results:
    """All rows of a preset, and what they were measured on. `parts`: facts of each part, by name."""

    preset: str
    date: str = ""
    commands: list[str] = field(default_factory=list)
    hardware: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)

    def replace_part(self, part: str, facts: Mapping[str, Any], rows: Iterable[Row]) -> None:
        """Put a part's facts and rows in the place of those that it had."""
        self.parts[part] = dict(facts)
        self.rows = [row for row in self.rows if row.part != part] + list(rows)

    def to_json(self) -> dict[str, Any]:
        return {"format": "resume_kit.benchmarks", "schema": SCHEMA, **asdict(self)}

    def write(self, folder: Path) -> None:
        """Write `results.json`, so that a reader sees the old or the new one."""
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = folder / f".{FILE}"
        unfinished.write_text(json.dumps(self.to_json(), indent=1, ensure_ascii=False) + "\n")
        os.replace(unfinished, folder / FILE)


def read_results(path: Path) -> Results:
    """Results from a folder or a JSON file. Raises `UsageError` where there are none, or of another schema."""
    path = path / FILE if path.is_dir() else path
    try:
        document = json.loads(path.read_text())
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"{path} is not JSON: {error}") from error
    if not isinstance(document, dict) or document.get("format") != "resume_kit.benchmarks":
        raise UsageError(f"{path} holds no results of `python -m benchmarks run`")
    if document.get("schema") != SCHEMA:
        raise UsageError(f"{path} has schema {document.get('schema')}; this version reads {SCHEMA}")
    known = {item.name for item in fields(Results)}
    values = {key: value for key, value in document.items() if key in known}
    return Results(**{**values, "rows": [Row(**row) for row in document["rows"]]})
