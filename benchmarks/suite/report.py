"""Results as Markdown: for each part and file system what every system took, beside the floors and the kit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.suite.charts import draw
from benchmarks.suite.results import Results, Row, Spread
from benchmarks.suite.tables import GATE, RAW_READ, RAW_WRITE, SAVES, gigabytes, seconds, table
from resume_kit.errors import UsageError

README = Path(__file__).resolve().parents[2] / "README.md"
BEGIN, END = "<!-- benchmarks: made by python -m benchmarks report -->", "<!-- end of benchmarks -->"

_HOW = (
    "Seconds are those of the slowest rank, median (least–most) of the repeats; the first repeat stands apart. All "
    "systems save and load in turns, in one process group, one training step before every save. *blocks*: until the "
    "call returns and training may go on. *durable*: until the checkpoint is complete and its files are fsynced; where "
    "a system does not fsync by itself, an fsync of all of its files is counted in. *load*: into the live state, with "
    "cold caches where the file system allows it; the kit's verifies digests on the way, and *with proof* adds "
    "preflight and the proof of every tensor on the device. ÷ floor: against raw files of as many bytes in as many "
    "seconds; ÷ ours: against the kit's best way. *memory*: largest growth of a rank's resident set during a save "
    "after the first, without pinned memory."
)


def write_report(folder: Path, results: Results) -> Path:
    """Write `results.md` and the charts beside it; returns the former."""
    charts = draw(folder, results)
    path = folder / "results.md"
    path.write_text("\n".join([*document(results), *(f"\n![{chart.stem}]({chart.name})" for chart in charts)]) + "\n")
    return path


def write_to_readme(folder: Path, readme: Path = README) -> None:
    """Put the excerpt of a folder's results between the README's marks. Raises `UsageError` without marks."""
    from benchmarks.suite.results import read_results

    text = readme.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise UsageError(f"{readme.name} has not these two lines, once each: {BEGIN} and {END}")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    readme.write_text("\n".join([before + BEGIN, *excerpt(read_results(folder)), END + after]))


def document(results: Results) -> Iterator[str]:
    """All lines of `results.md`."""
    yield f"# Benchmarks: {results.preset}"
    yield ""
    yield f"{results.date}; {machine(results)}; {software(results)}."
    if about := results.settings.get("about"):
        yield f"{results.preset}: {about}."
    yield ""
    yield from (f"    {command}" for command in results.commands)
    yield ""
    yield _HOW
    for part, facts in results.parts.items():
        yield from ("", f"## {part}", "", *_facts(facts))
        rows = [row for row in results.rows if row.part == part]
        for target in dict.fromkeys(row.target for row in rows):
            here = [row for row in rows if row.target == target]
            yield from ("", f"### {part} on {target}", "", *_where(facts.get("targets", {}).get(target, {})), "")
            yield from _target(here)


def excerpt(results: Results) -> Iterator[str]:
    """The README's table: one line a system, with the medians."""
    yield "| workload, file system | system | blocks | durable | load | ÷ floor: durable, load |"
    yield "|---|---|---|---|---|---|"
    for part in results.parts:
        for target in dict.fromkeys(row.target for row in results.rows if row.part == part):
            rows = [row for row in results.rows if (row.part, row.target) == (part, target)]
            for row in rows:
                if row.group in ("ours", "peer") and row.samples:
                    cells = [f"{part}, {target}", row.system, *(_median(row, metric) for metric in SAVES)]
                    ratios = [_times(_over_floor(row, rows, metric)) for metric in ("durable", "load")]
                    yield f"| {' | '.join(cells)} | {', '.join(ratios)} |"
    yield ""
    yield f"{results.date}; {machine(results)}; {software(results)}."


def machine(results: Results) -> str:
    hardware = results.hardware
    gpus = hardware.get("gpus") or []
    kinds = dict.fromkeys(gpus)
    shown = ", ".join(f"{gpus.count(kind)} × {kind}" for kind in kinds) or "no GPU"
    return f"{shown}, {hardware.get('host cores', '?')} cores"


def software(results: Results) -> str:
    names = ("python", "torch", "deepspeed", "megatron-core")
    return ", ".join(f"{name} {results.versions.get(name, '?')}" for name in names)


def _facts(facts: dict[str, Any]) -> Iterator[str]:
    if "what" in facts:
        size = f"{facts['parameters']:,} parameters; " if "parameters" in facts else ""
        yield f"{facts['what']}; {size}{facts['device']}; {facts['config']}."
    if "failure" in facts:
        yield f"**The part {facts['failure']}**; what it had measured is below."
    for what in facts.get("ended early", []):
        yield f"Ended early, the budget of time was used up: {what}."


def _where(facts: dict[str, str]) -> Iterator[str]:
    names = {"caches before reads": "Caches before reads", "write floor": "raw writes", "read floor": "raw reads"}
    if facts:
        yield "; ".join(f"{shown}: {facts[name]}" for name, shown in names.items() if name in facts) + "."


def _target(rows: Sequence[Row]) -> Iterator[str]:
    systems = [row for row in rows if row.group in ("ours", "peer")]
    if systems:
        yield from table(
            ["system", "GB", "blocks", "durable", "GB/s", "load", "first: blocks, durable, load", "memory, GB"],
            [_system(row) for row in systems],
        )
        yield ""
        yield from table(
            ["times", "durable ÷ floor", "load ÷ floor", "blocks ÷ ours", "durable ÷ ours", "load ÷ ours"],
            [_ratios(row, rows) for row in systems if row.samples],
        )
        yield from ("", *_notes(systems))
    ours = [row for row in rows if row.group == "ours" and row.samples]
    if ours:
        yield from _with_proof(rows)
        yield "Inside the kit, seconds of the slowest rank in each phase:"
        yield ""
        yield from table(["way", "phase", "seconds"], [line for row in ours for line in _phases(row)])
        yield ""
    yield from _others(rows, "floor", ["floor", "GB", "seconds", "GB/s", "note"])
    yield from _others(rows, "rate", ["by itself", "GB", "seconds", "GB/s", "note"])
    yield from _others(rows, "planning", ["planning", "GB", "seconds", "GB/s", "note"])
    yield from _training([row for row in rows if row.group == "training"])
    again = [row for row in rows if row.group == "continuation"]
    if again:
        yield "Trained again from a checkpoint, algorithms deterministic; records of steps and fingerprints compared:"
        yield ""
        yield from table(["where", "outcome"], [[row.system, row.failure or row.note] for row in again])
        yield ""
    legs = [row for row in rows if row.group == "reshard"]
    if legs:
        yield from table(
            ["resumed in another topology", "GB", "preflight", "load", "prove", "gate", "note"],
            [[row.system, gigabytes(row), *_stages(row), row.failure or row.note] for row in legs],
        )
        yield ""


def _stages(row: Row) -> list[str]:
    """Without further repeats those of the first, which says so."""
    stages = ("preflight", "load", "prove", "gate")
    if row.samples:
        return [_spread(row, stage) for stage in stages]
    return [f"first: {seconds(row.first[stage])}" if stage in row.first else "" for stage in stages]


def _system(row: Row) -> list[str]:
    if not row.samples and not row.first:
        return [row.system, "", "did not run", "", "", "", "", ""]
    first = ", ".join(seconds(row.first.get(metric)) for metric in SAVES)
    rate = row.rate("durable")
    memory = row.figures.get("resident growth")
    return [
        row.system,
        gigabytes(row),
        *(_spread(row, metric) for metric in ("blocking", "durable")),
        "" if rate is None else f"{rate / 1e9:.2f}",
        _spread(row, "load"),
        first,
        "" if memory is None else f"{memory / 1e9:.2f}",
    ]


def _ratios(row: Row, rows: Sequence[Row]) -> list[str]:
    floors = [_over_floor(row, rows, metric) for metric in ("durable", "load")]
    return [row.system, *map(_times, floors), *(_times(_over_ours(row, rows, metric)) for metric in SAVES)]


def _over_floor(row: Row, rows: Sequence[Row], metric: str) -> float | None:
    """Seconds a byte against those of the raw file's."""
    name = {"durable": RAW_WRITE, "load": RAW_READ}[metric]
    floor = next((other.rate(metric) for other in rows if other.group == "floor" and other.system == name), None)
    mine = row.rate(metric)
    return floor / mine if floor and mine else None


def _over_ours(row: Row, rows: Sequence[Row], metric: str) -> float | None:
    """Seconds against those of the kit's best way."""
    ours = [spread.median for other in rows if other.group == "ours" and (spread := other.spread(metric))]
    mine = row.spread(metric)
    return mine.median / min(ours) if mine and ours and min(ours) else None


def _notes(rows: Sequence[Row]) -> Iterator[str]:
    for row in rows:
        said = [row.note] if row.note and row.samples else []
        said += [f"**{'failed' if row.samples else 'did not run'}**: {row.failure}"] if row.failure else []
        if said:
            yield f"- {row.system}: {'; '.join(said)}"
    pinned = max((row.figures.get("pinned", 0.0) for row in rows if row.group == "ours"), default=0.0)
    if pinned:
        yield f"- Pinned host memory of a rank, all systems together: {pinned / 1e9:.2f} GB"
    yield ""


def _with_proof(rows: Sequence[Row]) -> Iterator[str]:
    for row in rows:
        if row.system == GATE and row.samples:
            yield (
                "The kit records its gate, a forward and backward, in the first of these saves only (`gate_every`). "
                f"Each save that records it blocks for that much longer: {_median(row, 'seconds')}."
            )
            yield ""
        if whole := _median(row, "load with proof"):
            stages = ", ".join(f"{name} {_median(row, f'resume: {name}')}" for name in ("preflight", "load", "prove"))
            yield f"The kit's load with proof: {whole} ({stages}); the gate after it: {_median(row, 'resume: gate')}."
            yield ""


def _phases(row: Row) -> Iterator[list[str]]:
    for metric in row.samples:
        if metric.startswith(("save: ", "resume: ")):
            yield [row.system, metric, _spread(row, metric)]


def _others(rows: Sequence[Row], group: str, header: list[str]) -> Iterator[str]:
    found = [row for row in rows if row.group == group]
    if not found:
        return
    lines = []
    for row in found:
        metric = next(iter(row.samples), "")
        rate = row.rate(metric)
        shown = "" if rate is None else f"{rate / 1e9:.2f}"
        lines.append([row.system, gigabytes(row), _spread(row, metric), shown, row.failure or row.note])
    yield from table(header, lines)
    yield ""


def _training(rows: Sequence[Row]) -> Iterator[str]:
    if not rows:
        return
    plain = rows[0].spread("mean step")
    lines = []
    for row in rows:
        mean = row.spread("mean step")
        added = "" if not (plain and mean) or row is rows[0] else f"{(mean.median / plain.median - 1) * 100:+.1f}%"
        worst = max(row.samples.get("step", []), default=None)
        lines.append([row.system, _spread(row, "mean step"), added, seconds(worst), row.failure])
    yield from table(["training", "mean step of a phase", "against no saves", "longest step", "note"], lines)
    yield ""


def _spread(row: Row, metric: str) -> str:
    spread = row.spread(metric)
    return _text(spread) if spread else ""


def _text(spread: Spread) -> str:
    return f"{seconds(spread.median)} ({seconds(spread.least)}–{seconds(spread.most)})"


def _median(row: Row, metric: str) -> str:
    spread = row.spread(metric)
    return f"{seconds(spread.median)} s" if spread else ""


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.1f}" if ratio >= 10 else f"{ratio:.2f}"
