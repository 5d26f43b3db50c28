"""What a newcomer gets: the quickstart from a fresh clone with nothing cached, the tests, and a real data set killed and resumed.

    make bench-quickstart                      all parts
    python benchmarks/quickstart.py first gsm8k    some of them; figures of the others are kept as they are

Each part is measured from the outside, as whole processes; memory is the peak over the whole process tree.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from record import ROOT, target, write

GSM8K = ROOT.parent / "shared" / "data" / "gsm8k"
PARTS = ("first", "second", "tests", "gsm8k")


@dataclass
class Measured:
    """A finished command."""

    seconds: float
    peak_bytes: int
    code: int
    output: str
    errors: str


def measure(command: list[str], cwd: Path, env: dict[str, str], kill_when: Any = None) -> Measured:
    """Runs a command, watching the memory of its process tree; `kill_when()` true ends it with SIGKILL."""
    started = time.monotonic()
    process = subprocess.Popen(
        command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    peak = 0

    def watch() -> None:
        nonlocal peak
        tree = psutil.Process(process.pid)
        while process.poll() is None:
            try:
                members = [tree, *tree.children(recursive=True)]
                peak = max(peak, sum(member.memory_info().rss for member in members))
            except psutil.Error:
                pass
            if kill_when is not None and kill_when():
                os.killpg(process.pid, signal.SIGKILL)
                return
            time.sleep(0.05)

    watcher = threading.Thread(target=watch)
    watcher.start()
    output, errors = process.communicate()
    watcher.join()
    return Measured(time.monotonic() - started, peak, process.returncode, output, errors)


def must(measured: Measured) -> Measured:
    """The measurement, or the command's own words where it failed."""
    if measured.code != 0:
        sys.exit(f"failed with {measured.code}:\n{measured.output[-3000:]}\n{measured.errors[-3000:]}")
    return measured


def main() -> None:
    """Measures the parts asked for and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=PARTS, metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder, removed afterwards)")
    options = parser.parse_args()
    results = ROOT / "benchmarks" / "results" / "quickstart.json"
    figures: dict[str, Any] = json.loads(results.read_text())["figures"] if results.exists() else {}
    folder = options.folder or Path(tempfile.mkdtemp(prefix="fullrank-bench-"))
    try:
        clone = folder / "clone"
        if not clone.exists():
            subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        env = os.environ | {"XDG_CACHE_HOME": str(folder / "cache"), "PIP_NO_CACHE_DIR": "1"}
        for part in options.parts:
            figures[part] = {"first": first, "second": second, "tests": tests, "gsm8k": gsm8k}[part](clone, env)
            figures[part]["commit"] = subprocess.run(
                ["git", "rev-parse", "HEAD"], cwd=clone, capture_output=True, text=True, check=True
            ).stdout.strip()
            print(part, json.dumps(figures[part], indent=2))
            print(f"wrote {write('quickstart', figures, targets(figures), clone)}")
    finally:
        if options.folder is None:
            shutil.rmtree(folder, ignore_errors=True)


def first(clone: Path, env: dict[str, str]) -> dict[str, Any]:
    """`make quickstart` with no environment, no model and no pip cache."""
    done = must(measure(["make", "quickstart"], clone, env))
    run = clone / "runs" / "quickstart"
    card, plan = (json.loads((run / name).read_text()) for name in ("train/card.json", "plan.json"))
    evaluation = json.loads((run / "evaluate" / "card.json").read_text())
    return {
        "total_seconds": done.seconds,
        "peak_bytes": done.peak_bytes,
        "train_stage_seconds": card["seconds"],
        "train_loop_seconds": card["loop_seconds"],
        "evaluate_seconds": evaluation["seconds"],
        "tokens_per_second": card["tokens_per_second"],
        "steps": card["steps"],
        "tokens": card["tokens_seen"],
        "peak_bytes_predicted": plan["peak_bytes_predicted"],
        "peak_bytes_measured": card["peak_bytes"],
        "train_seconds_predicted": plan["train_seconds_predicted"],
        "tensors_changed": card["proof"]["changed_tensors"],
        "scores": {
            name: {"examples": t["examples"], "base": t["base"], "tuned": t["tuned"]} for name, t in evaluation["tests"].items()
        },
    }


def second(clone: Path, env: dict[str, str]) -> dict[str, Any]:
    """`make quickstart` again, in the same clone."""
    done = must(measure(["make", "quickstart"], clone, env))
    said = [line for line in done.errors.splitlines() if "unchanged" in line]
    return {"total_seconds": done.seconds, "stages_reused": len(said)}


def tests(clone: Path, env: dict[str, str]) -> dict[str, Any]:
    """`make test`, its own set-up included."""
    done = must(measure(["make", "test"], clone, env))
    return {"total_seconds": done.seconds, "peak_bytes": done.peak_bytes, "last_line": done.output.strip().splitlines()[-1]}


def gsm8k(clone: Path, env: dict[str, str]) -> dict[str, Any] | None:
    """recipes/gsm8k.yaml on the real data: all stages undisturbed; then killed at a random step, run again, and compared."""
    if not GSM8K.is_dir():
        print("gsm8k: skipped, the data are not here")
        return None
    fullrank = str(clone / ".venv" / "bin" / "fullrank")
    sources = [
        f"data.train={{path: {GSM8K / 'train.jsonl'}, limit: 512}}",
        f"data.test={{path: {GSM8K / 'test.jsonl'}, limit: 32}}",
    ]
    recipe = clone / "recipes" / "gsm8k.yaml"
    whole = must(measure([fullrank, "run", str(recipe), *sources, "--json"], clone, env))
    summary = json.loads(whole.output.splitlines()[-1])
    card = json.loads((clone / "runs" / "gsm8k" / "train" / "card.json").read_text())
    kill_at = random.Random(20261122).randint(2, card["steps"] - 1)
    killed_steps = clone / "runs" / "gsm8k-killed" / "train" / "steps.jsonl"

    def reached() -> bool:
        return killed_steps.exists() and len(killed_steps.read_text().splitlines()) >= kill_at

    command = [fullrank, "train", str(recipe), *sources, "name=gsm8k-killed"]
    killed = measure(command, clone, env, kill_when=reached)
    must(measure(command, clone, env))
    again = json.loads((clone / "runs" / "gsm8k-killed" / "train" / "card.json").read_text())
    digests = {
        name: hashlib.sha256((clone / "runs" / name / "model" / "model.safetensors").read_bytes()).hexdigest()
        for name in ("gsm8k", "gsm8k-killed")
    }
    return {
        "recipe_lines": len(recipe.read_text().splitlines()),
        "run_seconds": whole.seconds,
        "peak_bytes": whole.peak_bytes,
        "validation_loss_before": card["validation_loss_before"],
        "validation_loss_best": card["validation_loss_best"],
        "tokens_per_second": card["tokens_per_second"],
        "scores": summary["scores"],
        "plan": summary["plan"],
        "killed_at_step": kill_at,
        "killed_exit_code": killed.code,
        "resumed_from_steps": again["resumed_from_steps"],
        "weights_bitwise_equal": digests["gsm8k"] == digests["gsm8k-killed"],
    }


def targets(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """The targets of the parts measured so far."""
    found: list[dict[str, Any]] = []
    if run := figures.get("first"):
        seen, unseen = run["scores"]["seen_wordings"], run["scores"]["unseen_wordings"]
        gap = seen["tuned"]["f1"]["value"] - seen["base"]["f1"]["value"]
        found += [
            target("make quickstart from a fresh clone, nothing cached", 10, run["total_seconds"] / 60, "minutes", at_most=True),
            target("training within it, whole stage", 4, run["train_stage_seconds"] / 60, "minutes", at_most=True),
            target("F1 of violations, tuned, seen wordings", 0.90, seen["tuned"]["f1"]["value"], "f1", at_most=False),
            target("F1 of violations, tuned above base", 0.50, gap, "f1", at_most=False),
            target("F1 of violations, tuned, unseen wordings", 0.60, unseen["tuned"]["f1"]["value"], "f1", at_most=False),
            target("ROUGE-L of directives, tuned", 0.85, seen["tuned"]["rouge_l"]["value"], "rouge_l", at_most=False),
            target("test reports", 60, seen["examples"], "examples", at_most=False),
            target("peak memory of the quickstart", 5e9, run["peak_bytes"], "bytes", at_most=True),
        ]
    if run := figures.get("second"):
        found.append(target("stages reused by a second make quickstart", 4, run["stages_reused"], "stages", at_most=False))
    if run := figures.get("tests"):
        found.append(target("make test from a fresh clone", 15, run["total_seconds"] / 60, "minutes", at_most=True))
    if run := figures.get("gsm8k"):
        fall = run["validation_loss_before"] - run["validation_loss_best"]
        found += [
            target("lines of the GSM8K recipe", 24, run["recipe_lines"], "lines", at_most=True),
            target("GSM8K: fall of the validation loss", 0, fall, "nats per token", at_most=False),
            target(
                "GSM8K: killed and run again, weights bitwise equal",
                1,
                float(run["weights_bitwise_equal"]),
                "1 is yes",
                at_most=False,
            ),
        ]
    return found


if __name__ == "__main__":
    main()
