"""How rows are best laid out on this CPU: how many tokens they hold, and what sharing a long prompt saves.

    python benchmarks/rows.py --text FOLDER

Whole optimizer steps of SmolLM2-135M, the ways of a case in turn, round after round, medians reported:

    budget  8 examples of GSM8K in rows of at most so many tokens
    pairs   2 conversations of several turns (GSM8K questions and answers one after the other), each with the right last answer
            and one of another question: as chosen and rejected answers come
    groups  generated tokens: one prompt with 8 answers, as sampled answers come; the prompt 6 or 12 times an answer

Pairs and groups are laid out with what they share once, and separately. The target: the ratio of the step times is at least 0.9
of the ratio of the tokens. What follows the prompt, the head above all, is not saved.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import target, write
from speed import chats

from fullrank.models.load import load_model, load_tokenizer
from fullrank.models.rows import RowModel
from fullrank.models.source import resolve
from fullrank.parallel.quiet import quiet
from fullrank.parallel.single import SingleDevice
from fullrank.recipe import Model, Train
from fullrank.sequences.chat import ChatRenderer, Tokens
from fullrank.sequences.layout import MicroBatch, micro_batches
from fullrank.sequences.store import ShardPlace, TokenStore, write_index, write_shard

BUDGETS = (128, 256, 512, 1024)
HISTORY = 6
"""Exchanges before the last question of a conversation."""
ANSWER_TOKENS = 48


def main() -> None:
    """Measures and writes `results/rows.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="the folder of the data sets")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dry", action="store_true", help="print the figures, write nothing")
    options = parser.parse_args()
    base = resolve(Model(source="smollm2-135m-instruct"))
    renderer = ChatRenderer(load_tokenizer(base.folder), datetime.date(2026, 1, 1), "smollm2")
    rows = RowModel(load_model(base.folder, device=torch.device("cpu")), adds_gradients=True)
    engine = SingleDevice(rows, Train(precision="fp32"), recompute="none")
    questions = chats("gsm8k", options.text)
    figures: dict[str, Any] = {"rounds": options.rounds, "threads": torch.get_num_threads()}
    targets = []
    with tempfile.TemporaryDirectory() as folder, quiet():
        store = _store(Path(folder) / "gsm8k", [renderer.examples(row)[0] for row in questions[:8]])
        ways = {str(budget): micro_batches(store, range(8), budget, packed=True) for budget in BUDGETS}
        found = _compared(engine, ways, options.rounds)
        figures["examples_per_second_by_row_tokens"] = {budget: 8 / seconds for budget, seconds in found.items()}
        shared = {
            "pairs: several turns": [tokens for n in range(2) for tokens in _pair(renderer, questions, n)],
            **{f"groups: prompt {times} times an answer": _group(times * ANSWER_TOKENS) for times in (6, 12)},
        }
        for name, examples in shared.items():
            case = _shared_and_separate(engine, _store(Path(folder) / name.replace(":", ""), examples), options.rounds)
            figures[name] = case
            what = f"{name}: ratio of step times, separate to shared, over that of tokens"
            targets.append(target(what, 0.9, case["time_ratio"] / case["token_ratio"], "ratio", at_most=False))
    print(json.dumps(figures, indent=2), *map(json.dumps, targets), sep="\n")
    if not options.dry:
        print(f"wrote {write('rows', figures, targets)}")


def _pair(renderer: ChatRenderer, questions: Sequence[list[dict[str, str]]], number: int) -> list[Tokens]:
    """A conversation with its own last answer and with another question's; the last answer carries loss."""
    exchanges = questions[number * (HISTORY + 2) : (number + 1) * (HISTORY + 2)]
    turns = [turn for exchange in exchanges[:-1] for turn in exchange]
    found = []
    for last in (turns[-1], exchanges[-1][-1]):
        tokens = renderer.examples([*turns[:-1], last])[0]
        supervised = np.asarray(tokens.supervised)
        begins = int(np.flatnonzero(supervised[1:] & ~supervised[:-1])[-1]) + 1
        found.append(Tokens(tokens.ids, (supervised & (np.arange(len(supervised)) >= begins)).tolist()))
    return found


def _group(prompt_tokens: int) -> list[Tokens]:
    draw = np.random.default_rng(0)
    prompt = draw.integers(1000, 40_000, size=prompt_tokens).tolist()
    answers = draw.integers(1000, 40_000, size=(8, ANSWER_TOKENS)).tolist()
    return [Tokens(prompt + answer, [False] * prompt_tokens + [True] * ANSWER_TOKENS) for answer in answers]


def _shared_and_separate(engine: SingleDevice, store: TokenStore, rounds: int) -> dict[str, float]:
    ways = {
        name: micro_batches(store, range(len(store)), 2048, packed=True, shared=name == "shared")
        for name in ("shared", "separate")
    }
    seconds = _compared(engine, ways, rounds)
    tokens = {name: sum(row.tokens for row in rows) for name, rows in ways.items()}
    return {
        **{f"{name}_tokens": count for name, count in tokens.items()},
        **{f"{name}_seconds": value for name, value in seconds.items()},
        "supervised_tokens": sum(row.supervised_tokens for row in ways["shared"]),
        "token_ratio": tokens["separate"] / tokens["shared"],
        "time_ratio": seconds["separate"] / seconds["shared"],
    }


def _compared(engine: SingleDevice, ways: Mapping[str, list[MicroBatch]], rounds: int) -> dict[str, float]:
    """Median seconds of a step, by way; a round before the first warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(rounds + 1):
        for name, rows in ways.items():
            supervised = sum(row.supervised_tokens for row in rows)
            started = time.perf_counter()
            engine.step(rows, supervised, learning_rate=1e-6, seed=round_)
            if round_:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _store(folder: Path, examples: list[Tokens]) -> TokenStore:
    split, shards = folder / "train", folder / "shards"
    split.mkdir(parents=True)
    shards.mkdir()
    numbers = range(len(examples))
    write_shard(shards / "0.safetensors", examples, numbers, [(number, -1) for number in numbers])
    write_index(split, [ShardPlace("0.safetensors", "case", 1, None, "record")], np.array([[0, n] for n in numbers]))
    return TokenStore(split)


if __name__ == "__main__":
    main()
