"""The learning rate at points worked out by hand."""

from __future__ import annotations

import math

import pytest

from fullrank.optim.schedule import learning_rate, warmup_steps
from fullrank.recipe import Schedule


def rates(steps: int, **schedule: object) -> list[float]:
    return [learning_rate(Schedule.model_validate(schedule), 1.0, step, steps) for step in range(1, steps + 1)]


@pytest.mark.parametrize(
    ("ratio", "steps", "warmup"), [(0.05, 100, 5), (0.05, 10, 1), (0.05, 1, 1), (0.0, 9, 0), (1.0, 7, 7), (0.3, 7, 3)]
)
def test_warmup_steps_are_rounded_up(ratio: float, steps: int, warmup: int) -> None:
    assert warmup_steps(Schedule(warmup_ratio=ratio), steps) == warmup


def test_the_climb_is_linear_and_reaches_the_peak() -> None:
    assert rates(20, warmup_ratio=0.25, name="constant") == pytest.approx([0.2, 0.4, 0.6, 0.8] + [1.0] * 16)


def test_cosine_by_hand() -> None:
    found = rates(6, warmup_ratio=1 / 3, min_lr_ratio=0.2, name="cosine")
    # After 2 steps of warmup, a quarter turn each step: cos 45, 90, 135, 180 degrees.
    half = math.sqrt(0.5)
    by_hand = [0.5, 1.0] + [0.2 + 0.8 * 0.5 * (1 + cosine) for cosine in (half, 0.0, -half, -1.0)]
    assert found == pytest.approx(by_hand, rel=1e-12)


def test_linear_by_hand() -> None:
    assert rates(5, warmup_ratio=0.0, min_lr_ratio=0.0, name="linear") == pytest.approx([0.8, 0.6, 0.4, 0.2, 0.0])


@pytest.mark.parametrize("name", ["cosine", "linear"])
@pytest.mark.parametrize("steps", [2, 3, 50])
def test_the_last_step_has_exactly_the_lowest_rate_and_none_is_lower_after_the_climb(name: str, steps: int) -> None:
    found = rates(steps, warmup_ratio=0.1, min_lr_ratio=0.1, name=name)
    warmup = math.ceil(0.1 * steps)
    assert found[-1] == pytest.approx(0.1, rel=1e-12)
    assert found[warmup - 1 :] == sorted(found[warmup - 1 :], reverse=True)


def test_every_step_moves_the_weights_even_in_a_run_of_one() -> None:
    assert rates(1) == [1.0]
    assert all(rate > 0 for rate in rates(3))


def test_the_peak_scales_everything() -> None:
    schedule = Schedule()
    assert learning_rate(schedule, 3e-4, 7, 30) == pytest.approx(3e-4 * learning_rate(schedule, 1.0, 7, 30))
