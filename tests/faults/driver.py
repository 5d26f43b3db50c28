"""`fullrank` as a user types it, made easy to catch in the act: slow steps, a save after each, a disk that says it is roomy.

python driver.py VERB ARGUMENTS...      with STEP_SECONDS and ROOMY_DISK in the environment
"""

from __future__ import annotations

import os
import shutil
import time
from collections import namedtuple
from collections.abc import Iterator
from typing import Any

from fullrank.plan import speed
from fullrank.train import stage as train_stage

Usage = namedtuple("Usage", "total used free")


def patch() -> None:
    """Slows steps down, and has each of them followed by a save."""
    seconds = float(os.environ.get("STEP_SECONDS", "0"))
    real_steps = train_stage.steps

    def slow_steps(*arguments: Any, **options: Any) -> Iterator[Any]:
        for step in real_steps(*arguments, **options):
            time.sleep(seconds)
            yield step

    train_stage.steps = slow_steps
    train_stage._SHORTEST_GAP_SECONDS = 0.0
    train_stage._SAVING_SHARE = 1e9  # a save is due after every step
    speed.measure = lambda *arguments, **options: None
    if os.environ.get("ROOMY_DISK"):
        shutil.disk_usage = lambda path: Usage(10**12, 0, 10**12)


def main() -> None:
    patch()
    from fullrank.cli.app import main as fullrank

    fullrank()


if __name__ == "__main__":
    main()
