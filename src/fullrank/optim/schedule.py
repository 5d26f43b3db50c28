"""The learning rate as a pure function of the step: nothing to save, nothing to replay."""

from __future__ import annotations

import math

from fullrank.recipe import Schedule


def warmup_steps(schedule: Schedule, steps: int) -> int:
    """Steps of the linear climb: the ratio of all steps, rounded up."""
    return math.ceil(schedule.warmup_ratio * steps)


def learning_rate(schedule: Schedule, peak: float, step: int, steps: int) -> float:
    """Rate of a step.

    The climb reaches the peak at the last warmup step; after it the cosine (SGDR, Loshchilov & Hutter 2017, eq. 5) or the
    line falls from the peak to `min_lr_ratio * peak`, which the last step has exactly.

    Args:
        schedule: the recipe's schedule.
        peak: highest rate.
        step: 1-based.
        steps: steps of the run.
    """
    warmup = warmup_steps(schedule, steps)
    if step <= warmup:
        return peak * step / warmup
    if schedule.name == "constant":
        return peak
    progress = (step - warmup) / max(1, steps - warmup)
    floor = schedule.min_lr_ratio
    fall = 0.5 * (1.0 + math.cos(math.pi * progress)) if schedule.name == "cosine" else 1.0 - progress
    return peak * (floor + (1.0 - floor) * fall)
