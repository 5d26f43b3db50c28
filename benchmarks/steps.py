"""How a step of fullrank divides, by `fullrank profile`, on the data sets of `speed.py`.

    python benchmarks/steps.py --text FOLDER

Told are shares of the timed parts: linear modules, head, attention (without its projections) and the update; the rate of linear
modules; and the utilisation that would be left if everything else (norms, activation functions, rotary angles, residuals, Python)
took no time, which is the most that these kernels allow on this machine.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from measure import measure, must
from record import write
from speed import CASES, environment, prepare

STEPS = 3


def main() -> None:
    """Measures and writes `results/steps.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="the folder of the data sets")
    parser.add_argument("--dry", action="store_true", help="print the figures, write nothing")
    options = parser.parse_args()
    figures: dict[str, Any] = {"steps": STEPS}
    for name in CASES:
        with tempfile.TemporaryDirectory() as folder:
            prepare(name, Path(folder), options.text, STEPS + 1)
            figures[name] = divided(Path(folder))
    print(json.dumps(figures, indent=2))
    if not options.dry:
        print(f"wrote {write('steps', figures, [])}")


def divided(folder: Path) -> dict[str, float]:
    """Shares, rates and the ceiling of a prepared data set."""
    program = [sys.executable, "-m", "fullrank", "profile", "recipe.yaml", "--runs-dir", "runs", "--json", "--steps", str(STEPS)]
    found = json.loads(must(measure(program, folder, environment(), looks_on=False)).output.splitlines()[-1])
    whole = sum(found["phases"].values())
    linear = [module for module in found["modules"] if module["flops_per_second"]]
    seconds = [module["forward_seconds"] + module["backward_seconds"] for module in linear]
    operations = sum(module["flops_per_second"] * each for module, each in zip(linear, seconds, strict=True))
    ratios = {
        "linear": sum(seconds) / whole,
        "head": found["phases"]["head"] / whole,
        "attention": sum(module["ratio"] for module in found["modules"] if module["module"].endswith("self_attn")),
        "optimizer": found["phases"]["optimizer"] / whole,
    }
    return {
        **{f"{name}_ratio": ratio for name, ratio in ratios.items()},
        "linear_flops_per_second": operations / sum(seconds),
        "best_flops_per_second": found["best_flops_per_second"],
        "utilisation": found["utilisation"],
        "ceiling": found["utilisation"] / sum(ratios.values()),
        "peak_bytes": found["peak_bytes"],
        "peak_bytes_planned": found["peak_bytes_planned"],
    }


if __name__ == "__main__":
    main()
