"""The ways to lay out the steps of a run, fastest first, each with its memory ledger."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from fullrank.models.resolved import ResolvedModel
from fullrank.parallel.blockwise import is_blockwise
from fullrank.parallel.fsdp2 import Sync
from fullrank.parallel.groups import Shapes
from fullrank.parallel.recompute import BLOCKWISE_LADDER, Recompute, ladder_of
from fullrank.parallel.world import ALONE, World
from fullrank.plan import memory
from fullrank.plan.memory import Division, Row
from fullrank.recipe import Recipe
from fullrank.records import LedgerLine, MachineFacts
from fullrank.sequences.layout import MicroBatch, micro_batches, needed_tokens, row_of
from fullrank.sequences.order import Order
from fullrank.sequences.store import Example, TokenStore

Engine = Literal["single", "fsdp2", "deepspeed"]

#: Tokens of a row beyond which matrix products gain nothing: past some hundreds a CPU's are at full rate, and longer rows only
#: hold more activations (measured, see docs/LOG.md); accelerators want more.
_ROW_TOKENS = {"cpu": 1024, "mps": 2048, "cuda": 16384}
#: Rows twice as long are worth it where they leave no more than this of the tokens to compute.
_WORTH_LONGER_ROWS = 0.95
#: Tokens of a row that hide what travels for it between machines. A row gathers the model twice and sums gradients once, 8 bytes
#: a weight in bf16, and computes 6 operations a weight and token: they take as long where tokens = 8 F / (6 w). With F = 4.4e14
#: reached of an H100's operations a second and w = 4e11 bytes a second out of a machine (eight adapters of 400 Gb/s) that is
#: 1,470; networks are seldom faster.
_HIDDEN_TOKENS = 2048


@dataclass(frozen=True)
class Choice:
    """A way to carry out the steps, and what it needs."""

    budget_tokens: int
    recompute: Recompute
    ledger: list[LedgerLine]
    sync: Sync = "step"
    """When ranks sum their gradients."""

    @property
    def peak_bytes(self) -> int:
        return memory.total(self.ledger)


@dataclass(frozen=True)
class Ground:
    """What a plan starts from, whatever the recipe says of the step."""

    base: ResolvedModel
    machine: MachineFacts
    shapes: Shapes
    looks: Looks
    longest: int
    """Tokens of the longest example."""
    process_bytes: int
    eager: bool
    world: World = ALONE
    replicas: int = 1
    engine: Engine = "single"
    context: int = 1
    """Ranks that share each row."""
    zero: Mapping[str, Any] | None = None
    """DeepSpeed's section on ZeRO, where it is the engine."""

    def sharing(self, context: int) -> Ground:
        """The same where so many ranks share each row."""
        return replace(self, looks=self.looks.among(self.world.size // context), context=context)


def choices(ground: Ground, recipe: Recipe) -> Iterator[Choice]:
    """Ways to carry out the steps, fastest first: full rows, smaller rows, then more and more recomputation."""
    device, longest = ground.machine.device, ground.longest
    budgets = [_full_row(ground.looks, max(longest, _ROW_TOKENS[device] * ground.context))]
    while budgets[-1] > longest:
        budgets.append(max(longest, budgets[-1] // 2))
    if ground.engine != "single":
        yield from _divided_choices(ground, recipe, budgets)
        return
    for recompute in BLOCKWISE_LADDER if is_blockwise(recipe) else ladder_of(device, ground.engine):
        for budget in budgets:
            lines = memory.ledger(
                ground.base.facts,
                ground.shapes,
                ground.looks.at(budget).largest,
                recipe,
                recompute=recompute,
                process_bytes=ground.process_bytes,
                eager=ground.eager,
                device=device,
            )
            yield Choice(budget, recompute, lines)


def _divided_choices(ground: Ground, recipe: Recipe, budgets: list[int]) -> Iterator[Choice]:
    """Gradients are summed after each row rather than that anything is computed again; across machines blocks are computed again
    rather than gathered for rows that are too short to hide it."""
    syncs: tuple[Sync, ...] = ("step", "row")
    if ground.zero is not None:  # the stage decides
        syncs = ("step",) if ground.zero["stage"] == 1 else ("row",)
    hidden = _HIDDEN_TOKENS if ground.machine.device == "cuda" and ground.world.local_size < ground.world.size else 0
    whole = [budget for budget in budgets if budget >= hidden * ground.context]
    ladder = ladder_of(ground.machine.device, ground.engine, ground.context)
    for recompute, of_these in itertools.chain(
        ((recompute, whole) for recompute in ladder), ((recompute, budgets[len(whole) :]) for recompute in ladder)
    ):
        for sync in syncs:
            for budget in of_these:
                laid = ground.looks.at(budget)
                lines = memory.ledger(
                    ground.base.facts,
                    ground.shapes,
                    laid.largest,
                    recipe,
                    recompute=recompute,
                    process_bytes=ground.process_bytes,
                    eager=ground.eager,
                    device=ground.machine.device,
                    division=Division(ground.world.size // ground.replicas, sync, laid.most_rows, ground.context, ground.zero),
                )
                yield Choice(budget, recompute, lines, sync)


def _full_row(looks: Looks, budget: int) -> int:
    """Tokens of a row where memory is no matter: more than products need where long beginnings are shared by several examples."""
    while looks.at(2 * budget).computed_tokens < _WORTH_LONGER_ROWS * looks.at(budget).computed_tokens:
        budget *= 2
    return budget


@dataclass(frozen=True)
class Laid:
    """Rows of the steps looked at."""

    largest: Row
    """Never smaller than the longest example."""
    computed_tokens: int
    separate_tokens: int
    most_rows: int
    """Of a rank in a step, or of the ranks that share them."""

    @property
    def shared_ratio(self) -> float:
        """Share of the examples' tokens that are not computed, because examples of a row begin alike."""
        return 1 - self.computed_tokens / self.separate_tokens if self.separate_tokens else 0.0


class Looks:
    """What the run's first steps come to at a budget; each is laid out once.

    Args:
        store: training examples.
        order: of the run.
        shared: whether examples of a row share what they begin with.
        ranks: that the rows are dealt to; of those that share rows one counts for all.
        steps: most steps that are looked at; None for those of the order.
    """

    def __init__(self, store: TokenStore, order: Order, *, shared: bool, ranks: int = 1, steps: int | None = None) -> None:
        self.store, self.order, self.shared, self.ranks = store, order, shared, ranks
        self.looked_at = order.first_steps[:steps]
        self._seen: dict[int, Laid] = {}
        tokens = list(_step_tokens(store, order))
        self.needed_tokens = sum(tokens)
        """Of all steps, without those that influence no loss."""
        self._largest_step = max(tokens)

    def among(self, ranks: int) -> Looks:
        """The same with rows for so many ranks."""
        other = copy.copy(self)
        other.ranks, other._seen = ranks, {} if ranks != self.ranks else self._seen
        return other

    def at(self, budget: int) -> Laid:
        """The rows of at most so many tokens."""
        if budget not in self._seen:
            longest = self.store[int(self.store.lengths.argmax())]
            tokens, predictions, computed, separate = needed_tokens(longest), longest.supervised_targets, 0, 0
            most_rows = 1
            for step in self.looked_at:
                rows = self.step(step, budget)
                most_rows = max(most_rows, -(-len(rows) // self.ranks))
                for row in rows:
                    tokens, predictions = max(tokens, row.tokens), max(predictions, len(row.targets_S))
                    computed, separate = computed + row.tokens, separate + row.separate_tokens
            self._seen[budget] = Laid(Row(tokens, predictions, self._largest_step), computed, separate, most_rows)
        return self._seen[budget]

    def step(self, step: int, budget: int) -> list[MicroBatch]:
        """A step's rows."""
        return micro_batches(self.store, self.order.step(step), budget, packed=True, shared=self.shared, ranks=self.ranks)

    def typical_row(self, budget: int) -> MicroBatch:
        """The middle one of the first step's."""
        rows = sorted(self.step(1, budget), key=lambda row: row.tokens)
        return rows[len(rows) // 2]

    def typical_part(self, budget: int, context: int) -> MicroBatch:
        """A row as long as what one of `context` ranks has of it, to be timed."""
        row = self.typical_row(budget)
        if context == 1:
            return row
        tokens, predictions = -(-row.tokens // context), -(-len(row.predicting_S) // context)
        ids = np.append(row.input_ids_1T[0, :tokens].numpy(), 0)
        return row_of([(0, Example(ids, np.arange(tokens + 1) > tokens - min(predictions, tokens)))], shared=False)


def _step_tokens(store: TokenStore, order: Order) -> Iterator[int]:
    """Tokens of each step's examples, without those that influence no loss."""
    needed = np.asarray([needed_tokens(store[n]) for n in range(len(store))])
    for step in range(1, order.steps + 1):
        yield int(needed[order.step(step)].sum())
