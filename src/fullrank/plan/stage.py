"""The plan stage: recipe + machine + data card -> `plan.json`.

Chooses the rows' token budget and whether blocks are recomputed, from a memory ledger; counts steps and tokens; estimates
seconds and disk; refuses what cannot fit and names the smallest change that would. A plan made before on this machine is kept
as it is, so that a continued run computes its steps in the very same rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fullrank.errors import FitError, UsageError
from fullrank.meter import Meter, resident_bytes
from fullrank.models.load import DTYPES, attention_for, drops
from fullrank.models.resolved import ResolvedModel
from fullrank.models.source import load_config
from fullrank.optim.schedule import warmup_steps
from fullrank.parallel.groups import shapes_of
from fullrank.parallel.world import ALONE, World
from fullrank.parallel.zero import refused_by_zero
from fullrank.parallel.zero_settings import settings_of
from fullrank.plan import memory
from fullrank.plan.clock import Clock, Work
from fullrank.plan.layouts import Choice, Engine, Ground, Looks, choices
from fullrank.plan.machine import host_memory_bytes, look
from fullrank.plan.refusal import memory_refusal
from fullrank.recipe import Recipe
from fullrank.records import DataCard, MachineFacts, Plan
from fullrank.run import Run, fingerprint, need_record, read_record, write_record
from fullrank.sequences.order import Order
from fullrank.sequences.store import TokenStore
from fullrank.units import format_bytes


def stage(recipe: Recipe, run: Run, base: ResolvedModel, world: World = ALONE) -> Plan:
    """Plans a run for some ranks, or finds the plan made before; refuses it when it does not fit now.

    Raises:
        FitError: memory or disk is too small; the message names the smallest change that fits.
        UsageError: the ranks cannot be divided as the recipe says.
    """
    card = need_record(run.data / "card.json", DataCard, "plan")
    engine = engine_of(recipe, world)
    machine = look(recipe.machine, run.root, world.local_size)
    current = _fingerprint(recipe, card, base, machine, world)
    zero = settings_of(recipe, world.size)["zero_optimization"] if engine == "deepspeed" else None
    plan = read_record(run.plan_path, Plan)
    if plan and plan.fits and (plan.fingerprint == current or _is_begun(plan, recipe, machine, run, engine, world, zero)):
        run.tell("reused", stage="plan", what="the plan made before")
        _refuse_what_no_longer_fits(plan, machine, run)
    else:
        run.tell("started", stage="plan")
        with Meter() as meter:
            plan = _make(recipe, run, base, machine, current, meter, engine, world, zero)
        write_record(run.plan_path, plan)
        run.tell("finished", stage="plan", seconds=plan.seconds)
    run.show("plan", plan=plan)
    if not plan.fits:
        raise FitError(plan.refusal)
    return plan


def engine_of(recipe: Recipe, world: World) -> Engine:
    """What computes the steps.

    Raises:
        UsageError: what the recipe asks for goes not with these ranks, everything at once.
    """
    if world.size == 1 and not recipe.parallel.needs_engine and recipe.parallel.context == 1:
        return "single"
    problems = []
    away = recipe.parallel.offload_parameters
    if world.size % recipe.parallel.context:
        problems.append(f"parallel.context: {recipe.parallel.context} does not divide {world.size} ranks")
    with_deepspeed = recipe.parallel.engine == "deepspeed"
    if with_deepspeed:
        problems += refused_by_zero(recipe.train)
        if recipe.parallel.context > 1:
            problems.append("parallel.context: ranks share rows with engine: fsdp2 alone; use it, or context: 1")
        if recipe.parallel.replicas > 1:
            problems.append("parallel.replicas: ZeRO holds the model once among all ranks; use engine: fsdp2, or replicas: 1")
    if away and recipe.machine.device != "cuda":
        problems.append(
            f"parallel.offload_parameters: there is no other memory beside the device {recipe.machine.device}; leave it out"
        )
    elif away and not with_deepspeed and recipe.machine.optimizer_states == "device":
        problems.append(
            "parallel.offload_parameters: weights in host memory are updated there, and machine.optimizer_states is device; "
            "write host, or disk"
        )
    if world.size % recipe.parallel.replicas:
        problems.append(f"parallel.replicas: {recipe.parallel.replicas} does not divide {world.size} ranks")
    if recipe.machine.gradients in ("release", "spill") and recipe.train.optimizer.name not in ("lomo", "adalomo"):
        problems.append(
            f"machine.gradients: {recipe.machine.gradients} is for one process; of several ranks each keeps its part of them"
        )
    if problems:
        hint = "leave machine.gradients out, and choose replicas and context that divide the ranks"
        raise UsageError("\n".join(problems), hint="" if with_deepspeed or away else hint)
    return "deepspeed" if with_deepspeed else "fsdp2"


def _is_begun(
    plan: Plan,
    recipe: Recipe,
    machine: MachineFacts,
    run: Run,
    engine: Engine,
    world: World,
    zero: Mapping[str, Any] | None,
) -> bool:
    """Whether training goes by this plan already, and the recipe has not moved to other places since."""
    waits = (
        plan.machine.device,
        plan.gradients,
        plan.optimizer_states,
        plan.engine,
        plan.ranks,
        plan.replicas,
        plan.context,
        plan.offload_parameters,
        plan.zero_stage,
    )
    wanted = (
        machine.device,
        recipe.gradients,
        recipe.machine.optimizer_states,
        engine,
        world.size,
        recipe.parallel.replicas,
        recipe.parallel.context,
        recipe.parallel.offload_parameters,
        zero["stage"] if zero is not None else None,
    )
    return (run.train / "inputs.json").is_file() and waits == wanted


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


def _fingerprint(recipe: Recipe, card: DataCard, base: ResolvedModel, machine: MachineFacts, world: World) -> str:
    return fingerprint(
        recipe.train.model_dump(mode="json"),
        recipe.machine.model_dump(mode="json"),
        recipe.parallel.model_dump(mode="json"),
        [world.size, world.local_size],
        recipe.export.model_dump(mode="json"),
        card.training_fingerprint,
        base.facts.fingerprint,
        [machine.device, machine.device_name, machine.threads, machine.memory_bytes],
    )


def _make(
    recipe: Recipe,
    run: Run,
    base: ResolvedModel,
    machine: MachineFacts,
    current: str,
    meter: Meter,
    engine: Engine,
    world: World,
    zero: Mapping[str, Any] | None,
) -> Plan:
    store = TokenStore(run.data / "train")
    validation = TokenStore(run.data / "validation")
    order = Order(len(store), recipe.train.global_batch_size, recipe.train.epochs, recipe.train.seed)
    process_bytes = 0 if machine.device == "cuda" else resident_bytes()
    config = load_config(base.folder)
    looks = Looks(store, order, shared=not drops(config), ranks=world.size // recipe.parallel.context)
    longest = int(max(store.lengths.max(), validation.lengths.max()))
    ground = Ground(
        base,
        machine,
        shapes_of(config, recipe.train.frozen),
        looks,
        longest,
        process_bytes,
        attention_for(config) == "eager",
        world,
        recipe.parallel.replicas,
        engine,
        recipe.parallel.context,
        zero,
    )
    ways = list(choices(ground, recipe))
    choice = next((way for way in ways if way.peak_bytes <= machine.memory_available_bytes), ways[-1])
    validations = 1 + -(-order.steps // recipe.train.evaluate_every_steps)
    work = Work(order.steps, looks.needed_tokens, validations * int(validation.lengths.sum()))
    clock = Clock(config, ground, work, run)
    disk_bytes = _disk_bytes(recipe, base, ground, choice)
    problems = (
        memory_refusal(choice, recipe, ground, clock, lambda changed, way: _no_room(changed, base, ground, way)),
        _host_refusal(recipe, ground, choice),
        _disk_refusal(disk_bytes, machine, run),
    )
    refusal = "\n".join(filter(None, problems))
    seconds, basis = (0.0, "not estimated: it does not fit") if refusal else clock.seconds(recipe, choice)
    return Plan(
        fingerprint=current,
        seconds=meter.seconds,
        peak_bytes=meter.peak_bytes,
        machine=machine,
        model=base.facts,
        trained_parameters=ground.shapes.trained_parameters,
        precision=recipe.train.precision,  # `auto` is resolved by now
        gradients=recipe.gradients,
        backward_passes=2 if engine == "single" and memory.goes_twice(recipe) else 1,
        optimizer_states=recipe.machine.optimizer_states,
        engine=engine,
        zero_stage=zero["stage"] if zero is not None else None,
        ranks=world.size,
        replicas=recipe.parallel.replicas,
        context=recipe.parallel.context,
        offload_parameters=recipe.parallel.offload_parameters,
        sync=choice.sync,
        examples=len(store),
        steps=order.steps,
        steps_per_epoch=order.steps_per_epoch,
        warmup_steps=warmup_steps(recipe.train.schedule, order.steps),
        train_tokens=looks.needed_tokens,
        shared_ratio=looks.at(choice.budget_tokens).shared_ratio,
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


def _disk_bytes(recipe: Recipe, base: ResolvedModel, ground: Ground, choice: Choice) -> int:
    """Two checkpoints (the next is complete before the last one goes), three of the best weights likewise, the export, and what
    waits in files."""
    n, weight = base.facts.parameters, memory.weight_bytes(recipe)
    stored = {"float32": 4}.get(base.facts.dtype, 2) if recipe.export.dtype == "base" else DTYPES[recipe.export.dtype].itemsize
    states = memory.states_bytes(ground.shapes, recipe)
    needed = n * (2 * weight + 3 * weight + stored) + 2 * states
    return needed + _elsewhere(recipe, ground, choice).file


def _elsewhere(recipe: Recipe, ground: Ground, choice: Choice) -> memory.Elsewhere:
    tokens = ground.looks.at(choice.budget_tokens).largest.step_tokens
    device = ground.machine.device
    return memory.elsewhere(ground.base.facts, ground.shapes, recipe, recompute=choice.recompute, tokens=tokens, device=device)


def _no_room(recipe: Recipe, base: ResolvedModel, ground: Ground, choice: Choice) -> bool:
    """Whether what waits in files or in host memory finds no room there."""
    too_large_a_file = _disk_bytes(recipe, base, ground, choice) > ground.machine.disk_free_bytes
    return too_large_a_file or bool(_host_refusal(recipe, ground, choice))


def _host_refusal(recipe: Recipe, ground: Ground, choice: Choice) -> str:
    if ground.engine == "fsdp2" and recipe.parallel.offload_parameters:
        ranks, here = ground.world.size // ground.replicas, ground.world.local_size
        needed = memory.offloaded_host_bytes(ground.shapes, recipe, ranks=ranks, here=here)
    else:
        needed = _elsewhere(recipe, ground, choice).host
    if ground.zero is not None:
        needed += memory.zero_host_bytes(ground.shapes, recipe)
    free = host_memory_bytes() if needed else 0
    if needed <= free:
        return ""
    return f"does not fit into host memory: {format_bytes(needed)} wait there, {format_bytes(free)} are free"


def _disk_refusal(needed: int, machine: MachineFacts, run: Run) -> str:
    if needed <= machine.disk_free_bytes:
        return ""
    return (
        f"does not fit on the disk of {run.root}: {format_bytes(needed)} needed for checkpoints and the export, "
        f"{format_bytes(machine.disk_free_bytes)} free\nfree that much, or choose another place with --runs-dir"
    )
