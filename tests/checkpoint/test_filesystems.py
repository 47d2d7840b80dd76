"""A run directory on an object store is refused, by what the system says of its mounts."""

from __future__ import annotations

from pathlib import Path

import pytest

from resume_kit.checkpoint import files
from resume_kit.checkpoint.filesystems import in_memory, mounted_as, require_atomic_renames
from resume_kit.errors import UsageError

MOUNTS = r"""
overlay / overlay rw 0 0
server:/export /scratch nfs4 rw,vers=4.2 0 0
bucket /scratch/bucket fuse.s3fs rw 0 0
mountpoint-s3 /scratch/with\040space fuse rw 0 0
/dev/fuse /scratch/good fuse.juicefs rw 0 0
tmpfs /dev/shm tmpfs rw 0 0
none /ram ramfs rw 0 0
/dev/sda1 /ram/disk ext4 rw 0 0
tmpfs /tmpfs ext4 rw 0 0
"""


@pytest.fixture
def mounts(tmp_path: Path) -> Path:
    (tmp_path / "mounts").write_text(MOUNTS)
    return tmp_path / "mounts"


@pytest.mark.parametrize(
    ("run", "kind"),
    [
        ("/scratch/run", "nfs4 server:/export"),
        ("/scratch/bucketful/run", "nfs4 server:/export"),
        ("/scratch/good/run", "fuse.juicefs /dev/fuse"),
        ("/elsewhere", "overlay overlay"),
    ],
)
def test_a_file_system_is_taken(run: str, kind: str, mounts: Path) -> None:
    assert mounted_as(Path(run), mounts) == kind
    require_atomic_renames(Path(run), mounts)


@pytest.mark.parametrize("run", ["/scratch/bucket/run", "/scratch/with space/run"])
def test_an_object_store_is_refused(run: str, mounts: Path) -> None:
    with pytest.raises(UsageError, match=r"lies on an object store \(fuse(.|\n)*copy committed checkpoints"):
        require_atomic_renames(Path(run), mounts)


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        ("/dev/shm/run", True),
        ("/ram", True),
        ("/ram/disk/run", False),
        ("/tmpfs/run", False),
        ("/scratch/run", False),
        ("/elsewhere", False),
    ],
)
def test_what_lies_in_memory_is_told_by_the_kind_of_its_mount(run: str, expected: bool, mounts: Path) -> None:
    assert in_memory(Path(run), mounts) is expected


def test_where_the_system_tells_nothing_nothing_is_refused(tmp_path: Path) -> None:
    assert mounted_as(tmp_path, tmp_path / "missing") is None
    assert not in_memory(tmp_path, tmp_path / "missing")
    require_atomic_renames(tmp_path, tmp_path / "missing")
    files.require_writable(tmp_path / "run")
    assert mounted_as(tmp_path) is not None
