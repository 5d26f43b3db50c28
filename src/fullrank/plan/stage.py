"""The plan stage: recipe + machine + data card -> `plan.json`.

Chooses the rows' token budget and whether blocks are recomputed, from a memory ledger; counts steps and tokens; estimates
seconds and disk; refuses what cannot fit and names the smallest change that would. A plan made before on this machine is kept
as it is, so that a continued run computes its steps in the very same rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fullrank.errors import FitError
from fullrank.meter import Meter, resident_bytes
from fullrank.models.load import DTYPES, attention_for, drops
from fullrank.models.resolved import ResolvedModel
from fullrank.models.source import load_config
from fullrank.optim.schedule import warmup_steps
from fullrank.parallel import device as devices
from fullrank.plan import memory, speed
from fullrank.plan.machine import look
from fullrank.plan.memory import Recompute, Row
from fullrank.recipe import Recipe
from fullrank.records import DataCard, LedgerLine, MachineFacts, Plan
from fullrank.run import Run, fingerprint, need_record, read_record, write_record
from fullrank.sequences.layout import MicroBatch, micro_batches, needed_tokens
from fullrank.sequences.order import Order
from fullrank.sequences.store import TokenStore
from fullrank.units import format_bytes

#: Tokens of a row beyond which matrix products gain nothing: past some hundreds a CPU's are at full rate, and longer rows only
#: hold more activations (measured, see docs/LOG.md); accelerators want more.
_ROW_TOKENS = {"cpu": 1024, "mps": 2048, "cuda": 16384}
#: Rows twice as long are worth it where they leave no more than this of the tokens to compute.
_WORTH_LONGER_ROWS = 0.95
#: What may be recomputed, the least first. Beneath the compiled attention of an accelerator, selective recomputation is unproven.
_RECOMPUTATIONS: dict[str, tuple[Recompute, ...]] = {
    "cpu": ("none", "selective", "block"),
    "mps": ("none", "block"),
    "cuda": ("none", "block", "offload"),
}


@dataclass(frozen=True)
class _Choice:
    """A way to carry out the steps, and what it needs."""

    budget_tokens: int
    recompute: Recompute
    ledger: list[LedgerLine]

    @property
    def peak_bytes(self) -> int:
        return memory.total(self.ledger)


def stage(recipe: Recipe, run: Run, base: ResolvedModel) -> Plan:
    """Plans a run, or finds the plan made before; refuses it when it does not fit now.

    Raises:
        FitError: memory or disk is too small; the message names the smallest change that fits.
    """
    card = need_record(run.data / "card.json", DataCard, "plan")
    machine = look(recipe.machine, run.root)
    current = _fingerprint(recipe, card, base, machine)
    plan = read_record(run.plan_path, Plan)
    begun = (run.train / "inputs.json").is_file() and plan is not None and plan.machine.device == machine.device
    if plan and plan.fits and (plan.fingerprint == current or begun):
        run.tell("reused", stage="plan", what="the plan made before")
        _refuse_what_no_longer_fits(plan, machine, run)
    else:
        run.tell("started", stage="plan")
        with Meter() as meter:
            plan = _make(recipe, run, base, machine, current, meter)
        write_record(run.plan_path, plan)
        run.tell("finished", stage="plan", seconds=plan.seconds)
    run.show("plan", plan=plan)
    if not plan.fits:
        raise FitError(plan.refusal)
    return plan


def _refuse_what_no_longer_fits(plan: Plan, machine: MachineFacts, run: Run) -> None:
    """A plan is kept, so that a continued run computes in the same rows; but free memory may have gone since.

    Raises:
        FitError: less is free now than the plan needs, and training is not done.
    """
    if plan.peak_bytes_predicted <= machine.memory_available_bytes or (run.train / "card.json").is_file():
        return
    raise FitError(
        f"does not fit any more: the plan needs {format_bytes(plan.peak_bytes_predicted)}, "
        f"{format_bytes(machine.memory_available_bytes)} are available now",
        hint=f"free memory, or delete {run.plan_path} to plan smaller rows (the steps stay the same, up to rounding)",
    )


def _fingerprint(recipe: Recipe, card: DataCard, base: ResolvedModel, machine: MachineFacts) -> str:
    return fingerprint(
        recipe.train.model_dump(mode="json"),
        recipe.machine.model_dump(mode="json"),
        recipe.export.model_dump(mode="json"),
        card.training_fingerprint,
        base.facts.fingerprint,
        [machine.device, machine.device_name, machine.threads, machine.memory_bytes],
    )


def _make(recipe: Recipe, run: Run, base: ResolvedModel, machine: MachineFacts, current: str, meter: Meter) -> Plan:
    store = TokenStore(run.data / "train")
    validation = TokenStore(run.data / "validation")
    order = Order(len(store), recipe.train.global_batch_size, recipe.train.epochs, recipe.train.seed)
    process_bytes = 0 if machine.device == "cuda" else resident_bytes()
    config = load_config(base.folder)
    eager = attention_for(config) == "eager"
    looks = _Looks(store, order, shared=not drops(config))
    longest = int(max(store.lengths.max(), validation.lengths.max()))
    choices = list(_choices(looks, longest, recipe, base, machine, process_bytes, eager))
    choice = next((c for c in choices if c.peak_bytes <= machine.memory_available_bytes), choices[-1])
    disk_bytes = _disk_bytes(recipe, base)
    refusal = "\n".join(
        filter(None, (_memory_refusal(choice, machine, base, recipe, store), _disk_refusal(disk_bytes, machine, run)))
    )
    train_tokens = sum(_step_tokens(store, order))
    shared_ratio = looks.at(choice.budget_tokens).shared_ratio
    seconds, basis = 0.0, "not estimated: it does not fit"
    if not refusal:
        measured = speed.measure(
            config,
            base.facts,
            looks.typical_row(choice.budget_tokens),
            device=devices.choose(machine.device),
            precision=recipe.train.precision,
            recompute=choice.recompute,
            available_bytes=machine.memory_available_bytes,
        )
        if measured is None:
            basis = "not estimated: measuring two blocks would take more than half of the memory"
        else:
            validations = 1 + -(-order.steps // recipe.train.evaluate_every_steps)
            seconds = (
                train_tokens * (1 - shared_ratio) * measured.forward_backward_per_token
                + order.steps * measured.optimizer_step
                + validations * int(validation.lengths.sum()) * measured.forward_per_token
            )
            basis = measured.basis
    return Plan(
        fingerprint=current,
        seconds=meter.seconds,
        peak_bytes=meter.peak_bytes,
        machine=machine,
        model=base.facts,
        precision="bf16-mixed" if recipe.train.precision == "bf16-mixed" else "fp32",
        examples=len(store),
        steps=order.steps,
        steps_per_epoch=order.steps_per_epoch,
        warmup_steps=warmup_steps(recipe.train.schedule, order.steps),
        train_tokens=train_tokens,
        shared_ratio=shared_ratio,
        micro_batch_tokens=choice.budget_tokens,
        recompute=choice.recompute,
        ledger=choice.ledger,
        peak_bytes_predicted=choice.peak_bytes,
        disk_bytes_predicted=disk_bytes,
        train_seconds_predicted=seconds,
        seconds_basis=basis,
        fits=not refusal,
        refusal=refusal,
    )


def _choices(
    looks: _Looks,
    longest: int,
    recipe: Recipe,
    base: ResolvedModel,
    machine: MachineFacts,
    process_bytes: int,
    eager: bool,
) -> Iterator[_Choice]:
    """Ways to carry out the steps, fastest first: full rows, smaller rows, then more and more recomputation."""
    budgets = [_full_row(looks, max(longest, _ROW_TOKENS[machine.device]))]
    while budgets[-1] > longest:
        budgets.append(max(longest, budgets[-1] // 2))
    for recompute in _RECOMPUTATIONS[machine.device]:
        for budget in budgets:
            lines = memory.ledger(
                base.facts,
                looks.at(budget).largest,
                precision=recipe.train.precision,
                recompute=recompute,
                process_bytes=process_bytes,
                eager=eager,
                device=machine.device,
            )
            yield _Choice(budget, recompute, lines)


def _full_row(looks: _Looks, budget: int) -> int:
    """Tokens of a row where memory is no matter: more than products need where long beginnings are shared by several examples."""
    while looks.at(2 * budget).computed_tokens < _WORTH_LONGER_ROWS * looks.at(budget).computed_tokens:
        budget *= 2
    return budget


@dataclass(frozen=True)
class _Laid:
    """Rows of the steps looked at."""

    largest: Row
    """Never smaller than the longest example."""
    computed_tokens: int
    separate_tokens: int

    @property
    def shared_ratio(self) -> float:
        """Share of the examples' tokens that are not computed, because examples of a row begin alike."""
        return 1 - self.computed_tokens / self.separate_tokens if self.separate_tokens else 0.0


class _Looks:
    """What the run's first steps come to at a budget; each is laid out once."""

    def __init__(self, store: TokenStore, order: Order, *, shared: bool) -> None:
        self.store, self.order, self.shared = store, order, shared
        self._seen: dict[int, _Laid] = {}

    def at(self, budget: int) -> _Laid:
        """The rows of at most so many tokens."""
        if budget not in self._seen:
            longest = self.store[int(self.store.lengths.argmax())]
            tokens, predictions, computed, separate = needed_tokens(longest), longest.supervised_targets, 0, 0
            for step in self.order.first_steps:
                for row in self.step(step, budget):
                    tokens, predictions = max(tokens, row.tokens), max(predictions, len(row.targets_S))
                    computed, separate = computed + row.tokens, separate + row.separate_tokens
            self._seen[budget] = _Laid(Row(tokens, predictions), computed, separate)
        return self._seen[budget]

    def step(self, step: int, budget: int) -> list[MicroBatch]:
        """A step's rows."""
        return micro_batches(self.store, self.order.step(step), budget, packed=True, shared=self.shared)

    def typical_row(self, budget: int) -> MicroBatch:
        """The middle one of the first step's."""
        rows = sorted(self.step(1, budget), key=lambda row: row.tokens)
        return rows[len(rows) // 2]


def _step_tokens(store: TokenStore, order: Order) -> Iterator[int]:
    """Tokens of each step's examples, without those that influence no loss."""
    needed = np.asarray([needed_tokens(store[n]) for n in range(len(store))])
    for step in range(1, order.steps + 1):
        yield int(needed[order.step(step)].sum())


def _disk_bytes(recipe: Recipe, base: ResolvedModel) -> int:
    """Two checkpoints (the next is complete before the last one goes), three of the best weights likewise, and the export."""
    n = base.facts.parameters
    stored = {"float32": 4}.get(base.facts.dtype, 2) if recipe.export.dtype == "base" else DTYPES[recipe.export.dtype].itemsize
    return n * (2 * 12 + 3 * 4 + stored)


def _memory_refusal(choice: _Choice, machine: MachineFacts, base: ResolvedModel, recipe: Recipe, store: TokenStore) -> str:
    if choice.peak_bytes <= machine.memory_available_bytes:
        return ""
    available = format_bytes(machine.memory_available_bytes)
    head = (
        f"does not fit: {format_bytes(choice.peak_bytes)} needed, {available} available on {machine.device_name}, "
        f"with the smallest rows ({choice.budget_tokens} tokens) and recomputed blocks\n{memory.table(choice.ledger)}\n"
    )
    by_row = {"activations", "heap", "logits", "head", "mask"}
    fixed = sum(line.bytes for line in choice.ledger if line.part not in by_row)
    if fixed >= machine.memory_available_bytes:
        return head + (
            f"weights, gradients and optimizer alone take {format_bytes(fixed)}: this model needs "
            f"machine.memory_limit (or memory) of at least {format_bytes(choice.peak_bytes)}, or a smaller model.source"
        )
    length = int(store.lengths.max())
    while length > 2 and fixed + sum(
        line.bytes for line in choice.ledger if line.part in by_row
    ) * length / store.lengths.max() > (machine.memory_available_bytes):
        length -= max(1, length // 50)
    return head + f"the smallest change that fits: data.max_length: {length} with data.too_long: drop or truncate"


def _disk_refusal(needed: int, machine: MachineFacts, run: Run) -> str:
    if needed <= machine.disk_free_bytes:
        return ""
    return (
        f"does not fit on the disk of {run.root}: {format_bytes(needed)} needed for checkpoints and the export, "
        f"{format_bytes(machine.disk_free_bytes)} free\nfree that much, or choose another place with --runs-dir"
    )
