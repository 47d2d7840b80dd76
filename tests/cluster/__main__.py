"""A SLURM cluster to play with: `python -m tests.cluster up` (as root)."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.cluster.cluster import Cluster, missing_parts


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.cluster", description=__doc__)
    parser.add_argument("command", choices=["up"])
    parser.add_argument("--nodes", type=int, default=4)
    options = parser.parse_args()
    if missing := missing_parts():
        print("No cluster can be started here:\n  " + "\n  ".join(missing), file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="cluster-") as folder, Cluster(Path(folder), options.nodes) as cluster:
        print(f"{options.nodes} nodes are up. This shell is on the controller: sinfo, sbatch launch/zero3.sbatch, …")
        print("The cluster ends with the shell.")
        enter = cluster.inside(None, "bash", "--norc", "-i")
        return subprocess.run(enter, env={**cluster.environment, "PS1": "control:\\W# "}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
