"""How many tokens should a row hold on this CPU? Whole optimizer steps of SmolLM2-135M at several row budgets.

    python benchmarks/rows.py

The steps hold 8 examples of the prudential case; budgets are measured in turn, round after round, and medians are reported.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from record import write

from fullrank.cases import prudential
from fullrank.models.load import load_model, load_tokenizer
from fullrank.models.source import resolve
from fullrank.parallel.single import SingleDevice
from fullrank.recipe import Data, Model, Train
from fullrank.sequences.chat import ChatRenderer, Tokens
from fullrank.sequences.layout import micro_batches
from fullrank.sequences.store import ShardPlace, TokenStore, write_index, write_shard

BUDGETS = (128, 256, 512, 1024)
ROUNDS = 3


def main() -> None:
    """Measures and writes `results/rows.json`."""
    base = resolve(Model(source="smollm2-135m-instruct"))
    renderer = ChatRenderer(load_tokenizer(base.folder), Data.model_fields["template_date"].default, "smollm2")
    engine = SingleDevice(load_model(base.folder, device=torch.device("cpu")), Train(precision="fp32"), recompute="none")
    with tempfile.TemporaryDirectory() as folder:
        examples = [renderer.examples(case.row["messages"])[0] for case in prudential.generate(8, seed=0, wordings="seen")]
        store = _store(Path(folder), examples)
        rates: dict[int, list[float]] = {budget: [] for budget in BUDGETS}
        for round_ in range(ROUNDS + 1):
            for budget in BUDGETS:
                rows = micro_batches(store, range(len(store)), budget, packed=True)
                started = time.perf_counter()
                supervised = sum(row.supervised_tokens for row in rows)
                engine.step(rows, supervised, learning_rate=1e-6, seed=round_)
                if round_:  # the first round warms up
                    rates[budget].append(sum(row.tokens for row in rows) / (time.perf_counter() - started))
    figures = {"tokens_per_second_by_row_tokens": {str(budget): statistics.median(values) for budget, values in rates.items()}}
    print(f"wrote {write('rows', figures, [])}: {figures}")


def _store(folder: Path, examples: list[Tokens]) -> TokenStore:
    split, shards = folder / "train", folder / "shards"
    split.mkdir()
    shards.mkdir()
    numbers = range(len(examples))
    write_shard(shards / "0.safetensors", examples, numbers, [(number, -1) for number in numbers])
    write_index(split, [ShardPlace("0.safetensors", "case", 1, None, "record")], np.array([[0, n] for n in numbers]))
    return TokenStore(split)


if __name__ == "__main__":
    main()
