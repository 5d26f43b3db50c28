"""A recipe on 1, 2, 4, ... devices of a cluster: memory by the plan's own ledger, time by `fullrank.plan.simulate`, price.

For each number of devices a way to carry out the steps is chosen as a plan would choose it there: the same ledger, the same order
of preference, rows laid out and dealt from the run's own data. Two questions are answered. Strong scaling: the recipe's step is
shared by more devices, and what is learned stays the same. Weak scaling: each device has as much to do as one alone has of the
recipe's step, so that a step grows with the devices, and *what is learned changes*.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from fullrank.errors import UsageError
from fullrank.models.flops import Products
from fullrank.models.load import attention_for, drops
from fullrank.models.resolved import ResolvedModel
from fullrank.parallel.groups import Shapes, shapes_of
from fullrank.parallel.world import World
from fullrank.parallel.zero_settings import settings_of
from fullrank.plan import memory, simulate
from fullrank.plan.layouts import Choice, Ground, Looks, choices
from fullrank.plan.machine import USABLE_SHARE
from fullrank.plan.stage import engine_of
from fullrank.recipe import Recipe
from fullrank.records import Cluster, MachineFacts, ModelFacts, SimulatedRow, Simulation
from fullrank.run import Run
from fullrank.sequences.layout import dealt
from fullrank.sequences.order import Order
from fullrank.sequences.store import TokenStore
from fullrank.units import format_bytes, plural

Scaling = Literal["strong", "weak"]

#: Steps whose rows are laid out, for each number of devices.
STEPS_LOOKED_AT = 8
MOST_DEVICES = 1024


@dataclass(frozen=True)
class Subject:
    """What is simulated: a recipe, its data, and a model in numbers."""

    recipe: Recipe
    """`precision` and `gradients` resolved for the devices of the cluster."""
    facts: ModelFacts
    shapes: Shapes
    products: Products
    looks: Looks
    """For one rank."""
    longest: int
    """Tokens of the longest example."""
    eager: bool
    process_bytes: int = 0
    """That a rank's process holds before the model, where that is memory of the device."""


def subject_of(recipe: Recipe, run: Run, config: PreTrainedConfig, facts: ModelFacts) -> Subject:
    """A prepared run as it would be with a model of this configuration.

    Args:
        recipe: see `Subject`.
        run: whose data are prepared.
        config: of the model, whose weights need not be there.
        facts: its facts.

    Raises:
        UsageError: a pattern of `train.frozen` matches nothing of this model.
    """
    store, validation = TokenStore(run.data / "train"), TokenStore(run.data / "validation")
    order = Order(len(store), recipe.train.global_batch_size, recipe.train.epochs, recipe.train.seed)
    with torch.device("meta"):
        blank = AutoModelForCausalLM.from_config(config)
    return Subject(
        recipe=recipe,
        facts=facts,
        shapes=shapes_of(config, recipe.train.frozen),
        products=Products.of(blank),
        looks=Looks(store, order, shared=not drops(config), steps=STEPS_LOOKED_AT),
        longest=int(max(store.lengths.max(), validation.lengths.max())),
        eager=attention_for(config) == "eager",
    )


def simulation(subject: Subject, cluster: Cluster, *, most: int, hybrid: bool = False) -> Simulation:
    """The rows of 1, 2, 4, ... `most` devices.

    Args:
        subject: what is simulated.
        cluster: the assumptions.
        most: devices; the last row, a power of two or not.
        hybrid: every node holds the model once (`parallel.replicas` = nodes), instead of all of them together.

    Raises:
        UsageError: `most` is out of range, or what the recipe asks for goes not with several ranks.
    """
    if not 1 <= most <= MOST_DEVICES:
        raise UsageError(f"--most: {most} devices; allowed: 1 to {MOST_DEVICES:,}")
    counts = [*(2**k for k in range(most.bit_length()) if 2**k < most), most]
    kinds: tuple[Scaling, ...] = ("strong", "weak")
    rows = [row for kind in kinds for row in _with_efficiency([_row(subject, cluster, n, kind, hybrid) for n in counts])]
    return Simulation(
        model=subject.facts,
        trained_parameters=subject.shapes.trained_parameters,
        precision=subject.recipe.train.precision,  # `auto` is resolved by now
        optimizer=subject.recipe.train.optimizer.name,
        tokens_per_step=_step_tokens(subject),
        steps_looked_at=len(subject.looks.looked_at),
        cluster=cluster,
        assumptions=_assumptions(subject, cluster, hybrid),
        rows=rows,
        notes=list(_notes(subject, rows)),
    )


# ---- a row ----------------------------------------------------------------------------------------------------------


def _row(subject: Subject, cluster: Cluster, devices: int, scaling: Scaling, hybrid: bool) -> SimulatedRow:
    replicas = simulate.nodes_of(cluster, devices) if hybrid else 1
    replicas = replicas if devices % replicas == 0 else 1
    spread = subject.recipe.parallel.model_copy(update={"ranks": devices, "replicas": replicas, "context": 1})
    recipe = subject.recipe.model_copy(update={"parallel": spread})
    here = simulate.ranks_of_a_node(cluster, devices)
    world = World(0, devices, 0, here)
    looks = subject.looks.among(devices) if scaling == "strong" else subject.looks
    available = int(USABLE_SHARE * cluster.memory_bytes * simulate.share_of_node(cluster, devices))
    engine = engine_of(recipe, world)
    ground = Ground(
        base=ResolvedModel(Path(), subject.facts),
        machine=_machine(cluster, available),
        shapes=subject.shapes,
        looks=looks,
        longest=subject.longest,
        process_bytes=subject.process_bytes,
        eager=subject.eager,
        world=world,
        replicas=replicas,
        engine=engine,
        zero=settings_of(recipe, devices)["zero_optimization"] if engine == "deepspeed" else None,
    )
    choice = None
    for choice in choices(ground, recipe):
        if choice.peak_bytes <= available:
            break
    assert choice is not None
    fits = choice.peak_bytes <= available
    times = devices if scaling == "weak" else 1
    steps = -(-subject.looks.order.steps // times)
    rounds, busy = _rounds(subject, looks, choice, devices if scaling == "strong" else 1)
    timing = _timing(subject, cluster, recipe, choice, rounds, ground) if fits else None
    seconds = timing.step if timing else None
    is_a_run = times <= subject.looks.order.steps  # else one step would hold more examples than all epochs
    hours = steps * seconds / 3600 if seconds is not None and is_a_run else None
    price = cluster.price_per_hour
    return SimulatedRow(
        devices=devices,
        scaling=scaling,
        replicas=replicas,
        global_batch_size=times * recipe.train.global_batch_size,
        steps=steps,
        rows_per_device=max(map(len, rounds)),
        row_tokens=looks.at(choice.budget_tokens).largest.tokens,
        busy_ratio=busy,
        recompute=choice.recompute,
        sync=choice.sync,
        ledger=choice.ledger,
        peak_bytes=choice.peak_bytes,
        available_bytes=available,
        fits=fits,
        compute_seconds=timing.compute if timing else None,
        communication_seconds=timing.communication if timing else None,
        exposed_seconds=timing.exposed if timing else None,
        update_seconds=timing.update if timing else None,
        step_seconds=seconds,
        tokens_per_second=times * _step_tokens(subject) / seconds if seconds else None,
        efficiency_ratio=None,
        run_seconds=None if hours is None else 3600 * hours,
        price=None if hours is None or price is None else price * devices * hours,
    )


def _machine(cluster: Cluster, available: int) -> MachineFacts:
    return MachineFacts(
        device=cluster.device_type,
        device_name=cluster.device,
        cores=1,
        threads=1,
        memory_bytes=cluster.memory_bytes,
        memory_available_bytes=available,
        disk_free_bytes=0,
    )


def _rounds(subject: Subject, looks: Looks, choice: Choice, ranks: int) -> tuple[list[list[simulate.Round]], float]:
    """(the rounds of each step looked at, share of the ranks' time that goes to rows that count)."""
    steps, useful, spent = [], 0.0, 0.0
    for step in looks.looked_at:
        hands = dealt(looks.step(step, choice.budget_tokens), ranks)
        rounds = []
        for side_by_side in zip(*hands, strict=True):
            needs = [(subject.products.needed(row), row) for row in side_by_side if row.supervised_tokens]
            flops, longest = max(needs, key=lambda need: need[0])
            rounds.append(simulate.Round(flops, subject.products.in_blocks(longest)))
            useful, spent = useful + sum(need for need, _ in needs), spent + ranks * flops
        steps.append(rounds)
    return steps, useful / spent


def _timing(
    subject: Subject,
    cluster: Cluster,
    recipe: Recipe,
    choice: Choice,
    steps: Sequence[Sequence[simulate.Round]],
    ground: Ground,
) -> simulate.Timing:
    """Mean of the steps looked at."""
    devices, divided = ground.world.size, ground.engine != "single"
    shapes, group = subject.shapes, devices // ground.replicas
    weight, states = memory.weight_bytes(recipe), memory.states_bytes(shapes, recipe, group)
    waiting = states if recipe.machine.optimizer_states != "device" else 0
    if ground.zero is not None and recipe.machine.optimizer_states == "host":  # gradients go there, and weights come back
        waiting += 4 * shapes.trained_parameters // group
    if not divided:
        away = memory.elsewhere(
            subject.facts,
            shapes,
            recipe,
            recompute=choice.recompute,
            tokens=int(_step_tokens(subject)),
            device=cluster.device_type,
        )
        waiting = away.file + away.host
    once = [
        simulate.timing(
            cluster,
            rounds,
            _freight(subject, recipe, cluster.device_type, zero=ground.zero is not None),
            ranks=devices,
            replicas=ground.replicas,
            recomputes=choice.recompute in ("block", "offload"),
            sync=choice.sync,
            updated_bytes=shapes.trained_parameters / group * (2 * weight + 2 * 4) + 2 * states,
            waiting_bytes=waiting,
            passes=2 if not divided and memory.goes_twice(recipe) else 1,
            whole_weights=ground.zero is not None and ground.zero["stage"] < 3,
        )
        for rounds in steps
    ]
    return simulate.Timing(
        *(statistics.fmean(getattr(one, part) for one in once) for part in ("compute", "communication", "exposed", "update"))
    )


def _freight(subject: Subject, recipe: Recipe, device_type: str, *, zero: bool) -> simulate.Freight:
    shapes, blocks = subject.shapes, max(1, subject.facts.layers)
    block_number, outside_number = (4, 4) if zero else memory.gathered_number_bytes(recipe, device_type)
    return simulate.Freight(
        blocks=blocks,
        block_bytes=block_number * (shapes.parameters - shapes.outside) / blocks,
        outside_bytes=outside_number * shapes.outside,
        block_gradient_bytes=4 * (shapes.trained_parameters - shapes.outside_trained) / blocks,
        outside_gradient_bytes=4 * shapes.outside_trained,
    )


def _step_tokens(subject: Subject) -> float:
    return subject.looks.needed_tokens / subject.looks.order.steps


def _with_efficiency(rows: list[SimulatedRow]) -> list[SimulatedRow]:
    first = next((row for row in rows if row.tokens_per_second), None)
    if first is None:
        return rows
    alone = (first.tokens_per_second or 0.0) / first.devices
    return [
        row.model_copy(
            update={"efficiency_ratio": row.tokens_per_second / row.devices / alone if row.tokens_per_second else None}
        )
        for row in rows
    ]


# ---- words ----------------------------------------------------------------------------------------------------------


def _assumptions(subject: Subject, cluster: Cluster, hybrid: bool) -> list[str]:
    recipe, looks = subject.recipe, subject.looks
    looked_at = plural(len(looks.looked_at), "step")
    said = [
        "memory: the plan's ledger, within nine tenths of a device's memory; the rest is for the driver, the network's buffers "
        "and what an allocator leaves unused",
        "compute: what matrix products need, and recomputed blocks repeat, at the share of the peak above, for all else too",
        "communication: rings (all-gather, reduce-scatter: call + hops + (n - 1) / n x bytes / rate); gradients in fp32; sums of "
        "few numbers left out",
        f"rows: laid out from the run's own data, {looked_at} of {looks.order.steps:,}; ranks wait for the longest",
        "the run: its optimizer steps alone, without validation, checkpoints, evaluation, or devices that fail",
    ]
    parallel = recipe.parallel
    if parallel.replicas > 1 and not hybrid:
        said.append(
            f"parallel.replicas: all devices hold the model once, although the recipe has {parallel.replicas} groups do so"
        )
    if hybrid:
        said.append("hybrid sharding: every node holds the model once (parallel.replicas = nodes)")
    if parallel.engine == "deepspeed":
        said.append("DeepSpeed: its buckets and what it prefetches are left out; weights and what is sent of them are fp32")
    if parallel.context > 1:
        said.append(f"parallel.context: {parallel.context} is left out; every device computes whole rows")
    if cluster.shares_node:
        said.append("ranks of a node share its compute, memory and links: more of them compute no faster")
    if recipe.train.optimizer.name == "muon":
        said.append("Muon's own products and the tensors it gathers are left out of the time")
    if recipe.parallel.offload_parameters:
        said.append("weights are taken to be on the devices: parallel.offload_parameters is left out")
    if recipe.machine.optimizer_states == "disk":
        said.append("optimizer states in a file are taken at the rate of host memory, which no disk reaches")
    return said


def _notes(subject: Subject, rows: Sequence[SimulatedRow]) -> Iterator[str]:
    strong = [row for row in rows if row.scaling == "strong"]
    fitting = [row for row in rows if row.fits]
    if not fitting:
        most = strong[-1]
        needed = format_bytes(most.peak_bytes)
        yield (
            f"it fits on none of these: {most.devices:,} devices still need {needed} each, of "
            f"{format_bytes(most.available_bytes)} usable"
        )
        return
    if (fewest := min(row.devices for row in fitting)) > 1:
        yield f"it fits on {fewest:,} devices and more"
    batch = subject.recipe.train.global_batch_size
    idle = [row for row in strong if row.fits and row.devices > batch]
    if idle:
        yield (
            f"strong scaling ends at {plural(batch, 'device')}: a step has {plural(batch, 'example')}, and further devices idle; "
            "a larger train.global_batch_size would employ them, and is another step"
        )
    weak = [row for row in rows if row.scaling == "weak" and row.devices > 1]
    if weak:
        steps = subject.looks.order.steps
        last = [row for row in weak if row.devices <= steps][-1:] or weak[:1]
        yield (
            f"weak scaling changes what a step is: {last[0].global_batch_size:,} examples on {last[0].devices:,} devices in "
            f"place of {batch:,}, and {plural(last[0].steps, 'step')} in all in place of {steps:,}"
        )
        if weak[-1].devices > steps:
            yield f"on more than {plural(steps, 'device')} a step of weak scaling would hold more than all epochs: no run"
