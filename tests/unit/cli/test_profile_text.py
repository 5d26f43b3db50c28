"""A profile as lines for a person."""

from __future__ import annotations

from typing import Any

from fullrank.cli.profile_text import profile_text
from fullrank.records import MemoryPart, ModuleTime, Profile, RankTime


def module(name: str, ratio: float, **facts: Any) -> ModuleTime:
    usual = {"calls": 2, "forward_seconds": ratio, "backward_seconds": 2 * ratio, "flops_per_second": None}
    return ModuleTime(module=name, ratio=ratio, **{**usual, **facts})


FOUND = Profile(
    device_name="a processor",
    threads=2,
    steps=3,
    first_step_seconds=2.5,
    step_seconds=1.25,
    steps_planned=1000,
    examples_per_second=6.4,
    tokens_per_second=1234.5,
    phases={"data wait": 0.0, "forward": 0.5, "head": 0.1, "backward": 0.8, "optimizer": 0.1},
    modules=[module("layers.*.mlp.up_proj", 0.2, flops_per_second=187e9), module("a", 0.001), module("b", 0.002)],
    needed_flops=150_000_000_000,
    best_flops_per_second=200e9,
    utilisation=0.6,
    rows_per_step=1.5,
    row_tokens=310,
    separate_tokens=1000,
    computed_tokens=600,
    padded_tokens=1500,
    predictions=250,
    memory=[
        MemoryPart(part="weights", planned_bytes=538_000_000, measured_bytes=538_000_000),
        MemoryPart(part="process", planned_bytes=510_000_000, measured_bytes=None),
    ],
    peak_bytes_planned=3_000_000_000,
    peak_bytes=3_100_000_000,
    ranks=[],
    balance=None,
    advice=["do this", "then that"],
)


def test_it_tells_the_figures() -> None:
    text = profile_text(FOUND)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert lines[0] == ("a step: 1.25 s (the first 2.5 s; median of 3), 6.4 examples/s, 1,234 tokens/s on a processor, 2 threads")
    assert "the run: 1,000 steps, about 20 min 50 s without validation" in lines
    assert "backward 0.800 0.53" in lines
    assert "layers.*.mlp.up_proj 0.200 0.400 0.20 187" in lines
    assert "2 others 0.003 0.006 0.00" in lines
    assert any("600 tokens computed of 1,000 (ratio 0.40 shared), 1,500 if padded (ratio 0.60 avoided)" in line for line in lines)
    assert "weights 538 MB 538 MB" in lines and "process 510 MB" in lines and "peak 3 GB 3.1 GB" in lines
    assert lines[-2:] == ["- do this", "- then that"]
    assert max(map(len, text.splitlines())) <= 130


def test_ranks_are_told_of_where_there_are_several() -> None:
    assert "rank" not in profile_text(FOUND)
    seconds = [(0.7, 0.5, 0.45), (1.0, 0.3, 0.25)]
    ranks = [
        RankTime(rank=n, computed_tokens=300, computing_seconds=a, communicating_seconds=b, exposed_seconds=c)
        for n, (a, b, c) in enumerate(seconds)
    ]
    text = profile_text(FOUND.model_copy(update={"ranks": ranks, "balance": 0.875}))
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "0 300 0.700 0.500 0.450" in lines and "1 300 1.000 0.300 0.250" in lines
    assert any(line.startswith("balance 0.88:") and line.endswith("is 0.20 of a step") for line in lines)
    assert max(map(len, text.splitlines())) <= 130
