"""`fullrank data`, as the command line runs it, saying what it is at: what the benchmarks of the data stage run and measure.

    python benchmarks/data_stage.py RECIPE [KEY=VALUE ...] [--runs-dir FOLDER] [--json]

Marks (`measure.mark`): import, describe (a process with torch and transformers says what the model is, and ends), start once that
is known, prepare (shards are made or found), write (splits), audit, show (samples and terms), finish, end.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from measure import mark


def _marking(name: str, function: Callable[..., Any], after: str | None = None) -> Callable[..., Any]:
    def marked(*arguments: Any, **named: Any) -> Any:
        mark(name)
        result = function(*arguments, **named)
        if after:
            mark(after)
        return result

    return marked


def main() -> None:
    """Runs the command with these arguments."""
    mark("import")
    from fullrank.cli.app import main as fullrank
    from fullrank.cli.console import Console  # noqa: F401 # imported by the command when it is asked for
    from fullrank.data import stage
    from fullrank.data.splits import Splits
    from fullrank.workflows import data

    patched: Any = Splits
    patched.prepare = _marking("prepare", Splits.prepare)
    patched.write = _marking("write", Splits.write)
    room: Any = stage
    room.conclude = _marking("audit", stage.conclude)
    room._write_samples = _marking("show", stage._write_samples)
    room.write_record = _marking_last(stage.write_record)
    workflow: Any = data
    workflow.describe_elsewhere = _marking("describe", data.describe_elsewhere, after="start")
    sys.argv = ["fullrank", "data", *sys.argv[1:]]
    try:
        fullrank()
    finally:
        mark("end")


def _marking_last(function: Callable[..., Any]) -> Callable[..., Any]:
    """Marks the end of the work where the card is written."""

    def marked(path: Any, *arguments: Any) -> Any:
        if path.name == "card.json":
            mark("finish")
        return function(path, *arguments)

    return marked


if __name__ == "__main__":
    main()
