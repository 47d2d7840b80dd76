"""The findings as text: a table around each kill, and the totals."""

from __future__ import annotations

from collections.abc import Iterator

from launch.demo.judging import FIGURES, Attempt, Findings, Kill, Pair

_MARGIN = 2


def kill_tables(findings: Findings) -> str:
    """One table a kill: the steps around it, each with both losses in full precision."""
    return "\n\n".join("\n".join(_kill_table(findings, kill)) for kill in findings.kills)


def _kill_table(findings: Findings, kill: Kill) -> Iterator[str]:
    resumed = next((a for a in findings.attempts if a.number == kill.attempt + 1), None)
    start = None if resumed is None else resumed.resumed_from
    rows = _rows(findings, kill, start)
    yield f"around kill {findings.kills.index(kill) + 1}, {kill.label}"
    if not rows:
        yield "  no step there was compared"
        return
    widths = [max(len("reference loss"), *(len(repr(pair.reference["loss"])) for pair in rows.values()))]
    widths.append(max(len("resumed loss"), *(len(repr(pair.resumed["loss"])) for pair in rows.values())))
    line = f"  {{:>4}}  {{:<{widths[0]}}}  {{:<{widths[1]}}}  {{:<5}}  {{}}"
    yield line.format("step", "reference loss", "resumed loss", "equal", "").rstrip()
    before: int | None = None
    for step, pair in rows.items():
        if before is not None and step > before + 1:
            hidden = [p for p in findings.pairs if before < p.step < step]
            equal = "all equal" if not any(p.differing for p in hidden) else "NOT all equal"
            steps = f"step {step - 1}" if step == before + 2 else f"steps {before + 1}–{step - 1}"
            yield line.format("⋮", steps, "", "", equal).rstrip()
        equal = "yes" if not pair.differing else "NO"
        note = ", ".join([*(f"{name} differs" for name in pair.differing), *_notes(step, start, kill, resumed)])
        yield line.format(step, repr(pair.reference["loss"]), repr(pair.resumed["loss"]), equal, note).rstrip()
        before = step


def _rows(findings: Findings, kill: Kill, start: int | None) -> dict[int, Pair]:
    """The compared steps around a checkpoint and the kill after it, as the attempt after the kill has them."""
    last = kill.last_step
    wanted = {last + offset for offset in range(-1, _MARGIN + 1)}
    if start is not None:
        wanted |= {start + offset for offset in range(_MARGIN + 1)}
    chosen: dict[int, Pair] = {}
    for step in sorted(wanted):
        pairs = {pair.attempt: pair for pair in findings.pairs if pair.step == step}
        if pairs:
            chosen[step] = pairs.get(kill.attempt + 1) or pairs.get(kill.attempt) or next(iter(pairs.values()))
    return chosen


def _notes(step: int, start: int | None, kill: Kill, resumed: Attempt | None) -> Iterator[str]:
    if step == start:
        yield "the checkpoint resumed from"
    again = resumed is not None and step in resumed.steps and step <= kill.last_step
    if start is not None and step == start + 1:
        yield "first step after the resume"
    elif again:
        yield "trained again after the resume"
    if step == kill.torn_step:
        yield "killed in its save"
    elif kill.torn_step is None and step == kill.last_step + 1:
        yield "the kill fell here"


def totals(findings: Findings) -> str:
    """What was compared, and how much of it was equal."""
    count = len(findings.pairs)
    first_resume = min((a.number for a in findings.attempts if a.resumed_from), default=None)
    later = [p for p in findings.pairs if first_resume is not None and p.attempt >= first_resume]
    lines = [
        ("kills", f"{len(findings.kills)}: " + "; ".join(kill.label for kill in findings.kills)),
        (
            "steps compared",
            f"{count} step records: {count - findings.trained_twice} steps, {findings.trained_twice} of them "
            f"trained twice; {len(later)} after a resume",
        ),
    ]
    for name, plural in FIGURES.items():
        equal = sum(name not in pair.differing for pair in findings.pairs)
        lines.append((plural, f"{equal} of {count} equal" + (", bit for bit" if equal == count else "")))
    last = findings.last_checkpoint
    if last is not None:
        equal = sum(not pair.differing for pair in findings.checkpoints)
        steps = ", ".join(str(pair.step) for pair in findings.checkpoints)
        lines.append(
            (
                "checkpoints",
                f"{equal} of {len(findings.checkpoints)} identical (steps {steps}): {last.tensors} tensors, "
                f"optimizer, RNG of {last.ranks} rank{'s' if last.ranks > 1 else ''}, data position",
            )
        )
    return "\n".join(f"  {name:<15} {text}" for name, text in lines)
