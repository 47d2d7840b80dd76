"""The public names, and that they load without each other."""

from __future__ import annotations

import subprocess
import sys

import pytest

import resume_kit


def test_the_public_names() -> None:
    assert resume_kit.__all__ == [
        "Policy",
        "ResumableLoader",
        "ResumeKit",
        "ResumeKitError",
        "Retention",
        "Saving",
        "TokenDataset",
    ]


@pytest.mark.parametrize("name", resume_kit.__all__)
def test_each_name_loads_by_itself(name: str) -> None:
    code = f"import resume_kit; assert resume_kit.{name}.__name__ == {name!r}"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = resume_kit.Nothing


def test_errors_show_each_remedy_once_and_count_what_they_leave_out() -> None:
    from resume_kit.errors import Problem, ResumeRefused

    error = ResumeRefused("no", [Problem("tensors", f"w{n}", "missing", "build it") for n in range(9)])
    assert str(error).count("→ build it") == 1
    assert "… and 3 more like these" in str(error)
    assert len(error.problems) == 9
