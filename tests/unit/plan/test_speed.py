"""The measurement of a model's own blocks, and how it is extended to the whole model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import random_tokens, write_store

from fullrank.models.resolved import ResolvedModel
from fullrank.models.source import load_config, resolve
from fullrank.plan import speed
from fullrank.recipe import Model, Train
from fullrank.sequences.layout import MicroBatch, micro_batches

CPU = torch.device("cpu")


@pytest.fixture
def row(tmp_path: Path) -> MicroBatch:
    store = write_store(tmp_path / "store", random_tokens(4))
    return micro_batches(store, range(4), 512, packed=True)[0]


def measured(base: ResolvedModel, row: MicroBatch, available_bytes: int = 10**12) -> speed.Speed | None:
    return speed.measure(
        load_config(base.folder),
        base.facts,
        row,
        device=CPU,
        train=Train(precision="fp32"),
        trained_parameters=base.facts.parameters,
        recompute="none",
        available_bytes=available_bytes,
    )


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_a_model_is_timed_without_its_weights(family: str, tiny_model_folder: Callable[..., Path], row: MicroBatch) -> None:
    found = measured(resolve(Model(source=str(tiny_model_folder(family)))), row)
    assert found is not None
    assert 0 < found.forward_per_token < 1 and 0 < found.forward_backward_per_token < 1
    assert found.optimizer_step > 0
    assert f"{row.tokens} tokens" in found.basis and "extended to 2" in found.basis


def test_blocks_are_extended_and_the_rest_counts_once(
    tiny_model_folder: Callable[..., Path], row: MicroBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One block took 5 s, two took 7 s: a block is 2 s and the rest 3 s, so ten blocks take 23 s."""
    base = resolve(Model(source=str(tiny_model_folder("llama"))))
    base = ResolvedModel(base.folder, base.facts.model_copy(update={"layers": 10, "parameters": 8_000_000}))
    timings = {1: (5.0, 9.0), 2: (7.0, 15.0)}
    monkeypatch.setattr(speed, "_time_blocks", lambda config, blocks, *rest: timings[blocks])
    monkeypatch.setattr(speed, "_time_optimizer", lambda device, train: 0.25)
    found = measured(base, row)
    assert found is not None
    assert found.forward_per_token == pytest.approx(23.0 / row.tokens)
    assert found.forward_backward_per_token == pytest.approx((3.0 + 10 * 6.0) / row.tokens)
    assert found.optimizer_step == pytest.approx(0.25 * 8_000_000 / 4_000_000)


def test_nothing_is_measured_where_two_blocks_would_not_fit(
    tiny_model_folder: Callable[..., Path], row: MicroBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise AssertionError("a model was built")

    monkeypatch.setattr(speed, "_time_blocks", fail)
    assert measured(resolve(Model(source=str(tiny_model_folder("llama")))), row, available_bytes=1000) is None
