"""Canonical JSON: every value comes back as it was, every change of a signed document is seen."""

from __future__ import annotations

import enum
import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resume_kit.checkpoint import canonical
from resume_kit.errors import CheckpointDamaged, UsageError

WHERE = Path("run/step-000000001/manifest.json")
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=8)
    | st.sampled_from(["$float", "$tuple", "$items", "$bytes", "digest", "NaN", "Infinity"])
)
KEYS = (
    st.text(max_size=4)
    | st.sampled_from(["$float", "$tuple", "$items", "$bytes", "digest"])
    | st.integers(-3, 3)
    | st.booleans()
    | st.none()
    | st.tuples(st.integers(0, 3), st.text(max_size=2))
    | st.binary(max_size=2)
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(KEYS, inner, max_size=4)
        | st.dictionaries(st.text(max_size=4), inner, max_size=4)
    ),
    max_leaves=20,
)
DOCUMENT = {"text": 'a "ü"\\', "n": -12, "f": 0.5, "list": [None, True, {}], "e": {"$float": "nan"}}


def exact(value: Any) -> Any:
    """A form in which only what is the same to the last bit and type is equal."""
    if isinstance(value, float):
        return "float", "nan" if math.isnan(value) else struct.pack("<d", value)
    if isinstance(value, list | tuple):
        return type(value).__name__, [exact(item) for item in value]
    if isinstance(value, dict):
        return "dict", sorted(((repr(exact(k)), exact(v)) for k, v in value.items()), key=repr)
    return type(value).__name__, value


@given(VALUES)
@settings(max_examples=100, deadline=None)
def test_a_value_comes_back_as_it_was(value: Any) -> None:
    raw = canonical.dumps(canonical.encode(value))
    assert exact(canonical.decode(json.loads(raw))) == exact(value)


@given(VALUES)
@settings(max_examples=50, deadline=None)
def test_an_encoded_value_is_strict_ascii_json_in_one_form(value: Any) -> None:
    raw = canonical.dumps(canonical.encode(value))
    assert raw.isascii() and raw.endswith(b"\n") and raw.count(b"\n") == 1
    again = json.loads(raw, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))
    assert canonical.dumps(again) == raw


@given(st.dictionaries(st.text("abc_.", max_size=4), LEAVES, max_size=5), st.randoms(use_true_random=True))
@settings(max_examples=40, deadline=None)
def test_the_digest_does_not_see_the_order_of_plain_keys(value: dict[str, Any], rng: Any) -> None:
    items = list(value.items())
    rng.shuffle(items)
    assert canonical.value_digest([dict(items)]) == canonical.value_digest([value])


def test_different_values_have_different_digests() -> None:
    values = [0, 0.0, -0.0, False, None, "", b"", [], (), {}, "0", [0], (0,), {"0": 0}, {0: 0}, math.nan, "nan", "NaN"]
    values += [math.inf, -math.inf, {"$float": "nan"}, {"$tuple": []}, {"$bytes": ""}, {"$items": []}]
    assert len({canonical.value_digest(value) for value in values}) == len(values)
    assert canonical.value_digest(math.nan) == canonical.value_digest(-math.nan)


class Size(enum.IntEnum):
    LARGE = 3


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        (np.float64(0.1), 0.1),
        (np.float32(0.5), 0.5),
        (np.int64(7), 7),
        (np.bool_(True), True),
        (np.array(3), 3),
        (Size.LARGE, 3),
        (np.float64("nan"), math.nan),
    ],
)
def test_scalars_of_numpy_become_plain(given: Any, plain: Any) -> None:
    assert exact(canonical.decode(json.loads(canonical.dumps(canonical.encode(given))))) == exact(plain)


@pytest.mark.parametrize(
    ("value", "place"),
    [
        ({1, 2}, "state holds a set"),
        ({"a": [0, {"b": object()}]}, r"state\.a\[1\]\.b holds a object"),
        ({"a": (1, np.zeros(2))}, r"state\.a\[1\] holds a ndarray"),
        ({3: 1j}, r"state\.3 holds a complex"),
        (bytearray(b"x"), "state holds a bytearray"),
        (Path("x"), "Path"),
    ],
)
def test_what_cannot_be_stored_is_named_with_its_place(value: Any, place: str) -> None:
    with pytest.raises(UsageError, match=place):
        canonical.encode(value, "state")


def test_a_float_that_was_not_encoded_is_never_written() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical.dumps({"x": math.nan})


# -- signed documents


def test_a_signed_document_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "doc.json"
    path.write_bytes(canonical.sign(DOCUMENT))
    read = canonical.read_signed(path)
    assert read.pop("digest") == canonical.digest(canonical.dumps(DOCUMENT))
    assert read == DOCUMENT


def test_every_change_of_every_single_byte_is_detected() -> None:
    raw = canonical.sign(DOCUMENT)
    assert canonical.parse_signed(raw, WHERE)["n"] == -12
    for position in range(len(raw)):
        changed = bytearray(raw)
        for value in range(256):
            if value != raw[position]:
                changed[position] = value
                with pytest.raises(CheckpointDamaged):
                    canonical.parse_signed(bytes(changed), WHERE)


def test_every_lost_doubled_or_added_byte_is_detected() -> None:
    raw = canonical.sign(DOCUMENT)
    changes = [raw[:i] for i in range(len(raw))]
    changes += [raw[:i] + raw[i + 1 :] for i in range(len(raw))]
    changes += [raw[:i] + bytes([byte]) + raw[i:] for i in range(len(raw) + 1) for byte in b' \n\t,"0\x00\xff']
    for changed in {change for change in changes if change != raw}:
        with pytest.raises(CheckpointDamaged):
            canonical.parse_signed(changed, WHERE)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "not valid JSON"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[1]\n", "not a JSON object"),
        (b"null\n", "not a JSON object"),
        (b'{"a":1}\n', "its digest is .*, stated None"),
        (b'{"a":NaN}\n', "not canonical JSON"),
        (b'{"a":1e999}\n', "not canonical JSON"),
        (json.dumps(json.loads(canonical.sign(DOCUMENT)), indent=1).encode(), "not the canonical form"),
        (canonical.sign(DOCUMENT).rstrip(b"\n"), "not the canonical form"),
        (canonical.sign(DOCUMENT).replace(b'{"digest"', b'{"digest":"","digest"', 1), "not the canonical form"),
        (canonical.dumps({**DOCUMENT, "digest": 7}), "stated 7"),
    ],
)
def test_other_bytes_are_damage_that_names_the_file(raw: bytes, reason: str) -> None:
    with pytest.raises(CheckpointDamaged, match=reason) as error:
        canonical.parse_signed(raw, WHERE)
    (problem,) = error.value.problems
    assert problem.where == str(WHERE) and problem.remedy == canonical.RESTORE


def test_a_file_that_is_missing_or_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointDamaged, match=r"gone\.json: the file is missing"):
        canonical.read_signed(tmp_path / "gone.json")
    with pytest.raises(CheckpointDamaged, match="cannot be read: Is a directory"):
        canonical.read_signed(tmp_path)
