"""Writes the figures that README and docs quote, from `results/` alone: `python benchmarks/quote.py`.

A block between markers that name it is generated; a test compares every one with what the results say now.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "README.md", ROOT / "docs" / "data.md")
_BLOCK = re.compile(r"(<!-- figures: benchmarks/quote.py (\S+) -->\n).*?(<!-- end of figures -->)", re.DOTALL)


def quickstart() -> str:
    """What the quickstart measured."""
    results = _results("quickstart")
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


def data_planted() -> str:
    """What the audit found of planted defects, class by class."""
    results = _results("data-planted")
    rows = "\n".join(
        f"| `{kind}` | {found['planted']} | {found['recall']:.3f} | {found['precision']:.3f} |"
        for kind, found in results["figures"]["classes"].items()
    )
    return f"""
Defects planted in real data by a program that shares nothing with the audit; what is wrong by nature was labelled first,
by comparing all pairs ([results](../benchmarks/results/data-planted.json)):

| kind | planted | recall | precision |
|---|---|---|---|
{rows}
"""


def data_speed() -> str:
    """How fast data are prepared, and in how much memory."""
    speed, scale = _results("data-speed"), _results("data-scale")["figures"]
    figures, machine = speed["figures"], speed["machine"]
    rows = "\n".join(
        f"| {words} | {found['megabytes_per_second']:.1f} | {found['peak_pss'] / 1e6:,.0f} |"
        for words, found in (
            ("fullrank, audit skipped", figures["messages"]["ours"]),
            ("fullrank, audit included", figures["messages"]["audited"]),
            ("`datasets.map`, as TRL calls it", figures["messages"]["map"]),
            ("TRL's own preparation", figures["messages"]["trl"]),
        )
    )
    cores = f"{machine['cores']} cores ({machine['processor']})"
    return f"""
{figures["megabytes"]:.0f} MB of chats, {figures["processes"]} processes each, {cores}, \
the same tokens and masks ([results](../benchmarks/results/data-speed.json)):

| | MB a second | peak memory of all processes, MB |
|---|---|---|
{rows}

Again with nothing changed: {figures["again"]["seconds"]:.1f} s beyond the import of libraries. A file of \
{scale["bytes"] / 1e9:.1f} GB, audit included, took at most {scale["memory"]["peak_pss"] / 1e9:.2f} GB of memory \
([results](../benchmarks/results/data-scale.json)).
"""


def _results(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))
    return found


BLOCKS: dict[str, Callable[[], str]] = {"quickstart": quickstart, "data-planted": data_planted, "data-speed": data_speed}


def with_figures(page: str) -> str:
    """A page with its generated blocks replaced."""
    return _BLOCK.sub(lambda found: f"{found[1]}{BLOCKS[found[2]]()}\n{found[3]}", page)


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(with_figures(path.read_text(encoding="utf-8")), encoding="utf-8")
