"""What a step needs of memory and time under every optimizer and every place to wait, and what that does to what is learned.

    python benchmarks/memory.py PART... --text FOLDER --peer .venv-peer/bin/python

Every measurement is a process of its own, one after the other, the ways of a part in turn, round after round. Parts, each of
which writes `results/memory-PART.json`:

    slopes   bytes a parameter: slope of the peak memory of the process over models of SmolLM2's width and 16 to 48 blocks, random
             weights, two steps of 2 rows of 64 tokens; the embedding, the same in all of them, plays no part in a slope
    exact    100 steps of SmolLM2-135M, 4 rows of 32 tokens each: are the weights bitwise those of the plain step?
    time     seconds of the second step of SmolLM2-135M, 4 rows of 512 tokens, beside the plain step with recomputed blocks; what
             has no target in one round
    quality  GSM8K by `fullrank train`, three seeds: the validation loss beside that of fp32 AdamW
    longest  the longest example of SmolLM2-135M in 8 GB of process memory, beside the plain trainer of transformers
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from measure import measure, must
from record import ROOT, target, write

from fullrank.models.embedded import folder_of

MODEL = "smollm2-135m-instruct"
INT8 = {"optimizer": {"name": "adamw", "moments": "int8"}}
STOCHASTIC = {"precision": "bf16-stochastic"}
Way = dict[str, Any]

#: name -> (what a process is asked, bytes a parameter that are the target, whether that is the most)
SLOPES: dict[str, tuple[Way, float | None]] = {
    "adamw": ({"train": {}}, 16.0),
    "adamw, released": ({"train": {}, "machine": {"gradients": "release"}}, 12.0),
    "adamw, spilled": ({"train": {}, "machine": {"gradients": "spill"}}, None),
    "adamw, spilled, states on disk": ({"train": {}, "machine": {"gradients": "spill", "optimizer_states": "disk"}}, None),
    "adamw bf16-kahan, released": ({"train": {"precision": "bf16-kahan"}, "machine": {"gradients": "release"}}, None),
    "adamw bf16-stochastic int8, released": ({"train": STOCHASTIC | INT8, "machine": {"gradients": "release"}}, 5.0),
    "lomo bf16-stochastic": ({"train": STOCHASTIC | {"optimizer": {"name": "lomo"}}}, 2.5),
    "adalomo bf16-stochastic": ({"train": STOCHASTIC | {"optimizer": {"name": "adalomo"}}}, 2.5),
}
BLOCKS = (16, 32, 48)

#: name -> what a process is asked; the first is the plain step. Clipping by a norm of 1e-3 is always due, by 1e9 never.
TIMES: dict[str, Way] = {
    "plain": {"train": {"max_grad_norm": 1e-3}},
    "released, clipping due": {"train": {"max_grad_norm": 1e-3}, "machine": {"gradients": "release"}},
    "spilled, clipping due": {"train": {"max_grad_norm": 1e-3}, "machine": {"gradients": "spill"}},
    "spilled, clipping not due": {"train": {"max_grad_norm": 1e9}, "machine": {"gradients": "spill"}},
    "released, no clipping": {"train": {"max_grad_norm": None}, "machine": {"gradients": "release"}},
    "int8 moments": {"train": INT8},
    "bf16-stochastic": {"train": STOCHASTIC},
    "bf16-stochastic, int8 moments": {"train": STOCHASTIC | INT8},
    "lomo bf16-stochastic, no clipping": {"train": STOCHASTIC | {"optimizer": {"name": "lomo"}, "max_grad_norm": None}},
    "adalomo bf16-stochastic": {"train": STOCHASTIC | {"optimizer": {"name": "adalomo"}}},
}

#: name -> overrides of the quality recipe; the first is what the others are compared with.
QUALITY: dict[str, list[str]] = {
    "adamw fp32": [],
    "bf16-stochastic": ["train.precision=bf16-stochastic"],
    "int8 moments": ["train.optimizer.moments=int8"],
    "adalomo bf16-stochastic": [
        "train.precision=bf16-stochastic",
        "train.optimizer={name: adalomo, learning_rate: 5e-4}",
    ],
}
_RECIPE = """\
name: quality
model: {{source: {model}}}
data:
  train: {{path: train.jsonl, limit: {examples}}}
  validation: {{path: validation.jsonl}}
train:
  epochs: 1
  global_batch_size: 8
  optimizer: {{learning_rate: 1e-4}}
  evaluate_every_steps: 100000
export: {{dtype: fp32}}
"""
EXAMPLES, VALIDATION, SEEDS = 96, 32, 3
MOST_BYTES = 8e9
TIMES_LONGER = 4


def main() -> None:
    """Measures the parts asked for and writes their results."""
    parts: dict[str, Callable[[argparse.Namespace], tuple[dict[str, Any], list[dict[str, Any]]]]] = {
        "slopes": slopes,
        "exact": exact,
        "time": time,
        "quality": quality,
        "longest": longest,
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=list(parts), help=", ".join(parts))
    parser.add_argument("--text", type=Path, help="the folder of the data sets (quality)")
    parser.add_argument("--peer", type=Path, help="python of the peer's environment (longest)")
    parser.add_argument("--rounds", type=int, default=3, help="of the part `time`")
    parser.add_argument("--dry", action="store_true", help="print the figures, write nothing")
    options = parser.parse_args()
    for part in options.parts or list(parts):
        figures, targets = parts[part](options)
        print(json.dumps(figures, indent=2), *map(json.dumps, targets), sep="\n", flush=True)
        if not options.dry:
            print(f"wrote {write(f'memory-{part}', figures, targets)}", flush=True)


def _step(**request: Any) -> dict[str, Any]:
    """What `memory_step.py` answers."""
    command = [sys.executable, str(ROOT / "benchmarks" / "memory_step.py"), json.dumps(request)]
    found: dict[str, Any] = json.loads(must(measure(command, ROOT, looks_on=False)).output.splitlines()[-1])
    return found


# ---- slopes ----------------------------------------------------------------------------------------------------------------


def slopes(_: argparse.Namespace) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Bytes a parameter."""
    figures: dict[str, Any] = {"blocks": BLOCKS, "rows": 2, "row_tokens": 64}
    targets = []
    with tempfile.TemporaryDirectory() as scratch:
        folders = [_random_model(Path(scratch) / str(blocks), blocks) for blocks in BLOCKS]
        for name, (way, wanted) in SLOPES.items():
            found = [_step(model=str(folder), rows=2, row_tokens=64, steps=2, **way) for folder in folders]
            sizes, peaks = ([one[key] for one in found] for key in ("parameters", "peak_bytes"))
            slope = float(np.polyfit(sizes, peaks, 1)[0])
            figures["outside_parameters"] = found[0]["outside_parameters"]
            figures[name] = {"parameters": sizes, "peak_bytes": peaks, "bytes_per_parameter": slope}
            print(f"{name}: {slope:.2f} bytes a parameter", flush=True)
            if wanted in (16.0, 12.0):
                what = f"{name}: bytes a parameter, of the {wanted:g} that it should be"
                targets.append(target(what, 0.1, abs(slope / wanted - 1), "relative difference", at_most=True))
            elif wanted:
                targets.append(target(f"{name}: bytes a parameter", 1.1 * wanted, slope, "bytes", at_most=True))
    return figures, targets


def _random_model(folder: Path, blocks: int) -> Path:
    """SmolLM2-135M's configuration with another number of blocks and random weights in bf16."""
    code = (
        "import sys, torch; from transformers import AutoConfig, AutoModelForCausalLM; torch.manual_seed(0); "
        "c = AutoConfig.from_pretrained(sys.argv[1]); c.num_hidden_layers = int(sys.argv[3]); c.layer_types = None; "
        "AutoModelForCausalLM.from_config(c, dtype=torch.bfloat16).save_pretrained(sys.argv[2])"
    )
    must(measure([sys.executable, "-c", code, str(folder_of(MODEL)), str(folder), str(blocks)], ROOT, looks_on=False))
    return folder


# ---- exact -----------------------------------------------------------------------------------------------------------------


def exact(_: argparse.Namespace) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Whether released weights are the plain step's."""
    ways = {"plain": {}, "released": {"gradients": "release"}, "spilled": {"gradients": "spill"}}
    limit, row_tokens = 4.0, 32
    asked: Way = {"model": str(folder_of(MODEL)), "steps": 100, "row_tokens": row_tokens, "digest": True}
    train = {"max_grad_norm": limit, "optimizer": {"learning_rate": 1e-5}}
    found = {name: _step(**asked, train=train, machine=machine) for name, machine in ways.items()}
    plain = found["plain"]
    due = statistics.mean(norm > limit for norm in plain["grad_norms"])
    figures = {
        "steps": 100,
        "rows": 4,
        "row_tokens": row_tokens,
        "max_grad_norm": limit,
        "clipped_ratio": due,
        "digests": {name: one["digest"] for name, one in found.items()},
        "peak_bytes": {name: one["peak_bytes"] for name, one in found.items()},
        "loss_first_and_last": [plain["losses"][0], plain["losses"][-1]],
    }
    targets = [target("share of the steps in which clipping is due", 0.5, due, "ratio", at_most=False)]
    for name in ("released", "spilled"):
        same = float(found[name]["digest"] == plain["digest"] and found[name]["grad_norms"] == plain["grad_norms"])
        what = f"{name}: weights after 100 steps bitwise those of the plain step"
        targets.append(target(what, 1.0, same, "1 is yes", at_most=False))
    return figures, targets


# ---- time ------------------------------------------------------------------------------------------------------------------


def time(options: argparse.Namespace) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Seconds of a step beside the plain one's."""
    wanted = {
        "released, clipping due": 1.35,
        "spilled, clipping due": 1.35,
        "spilled, clipping not due": 1.05,
        "released, no clipping": 1.05,
    }
    seconds: dict[str, list[float]] = {name: [] for name in TIMES}
    peaks: dict[str, list[int]] = {name: [] for name in TIMES}
    for number in range(options.rounds):
        for name, way in TIMES.items():
            if number and name not in ("plain", *wanted):
                continue
            found = _step(model=str(folder_of(MODEL)), rows=4, row_tokens=512, steps=2, **way)
            seconds[name].append(found["seconds"][1])
            peaks[name].append(found["peak_bytes"])
            print(f"round {number + 1}, {name}: {seconds[name][-1]:.2f} s, {peaks[name][-1] / 1e9:.2f} GB", flush=True)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = {
        name: statistics.median(one / plain for one, plain in zip(values, seconds["plain"], strict=False))
        for name, values in seconds.items()
    }
    figures = {
        "rounds": options.rounds,
        "rows": 4,
        "row_tokens": 512,
        "step_seconds": medians,
        "ratios_to_plain": ratios,
        "peak_bytes": {name: statistics.median(values) for name, values in peaks.items()},
    }
    what = "step time over the plain step's"
    return figures, [target(f"{name}: {what}", most, ratios[name], "times", at_most=True) for name, most in wanted.items()]


# ---- quality ---------------------------------------------------------------------------------------------------------------


def quality(options: argparse.Namespace) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Validation losses on GSM8K."""
    losses: dict[str, list[float]] = {name: [] for name in QUALITY}
    before: list[float] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        lines = (options.text / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / "train.jsonl").write_text("".join(lines[:EXAMPLES]), encoding="utf-8")
        (folder / "validation.jsonl").write_text("".join(lines[-VALIDATION:]), encoding="utf-8")
        (folder / "recipe.yaml").write_text(_RECIPE.format(model=MODEL, examples=EXAMPLES), encoding="utf-8")
        for seed in range(SEEDS):
            for name, overrides in QUALITY.items():
                card = _trained(folder, seed, overrides)
                losses[name].append(card["validation_loss_last"])
                before.append(card["validation_loss_before"])
                print(f"seed {seed}, {name}: {losses[name][-1]:.5f}", flush=True)
    first = losses["adamw fp32"]
    worse = {
        name: statistics.mean(one / base - 1 for one, base in zip(values, first, strict=True)) for name, values in losses.items()
    }
    figures = {
        "examples": EXAMPLES,
        "validation_examples": VALIDATION,
        "seeds": SEEDS,
        "validation_loss_before": before[0],
        "validation_losses": losses,
        "relative_difference": worse,
    }
    return figures, [
        target(f"{name}: validation loss above that of fp32 AdamW", 0.005, worse[name], "ratio", at_most=True)
        for name in ("bf16-stochastic", "int8 moments")
    ]


def _trained(folder: Path, seed: int, overrides: Sequence[str]) -> dict[str, Any]:
    runs = folder / "runs"
    shutil.rmtree(runs / "quality", ignore_errors=True)
    command = [sys.executable, "-m", "fullrank", "train", "recipe.yaml", f"train.seed={seed}", *overrides]
    must(measure([*command, "--runs-dir", str(runs)], folder, looks_on=False))
    found: dict[str, Any] = json.loads((runs / "quality" / "train" / "card.json").read_text(encoding="utf-8"))
    return found


# ---- longest ---------------------------------------------------------------------------------------------------------------


def longest(options: argparse.Namespace) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The longest example in 8 GB."""
    peer = str(options.peer or sys.executable)
    script = str(ROOT / "benchmarks" / "memory_peer.py")
    folder = str(folder_of(MODEL))

    def theirs(tokens: int, *more: str) -> int:
        command = [peer, script, folder, str(tokens), *more]
        measured = measure(command, ROOT, {"OMP_NUM_THREADS": str(os.cpu_count())}, looks_on=False)
        return int(json.loads(must(measured).output.splitlines()[-1])["peak_bytes"])

    def ours(tokens: int, **way: Any) -> int:
        return int(_step(model=folder, rows=1, row_tokens=tokens, steps=2, **way)["peak_bytes"])

    plain_found = _most_tokens(theirs)
    plain = plain_found["tokens"]
    twice = {"tokens": 2 * plain, "peak_bytes": theirs(2 * plain, "checkpointing")}
    released: Way = {"train": {"max_grad_norm": None}, "machine": {"gradients": "release"}}
    candidates: dict[str, Way] = {"fullrank, adamw": {"train": {}}, "fullrank, adamw, released": released}
    figures: dict[str, Any] = {
        "most_bytes": MOST_BYTES,
        "transformers": plain_found,
        "transformers, checkpointing, twice that": twice,
    }
    for name, way in candidates.items():  # steps of so many tokens take minutes: one length is tried, not the longest searched
        tokens = TIMES_LONGER * plain
        figures[name] = {"tokens": tokens, "peak_bytes": ours(tokens, **way)}
        print(f"{name}: {tokens} tokens, {figures[name]['peak_bytes'] / 1e9:.2f} GB", flush=True)
    best = max((figures[name]["tokens"] for name in candidates if figures[name]["peak_bytes"] <= MOST_BYTES), default=0)
    what = "longest example in 8 GB, beside transformers' plain trainer"
    return figures, [target(what, 4.0, best / plain, "times", at_most=False)]


def _most_tokens(peak: Callable[[int], int]) -> dict[str, int]:
    """The longest example within the limit, to 10 %, and its peak."""
    low, high, peaks = 2048, 0, {}
    while not high or high > 1.1 * low:
        tokens = (low + high) // 2 if high else 2 * low
        peaks[tokens] = peak(tokens)
        print(f"theirs: {tokens} tokens, {peaks[tokens] / 1e9:.2f} GB", flush=True)
        low, high = (tokens, high) if peaks[tokens] <= MOST_BYTES else (low, tokens)
    return {"tokens": low, "peak_bytes": peaks.get(low, 0)}


if __name__ == "__main__":
    main()
