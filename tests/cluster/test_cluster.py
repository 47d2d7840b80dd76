"""The cluster itself: its nodes are hosts, and nothing is left of it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.cluster.cluster import PROGRAMS, Cluster, ClusterError, missing_parts


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    missing = missing_parts()
    assert [package for package in PROGRAMS.values() if not any(f"Debian: {package}" in line for line in missing)] == []


@pytest.mark.cluster
def test_a_node_can_be_killed_booted_cut_off_and_healed(cluster: Cluster) -> None:
    def reached() -> bool:
        return cluster.run(1, "ssh", "-o", "ConnectTimeout=1", "n2", "hostname", check=False).stdout == "n2\n"

    assert cluster.run(1, "srun", "--nodes=2", "hostname").stdout.split() in (["n1", "n2"], ["n2", "n1"])
    cluster.kill_node(2)
    cluster.declare_down(2)
    assert cluster.node_state(2).startswith("DOWN") and not reached()
    with pytest.raises(ClusterError, match="n2 is off"):
        cluster.pids(2)
    cluster.boot_node(2)
    assert reached() and cluster.pids(2)

    cluster.cut_off(2)
    assert not reached() and cluster.pids(2), "it lives on"
    cluster.heal(2)
    cluster.wait_for("n2 reached", reached, timeout=10)


@pytest.mark.cluster
def test_nothing_is_left(cluster: Cluster, tmp_path: Path) -> None:
    """A second cluster beside the first, under the same names and addresses."""
    with Cluster(tmp_path / "second", nodes=1) as second:
        assert second.run(1, "hostname").stdout == "n1\n"
        processes = second.pids(1)
    assert processes and not [pid for pid in processes if Path(f"/proc/{pid}").exists()]
    assert cluster.run(1, "hostname").stdout == "n1\n", "the first one goes on"
