"""``resume-kit diff A B``: how two checkpoints differ."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from resume_kit.checkpoint.records import TensorKey, TensorSpec
from resume_kit.cli.opening import open_checkpoint, open_manifest
from resume_kit.cli.output import BAD, FINE, Outcome, heading, printable, table
from resume_kit.cli.values import decoded
from resume_kit.integrity.compare import Comparison, ValueDifference, compare, count_by_kind
from resume_kit.integrity.differences import ABSENT, brief

#: Lines shown of each part; the JSON document has all.
_SHOWN = 12


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", metavar="A", help="a checkpoint; of a run, its newest")
    parser.add_argument("b", metavar="B", help="another")
    parser.epilog = (
        "exit 0 when the training state is the same: tensors, step, state, RNG, data and position in it. "
        "Engine, configuration, versions and gate are shown without counting"
    )


def execute(arguments: argparse.Namespace) -> Outcome:
    paths = open_checkpoint(arguments.a), open_checkpoint(arguments.b)
    found = compare(open_manifest(paths[0]), open_manifest(paths[1]))
    text = [f"A  {printable(str(paths[0]))}", f"B  {printable(str(paths[1]))}", *_text(found)]
    document = {"a": str(paths[0]), "b": str(paths[1]), **_document(found)}
    return Outcome(FINE if found.same_training_state else BAD, document, text)


def _document(found: Comparison) -> dict[str, Any]:
    tensors = found.tensors
    return {
        "same_training_state": found.same_training_state,
        "identical": found.identical,
        "tensors": {
            "same": tensors.same,
            "only_a": [list(key) for key in tensors.only_a],
            "only_b": [list(key) for key in tensors.only_b],
            "respecified": [
                {"tensor": list(old.key), "a": [old.dtype, old.shape], "b": [new.dtype, new.shape]}
                for old, new in tensors.respecified
            ],
            "changed": [list(key) for key in tensors.changed],
            "changed_by_kind": count_by_kind(tensors.changed),
        },
        "sections": {
            part.name: {"training_state": part.training_state, "differences": _values(part.differences)}
            for part in found.sections
        },
        "provenance": _values(found.provenance),
    }


def _values(values: Iterable[ValueDifference]) -> list[dict[str, Any]]:
    return [{"path": v.path, "a": decoded(v.a), "b": decoded(v.b)} for v in values]


def _text(found: Comparison) -> Iterator[RenderableType]:
    yield from _tensor_text(found)
    for section in found.sections:
        if section.differences:
            yield heading(f"{section.name}{'' if section.training_state else ' (does not count)'}")
            yield _difference_table(section.differences)
    if found.provenance:
        yield heading("provenance (does not count)")
        yield _difference_table(found.provenance)
    yield ""
    if found.same_training_state:
        rest = "nothing differs" if found.identical else "what differs does not count"
        yield Text(f"✓ the training state is the same; {rest}", style="green")
    else:
        yield Text("✗ the training state differs", style="bold red")


def _tensor_text(found: Comparison) -> Iterator[RenderableType]:
    tensors = found.tensors
    yield heading("tensors")
    yield f"{tensors.same} are the same"
    if tensors.only_a:
        yield f"{len(tensors.only_a)} only in A: {_some(tensors.only_a)}"
    if tensors.only_b:
        yield f"{len(tensors.only_b)} only in B: {_some(tensors.only_b)}"
    if tensors.respecified:
        rows = [(old.key, _layout(old), _layout(new)) for old, new in tensors.respecified]
        yield f"{len(rows)} have another dtype or shape"
        yield table(("tensor", "A", "B"), rows[:_SHOWN])
        yield from _more(len(rows))
    if tensors.changed:
        kinds = ", ".join(f"{count} {kind}" for kind, count in count_by_kind(tensors.changed).items())
        yield f"{len(tensors.changed)} have another content: {printable(kinds)}"
        yield f"  {_some(tensors.changed)}"


def _layout(spec: TensorSpec) -> str:
    return f"{spec.dtype}{list(spec.shape)}"


def _some(keys: Sequence[TensorKey]) -> str:
    rest = [f"… and {len(keys) - _SHOWN} more (--json lists all)"] if len(keys) > _SHOWN else []
    return ", ".join([*(printable(str(key)) for key in keys[:_SHOWN]), *rest])


def _difference_table(values: Sequence[ValueDifference]) -> RenderableType:
    alike: dict[tuple[str, str, str], list[str]] = {}
    for value in values:
        last = value.path.rsplit(".", 1)[-1]
        alike.setdefault((last, _shown(value.a), _shown(value.b)), []).append(value.path)
    rows = [
        (f"{paths[0]} (and {len(paths) - 1} alike)" if len(paths) > 1 else paths[0] or "(all)", a, b)
        for (_, a, b), paths in alike.items()
    ]
    if len(rows) > _SHOWN:
        rows[_SHOWN:] = [(f"… and {len(rows) - _SHOWN} more (--json lists all)", "", "")]
    return table(("", "A", "B"), rows)


def _more(count: int) -> Iterator[str]:
    if count > _SHOWN:
        yield f"  … and {count - _SHOWN} more (--json lists all)"


def _shown(value: object) -> str:
    return ABSENT if value == ABSENT else brief(decoded(value))
