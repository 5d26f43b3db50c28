"""The heart: a generator of facts, one row a step.

For each step it lays out the step's examples, counts their supervised tokens before the first backward, lets the engine execute
this rank's part of the step, and yields what happened. It writes, decides and stops nothing: its one consumer does.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from fullrank.meter import resident_bytes
from fullrank.optim.schedule import learning_rate
from fullrank.parallel.engine import Engine, StepOutcome
from fullrank.parallel.world import ALONE, World
from fullrank.recipe import Train
from fullrank.records import StepRow
from fullrank.sequences.layout import MicroBatch, dealt, micro_batches
from fullrank.sequences.order import Order
from fullrank.sequences.store import TokenStore


@dataclass(frozen=True)
class Step:
    """A step that was executed: its row, its examples and whether the weights moved."""

    row: StepRow
    examples: np.ndarray
    outcome: StepOutcome


@dataclass(frozen=True)
class Layout:
    """How examples become rows, and rows come to ranks: the plan's budget, and what the model keeps apart."""

    budget_tokens: int
    packed: bool
    shared: bool
    ranks: int = 1
    context: int = 1
    """Neighbouring ranks that share each row."""

    @property
    def groups(self) -> int:
        """Of ranks, that rows are dealt to."""
        return self.ranks // self.context

    def rows(self, store: TokenStore, examples: np.ndarray) -> list[MicroBatch]:
        """The micro-batches of some examples, of all ranks."""
        return micro_batches(store, examples, self.budget_tokens, packed=self.packed, shared=self.shared, ranks=self.groups)

    def own(self, rows: Sequence[MicroBatch], world: World) -> list[MicroBatch]:
        """Those of the rows that this rank computes, alone or with the others of its group."""
        return dealt(rows, self.groups)[world.rank // self.context]


def steps(
    engine: Engine,
    store: TokenStore,
    order: Order,
    train: Train,
    layout: Layout,
    *,
    first: int,
    world: World = ALONE,
    interruptible: Callable[[Iterable[MicroBatch]], Iterable[MicroBatch]] = iter,
) -> Iterator[Step]:
    """Executes the steps from `first` (1-based) to the last.

    Args:
        engine: takes this rank's rows.
        layout: of the rows of all ranks.
        world: the ranks; each of them runs this loop.
        interruptible: wraps each step's rows; what it raises between rows ends the generator before the update.
    """
    started = time.monotonic()
    for step, examples, rows in laid_out_ahead(store, order, layout, range(first, order.steps + 1)):
        supervised_tokens = sum(row.supervised_tokens for row in rows)
        rate = learning_rate(train.schedule, train.optimizer.learning_rate, step, order.steps)
        own = layout.own(rows, world)
        outcome = engine.step(interruptible(own), supervised_tokens, learning_rate=rate, seed=step_seed(train.seed, step))
        row = StepRow(
            step=step,
            epoch=order.epoch_after(step),
            loss=outcome.loss,
            learning_rate=rate,
            grad_norm=outcome.grad_norm,
            examples=len(examples),
            tokens=sum(row.separate_tokens for row in rows),
            computed_tokens=sum(row.tokens for row in rows),
            supervised_tokens=supervised_tokens,
            seconds=time.monotonic() - started,
            memory_bytes=resident_bytes(),
            changed_ratio=outcome.changed_ratio,
        )
        yield Step(row, examples, outcome)
        started = time.monotonic()


def laid_out_ahead(
    store: TokenStore, order: Order, layout: Layout, wanted: Sequence[int]
) -> Iterator[tuple[int, np.ndarray, list[MicroBatch]]]:
    """(step, its examples, its rows) of the steps wanted: the rows of one are laid out while the one before is computed."""

    def lay_out(step: int) -> tuple[np.ndarray, list[MicroBatch]]:
        examples = order.step(step)
        return examples, layout.rows(store, examples)

    with ThreadPoolExecutor(1, thread_name_prefix="layout") as worker:
        following = worker.submit(lay_out, wanted[0]) if wanted else None
        for step, after in itertools.zip_longest(wanted, wanted[1:]):
            assert following is not None
            examples, rows = following.result()
            following = worker.submit(lay_out, after) if after is not None else None
            yield step, examples, rows


def step_seed(seed: int, step: int) -> int:
    """Seed of a step's dropout: distinct for every (seed, step) below 2^32 steps."""
    return (seed << 32) + step


def validation_loss(engine: Engine, store: TokenStore, layout: Layout, world: World = ALONE) -> float:
    """Mean loss over the supervised tokens of a store, nats: the loss law over all of it, whatever the rows and ranks."""
    rows = layout.rows(store, np.arange(len(store)))
    own = layout.own(rows, world)
    losses = zip(own, engine.losses(own), strict=True)
    loss = sum(float(losses_S.double().cpu() @ row.times_S.double()) for row, losses_S in losses)
    (total,) = world.summed(0.0 if world.rank % layout.context else loss)  # a group's ranks have the same losses
    return total / sum(row.supervised_tokens for row in rows)
