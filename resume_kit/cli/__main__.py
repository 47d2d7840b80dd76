"""``python -m resume_kit.cli`` is the command ``resume-kit``."""

import sys

from resume_kit.cli.main import main

sys.exit(main())
