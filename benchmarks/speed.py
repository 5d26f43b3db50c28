"""How fast a step is, and in how much memory, beside TRL and transformers on the same examples.

    python benchmarks/speed.py --text FOLDER --peer .venv-peer/bin/python
    python benchmarks/speed.py --text FOLDER --data rasbt --steps 4 --rounds 1 --dry       a trial, within one environment

Ours is `fullrank train`, theirs `speed_peer.py`; each is a process of its own, one after the other, round after round, with the
same threads, fp32 (what a newcomer gets, bf16 and one thread, apart), the same chats, batch and learning rate, one epoch in an
order of its own. The first step of each is told apart (latency: from when libraries are imported to when it is done). Examples a
second are those of all other steps over their seconds; medians over the rounds are told. Memory is the most that the process
ever held (the system's own count of its resident pages). Mean losses that are not alike would mean that something else was
trained: then nothing is written.

    rasbt     short instructions, the template's system prompt before each: batch 8
    gsm8k     questions and worked answers of varied length: batch 16
    fastchat  conversations of several turns: batch 4
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, get_args

from measure import measure, must
from record import ROOT, target, write

from fullrank.models.embedded import folder_of
from fullrank.recipe import AuditKind

MODEL = "smollm2-135m-instruct"
RATE = 1e-5
#: data -> (batch, steps beside the first, longest example in tokens, ways of the peer; the first is its defaults)
CASES: dict[str, tuple[int, int, int, tuple[str, ...]]] = {
    "rasbt": (8, 8, 1024, ("defaults", "plain", "padding-free", "transformers", "packed", "newcomer")),
    "gsm8k": (16, 1, 1024, ("defaults", "plain", "padding-free", "transformers")),
    "fastchat": (4, 8, 2048, ("defaults", "plain", "padding-free", "transformers")),
}
#: Ways in which other examples, or another type, make up an update: told apart, from one round.
APART = ("packed", "newcomer")
_RECIPE = """\
name: speed
model: {{source: {model}}}
data:
  train: train.jsonl
  validation: validation.jsonl
  max_length: {longest}
  audit: {{skip: [{skip}]}}
train:
  epochs: 1
  global_batch_size: {batch}
  optimizer: {{name: adamw, learning_rate: {rate}}}
  schedule: {{name: constant, warmup_ratio: 0.0}}
  evaluate_every_steps: 100000
machine: {{device: cpu}}
"""


def chats(name: str, folder: Path) -> list[list[dict[str, str]]]:
    """Conversations of a data set."""
    if name == "rasbt":
        rows = _lines(folder / "rasbt_instruction" / "alpaca.jsonl")
        asked = [row["instruction"] + (f"\n{row['input']}" if row["input"] else "") for row in rows]
        return [_exchange(question, row["output"]) for question, row in zip(asked, rows, strict=True)]
    if name == "gsm8k":
        return [row["messages"] for row in _lines(folder / "gsm8k" / "train.jsonl")]
    rows = _lines(folder / "fastchat_multiturn" / "conversations.jsonl")
    roles = {"human": "user", "gpt": "assistant"}
    return [[{"role": roles[turn["from"]], "content": turn["value"]} for turn in row["conversations"]] for row in rows]


def _lines(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:  # its lines end in new lines only, whatever their texts hold
        return [json.loads(line) for line in file]


def _exchange(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def main() -> None:
    """Measures and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="the folder of the data sets")
    parser.add_argument("--data", nargs="*", choices=tuple(CASES), default=tuple(CASES))
    parser.add_argument("--steps", type=int, help="beside the first")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ways", nargs="*", help="of the peer; all by default")
    parser.add_argument("--peer", default=sys.executable, help="the interpreter of an environment with TRL")
    parser.add_argument("--dry", action="store_true", help="print the figures, write nothing")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="fullrank-bench-"))
    try:
        figures: dict[str, Any] = {
            "rounds": options.rounds,
            "threads": os.cpu_count(),
            "peer_versions": _versions(options.peer),
        }
        model = folder_of(MODEL, print)
        for name in options.data:
            figures[name] = compared(name, folder, model, options)
        results = targets(figures)
        print(json.dumps(figures, indent=2))
        for line in results:
            print(json.dumps(line))
        if not options.dry:
            print(f"wrote {write('speed-cpu', figures, results)}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _versions(interpreter: str) -> dict[str, str]:
    program = (
        "import importlib.metadata as m, json; "
        "print(json.dumps({n: m.version(n) for n in ('trl', 'transformers', 'torch', 'accelerate', 'datasets')}))"
    )
    found: dict[str, str] = json.loads(subprocess.run([interpreter, "-c", program], capture_output=True, check=True).stdout)
    return found


def prepare(name: str, folder: Path, text: Path, steps: int) -> None:
    """Writes a data set of so many steps, and its recipe."""
    batch, _, longest, _ = CASES[name]
    count = batch * steps
    rows = chats(name, text)
    _write(folder / "train.jsonl", rows[:count])
    _write(folder / "validation.jsonl", rows[count : count + 1])
    skip = ", ".join(get_args(AuditKind))
    recipe = _RECIPE.format(model=MODEL, batch=batch, longest=longest, rate=RATE, skip=skip)
    (folder / "recipe.yaml").write_text(recipe, encoding="utf-8")


def compared(name: str, folder: Path, model: Path, options: argparse.Namespace) -> dict[str, Any]:
    """All ways on one data set."""
    batch, steps, longest, ways = CASES[name]
    steps = options.steps or steps
    count = batch * (steps + 1)
    prepare(name, folder, options.text, steps + 1)
    runs: dict[str, list[dict[str, Any]]] = {}
    for number in range(options.rounds):
        for way in ("ours", *(way for way in ways if not options.ways or way in options.ways)):
            if number and way in APART:
                continue
            found = ours(folder) if way == "ours" else theirs(way, folder, model, batch, longest, options.peer)
            if way == "packed":  # fewer steps, of other examples: all of them, the first too
                found["examples_per_second"] = count / sum(found["step_seconds"])
            else:
                found["examples_per_second"] = batch * steps / sum(found["step_seconds"][1:])
            print(name, f"round {number + 1}", way, json.dumps(found), flush=True)
            runs.setdefault(way, []).append(found)
    medians = {way: _median(found) for way, found in runs.items()}
    losses = {way: found["mean_loss"] for way, found in medians.items() if way not in APART}
    if max(losses.values()) > 1.15 * min(losses.values()):  # each has an order of its own
        raise SystemExit(f"{name}: not the same was trained: {losses}")
    return {"batch": batch, "steps": steps + 1, **medians}


def _write(path: Path, rows: list[list[dict[str, str]]]) -> None:
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows), encoding="utf-8")


def environment() -> dict[str, str]:
    return {"OMP_NUM_THREADS": str(os.cpu_count()), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def ours(folder: Path) -> dict[str, Any]:
    """`fullrank train`, its plan made before."""
    shutil.rmtree(folder / "runs", ignore_errors=True)
    arguments = ["recipe.yaml", "--runs-dir", "runs"]
    must(measure([sys.executable, "-m", "fullrank", "plan", *arguments], folder, environment()))
    program = [sys.executable, str(ROOT / "benchmarks" / "speed_stage.py")]
    done = must(measure([*program, *arguments], folder, environment(), looks_on=False))
    plan = json.loads((folder / "runs" / "speed" / "plan.json").read_text(encoding="utf-8"))
    rows = _lines(folder / "runs" / "speed" / "train" / "steps.jsonl")
    flops = json.loads((folder / "flops.json").read_text(encoding="utf-8"))
    seconds = sum(row["seconds"] for row in rows[1:])
    return {
        "flops_utilisation": sum(flops["needed"][1:]) / seconds / flops["best_per_second"],
        "best_gflops_of_products": flops["best_per_second"] / 1e9,
        "step_seconds": [row["seconds"] for row in rows],
        "losses": [row["loss"] for row in rows],
        "tokens": sum(row["tokens"] for row in rows),
        "computed_tokens": sum(row["computed_tokens"] for row in rows),
        "first_step_seconds": done.between("start", "first"),
        "peak_rss": flops["peak_rss"],
        "peak_planned": plan["peak_bytes_predicted"],
        "seconds_planned": plan["train_seconds_predicted"],
    }


def theirs(way: str, folder: Path, model: Path, batch: int, longest: int, interpreter: str) -> dict[str, Any]:
    """The peer in one of its ways."""
    program = [interpreter, str(ROOT / "benchmarks" / "speed_peer.py"), "train.jsonl", str(model), "--as", way]
    program += ["--batch", str(batch), "--learning-rate", str(RATE), "--max-length", str(longest)]
    # What a newcomer types sets no threads: the peer's launcher then takes one.
    threads = {"OMP_NUM_THREADS": "1"} if way == "newcomer" else {}
    done = must(measure(program, folder, {**environment(), **threads, "HF_HOME": str(folder / "hf")}, looks_on=False))
    said = json.loads(done.output.splitlines()[-1])
    return {
        "step_seconds": said["seconds"],
        "losses": said["losses"],
        "first_step_seconds": done.between("start", "first"),
        "peak_rss": said["peak_rss"],
    }


def _median(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of numbers; what is the same in every round is told once."""
    found: dict[str, Any] = {}
    for key, value in runs[0].items():
        if isinstance(value, int | float):
            found[key] = statistics.median(run[key] for run in runs)
    found["examples_per_second_of_rounds"] = [run["examples_per_second"] for run in runs]
    found["mean_loss"] = statistics.fmean(runs[0]["losses"])
    return found


def targets(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """Ours against the peer's defaults and its best."""
    wanted = {"rasbt": (2.2, 1.8, 0.9), "gsm8k": (2.2, 1.6, 0.5)}
    found = []
    for name, (defaults, best, memory) in wanted.items():
        if name not in figures or "defaults" not in figures[name]:
            continue
        case = figures[name]
        own = case["ours"]
        peers = {way: case[way] for way in CASES[name][3] if way in case and way not in APART}
        fastest = max(peers, key=lambda way: peers[way]["examples_per_second"])
        for words, way, least in (
            ("TRL's defaults", "defaults", defaults),
            (f"a peer's best setting ({fastest})", fastest, best),
        ):
            times = own["examples_per_second"] / peers[way]["examples_per_second"]
            found.append(target(f"{name}: examples a second against {words}", least, times, "times", at_most=False))
        words = f"{name}: operations of the needed matrix products over step time, of the best square product's"
        found.append(target(words, 0.85, own["flops_utilisation"], "ratio", at_most=False))
        ratio = own["peak_rss"] / peers["defaults"]["peak_rss"]
        found.append(target(f"{name}: peak memory against TRL's defaults", memory, ratio, "times", at_most=True))
    return found


if __name__ == "__main__":
    main()
