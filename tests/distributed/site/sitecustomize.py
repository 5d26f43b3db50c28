"""Python imports this when it starts: ranks, which the command starts, are to be slow as well (tests/faults/driver.py)."""

import os
import sys
from pathlib import Path

if "STEP_SECONDS" in os.environ and "fullrank" in " ".join(sys.orig_argv):
    sys.path.append(str(Path(__file__).parents[2] / "faults"))
    from driver import patch

    patch()
