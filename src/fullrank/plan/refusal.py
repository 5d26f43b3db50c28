"""What a plan says where memory is too small: what is needed, part by part, and the smallest changes of the recipe that fit."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Sequence

import yaml
from pydantic import ValidationError

from fullrank.parallel.blockwise import is_blockwise
from fullrank.plan import memory
from fullrank.plan.clock import Clock
from fullrank.plan.layouts import Choice, Ground, choices
from fullrank.recipe import Recipe
from fullrank.units import format_bytes

NoRoom = Callable[[Recipe, Choice], bool]

#: Changes of a recipe that take less memory, the smallest first: those that leave the weights as they would be, then others.
_SAME_WEIGHTS: tuple[tuple[str, ...], ...] = (
    ("machine.gradients=spill",),
    ("machine.gradients=release",),
    ("machine.optimizer_states=disk",),
    ("machine.gradients=spill", "machine.optimizer_states=disk"),
    ("machine.gradients=release", "machine.optimizer_states=disk"),
)
_OTHER_STEPS: tuple[tuple[str, ...], ...] = (
    ("train.optimizer.moments=int8", "machine.gradients=release"),
    ("train.precision=bf16-stochastic", "train.optimizer.moments=int8", "machine.gradients=release"),
    ("train.precision=bf16-stochastic", "train.optimizer={name: adalomo, learning_rate: 5e-4}"),
)


def memory_refusal(choice: Choice, recipe: Recipe, ground: Ground, clock: Clock, no_room: NoRoom) -> str:
    """What does not fit, and what would; empty where the choice fits.

    Args:
        no_room: whether what a changed recipe has wait elsewhere finds no room there.
    """
    machine = ground.machine
    if choice.peak_bytes <= machine.memory_available_bytes:
        return ""
    available = format_bytes(machine.memory_available_bytes)
    lines = [
        f"does not fit: {format_bytes(choice.peak_bytes)} needed, {available} available on {machine.device_name}, "
        f"with the smallest rows ({choice.budget_tokens} tokens) and recomputed blocks",
        memory.table(choice.ledger),
    ]
    found = [*_changes(recipe, ground, clock, no_room), *([] if is_blockwise(recipe) else _shorter(choice, ground))]
    if found:
        lines += [f"the smallest change that fits: {found[0]}", *(f"or: {change}" for change in found[1:])]
    else:
        fixed = sum(line.bytes for line in choice.ledger if line.part not in _BY_ROW)
        lines.append(
            "no change of optimizer, precision or places to wait makes it fit: weights, gradients and optimizer alone take "
            f"{format_bytes(fixed)}; this model needs machine.memory_limit (or memory) of at least "
            f"{format_bytes(choice.peak_bytes)}, or take a smaller model.source"
        )
    return "\n".join(lines)


def _changes(recipe: Recipe, ground: Ground, clock: Clock, no_room: NoRoom) -> Iterator[str]:
    """Changes of the step that fit: bytes and time of each; one that changes what is learned only where none else fits."""
    plain, _ = clock.seconds(recipe, list(choices(ground, recipe))[-1])
    for same, candidates in ((True, _SAME_WEIGHTS), (False, _OTHER_STEPS)):
        fitting: list[tuple[str, ...]] = []
        for changes in (*_wider(ground), *candidates, *_away(ground)) if same else candidates:
            if ground.machine.device == "cuda":
                changes = tuple(change.replace("states=disk", "states=host") for change in changes)
            if ground.engine != "single":  # where each rank keeps its part of the gradients
                changes = tuple(change for change in changes if not change.startswith("machine.gradients"))
            changed = _with(recipe, changes)
            if (
                changed is None
                or (is_blockwise(changed) and not ground.shapes.block)
                or any(set(fewer) <= set(changes) for fewer in fitting)
            ):
                continue
            is_wider = changed.parallel.context != recipe.parallel.context
            own = ground.sharing(changed.parallel.context) if is_wider else ground
            choice = next((c for c in choices(own, changed) if c.peak_bytes <= ground.machine.memory_available_bytes), None)
            if choice is None or no_room(changed, choice):
                continue
            is_told = is_wider or changed.parallel.offload_parameters  # what more is told and copied is not measured
            seconds, _ = (0.0, "") if is_told else clock.seconds(changed, choice)
            time = f"about {seconds / plain:.2f} times the time" if seconds and plain else "time not estimated"
            learned = "the same weights" if same else "another step: it learns differently"
            yield f"{' '.join(map(shlex.quote, changes))}  ({format_bytes(choice.peak_bytes)}, {time}, {learned})"
            fitting.append(changes)
        if fitting:
            return


def _wider(ground: Ground) -> Iterator[tuple[str, ...]]:
    """More ranks that share each row, and hold fewer activations each."""
    for context in range(2 * ground.context, ground.world.size + 1):
        if ground.engine == "fsdp2" and ground.world.size % context == 0:
            yield (f"parallel.context={context}",)


def _away(ground: Ground) -> Iterator[tuple[str, ...]]:
    """Weights and all that belongs to them in host memory."""
    if ground.engine == "fsdp2" and ground.machine.device == "cuda":
        yield ("machine.optimizer_states=host", "parallel.offload_parameters=true")


def _with(recipe: Recipe, changes: Sequence[str]) -> Recipe | None:
    """The recipe with some keys changed; None where that is no change, or no recipe."""
    tree = recipe.model_dump(mode="json")
    for change in changes:
        path, _, value = change.partition("=")
        *sections, key = path.split(".")
        section = tree
        for name in sections:
            section = section[name]
        section[key] = yaml.safe_load(value)
    if tree["train"]["optimizer"]["name"] != recipe.train.optimizer.name:  # what `auto` came to for the other rule
        tree["machine"]["gradients"] = tree["train"]["max_grad_norm"] = "auto"
    try:
        changed = Recipe.model_validate(tree)
    except ValidationError:
        return None
    return None if changed == recipe else changed


_BY_ROW = {"activations", "heap", "logits", "head", "mask"}


def _shorter(choice: Choice, ground: Ground) -> Iterator[str]:
    """The longest example that fits, where that is an answer: all that grows with a row, taken in proportion to its tokens."""
    available = ground.machine.memory_available_bytes
    by_row = sum(line.bytes for line in choice.ledger if line.part in _BY_ROW)
    fixed = choice.peak_bytes - by_row
    if fixed >= available:
        return
    length = int((available - fixed) / by_row * ground.longest)
    if length >= 2:
        yield f"data.max_length: {length} with data.too_long: drop or truncate"
