"""Where the time and the memory of a step go: some steps as training runs them, then the same with a stopwatch inside.

Nothing is saved of what the steps learn. Seconds a step are those of the untimed ones; the timed ones say how they divide.
Several ranks take the steps together, and once more to see how much of them goes to telling one another; each tells of itself,
and the first one's phases and modules are shown.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from fullrank.meter import Meter
from fullrank.models.flops import Products
from fullrank.models.load import blank_model
from fullrank.models.resolved import ResolvedModel
from fullrank.optim.schedule import learning_rate
from fullrank.parallel import device as devices
from fullrank.parallel import traffic
from fullrank.parallel.quiet import are_long, between_steps, quiet
from fullrank.parallel.world import ALONE, World
from fullrank.recipe import Recipe
from fullrank.records import MemoryPart, ModuleTime, Plan, Profile, RankTime
from fullrank.run import Run, need_record, write_record
from fullrank.sequences.layout import MicroBatch, dealt, needed_tokens
from fullrank.sequences.loss import add_gradients, unwatched
from fullrank.train.loop import laid_out_ahead, step_seed
from fullrank.train.setup import Setup, set_up
from fullrank.train.stopwatch import Stopwatch

#: What of a step's time is worth advice.
_WAIT_RATIO, _OPTIMIZER_RATIO, _SHORT_ROW_TOKENS, _EXPOSED_RATIO, _BALANCE = 0.02, 0.15, 256, 0.2, 0.9


@dataclass(frozen=True)
class _Timed:
    """A step that was timed from outside."""

    seconds: float
    waited: float
    examples: int
    rows: list[MicroBatch]
    """Of all ranks."""
    lengths: list[int]
    """Of its examples, without what influences nothing."""


def profile(recipe: Recipe, run: Run, base: ResolvedModel, steps: int, world: World = ALONE) -> Profile | None:
    """Executes 1 + 2 x `steps` steps of a planned run and writes `profile.json`; several ranks `steps` more.

    Args:
        recipe: resolved.
        run: with its plan.
        base: the model.
        steps: to be timed, beside the first; as many again with the stopwatch.
        world: the ranks, which profile together.

    Returns:
        None on ranks other than the first.
    """
    plan = need_record(run.plan_path, Plan, "plan")
    run.tell("started", stage="profile")
    large_apart = world.size > 1 or are_long(plan.micro_batch_tokens, base.facts.hidden_size)
    with Meter() as meter, quiet(large_apart=large_apart):
        setup = set_up(recipe, run, base, plan, world)
        stopwatch = Stopwatch(setup.device, repeats_products=plan.recompute != "selective")
        ones = [1 + number % setup.order.steps for number in range(1, 1 + steps)]
        wanted = [1, *ones, *ones]
        timed = _execute(recipe, setup, wanted, watched_from=1 + steps, stopwatch=stopwatch)
        first, plain = next(timed), list(itertools.islice(timed, steps))
        watched = list(timed)
        ranks, balance = _among_ranks(recipe, setup, ones) if world.size > 1 else ([], None)
        measured = _measured_memory(setup, _largest_row(setup), plan)
        peak = devices.device_peak_bytes(setup.device) or meter.peak_bytes
    rate = devices.best_product_rate(setup.device, torch.bfloat16 if plan.precision == "bf16-mixed" else torch.float32)
    (best,) = world.summed(rate)
    if not world.is_first:
        return None
    seconds = statistics.median(step.seconds for step in plain)
    rows = [row for step in plain for row in step.rows]
    # DeepSpeed leaves a divided parameter no shape.
    products = Products.of(setup.rows.model if setup.zeroed is None else blank_model(base.folder, dtype=torch.float32))
    needed = sum(products.needed(row) for row in rows)
    phases = {"data wait": sum(step.waited for step in watched), **stopwatch.phases}
    found = Profile(
        device_name=plan.machine.device_name,
        threads=torch.get_num_threads() if plan.machine.threads else 0,
        steps=steps,
        first_step_seconds=first.seconds,
        step_seconds=seconds,
        steps_planned=plan.steps,
        examples_per_second=sum(step.examples for step in plain) / sum(step.seconds for step in plain),
        tokens_per_second=sum(row.separate_tokens for row in rows) / sum(step.seconds for step in plain),
        phases={name: total / steps for name, total in phases.items()},
        modules=_modules(stopwatch, steps),
        needed_flops=needed // steps,
        best_flops_per_second=best,
        utilisation=needed / sum(step.seconds for step in plain) / best,
        rows_per_step=len(rows) / steps,
        row_tokens=int(statistics.median(row.tokens for row in rows)),
        separate_tokens=sum(row.separate_tokens for row in rows),
        computed_tokens=sum(row.tokens for row in rows),
        padded_tokens=sum(len(step.lengths) * max(step.lengths) for step in plain),
        predictions=sum(len(row.targets_S) for row in rows),
        memory=[
            MemoryPart(part=line.part, planned_bytes=line.bytes, measured_bytes=measured.get(line.part)) for line in plan.ledger
        ],
        peak_bytes_planned=plan.peak_bytes_predicted,
        peak_bytes=peak,
        ranks=ranks,
        balance=balance,
        advice=[],
    )
    found = found.model_copy(update={"advice": advice(found, plan, setup.rows.why)})
    write_record(run.profile_path, found)
    return found


def _execute(recipe: Recipe, setup: Setup, wanted: Sequence[int], *, watched_from: int, stopwatch: Stopwatch) -> Iterator[_Timed]:
    """Steps as the training loop takes them; from number `watched_from` on with the stopwatch."""
    engine, train = setup.engine, recipe.train
    started = time.perf_counter()
    for number, (step, examples, rows) in enumerate(laid_out_ahead(setup.store, setup.order, setup.layout, wanted)):
        waited = time.perf_counter() - started
        supervised = sum(row.supervised_tokens for row in rows)
        rate = learning_rate(train.schedule, train.optimizer.learning_rate, step, setup.order.steps)
        own = setup.layout.own(rows, setup.world)
        is_watched = number >= watched_from
        with stopwatch.watching(setup.rows.model.base_model) if is_watched else contextlib.nullcontext():
            engine.watch = stopwatch.phase if is_watched else unwatched
            engine.step(own, supervised, learning_rate=rate, seed=step_seed(train.seed, step))
        lengths = [needed_tokens(setup.store[int(example)]) for example in examples]
        yield _Timed(time.perf_counter() - started, waited, len(examples), rows, lengths)
        between_steps()
        started = time.perf_counter()


def _among_ranks(recipe: Recipe, setup: Setup, wanted: Sequence[int]) -> tuple[list[RankTime], float]:
    """What each rank does in the steps wanted, and how evenly their rows are dealt."""
    world, layout, steps = setup.world, setup.layout, len(wanted)
    taken: list[_Timed] = []
    plain = Stopwatch(setup.device)
    seen = traffic.watched(
        setup.device, lambda: taken.extend(_execute(recipe, setup, wanted, watched_from=steps, stopwatch=plain))
    )
    shares = [[sum(row.tokens for row in own) for own in dealt(step.rows, layout.groups)] for step in taken]
    computed = sum(share[world.rank // layout.context] for share in shares) / layout.context
    own = RankTime(
        rank=world.rank,
        computed_tokens=computed / steps,
        computing_seconds=seen.computing / steps,
        communicating_seconds=seen.communicating / steps,
        exposed_seconds=seen.exposed / steps,
    )
    balance = statistics.fmean(statistics.fmean(share) / max(share) for share in shares)
    return [RankTime.model_validate(rank) for rank in world.gathered(own.model_dump())], balance


def _modules(stopwatch: Stopwatch, steps: int) -> list[ModuleTime]:
    whole = sum(stopwatch.phases.values())
    found = []
    for name, calls in stopwatch.calls.items():
        forward, backward = (seconds.get(name, 0.0) for seconds in (stopwatch.forward, stopwatch.backward))
        found.append(
            ModuleTime(
                module=name,
                calls=calls // steps,
                forward_seconds=forward / steps,
                backward_seconds=backward / steps,
                ratio=(forward + backward) / whole,
                flops_per_second=stopwatch.products[name] / (forward + backward) if name in stopwatch.products else None,
            )
        )
    return sorted(found, key=lambda module: -module.ratio)


def _largest_row(setup: Setup) -> MicroBatch:
    """Of the steps that the plan looked at."""
    laid_out = (setup.layout.rows(setup.store, setup.order.step(step)) for step in setup.order.first_steps)
    return max(itertools.chain.from_iterable(laid_out), key=lambda row: row.tokens)


def _measured_memory(setup: Setup, row: MicroBatch, plan: Plan) -> dict[str, int]:
    """Bytes of the parts that can be told apart: tensors of the model and its optimizer, and what a row's graph keeps."""
    if setup.world.size > 1:
        return _measured_parts(setup, plan)
    model = setup.rows.model
    parameters = {p.untyped_storage().data_ptr(): p for p in model.parameters()}
    weights = sum(p.untyped_storage().nbytes() for p in parameters.values())
    state = setup.engine.state()
    kinds = state.tensors.items() if plan.optimizer_states == "device" else ()  # elsewhere it is not this memory
    moments = (tensor for kind, tensors in kinds if kind != "weights" for tensor in tensors.values())
    found = {"weights": weights}
    if plan.optimizer_states == "device":
        found["optimizer"] = sum(tensor.nbytes for tensor in moments)
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()  # alive as long as the graph is, so no two share an address
        return tensor

    # Recomputation keeps tensors in ways of its own, autocast keeps copies of weights among them.
    if plan.recompute == "none" and plan.precision == "fp32":
        model.train()
        with (
            setup.rows.ready(),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            setup.engine.compute_type(),
        ):
            add_gradients(setup.rows, row.to(setup.device), row.supervised_tokens)
        found["gradients"] = sum(p.grad.nbytes for p in parameters.values() if p.grad is not None)
        model.zero_grad(set_to_none=True)
        found["activations"] = sum(kept.values())
    return found


def _measured_parts(setup: Setup, plan: Plan) -> dict[str, int]:
    """The same of a rank's parts of the model and of its optimizer; what comes and goes with a block is not told apart."""
    kinds = setup.engine.state().tensors
    found = {"weights": sum(part.nbytes for part in kinds["weights"].values())}
    if plan.optimizer_states == "device":
        found["optimizer"] = sum(part.nbytes for kind, parts in kinds.items() if kind != "weights" for part in parts.values())
    return found


def advice(found: Profile, plan: Plan, layout_note: str) -> list[str]:
    """What the figures suggest, each with its figure."""
    said: list[str] = []
    whole = sum(found.phases.values())

    def ratio(phase: str) -> float:
        return found.phases.get(phase, 0.0) / whole

    if layout_note:
        said.append(layout_note)
    if plan.gradients == "release" and plan.backward_passes == 2:
        said.append(
            f"gradients are released and clipped, so each block is differentiated twice: the backward pass is "
            f"{ratio('backward'):.2f} of the step; machine.gradients=spill lets them wait in a file instead"
        )
    elif plan.recompute != "none" and plan.gradients == "keep":
        more = "the blocks' activations" if plan.recompute == "block" else "more activations"
        said.append(
            f"recomputation ({plan.recompute}) lengthens the backward pass, {ratio('backward'):.2f} of the step: with more "
            f"memory (machine.memory_limit) or a shorter data.max_length the plan keeps {more}"
        )
    if found.row_tokens < _SHORT_ROW_TOKENS and found.rows_per_step <= 1:
        said.append(
            f"a step is one row of {found.row_tokens} tokens: products are fuller, and the update costs less an example, with a "
            "larger train.global_batch_size (it changes what a step is: set the learning rate anew)"
        )
    if ratio("optimizer") > _OPTIMIZER_RATIO:
        said.append(
            f"the optimizer takes {ratio('optimizer'):.2f} of the step: it costs the same however many examples the step has, "
            "so a larger train.global_batch_size spreads it"
        )
    if found.ranks:
        said.extend(_advice_of_ranks(found, plan))
    if ratio("data wait") > _WAIT_RATIO:
        said.append(f"the device waits for rows {ratio('data wait'):.2f} of the time: making them takes longer than a step")
    threads = plan.machine.threads
    if plan.machine.device == "cpu" and "OMP_NUM_THREADS" in os.environ and threads < plan.machine.cores:
        said.append(
            f"torch computes with {threads} of {plan.machine.cores} cores: unset OMP_NUM_THREADS, or set it to the number of "
            "physical cores"
        )
    return said or ["nothing stands out: what is left is arithmetic"]


def _advice_of_ranks(found: Profile, plan: Plan) -> Iterator[str]:
    busiest = max(rank.exposed_seconds for rank in found.ranks)
    least = min(rank.exposed_seconds for rank in found.ranks)
    if busiest > _EXPOSED_RATIO * found.step_seconds:
        changes = ["a larger train.global_batch_size gives a rank more to compute for as much that is told"]
        if plan.sync == "row":
            changes.append("with more memory a rank the plan sums gradients once a step instead of after every row")
        if plan.engine == "fsdp2" and plan.replicas == 1:
            changes.append("parallel.replicas, as many as machines, keeps weights from travelling between these")
        yield (
            f"what ranks tell one another, and wait for, is not hidden for {least:.3g} to {busiest:.3g} s of a step of "
            f"{found.step_seconds:.3g} s: " + "; ".join(changes)
        )
    if found.balance is not None and found.balance < _BALANCE:
        yield (
            f"ranks compute {found.balance:.2f} of the tokens that the one with most does, mean: a larger "
            "train.global_batch_size has more rows to deal evenly"
        )
