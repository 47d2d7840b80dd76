"""One cluster for all tests of this folder, and the references they compare with."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster.cluster import Cluster, missing_parts
from tests.cluster.runs import References, Run

NewRun = Callable[..., Run]


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if missing := missing_parts():
        text = "no cluster can be started here: " + "; ".join(missing)
        if os.environ.get("RESUME_KIT_REQUIRE_CLUSTER") == "1":
            pytest.fail(text)
        pytest.skip(text)
    with Cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def references(tmp_path_factory: pytest.TempPathFactory) -> References:
    return References(tmp_path_factory.mktemp("references"))


@pytest.fixture
def new_run(cluster: Cluster, tmp_path: Path) -> Iterator[NewRun]:
    """Makes a `Run`; its jobs end with the test, and every node is back for the next one."""
    runs: list[Run] = []

    def make(kind: str, *settings: str) -> Run:
        runs.append(Run(cluster, tmp_path / f"run-{len(runs)}", kind, settings))
        return runs[-1]

    yield make
    for job in (job for run in runs for job in run.jobs):
        cluster.run(None, "scancel", "--signal=KILL", "--full", str(job), check=False)
        cluster.run(None, "scancel", str(job), check=False)
    cluster.repair()
