"""Writes the figures that README and docs quote, from `results/` alone: `python benchmarks/quote.py`.

A block between markers that name it is generated; a test compares every one with what the results say now.
"""

# ruff: noqa: E501 - lines of the pages are as long as pages have them
from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "README.md", *(ROOT / "docs" / f"{page}.md" for page in ("data", "speed", "memory", "parallel")))
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


def memory_slopes() -> str:
    """Bytes a parameter, by optimizer and place to wait."""
    results = _results("memory-slopes")
    figures, machine = results["figures"], results["machine"]
    rows = "\n".join(
        f"| {name} | {found['bytes_per_parameter']:.1f} |" for name, found in figures.items() if isinstance(found, dict)
    )
    return f"""
Bytes a parameter: the slope of the peak memory of the whole process over models of {figures["blocks"][0]} to {figures["blocks"][-1]} blocks of
SmolLM2's width on {machine["cores"]} cores ({machine["processor"]}). The embedding, {figures["outside_parameters"]:,} parameters in each of
them, plays no part ([results](../benchmarks/results/memory-slopes.json)):

| way | bytes a parameter |
|---|---|
{rows}
"""


def memory_exact() -> str:
    """Whether released weights are the plain step's."""
    figures = _results("memory-exact")["figures"]
    digests = figures["digests"]
    same = [name for name, digest in digests.items() if name != "plain" and digest == digests["plain"]]
    return f"""
After {figures["steps"]} steps of SmolLM2-135M with {figures["rows"]} rows each, a ratio of {figures["clipped_ratio"]:.2f} of them clipped, the weights
are bitwise those of the plain step: {" and ".join(same) or "in no way"} ([results](../benchmarks/results/memory-exact.json)).
"""


def memory_time() -> str:
    """Time of a step beside the plain one's."""
    figures = _results("memory-time")["figures"]
    rows = "\n".join(
        f"| {name} | {ratio:.2f} | {figures['peak_bytes'][name] / 1e9:.2f} |"
        for name, ratio in figures["ratios_to_plain"].items()
    )
    return f"""
Time of a step of SmolLM2-135M, {figures["rows"]} rows of {figures["row_tokens"]} tokens, beside the plain step with recomputed blocks, and the peak of the
process ([results](../benchmarks/results/memory-time.json)):

| way | times the plain step | GB |
|---|---|---|
{rows}
"""


def memory_longest() -> str:
    """The longest example in a given memory."""
    figures = _results("memory-longest")["figures"]
    rows = "\n".join(
        f"* {name}: {found['tokens']:,} tokens, {found['peak_bytes'] / 1e9:.1f} GB"
        for name, found in figures.items()
        if isinstance(found, dict)
    )
    return f"""
The longest example that SmolLM2-135M was trained on in {figures["most_bytes"] / 1e9:.0f} GB of process memory; ours were tried at four times the
plain trainer's only ([results](../benchmarks/results/memory-longest.json)):

{rows}
"""


def memory_quality() -> str:
    """Validation losses beside those of fp32 AdamW."""
    figures = _results("memory-quality")["figures"]
    rows = "\n".join(
        f"| {name} | {', '.join(f'{loss:.4f}' for loss in losses)} | {100 * figures['relative_difference'][name]:+.2f} % |"
        for name, losses in figures["validation_losses"].items()
    )
    return f"""
GSM8K, {figures["examples"]} examples, {figures["seeds"]} seeds: the validation loss after training, {figures["validation_loss_before"]:.4f} before it, \
and its difference from fp32 AdamW's, seed by seed ([results](../benchmarks/results/memory-quality.json)):

| way | validation losses | mean difference |
|---|---|---|
{rows}
"""


def distributed_equal() -> str:
    """Losses and weights of several ranks beside those of one process."""
    figures = _results("distributed-equal")["figures"]
    ways = [name.removesuffix(", float64") for name in figures if name.endswith(", float64")]
    rows = "\n".join(
        f"| {way} | {figures[f'{way}, float64']['losses']:.0e} | {figures[f'{way}, float64']['weights']:.0e} "
        f"| {figures[f'{way}, float32']['losses_first_10']:.0e} | {figures[f'{way}, float32']['losses']:.0e} "
        f"| {figures[f'{way}, float32']['weights']:.0e} |"
        for way in ways
    )
    return f"""
Largest relative differences from one process, of any step's loss and of any final tensor, over {figures["steps"]} steps with a learning rate of
{figures["learning_rate"]:.0e} ({figures["model"]}; [results](../benchmarks/results/distributed-equal.json)):

| ranks of a CPU | float64: losses | weights | fp32: losses of 10 steps | of all | weights |
|---|---|---|---|---|---|
{rows}
"""


def distributed_memory() -> str:
    """Peaks of ranks beside their ledger."""
    figures = _results("distributed-memory")["figures"]
    rows = "\n".join(
        f"| {name} | {found['planned_bytes'] / 1e9:.2f} | {found['peak_bytes'] / 1e9:.2f} |"
        for name, found in figures.items()
        if isinstance(found, dict)
    )
    return f"""
Memory of a rank at its peak, SmolLM2-135M in fp32, {figures["rows"]} rows of {figures["row_tokens"]} tokens a step
([results](../benchmarks/results/distributed-memory.json)):

| ranks of a CPU | planned, GB | measured, GB |
|---|---|---|
{rows}
"""


def distributed_kills() -> str:
    """Ranks that were killed or stopped."""
    figures = _results("distributed-kills")["figures"]
    struck = figures["struck"]
    told = []
    for how, words in (("SIGKILL", "killed"), ("SIGSTOP", "stopped")):
        seconds = [one["seconds"] for one in struck if one["how"] == how]
        told.append(f"{len(seconds)} times {words}: at most {max(seconds):.0f} s until it was named and all were gone")
    continued = sum(one["same_weights"] for one in struck)
    return f"""
One of two ranks struck at random moments, {told[0]}; {told[1]}. The run was continued to the weights of one that nobody touched, bit by bit, \
{continued} times of {len(struck)} ([results](../benchmarks/results/distributed-kills.json)).
"""


def distributed_scaling() -> str:
    """A simulation of this machine beside what its ranks did."""
    results = _results("distributed-scaling")
    figures, machine = results["figures"], results["machine"]
    rows = "\n".join(
        f"| {ranks} | {found['measured_step_seconds']:.2f} | {found['simulated_step_seconds']:.2f} |"
        for ranks, found in figures.items()
        if isinstance(found, dict) and "measured_step_seconds" in found
    )
    return f"""
Ranks of {machine["cores"]} cores ({machine["processor"]}), which they share, beside the simulation of `this-machine`: SmolLM2-135M in fp32, {figures["batch"]} examples
a step ([results](../benchmarks/results/distributed-scaling.json)):

| ranks | measured, seconds a step | simulated |
|---|---|---|
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


_SPEED_DATA = {
    "rasbt": "short instructions, batch 8",
    "gsm8k": "GSM8K, batch 16",
    "fastchat": "short conversations of several turns, batch 4",
}
_WAYS = {
    "ours": "fullrank",
    "defaults": "TRL, its defaults in fp32",
    "plain": "TRL without recomputation",
    "padding-free": "TRL without padding or recomputation",
    "transformers": "transformers' `Trainer` without recomputation",
    "packed": "TRL packing (*other examples make up an update*)",
    "newcomer": "TRL as a newcomer gets it (*bf16, one thread*)",
}


def speed_line() -> str:
    """One sentence on the speed of steps."""
    results = _results("speed-cpu")
    figures, machine = results["figures"], results["machine"]
    said = []
    for name in ("rasbt", "gsm8k"):
        case = figures[name]
        own, defaults = case["ours"], case["defaults"]
        best = max(_alike(case), key=lambda way: case[way]["examples_per_second"])
        said.append(
            f"* {_SPEED_DATA[name]}: {own['examples_per_second']:.2f} examples a second, "
            f"{own['examples_per_second'] / defaults['examples_per_second']:.1f} times TRL's defaults and "
            f"{own['examples_per_second'] / case[best]['examples_per_second']:.1f} times the best setting found for a peer, in "
            f"{own['peak_rss'] / defaults['peak_rss']:.2f} of the defaults' memory"
        )
    lines = "\n".join(said)
    return f"""
{lines}

SmolLM2-135M, fp32, the same examples and threads on {machine["cores"]} cores ({machine["processor"]}); more in
[speed](docs/speed.md).
"""


def _alike(case: dict[str, Any]) -> list[str]:
    """Ways of the peers in which the same examples make up an update."""
    return [way for way in _WAYS if way in case and way not in ("ours", "packed", "newcomer")]


def speed() -> str:
    """Steps beside the peers'."""
    results = _results("speed-cpu")
    figures, machine = results["figures"], results["machine"]
    versions = figures["peer_versions"]
    planned = ", ".join(f"{figures[name]['ours']['peak_planned'] / 1e9:.2f}" for name in _SPEED_DATA)
    tables = []
    for name, words in _SPEED_DATA.items():
        case = figures[name]
        own = case["ours"]["examples_per_second"]
        rows = "\n".join(
            f"| {said} | {case[way]['examples_per_second']:.2f} | {own / case[way]['examples_per_second']:.2f} | "
            f"{case[way]['peak_rss'] / 1e9:.2f} | {case[way]['first_step_seconds']:.1f} |"
            for way, said in _WAYS.items()
            if way in case
        )
        head = f"| {words} | examples a second | fullrank is faster by | peak memory, GB | first step, s |"
        tables.append(f"{head}\n|---|---|---|---|---|\n{rows}")
    return f"""
SmolLM2-135M, fp32, the same examples, batch, learning rate and threads on {machine["cores"]} cores ({machine["processor"]}),
processes alternating, medians of {figures["rounds"]} rounds ([results](../benchmarks/results/speed-cpu.json)). \
TRL {versions["trl"]}, transformers {versions["transformers"]}, torch {versions["torch"]}.
The first step counts from when libraries are imported; the plan had foreseen {planned} GB for fullrank.

{(chr(10) * 2).join(tables)}
"""


def ceiling() -> str:
    """Why utilisation is what it is."""
    results = _results("steps")
    rows = "\n".join(
        f"| {words} | {part['utilisation']:.2f} | {part['linear_ratio'] + part['head_ratio']:.2f} | "
        f"{part['attention_ratio']:.2f} | {part['optimizer_ratio']:.2f} | {part['linear_flops_per_second'] / 1e9:.0f} of "
        f"{part['best_flops_per_second'] / 1e9:.0f} | {part['ceiling']:.2f} |"
        for name, words in _SPEED_DATA.items()
        for part in (results["figures"][name],)
    )
    return f"""
| | utilisation | share of products and head | of attention | of the update | rate of linear modules, GFLOP/s | ceiling |
|---|---|---|---|---|---|---|
{rows}

The ceiling is the utilisation if all else (norms, activation functions, rotary angles, residuals, Python) took no time: what
products, the library's attention kernel and the update leave on {results["machine"]["cores"]} cores \
({results["machine"]["processor"]}; [results](../benchmarks/results/steps.json)).
"""


def shared() -> str:
    """What sharing long prompts saves."""
    figures = _results("rows")["figures"]
    rows = "\n".join(
        f"| {name} | {case['separate_tokens']:,} | {case['shared_tokens']:,} | {case['token_ratio']:.2f} | "
        f"{case['time_ratio']:.2f} |"
        for name, case in figures.items()
        if isinstance(case, dict) and "token_ratio" in case
    )
    return f"""
| a step of | tokens separately | shared | times fewer | times faster |
|---|---|---|---|---|
{rows}

Whole steps of SmolLM2-135M on two cores ([results](../benchmarks/results/rows.json)).
"""


def _results(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))
    return found


BLOCKS: dict[str, Callable[[], str]] = {
    "quickstart": quickstart,
    "memory-slopes": memory_slopes,
    "memory-exact": memory_exact,
    "memory-time": memory_time,
    "memory-longest": memory_longest,
    "memory-quality": memory_quality,
    "distributed-equal": distributed_equal,
    "distributed-memory": distributed_memory,
    "distributed-kills": distributed_kills,
    "distributed-scaling": distributed_scaling,
    "data-planted": data_planted,
    "data-speed": data_speed,
    "speed-line": speed_line,
    "speed": speed,
    "ceiling": ceiling,
    "shared": shared,
}


def with_figures(page: str) -> str:
    """A page with its generated blocks replaced."""
    return _BLOCK.sub(lambda found: f"{found[1]}{BLOCKS[found[2]]()}\n{found[3]}", page)


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(with_figures(path.read_text(encoding="utf-8")), encoding="utf-8")
