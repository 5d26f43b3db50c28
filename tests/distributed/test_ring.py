"""Ring attention against the attention of a whole row, and ranks that share rows against one process; in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rank_work import Asked, RingAsked, differences, refused, ringed, stepped
from ranks import Ranks
from staging import write_case

from fullrank import loading
from fullrank.parallel.world import World
from fullrank.run import read_json_lines
from fullrank.workflows.stages import run_until

Folder = Callable[..., Path]
Worlds = Callable[[int], Ranks]

#: Sums of float64 in another order: within attention, and through steps.
EXACT, CLOSE = 1e-10, 1e-9


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize(
    "asked",
    [
        RingAsked([[37]]),
        RingAsked([[37]], window=9),
        RingAsked([[12], [5], [1], [23]]),
        RingAsked([[12], [5], [1], [23]], window=4),
        RingAsked([[8, 5], [8, 7], [8, 5, 6], [9]]),
        RingAsked([[8, 5], [8, 7], [8, 5, 6], [9]], window=6),
        RingAsked([[20, 11], [20, 3]], key_heads=1, softcap=1.5),
        RingAsked([[33]], key_heads=4, softcap=0.7, window=8),
        RingAsked([[2]]),
        RingAsked([[1]]),
        RingAsked([[41, 20], [41, 3], [17]], tile=7),
        RingAsked([[41, 20], [41, 3], [17]], tile=7, window=11, softcap=2.0),
        RingAsked([[1300], [200]]),
    ],
    ids=str,
)
def test_the_ring_attends_as_the_whole_row_does(size: int, asked: RingAsked, ranks: Worlds) -> None:
    """Outputs and gradients of queries, keys and values."""
    for found in ranks(size).ask(ringed, asked):
        assert max(found.values()) <= EXACT


# ---- steps --------------------------------------------------------------------------------------------------------------


def learned_alike(size: int, asked: Asked, ranks: Worlds, tolerance: float = CLOSE) -> dict[str, Any]:
    """Steps of ranks, after they were found to be those of one process that holds the model whole."""
    wanted = stepped(World(), replace(asked, sync="step", recompute="none"), False)
    found = ranks(size).ask(stepped, asked)
    for one in found:
        for what in ("losses", "norms", "validation"):
            assert np.allclose(one[what], wanted[what], rtol=tolerance, atol=0), what
        assert differences(one["weights"], wanted["weights"]) <= tolerance
        assert one["never_reached"] == set()
    first: dict[str, Any] = found[0]
    return first


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gemma3", "gpt2", "mistral", "phi", "qwen3_moe"])
def test_two_ranks_that_share_rows_learn_what_one_process_does(family: str, ranks: Worlds, tiny_model_folder: Folder) -> None:
    """Windows, caps, biases, experts, positions that are learned; the last step has one example of a few tokens."""
    double = family != "qwen3_moe"  # torch multiplies groups of experts in fp32 at most
    dtype = torch.float64 if double else torch.float32
    learned_alike(2, Asked(str(tiny_model_folder(family)), dtype=dtype, context=2), ranks, CLOSE if double else 1e-4)


@pytest.mark.parametrize(
    ("size", "changes"),
    [
        (4, {"context": 2}),
        (4, {"context": 4}),
        (4, {"context": 2, "sync": "row"}),
        (4, {"context": 2, "replicas": 2}),
        (3, {"context": 3, "recompute": "block"}),
        (2, {"context": 2, "recompute": "block", "sync": "row"}),
        (2, {"context": 2, "budget": 400, "examples": 20}),
        (2, {"context": 2, "alike": True}),
        (4, {"context": 4, "alike": True}),
        (2, {"context": 2, "train": {"frozen": ["model.embed_tokens", "model.layers.0.*"]}}),
    ],
    ids=str,
)
def test_every_way_to_share_rows_is_the_same_step(
    size: int, changes: dict[str, Any], ranks: Worlds, tiny_model_folder: Folder
) -> None:
    learned_alike(size, Asked(str(tiny_model_folder("llama")), **changes), ranks)


@pytest.mark.parametrize("size", [2, 4])
def test_fifty_steps(size: int, ranks: Worlds, tiny_model_folder: Folder) -> None:
    """Two ranks that share rows; and two such pairs, among all of whom FSDP2 divides the model."""
    learned_alike(size, Asked(str(tiny_model_folder("llama")), steps=50, context=2), ranks)


# ---- what is refused, and a run -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("gpt2", {"attn_pdrop": 0.1}, "dropout"),
        ("llama", {"attention_dropout": 0.1}, "dropout"),
        ("gpt_oss", {}, "attention sinks"),
        ("mamba", {}, "one example a row"),
    ],
    ids=["gpt2", "llama", "gpt_oss", "mamba"],
)
def test_a_model_whose_rows_cannot_be_divided_is_refused_by_name(
    family: str, changes: dict[str, Any], words: str, ranks: Worlds
) -> None:
    for said in ranks(2).ask(refused, family, changes):
        assert said.startswith("parallel.context: the rows of ") and words in said


def test_a_ring_that_is_not_right_is_noticed(ranks: Worlds) -> None:
    """One rank's ring leaves out what visits: every rank says so."""
    for said in ranks(2).ask(refused, "llama", {}, True):
        assert "its logits are others then" in said


def test_a_run_of_two_ranks_that_share_rows_has_the_losses_of_one_process(
    tmp_path: Path, tiny_model_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planned, rehearsed, trained, validated and exported, as `fullrank train` does it."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    recipe = write_case(tmp_path, tiny_model_folder("qwen3"), rows=12)
    losses, validations = [], []
    for name, overrides in {"one": [], "two": ["parallel.ranks=2", "parallel.context=2"]}.items():
        run = run_until("train", loading.load(recipe, [f"name={name}", *overrides]), tmp_path / "runs")
        rows = read_json_lines(run.train / "steps.jsonl")
        losses.append([row["loss"] for row in rows])
        validations.append([row["validation_loss"] for row in rows if row["validation_loss"] is not None])
    assert np.allclose(losses[1], losses[0], rtol=1e-4, atol=0)
    assert np.allclose(validations[1], validations[0], rtol=1e-4, atol=0) and validations[0]
