"""The generator of steps: what it asks of an engine, and the facts it yields."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import random_tokens, write_store

from fullrank.optim.schedule import learning_rate
from fullrank.parallel.engine import StepOutcome
from fullrank.recipe import Train
from fullrank.sequences.layout import MicroBatch
from fullrank.sequences.order import Order
from fullrank.sequences.store import TokenStore
from fullrank.train.loop import Layout, step_seed, steps, validation_loss

TRAIN = Train(epochs=2, global_batch_size=4, precision="fp32", seed=3)


class Recorder:
    """An engine that computes nothing and writes down what it was asked."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []

    def step(
        self, micro_batches: Iterable[MicroBatch], supervised_tokens: int, *, learning_rate: float, seed: int
    ) -> StepOutcome:
        rows = list(micro_batches)
        self.asked.append({"rows": rows, "supervised": supervised_tokens, "rate": learning_rate, "seed": seed})
        return StepOutcome(loss=0.5, grad_norm=2.0, updated=True)

    def losses(self, micro_batches: Iterable[MicroBatch]) -> Iterator[torch.Tensor]:
        for row in micro_batches:  # the loss of a token is its id: easy to add up by hand
            yield row.targets_S.float()


@pytest.fixture
def store(tmp_path: Path) -> TokenStore:
    return write_store(tmp_path / "s", random_tokens(10))


def run(store: TokenStore, budget: int = 64, first: int = 1) -> tuple[Recorder, list[Any]]:
    engine, order = Recorder(), Order(len(store), 4, 2, 3)
    return engine, list(steps(engine, store, order, TRAIN, Layout(budget, True, True), first=first))  # type: ignore[arg-type]


@pytest.mark.parametrize("budget", [1, 64, 4096])
def test_every_step_has_its_examples_whatever_the_rows(store: TokenStore, budget: int) -> None:
    engine, done = run(store, budget)
    order = Order(10, 4, 2, 3)
    assert [step.row.step for step in done] == list(range(1, 7))
    for number, (asked, step) in enumerate(zip(engine.asked, done, strict=True), start=1):
        examples = sorted(e for row in asked["rows"] for e in row.examples)
        assert examples == sorted(order.step(number).tolist()) == sorted(step.examples.tolist())
        supervised = sum(store[e].supervised_targets for e in examples)
        assert asked["supervised"] == step.row.supervised_tokens == supervised
        assert step.row.tokens == sum(row.separate_tokens for row in asked["rows"])
        assert step.row.computed_tokens == sum(row.tokens for row in asked["rows"])
        assert step.row.examples == len(examples)


def test_rates_and_seeds_are_functions_of_the_step(store: TokenStore) -> None:
    engine, done = run(store)
    peak = TRAIN.optimizer.learning_rate
    assert [asked["rate"] for asked in engine.asked] == [learning_rate(TRAIN.schedule, peak, s, 6) for s in range(1, 7)]
    assert [asked["seed"] for asked in engine.asked] == [step_seed(3, s) for s in range(1, 7)]
    assert [step.row.epoch for step in done] == pytest.approx([0.4, 0.8, 1.0, 1.4, 1.8, 2.0])
    assert {(step.row.loss, step.row.grad_norm) for step in done} == {(0.5, 2.0)}


def test_beginning_late_gives_the_same_steps(store: TokenStore) -> None:
    whole, _ = run(store)
    late, done = run(store, first=4)
    assert [step.row.step for step in done] == [4, 5, 6]
    for one, other in zip(late.asked, whole.asked[3:], strict=True):
        assert (one["rate"], one["seed"], one["supervised"]) == (other["rate"], other["seed"], other["supervised"])
        assert [row.examples for row in one["rows"]] == [row.examples for row in other["rows"]]


def test_seeds_never_meet() -> None:
    assert len({step_seed(seed, step) for seed in range(5) for step in range(1, 1000)}) == 5 * 999


def test_the_validation_loss_is_the_mean_over_tokens_whatever_the_rows(store: TokenStore) -> None:
    targets = [store[e].ids[1:][store[e].supervised[1:]] for e in range(10)]
    by_hand = float(np.concatenate(targets).mean())
    for layout in (Layout(1, True, True), Layout(64, True, False), Layout(4096, True, True), Layout(64, False, False)):
        found = validation_loss(Recorder(), store, layout)  # type: ignore[arg-type]
        assert math.isclose(found, by_hand, rel_tol=1e-12)
