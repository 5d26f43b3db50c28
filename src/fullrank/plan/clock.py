"""How long a training by a recipe takes, from a measurement of the model's own blocks."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedConfig

from fullrank.parallel import device as devices
from fullrank.parallel.blockwise import is_blockwise
from fullrank.plan import memory, speed
from fullrank.plan.layouts import Choice, Ground
from fullrank.plan.speed import Speed
from fullrank.recipe import Recipe
from fullrank.run import Run
from fullrank.units import format_bytes


@dataclass(frozen=True)
class Work:
    """What all steps come to."""

    steps: int
    needed_tokens: int
    validation_tokens: int
    """Of all validations."""


class Clock:
    """Seconds of the training by a recipe, from one measurement of the model's blocks for each way to carry out a step."""

    def __init__(self, config: PreTrainedConfig, ground: Ground, work: Work, run: Run) -> None:
        self._config, self._ground, self._work, self._run = config, ground, work, run
        self._measured: dict[str, Speed | None] = {}
        self._file_rate: float | None = None
        self._host_rate: float | None = None

    def seconds(self, recipe: Recipe, choice: Choice) -> tuple[float, str]:
        """(seconds, what they rest on); 0 where nothing could be measured."""
        ground, work = self._ground, self._work
        divided = ground.engine != "single"
        how = "block" if is_blockwise(recipe) and not divided else choice.recompute
        key = f"{how} {recipe.train.precision} {recipe.train.optimizer} {ground.context}"
        if key not in self._measured:
            self._measured[key] = speed.measure(
                self._config,
                ground.base.facts,
                ground.looks.typical_part(choice.budget_tokens, ground.context),
                device=devices.choose(ground.machine.device),
                train=recipe.train,
                trained_parameters=ground.shapes.trained_parameters,
                recompute=how,
                available_bytes=ground.machine.memory_available_bytes,
            )
        measured = self._measured[key]
        if measured is None:
            return 0.0, "not estimated: measuring two blocks would take more than half of the memory"
        computed = work.needed_tokens * (1 - ground.looks.at(choice.budget_tokens).shared_ratio)
        per_token = measured.forward_backward_per_token
        if memory.goes_twice(recipe) and not divided:  # the second time no forward pass goes before it
            per_token += measured.forward_backward_per_token - measured.forward_per_token
        device, basis = ground.machine.device, measured.basis
        # Ranks on devices of their own work side by side; those of one CPU share it.
        ranks = ground.world.size if device == "cuda" else 1 + (ground.world.size - 1) // ground.world.local_size
        seconds = (
            computed * per_token + work.steps * measured.optimizer_step + work.validation_tokens * measured.forward_per_token
        ) / ranks
        if ground.world.size > 1:
            basis += f"; shared by {ground.world.size} ranks, without what they tell one another"
        if ground.context > 1:
            basis += " and without what a query sees of other ranks' keys"
        waits = memory.elsewhere(
            ground.base.facts,
            ground.shapes,
            recipe,
            recompute=choice.recompute,
            tokens=int(computed / work.steps),
            device=device,
        )
        if waits.file:  # there and back, every step
            self._file_rate = self._file_rate or speed.file_bytes_per_second(self._run.root)
            seconds += 2 * waits.file * work.steps / self._file_rate
            basis += f"; {format_bytes(self._file_rate)}/s to and from a file"
        if recipe.parallel.offload_parameters:
            basis += "; without the way of weights and gradients to and from host memory, and updates taken as the device's"
        elif waits.host:
            self._host_rate = self._host_rate or speed.host_bytes_per_second(devices.choose(device))
            seconds += 2 * waits.host * work.steps / self._host_rate
            basis += f"; {format_bytes(self._host_rate)}/s to and from host memory"
        return seconds, basis
