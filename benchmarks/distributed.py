"""Several ranks beside one process: the same steps, memory divided, ranks that die named, exports of the same bytes.

    python benchmarks/distributed.py PART...

Ranks are processes of this machine's CPU, joined by gloo. Each part writes `results/distributed-PART.json`:

    equal    50 steps of SmolLM2's first blocks in float64 and fp32: losses and final weights beside one process's
    memory   peak memory of each of 2 and 4 ranks beside what the plan's ledger says they need
    kills    a rank killed or stopped at random moments of a run, thirty times: seconds until it is named and all are gone, and
             whether the run then ends with the weights of one that nobody touched
    export   the bytes of an export by 4 ranks beside one process's, and the memory it takes beyond training's
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
from measure import measure, must
from record import ROOT, target, write
from safetensors.numpy import load_file

from fullrank.models.embedded import folder_of
from fullrank.models.source import load_config, resolve
from fullrank.parallel.fsdp2 import Sync
from fullrank.parallel.groups import shapes_of
from fullrank.parallel.zero_settings import settings_of
from fullrank.plan.memory import Division, Row, ledger, total
from fullrank.recipe import Model, Recipe
from fullrank.run import read_json_lines

MODEL = "smollm2-135m-instruct"
RATE = 1e-4
#: name -> (ranks, what is asked of them beside the step)
WAYS: dict[str, tuple[int, dict[str, Any]]] = {
    "fsdp2, 1 rank": (1, {}),
    "fsdp2, 2 ranks": (2, {}),
    "fsdp2, 4 ranks": (4, {}),
    "fsdp2, 2 ranks, summed after every row": (2, {"sync": "row"}),
    "fsdp2, 4 ranks, 2 replicas": (4, {"recipe": {"parallel": {"replicas": 2}}}),
    "ring, 2 ranks": (2, {"recipe": {"parallel": {"context": 2}}}),
    "fsdp2 x ring, 2 x 2 ranks": (4, {"recipe": {"parallel": {"context": 2}}}),
    **{
        f"zero-{stage}, 2 ranks": (2, {"recipe": {"parallel": {"engine": "deepspeed", "zero_stage": stage}}})
        for stage in (1, 2, 3)
    },
}
#: name -> (ranks, when gradients are summed, section `parallel`)
DIVIDED: dict[str, tuple[int, Sync, dict[str, Any]]] = {
    **{f"fsdp2, {ranks} ranks, summed once a {sync}": (ranks, sync, {}) for ranks in (2, 4) for sync in get_args(Sync)},
    **{f"zero-3, {ranks} ranks": (ranks, "row", {"engine": "deepspeed", "zero_stage": 3}) for ranks in (2, 4)},
}
NAMED_SECONDS = 30.0
KILLS = 30


def main() -> None:
    """Measures the parts asked for and writes their results."""
    parts: dict[str, Callable[[], tuple[dict[str, Any], list[dict[str, Any]]]]] = {
        "equal": equal,
        "memory": memory,
        "kills": kills,
        "export": export,
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=list(parts), help=", ".join(parts))
    parser.add_argument("--dry", action="store_true", help="print the figures, write nothing")
    options = parser.parse_args()
    for part in options.parts or list(parts):
        figures, targets = parts[part]()
        print(json.dumps(figures, indent=2), *map(json.dumps, targets), sep="\n", flush=True)
        if not options.dry:
            print(f"wrote {write(f'distributed-{part}', figures, targets)}", flush=True)


def _asked(ranks: int, **request: Any) -> dict[str, Any]:
    """What `distributed_rank.py` answers; 0 ranks are one process without an engine for several."""
    script = str(ROOT / "benchmarks" / "distributed_rank.py")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks else []
    environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // max(1, ranks))), "GOMP_SPINCOUNT": "0"}
    command = [sys.executable, *launcher, script, json.dumps(request)]
    done = must(measure(command, ROOT, environment, looks_on=False))
    found: dict[str, Any] = json.loads(next(line for line in done.output.splitlines() if line.startswith("{")))
    return found


def _cut(folder: Path, blocks: int, vocabulary: int) -> Path:
    """SmolLM2 with its first blocks and the first tokens of its vocabulary only, in fp32."""
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM, AutoTokenizer; from pathlib import Path; "
        "m = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32); n = int(sys.argv[3]); "
        "m.model.layers = m.model.layers[:n]; m.config.num_hidden_layers = n; m.config.layer_types = None; "
        "m.resize_token_embeddings(int(sys.argv[4])); "
        "m.save_pretrained(sys.argv[2]); AutoTokenizer.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2])"
    )
    given = [str(folder_of(MODEL)), str(folder), str(blocks), str(vocabulary)]
    must(measure([sys.executable, "-c", code, *given], ROOT, looks_on=False))
    return folder


# ---- equal -----------------------------------------------------------------------------------------------------------------


def equal() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Losses and weights beside one process's."""
    blocks, vocabulary, steps = 4, 4096, 50
    train = {"train": {"precision": "fp32", "optimizer": {"learning_rate": RATE}}}
    figures: dict[str, Any] = {
        "model": f"{MODEL}, its first {blocks} blocks and {vocabulary:,} tokens",
        "steps": steps,
        "learning_rate": RATE,
        "rows": 4,
        "row_tokens": 32,
    }
    targets = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = _cut(Path(scratch) / "model", blocks, vocabulary)
        for dtype in ("float64", "float32"):
            asked: dict[str, Any] = {"model": str(folder), "dtype": dtype, "steps": steps, "rows": 4, "row_tokens": 32}
            alone = _asked(0, **asked, recipe=train, weights=str(Path(scratch) / "alone"))
            wanted = load_file(Path(scratch) / "alone")
            for name, (ranks, way) in WAYS.items():
                more = {**way, "recipe": train | way.get("recipe", {})}
                found = _asked(ranks, **asked, **more, weights=str(Path(scratch) / "ranks"))
                weights = load_file(Path(scratch) / "ranks")
                losses = np.abs(np.array(found["losses"]) / np.array(alone["losses"]) - 1)
                apart = max(float(np.linalg.norm(weights[n] - wanted[n]) / np.linalg.norm(wanted[n])) for n in wanted)
                figures[f"{name}, {dtype}"] = {
                    "losses_first_10": float(losses[:10].max()),
                    "losses": float(losses.max()),
                    "weights": apart,
                }
                print(f"{name}, {dtype}: losses {losses.max():.2g}, weights {apart:.2g}", flush=True)
                what = f"{name}, {dtype}: relative difference from one process"
                if dtype == "float64":
                    worst = max(float(losses.max()), apart)
                    targets.append(target(f"{what}, losses and weights", 1e-9, worst, "ratio", at_most=True))
                else:
                    targets.append(target(f"{what}, losses of 10 steps", 1e-5, float(losses[:10].max()), "ratio", at_most=True))
                    worst = max(float(losses.max()), apart)
                    targets.append(target(f"{what}, losses and weights of 50", 1e-3, worst, "ratio", at_most=True))
    return figures, targets


# ---- memory ----------------------------------------------------------------------------------------------------------------


def memory() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Peaks of ranks beside the ledger's."""
    folder = folder_of(MODEL)
    facts = resolve(Model(source=MODEL)).facts
    shapes = shapes_of(load_config(folder), [])
    figures: dict[str, Any] = {"model": MODEL, "rows": 4, "row_tokens": 256, "recompute": "block"}
    targets = []
    for name, (ranks, sync, parallel) in DIVIDED.items():
        tree = {"name": "distributed", "model": {"source": MODEL}, "data": {"train": "none"}, "parallel": parallel}
        recipe = Recipe.model_validate(tree | {"train": {"precision": "fp32"}})
        found = _asked(ranks, model=str(folder), rows=4, row_tokens=256, sync=sync, steps=3, recipe={"parallel": parallel})
        peak = max(rank["trained"] for rank in found["ranks"])
        zero = settings_of(recipe, ranks)["zero_optimization"] if parallel else None
        lines = ledger(
            facts,
            shapes,
            Row(256, 128, 4 * 256),
            recipe,
            recompute="block",
            process_bytes=max(rank["process"] for rank in found["ranks"]),
            eager=False,
            device="cpu",
            division=Division(ranks, sync, 4 // ranks if sync == "step" else 1, zero=zero),
        )
        figures[name] = {
            "peak_bytes": peak,
            "planned_bytes": total(lines),
            "ledger": {line.part: line.bytes for line in lines},
            "step_seconds": found["seconds"][-1],
        }
        print(f"{name}: {peak / 1e9:.2f} GB, {total(lines) / 1e9:.2f} planned", flush=True)
        apart = abs(peak / total(lines) - 1)
        targets.append(target(f"{name}: peak of a rank beside its ledger", 0.1, apart, "ratio", at_most=True))
    return figures, targets


# ---- kills -----------------------------------------------------------------------------------------------------------------


def kills() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A rank of two that dies or stops, thirty times."""
    sys.path.insert(0, str(ROOT / "tests"))
    import tiny
    from staging import write_case

    chance = random.Random(0)
    struck: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        model = tiny.write_model_folder(Path(scratch) / "model", "llama")
        case = write_case(Path(scratch), model, train={"epochs": 6})
        run = Path(scratch) / "runs" / "tiny"
        _finished(case)
        wanted = (run / "model" / "model.safetensors").read_bytes()
        for number in range(KILLS):
            shutil.rmtree(run)
            how = signal.SIGKILL if number % 2 == 0 else signal.SIGSTOP
            after, rank = chance.uniform(0.0, 8.0), chance.randrange(2)
            process = _started(case, step_seconds=0.3)
            while not (run / "train" / "ranks.json").exists():
                time.sleep(0.02)
            time.sleep(after)
            facts = json.loads((run / "train" / "ranks.json").read_text(encoding="utf-8"))
            os.kill(facts["ranks"][rank]["process"], how)
            began = time.monotonic()
            _, errors = process.communicate(timeout=300)
            seconds = time.monotonic() - began
            step = max((row["step"] for row in read_json_lines(run / "train" / "steps.jsonl")), default=0)
            gone = not any(Path(f"/proc/{one['process']}").exists() for one in facts["ranks"])
            _finished(case)
            same = (run / "model" / "model.safetensors").read_bytes() == wanted
            named = f"error: rank {rank} " in errors
            struck.append(
                {"how": how.name, "step": step, "seconds": seconds, "named": named, "all_gone": gone, "same_weights": same}
            )
            print(json.dumps(struck[-1]), flush=True)
    named_in_time = sum(one["named"] and one["all_gone"] and one["seconds"] <= NAMED_SECONDS for one in struck)
    continued = sum(one["same_weights"] for one in struck)
    figures = {"ranks": 2, "struck": struck, "slowest_seconds": max(one["seconds"] for one in struck)}
    return figures, [
        target("ranks struck that were named and all gone within 30 s", KILLS, named_in_time, "times", at_most=False),
        target(
            "runs continued to the same weights, bit by bit",
            KILLS,
            continued,
            "times",
            at_most=False,
        ),
    ]


def _started(case: Path, step_seconds: float) -> subprocess.Popen[str]:
    site = ROOT / "tests" / "distributed" / "site"
    environment = os.environ | {
        "STEP_SECONDS": str(step_seconds),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH", "")])),
    }
    command = [sys.executable, "-m", "fullrank", "train", str(case), "parallel.ranks=2", "--runs-dir", str(case.parent / "runs")]
    return subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def _finished(case: Path) -> None:
    process = _started(case, 0.0)
    _, errors = process.communicate(timeout=300)
    if process.returncode:
        sys.exit(errors)


# ---- export ----------------------------------------------------------------------------------------------------------------


def export() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Bytes and memory of an export by four ranks."""
    with tempfile.TemporaryDirectory() as scratch:
        ours, theirs = Path(scratch) / "ranks", Path(scratch) / "alone"
        asked: dict[str, Any] = {"model": str(folder_of(MODEL)), "steps": 0}
        found = _asked(4, **asked, exported=str(ours))
        _asked(0, **asked, exported=str(theirs))
        names = sorted(path.name for path in theirs.iterdir())
        same, different, _ = filecmp.cmpfiles(ours, theirs, names, shallow=False)
        stepped = _asked(4, model=asked["model"], steps=2, row_tokens=128, exported=str(Path(scratch) / "stepped"))
        first = stepped["ranks"][0]
        beyond = max(0, first["ended"] - first["trained"])
        largest = stepped["largest_tensor_bytes"]
    figures = {
        "files_equal": same,
        "files_different": different,
        "beyond_training_bytes": beyond,
        "largest_tensor_bytes": largest,
        "ranks": found["ranks"],
    }
    return figures, [
        target("files of the export that are those of one process, byte for byte", len(names), len(same), "files", at_most=False),
        target(
            "memory of the export beyond training's peak, over the largest tensor", 1.1, beyond / largest, "times", at_most=True
        ),
    ]


if __name__ == "__main__":
    main()
