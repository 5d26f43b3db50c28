"""The worst batch, tried before step 1: what a run will need at its worst is asked of the machine in its first minute.

The largest row (where steps go block by block: the largest step) is computed forward and backward and updated with a learning
rate of nothing; the longest validation example is computed; a checkpoint is written and removed. What does not fit is laid out
anew, rows smaller first, then with more recomputation: the mathematics of a step never changes. What came of it is
`train/layout.json`, which a continued run computes by again.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator

import torch

from fullrank.errors import FitError
from fullrank.meter import Meter
from fullrank.parallel import device as devices
from fullrank.parallel.blockwise import Blockwise
from fullrank.parallel.quiet import give_back
from fullrank.parallel.recompute import BLOCKWISE_LADDER, LADDER, Recompute
from fullrank.records import Plan, Rehearsal
from fullrank.run import Run, read_record, write_record
from fullrank.sequences.layout import MicroBatch
from fullrank.sequences.store import TokenStore
from fullrank.train import checkpoint
from fullrank.train.setup import Setup
from fullrank.units import format_bytes


def rehearsed(setup: Setup, run: Run, plan: Plan, validation: TokenStore) -> tuple[Setup, Rehearsal]:
    """The setup as it fits, and what the rehearsal found.

    Raises:
        FitError: nothing fits, though the plan said so.
    """
    path = run.train / "layout.json"
    before = read_record(path, Rehearsal)
    if before is not None:
        changed = (before.micro_batch_tokens, before.recompute) != (plan.micro_batch_tokens, plan.recompute)
        return setup.amended(before.micro_batch_tokens, before.recompute) if changed else setup, before
    run.show("rehearsing")
    amendments: list[str] = []
    longest = int(max(setup.store.lengths.max(), validation.lengths.max()))
    for budget, recompute in _layouts(plan, longest, blockwise=isinstance(setup.engine, Blockwise)):
        if amendments:
            give_back()
            setup = setup.amended(budget, recompute)
        problem, peak, seconds = _tried(setup, run, plan, validation)
        if problem is None:
            found = Rehearsal(
                micro_batch_tokens=budget, recompute=recompute, peak_bytes=peak, save_seconds=seconds, amendments=amendments
            )
            write_record(path, found)
            run.tell("rehearsed", peak_bytes=peak, planned_bytes=plan.peak_bytes_predicted, amendments=amendments)
            return setup, found
        amendments.append(f"rows of {budget} tokens, recomputation {recompute}: {problem}")
    raise FitError(
        "the worst batch does not fit, however it is laid out:\n" + "\n".join(f"  {words}" for words in amendments),
        hint="set machine.memory_limit to what is really there, and `fullrank plan` names the changes of the recipe that fit",
    )


def _layouts(plan: Plan, longest: int, *, blockwise: bool) -> Iterator[tuple[int, Recompute]]:
    """(tokens of a row, recomputation): the plan's, then ever smaller ones."""
    budget = plan.micro_batch_tokens
    yield budget, plan.recompute
    while budget > longest:
        budget = max(longest, budget // 2)
        yield budget, plan.recompute
    ladder = BLOCKWISE_LADDER if blockwise else LADDER[plan.machine.device]
    for recompute in ladder[ladder.index(plan.recompute) + 1 :]:
        yield budget, recompute


def _tried(setup: Setup, run: Run, plan: Plan, validation: TokenStore) -> tuple[str | None, int, float]:
    """(what went wrong, peak bytes, seconds of a save)."""
    rows = _worst(setup)
    trial = run.train / "rehearsal"
    seconds = 0.0
    with Meter() as meter:
        devices.reset_peak(setup.device)
        try:
            outcome = setup.engine.step(rows, sum(row.supervised_tokens for row in rows), learning_rate=0.0, seed=0)
            longest = setup.layout.rows(validation, validation.lengths.argsort()[-1:])
            list(setup.engine.losses(longest))
            if outcome.updated:
                started = time.monotonic()
                checkpoint.save(trial, 0, setup.engine.state(), {})
                seconds = time.monotonic() - started
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "memory" not in str(error).lower():
                raise
            return "out of memory", meter.peak_bytes, seconds
        finally:
            shutil.rmtree(trial, ignore_errors=True)
            setup.engine.forget()
    peak = devices.device_peak_bytes(setup.device) or meter.peak_bytes
    limit = plan.machine.memory_available_bytes
    return (f"{format_bytes(peak)} needed, {format_bytes(limit)} available" if peak > limit else None), peak, seconds


def _worst(setup: Setup) -> list[MicroBatch]:
    """The rows that take most, of the steps that the plan looked at."""
    steps = [setup.layout.rows(setup.store, setup.order.step(step)) for step in setup.order.first_steps]
    if isinstance(setup.engine, Blockwise):
        return max(steps, key=lambda rows: sum(row.tokens for row in rows))
    longest = setup.layout.rows(setup.store, setup.store.lengths.argsort()[-1:])
    return [max((row for rows in [*steps, longest] for row in rows if row.supervised_tokens), key=lambda row: row.tokens)]
