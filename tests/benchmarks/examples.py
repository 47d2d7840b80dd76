"""Results made by hand: a kit that is twice as slow as the floor, a slower peer, and a peer that did not run."""

from __future__ import annotations

from benchmarks.suite.results import Results, Row


def row(group: str, system: str, nbytes: int = 0, **samples: list[float]) -> Row:
    return Row(
        "zero3", "ext4", group, system, nbytes=nbytes, samples={k.replace("_", " "): v for k, v in samples.items()}
    )


def results() -> Results:
    rows = [
        row("ours", "resume_kit, overlapped", 4_000_000_000, blocking=[0.01, 0.02, 0.03], durable=[4.0, 4.0, 5.0]),
        row(
            "ours",
            "resume_kit, committed",
            4_000_000_000,
            blocking=[4.0],
            durable=[4.0],
            load=[3.0],
            load_with_proof=[3.5],
        ),
        row("peer", "Slow", 6_000_000_000, blocking=[9.0, 8.0, 10.0], durable=[12.0, 12.0, 12.0], load=[6.0, 6.0, 6.0]),
        row("floor", "raw write and fsync", 4_000_000_000, durable=[2.0, 2.0, 2.0]),
        row("floor", "raw read", 4_000_000_000, load=[1.0]),
        row("training", "no saves", mean_step=[1.0, 1.0], step=[0.9, 1.1]),
        row("training", "resume_kit, overlapped, every 2 steps", mean_step=[1.02, 1.06], step=[1.0, 1.5]),
        row("rate", "fingerprints on the device", 2_000_000_000, seconds=[0.001]),
    ]
    rows[0].first = {"blocking": 7.0, "durable": 9.0}
    rows.append(Row("zero3", "ext4", "peer", "Absent", failure="ImportError: no such thing"))
    rows.append(
        Row("zero3-on-3", "ext4", "reshard", "zero3 → zero3-on-3", nbytes=1, samples={"load": [2.5], "prove": [0.25]})
    )
    made = Results("by-hand", date="2026-01-02", commands=["python -m benchmarks run"], versions={"torch": "9.9"})
    facts = {"what": "a model", "parameters": 1234567, "device": "cpu", "config": "c.yaml"}
    made.replace_part("zero3", facts, rows[:-1])
    made.replace_part("zero3-on-3", {}, rows[-1:])
    return made
