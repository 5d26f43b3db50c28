"""The worst batch, tried before step 1: what a run will need at its worst is asked of the machine in its first minute.

A small row is taken first, so that the optimizer has its states, as from the second step on; then it and the largest row (where
steps go block by block: the largest step and the longest example), forward, backward and updated with a learning rate of nothing;
the longest validation example is computed; a checkpoint is written and removed. What does not fit is laid out anew, rows smaller
first, then with more recomputation: the mathematics of a step never changes. What came of it is `train/layout.json`, which a
continued run computes by again as long as the plan is the same.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator

import torch

from fullrank.errors import FitError, TrainingError
from fullrank.meter import Meter
from fullrank.parallel import device as devices
from fullrank.parallel.blockwise import Blockwise
from fullrank.parallel.engine import StepOutcome
from fullrank.parallel.fsdp2 import Sync
from fullrank.parallel.quiet import give_back
from fullrank.parallel.recompute import BLOCKWISE_LADDER, Recompute, ladder_of
from fullrank.parallel.world import World
from fullrank.records import Plan, Rehearsal
from fullrank.run import Run, fingerprint, read_record, write_record
from fullrank.sequences.layout import MicroBatch
from fullrank.sequences.store import TokenStore
from fullrank.train import checkpoint
from fullrank.train.guard import named_examples
from fullrank.train.setup import Setup
from fullrank.units import format_bytes


def rehearsed(setup: Setup, run: Run, plan: Plan, validation: TokenStore) -> tuple[Setup, Rehearsal]:
    """The setup as it fits, and what the rehearsal found.

    Raises:
        FitError: nothing fits, though the plan said so.
    """
    path = run.train / "layout.json"
    before = read_record(path, Rehearsal)
    planned = fingerprint(
        [plan.micro_batch_tokens, plan.recompute, plan.gradients, plan.optimizer_states],
        [plan.engine, plan.ranks, plan.replicas, plan.context, plan.sync],
        [plan.peak_bytes_predicted, plan.machine.memory_available_bytes],
    )
    if before is not None and before.planned == planned:
        layout = (before.micro_batch_tokens, before.recompute, before.sync)
        changed = layout != (plan.micro_batch_tokens, plan.recompute, plan.sync)
        return setup.amended(*layout) if changed else setup, before
    run.show("rehearsing")
    amendments: list[str] = []
    longest = int(max(setup.store.lengths.max(), validation.lengths.max()))
    for budget, recompute, sync in _layouts(plan, longest, blockwise=isinstance(setup.engine, Blockwise)):
        if amendments:
            give_back()
            setup = setup.amended(budget, recompute, sync)
        problem, peak, seconds = _worst_of(setup.world, *_tried(setup, run, plan, validation))
        if problem is None:
            found = Rehearsal(
                micro_batch_tokens=budget,
                recompute=recompute,
                sync=sync,
                planned=planned,
                peak_bytes=peak,
                save_seconds=seconds,
                amendments=amendments,
            )
            if setup.world.is_first:
                write_record(path, found)
            run.tell("rehearsed", peak_bytes=peak, planned_bytes=plan.peak_bytes_predicted, amendments=amendments)
            return setup, found
        amendments.append(f"rows of {budget} tokens, recomputation {recompute}: {problem}")
    raise FitError(
        "the worst batch does not fit, however it is laid out:\n" + "\n".join(f"  {words}" for words in amendments),
        hint=f"set machine.memory_limit to what is really there and delete {run.plan_path}: `fullrank plan` names what fits then",
    )


def _layouts(plan: Plan, longest: int, *, blockwise: bool) -> Iterator[tuple[int, Recompute, Sync]]:
    """(tokens of a row, recomputation, when ranks sum gradients): the plan's, then ever smaller ones."""
    budget, sync = plan.micro_batch_tokens, plan.sync
    yield budget, plan.recompute, sync
    while budget > longest:
        budget = max(longest, budget // 2)
        yield budget, plan.recompute, sync
    if sync == "step" and plan.engine == "fsdp2":
        sync = "row"
        yield budget, plan.recompute, sync
    ladder = BLOCKWISE_LADDER if blockwise else ladder_of(plan.machine.device, plan.engine, plan.context)
    for recompute in ladder[ladder.index(plan.recompute) + 1 :]:
        yield budget, recompute, sync


def _worst_of(world: World, problem: str | None, peak: int, seconds: float) -> tuple[str | None, int, float]:
    """What the rank with most trouble found: all of them lay out anew, or none."""
    told = world.gathered([problem, peak, seconds])
    problems = [f"rank {rank}: {words}" if world.size > 1 else words for rank, (words, _, _) in enumerate(told) if words]
    return "; ".join(problems) or None, max(peak for _, peak, _ in told), max(seconds for _, _, seconds in told)


def _tried(setup: Setup, run: Run, plan: Plan, validation: TokenStore) -> tuple[str | None, int, float]:
    """(what went wrong, peak bytes, seconds of a save)."""
    small, worst = _small_and_worst(setup)
    trial = run.train / "rehearsal"
    seconds = 0.0
    with Meter() as meter:
        devices.reset_peak(setup.device)
        try:
            for rows in ([small], worst):
                outcome = setup.engine.step(rows, sum(row.supervised_tokens for row in rows), learning_rate=0.0, seed=0)
                if not outcome.updated:
                    raise _not_finite(setup, rows, outcome)
            list(setup.engine.losses(setup.layout.rows(validation, validation.lengths.argsort()[-1:])))
            started = time.monotonic()
            checkpoint.save(trial, 0, setup.engine.state(), {}, setup.world)
            seconds = time.monotonic() - started
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            is_alone = setup.world.size == 1 and setup.zeroed is None
            if not devices.out_of_memory(error) or not is_alone:  # other ranks wait within the step, and DeepSpeed is amid one
                raise
            return "out of memory", meter.peak_bytes, seconds
        finally:
            if setup.world.is_first:
                shutil.rmtree(trial, ignore_errors=True)
            setup.engine.forget()
    peak = devices.device_peak_bytes(setup.device) or meter.peak_bytes
    limit = plan.machine.memory_available_bytes
    return (f"{format_bytes(peak)} needed, {format_bytes(limit)} available" if peak > limit else None), peak, seconds


def _small_and_worst(setup: Setup) -> tuple[MicroBatch, list[MicroBatch]]:
    """The smallest row, and the rows that take most: of the steps that the plan looked at, or the largest step of all."""
    store, order = setup.store, setup.order
    longest = setup.layout.rows(store, store.lengths.argsort()[-1:])
    looked_at = [row for step in order.first_steps for row in setup.layout.rows(store, order.step(step))] + longest
    with_loss = sorted((row for row in looked_at if row.supervised_tokens), key=lambda row: row.tokens)
    if not isinstance(setup.engine, Blockwise):
        return with_loss[0], [with_loss[0], with_loss[-1]]  # of two rows, so that the last one meets a gradient
    largest = max(range(1, order.steps + 1), key=lambda step: int(store.lengths[order.step(step)].sum()))
    return with_loss[0], [*setup.layout.rows(store, order.step(largest)), *(row for row in longest if row.supervised_tokens)]


def _not_finite(setup: Setup, rows: list[MicroBatch], outcome: StepOutcome) -> TrainingError:
    examples = dict.fromkeys(example for row in rows for example in row.examples)
    return TrainingError(
        f"the base model's loss on the largest batch is {outcome.loss}, its gradient's norm {outcome.grad_norm}: not finite\n"
        f"its examples: {named_examples(setup.store, examples)}",
        hint="look at these records, and whether the base model answers them at all",
    )
