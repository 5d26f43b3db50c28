"""Writes the figures that README quotes, from `results/` alone: `python benchmarks/quote.py`.

The block between the two markers is generated; a test compares it with what the results say now.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- figures: benchmarks/quote.py -->", "<!-- end of figures -->"


def block() -> str:
    """The generated part of README, from results/quickstart.json."""
    results = json.loads((ROOT / "benchmarks" / "results" / "quickstart.json").read_text(encoding="utf-8"))
    machine, run = results["machine"], results["figures"]["first"]
    rows = [
        ("F1 of violations found", "seen_wordings", "f1"),
        ("ROUGE-L of directives", "seen_wordings", "rouge_l"),
        ("F1, wordings never seen in training", "unseen_wordings", "f1"),
        ("ROUGE-L, wordings never seen", "unseen_wordings", "rouge_l"),
    ]
    table = "\n".join(
        f"| {name} | {_score(run, test, 'base', key)} | {_score(run, test, 'tuned', key)} |" for name, test, key in rows
    )
    examples = run["scores"]["seen_wordings"]["examples"]
    return f"""
Measured on {machine["cores"]} cores ({machine["processor"]}), from a fresh clone with nothing cached
([results](benchmarks/results/quickstart.json)):

| {examples} unseen reports each | base model, told what is asked | tuned model |
|---|---|---|
{table}

{_minutes(run["total_seconds"])} in all, {_minutes(run["train_stage_seconds"])} of it training ({run["tokens"]:,} tokens at \
{run["tokens_per_second"]:.0f} a second); {run["peak_bytes"] / 1e9:.1f} GB of memory at the peak. In brackets: 95 % intervals
over the reports. All {run["tensors_changed"]} tensors changed, and a fresh process reproduces the exported model's logits bit
for bit.
"""


def _score(run: dict[str, Any], test: str, who: str, key: str) -> str:
    score = run["scores"][test][who][key]
    return f"{score['value']:.2f} ({score['low']:.2f} to {score['high']:.2f})"


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} minutes"


def with_figures(readme: str) -> str:
    """README with the generated block replaced."""
    before, rest = readme.split(BEGIN)
    return before + BEGIN + "\n" + block() + "\n" + END + rest.split(END)[1]


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(with_figures(path.read_text(encoding="utf-8")), encoding="utf-8")
