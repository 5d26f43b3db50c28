"""What a plan says where memory is too small: what is needed, part by part, and the smallest changes of the recipe that fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pydantic import ValidationError

from fullrank.plan import memory
from fullrank.plan.clock import Clock
from fullrank.plan.layouts import Choice, Ground, choices
from fullrank.recipe import Recipe
from fullrank.units import format_bytes

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
    ("train.precision=bf16-stochastic", "train.optimizer.name=adalomo", "train.optimizer.learning_rate=5e-4"),
)


def memory_refusal(choice: Choice, recipe: Recipe, ground: Ground, clock: Clock) -> str:
    machine = ground.machine
    if choice.peak_bytes <= machine.memory_available_bytes:
        return ""
    available = format_bytes(machine.memory_available_bytes)
    lines = [
        f"does not fit: {format_bytes(choice.peak_bytes)} needed, {available} available on {machine.device_name}, "
        f"with the smallest rows ({choice.budget_tokens} tokens) and recomputed blocks",
        memory.table(choice.ledger),
    ]
    found = [*_changes(recipe, ground, clock), *_shorter(choice, ground)]
    if found:
        lines += [f"the smallest change that fits: {found[0]}", *(f"or: {change}" for change in found[1:])]
    else:
        fixed = sum(line.bytes for line in choice.ledger if line.part not in _BY_ROW)
        lines.append(
            f"nothing in the recipe makes it fit: weights, gradients and optimizer alone take {format_bytes(fixed)}; this model "
            f"needs machine.memory_limit (or memory) of at least {format_bytes(choice.peak_bytes)}, or a smaller model.source is"
        )
    return "\n".join(lines)


def _changes(recipe: Recipe, ground: Ground, clock: Clock) -> Iterator[str]:
    """Changes of the step that fit: bytes and time of each; one that changes what is learned only where none else fits."""
    plain, _ = clock.seconds(recipe, list(choices(ground, recipe))[-1])
    for same, candidates in ((True, _SAME_WEIGHTS), (False, _OTHER_STEPS)):
        fitting: list[tuple[str, ...]] = []
        for changes in candidates:
            changed = _with(recipe, changes, ground.machine.device)
            if changed is None or any(set(fewer) < set(changes) for fewer in fitting):
                continue
            choice = next((c for c in choices(ground, changed) if c.peak_bytes <= ground.machine.memory_available_bytes), None)
            if choice is None:
                continue
            seconds, _ = clock.seconds(changed, choice)
            time = f"about {seconds / plain:.2f} times the time" if seconds and plain else "time not estimated"
            learned = "the same weights" if same else "another step: it learns differently"
            yield f"{' '.join(changes)}  ({format_bytes(choice.peak_bytes)}, {time}, {learned})"
            fitting.append(changes)
        if fitting:
            return


def _with(recipe: Recipe, changes: Sequence[str], device: str) -> Recipe | None:
    """The recipe with some keys changed; None where that is no change, or no recipe."""
    tree = recipe.model_dump(mode="json")
    for change in changes:
        path, _, value = change.partition("=")
        if path == "machine.optimizer_states" and device == "cuda":
            value = "host"
        *sections, key = path.split(".")
        section = tree
        for name in sections:
            section = section[name]
        if path == "train.optimizer.name":
            section.clear()
        section[key] = value
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
