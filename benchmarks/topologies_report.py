"""The topology matrix as lines for a console and as the table of docs/topologies.md."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_BEGIN, _END = "<!-- topologies: made by python -m benchmarks.topologies -->", "<!-- end of topologies -->"
_HEADER = "| from | to | tensors equal | back bit-identical | 20 steps on: max Δloss | read ÷ wanted |"


def line(row: Mapping[str, Any]) -> str:
    """A trip in one line."""
    verdict = "FAILED" if row["problems"] else "exact"
    text = f"{verdict:<6} {row['name']:<34} {_from(row)} → {row['to']}"
    if "tensors" not in row:
        return text
    difference = f"Δloss {row['forward']['max relative loss difference']:.1e}"
    return f"{text}: {row['tensors']} tensors, {difference}, read {ratio(row):.3f}, {row['seconds']:.1f} s"


def ratio(row: Mapping[str, Any]) -> float:
    """Bytes read for each byte wanted, over all ranks."""
    read: float = row["read"]["read_bytes"] / row["read"]["wanted_bytes"]
    return read


def markdown(result: Mapping[str, Any]) -> str:
    return "\n".join(_lines(result)) + "\n"


def with_table(page: str, result: Mapping[str, Any]) -> str:
    """The page with the table between its two marks made anew."""
    before, rest = page.split(_BEGIN)
    _, after = rest.split(_END)
    return before + _BEGIN + "\n" + "\n".join(short_table(result)) + "\n" + _END + after


def short_table(result: Mapping[str, Any]) -> Iterator[str]:
    """One line for each topology that was left, with the worst figure of its trips."""
    yield "| from | to | tensors equal, back bit-identical | 20 steps on: max Δloss |"
    yield "|---|---|---|---|"
    departures: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in result["trips"]:
        departures.setdefault((row["engine"], row["from"]), []).append(row)
    for (engine, start), rows in departures.items():
        goals = "; ".join(f"{row['to']} ({row['note']})" if row["note"] else row["to"] for row in rows)
        good = sum(not row["problems"] for row in rows)
        worst = max(row["forward"]["max relative loss difference"] for row in rows if "forward" in row)
        yield f"| {engine} {start} | {goals} | {good} of {len(rows)} | {worst:.1e} |"


def _lines(result: Mapping[str, Any]) -> Iterator[str]:
    rows, method = result["trips"], result["method"]
    yield "# Topology matrix"
    yield ""
    versions = ", ".join(f"{name} {result['versions'][name]}" for name in ("torch", "deepspeed", "megatron-core"))
    cores = result["hardware"]["host cores"]
    yield (
        f"{result['date']}, {len(rows)} trips on real engines, CPU and gloo, {cores} cores; {versions}. "
        f"`{result['command']}`, {result['seconds'] / 60:.0f} minutes."
    )
    yield ""
    yield (
        f"A takes a checkpoint {method['checkpoint of A']}; B resumes from it and saves at once; A resumes from that. "
        "Tensors equal: both saves tell the same dtype, shape and fingerprint of each. Back bit-identical: every later "
        "record and the final state of every rank, RNG included, are those of the uninterrupted run. Δloss: the "
        "largest relative difference over 20 steps in B without dropout, the samples the same in every step. "
        "Read ÷ wanted: bytes, over all ranks; up to 5% are read in vain, and on top the headers of files that a rank "
        "reads whole, which weigh in files this small."
    )
    for engine in dict.fromkeys(row["engine"] for row in rows):
        yield from ("", f"## {engine}", "", _HEADER, "|---|---|---|---|---|---|")
        yield from (_row(row) for row in rows if row["engine"] == engine)


def _row(row: Mapping[str, Any]) -> str:
    if "tensors" not in row:
        return f"| {_from(row)} | {row['to']} | failed | failed | failed | |"
    forward = row["forward"]
    equal = str(row["tensors"]) if row["fingerprints equal"] else "**no**"
    back = "yes" if row["back bit-identical"] else "**no**"
    loss = f"{forward['max relative loss difference']:.1e}"
    if not (forward["within tolerance"] and forward["samples equal"]):
        loss = f"**{loss}**"
    return f"| {_from(row)} | {row['to']} | {equal} | {back} | {loss} | {ratio(row):.3f} |"


def _from(row: Mapping[str, Any]) -> str:
    return f"{row['from']}, {row['note']}" if row["note"] else str(row["from"])
