"""Print the run directory of a configuration: batch scripts ask here, so that they look where the ranks write.

python -m launch.run_dir zero3 --config configs/zero3_tiny.yaml --set run.dir=/scratch/mine
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from launch.config import SharedConfig, TrainConfig, parse_as
from launch.entry import report_error
from launch.megatron_config import MegatronConfig
from resume_kit.errors import UsageError

KINDS: dict[str, type[SharedConfig]] = {"zero3": TrainConfig, "megatron": MegatronConfig}


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 2 for a configuration that cannot be trained, before any rank has started."""
    kind, *rest = sys.argv[1:] if arguments is None else arguments
    try:
        print(Path(parse_as(KINDS[kind], rest).run.dir).absolute())
    except UsageError as error:
        report_error(error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
