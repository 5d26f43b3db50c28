"""Steps on 1, 2 and 4 ranks of this machine under FSDP2, and beside them what a simulation of this machine says.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --model FOLDER --ranks 1 2 --steps 2 --dry      a trial, of which nothing is written

Each number of ranks is a run of `fullrank train` of its own, the same examples, steps and seed; the first step is left out, and
the median of the others is told. Ranks of one CPU share its cores, so that more of them are not expected to be faster: what is
looked at is whether the simulation says what happens. Losses that differ between numbers of ranks would mean that another step
was computed: then nothing is written.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from record import target, write

_RECIPE = """\
name: ranks-{ranks}
model: {{source: {model}}}
data: {{train: train.jsonl, validation: validation.jsonl, audit: {{skip: [too_little_data, near_duplicate]}}}}
train:
  epochs: 1
  global_batch_size: {batch}
  schedule: {{name: constant, warmup_ratio: 0.0}}
  evaluate_every_steps: 100000
  precision: fp32
machine: {{device: cpu}}
parallel: {{engine: fsdp2, ranks: {ranks}}}
"""
#: Simulated and measured seconds of a step differ by no more than this factor.
_WANTED = 1.5


def main() -> None:
    """Measures, simulates and writes `results/distributed-scaling.json`."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--model", default="smollm2-135m-instruct")
    arguments.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    arguments.add_argument("--steps", type=int, default=8, help="beside the first")
    arguments.add_argument("--batch", type=int, default=8)
    arguments.add_argument("--dry", action="store_true", help="write nothing")
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_data(folder, given.batch * (given.steps + 1))
        measured = {ranks: _measured(folder, given, ranks) for ranks in given.ranks}
        simulated = _simulated(folder, given)
    figures: dict[str, Any] = {"model": given.model, "batch": given.batch, "steps": given.steps, "cluster": simulated["cluster"]}
    strong = {row["devices"]: row for row in simulated["rows"] if row["scaling"] == "strong"}
    factors = []
    for ranks, (seconds, losses) in measured.items():
        row = strong[ranks]
        factors.append(math.exp(abs(math.log(row["step_seconds"] / seconds))))
        figures[str(ranks)] = {
            "measured_step_seconds": seconds,
            "simulated_step_seconds": row["step_seconds"],
            "simulated_compute_seconds": row["compute_seconds"],
            "simulated_exposed_seconds": row["exposed_seconds"],
            "last_loss": losses[-1],
        }
    first = next(iter(measured.values()))[1]
    for _, losses in measured.values():
        if not all(math.isclose(one, other, rel_tol=1e-3) for one, other in zip(first, losses, strict=True)):
            raise SystemExit(f"losses differ between numbers of ranks: {first} and {losses}")
    targets = [
        target("largest factor between simulated and measured seconds of a step", _WANTED, max(factors), "times", at_most=True)
    ]
    if given.dry:
        print(json.dumps({"figures": figures, "targets": targets}, indent=2))
    else:
        print(write("distributed-scaling", figures, targets))


def _write_data(folder: Path, examples: int) -> None:
    """Short sums, told in words of varied number."""
    rows = [
        {
            "prompt": f"What is {n} plus {n * n}?" + " Explain each step." * (n % 5),
            "completion": f"It is {n + n * n}." * (1 + n % 3),
        }
        for n in range(examples + 4)
    ]
    for name, part in (("train", rows[:examples]), ("validation", rows[examples:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")


def _fullrank(folder: Path, *words: str) -> str:
    command = [sys.executable, "-m", "fullrank", *words]
    done = subprocess.run(command, cwd=folder, env=os.environ, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"$ {' '.join(command)}\n{done.stderr[-3000:]}")
    return done.stdout


def _recipe(folder: Path, given: argparse.Namespace, ranks: int) -> str:
    model = str(Path(given.model).resolve()) if Path(given.model).exists() else given.model
    path = folder / f"ranks-{ranks}.yaml"
    path.write_text(_RECIPE.format(ranks=ranks, model=model, batch=given.batch), encoding="utf-8")
    return path.name


def _measured(folder: Path, given: argparse.Namespace, ranks: int) -> tuple[float, list[float]]:
    """(median seconds of a step but the first, losses)."""
    _fullrank(folder, "train", _recipe(folder, given, ranks))
    lines = (folder / "runs" / f"ranks-{ranks}" / "train" / "steps.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [json.loads(line) for line in lines]
    return statistics.median(step["seconds"] for step in steps[1:]), [step["loss"] for step in steps]


def _simulated(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    words = ("simulate", _recipe(folder, given, 1), "--device", "this-machine", "--most", str(max(given.ranks)), "--json")
    found: dict[str, Any] = json.loads(_fullrank(folder, *words).splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
