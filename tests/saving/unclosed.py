"""A training script that ends while its save is under way: `unclosed.py RUN TEXT [FAULT …]`, see `test_at_exit.py`."""

from __future__ import annotations

import os
import sys

from tests.jobs import Job
from tests.saving.loop import Loop


def main(run_dir: str, data: str, *faults: str) -> None:
    job = Job(run_dir=run_dir, data=data, stage=1, save_every=3)
    Loop(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), job.to_json(), faults).steps(3)
    print("the script ends", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
