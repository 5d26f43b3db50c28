"""`fullrank train`, as the command line runs it, saying what it is at: what `speed.py` runs and measures.

    python benchmarks/speed_stage.py RECIPE --runs-dir FOLDER

Marks (`measure.mark`): import, start once every library is imported, first when the first step is done, end. Writes `flops.json`:
the operations that each step's matrix products need, the peak of the process's memory, and the best rate of square products in
this process afterwards.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from typing import Any

from measure import mark


def main() -> None:
    """Runs the command with these arguments."""
    mark("import")
    import torch

    from fullrank.cli.app import main as fullrank
    from fullrank.models.flops import Products
    from fullrank.parallel.device import best_product_rate
    from fullrank.parallel.single import SingleDevice
    from fullrank.train import stage

    write_row, step = stage._Training._write_row, SingleDevice.step
    needed: list[int] = []

    def marking(self: Any, row: Any) -> None:
        if row.step == 1:
            mark("first")
        write_row(self, row)

    def counting(self: Any, micro_batches: Any, *rest: Any, **named: Any) -> Any:
        rows = list(micro_batches)
        outcome = step(self, rows, *rest, **named)
        needed.append(sum(Products.of(self.rows.model).needed(row) for row in rows))
        return outcome

    stage._Training._write_row = marking  # type: ignore[method-assign]
    SingleDevice.step = counting  # type: ignore[method-assign]
    mark("start")
    sys.argv = ["fullrank", "train", *sys.argv[1:]]
    try:
        fullrank()
    except SystemExit as leaving:
        if leaving.code:
            raise
    finally:
        mark("end")
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    facts = {"needed": needed, "peak_rss": peak, "best_per_second": best_product_rate(torch.device("cpu"), torch.float32)}
    Path("flops.json").write_text(json.dumps(facts), encoding="utf-8")


if __name__ == "__main__":
    main()
