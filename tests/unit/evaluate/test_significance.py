"""Permutation tests against enumeration by brute force, and how often they err; Holm's correction against its definition."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest

from fullrank.evaluate import significance
from fullrank.evaluate.metrics import Array, Items, score
from fullrank.evaluate.significance import holm, p_value
from fullrank.recipe import Task


def means(values: Sequence[float] | Array) -> Items:
    stats = np.column_stack([np.asarray(values, np.float64), np.ones(len(values))])
    return Items(stats, lambda sums: np.asarray(sums[..., 0] / sums[..., 1]), "share")


@pytest.mark.parametrize(("better", "worse"), [(5, 0), (6, 0), (7, 2), (4, 4)])
def test_right_and_wrong_items_have_the_exact_sign_test(better: int, worse: int) -> None:
    tuned = means([1] * better + [0] * worse + [1] * 20 + [0] * 10)
    base = means([0] * better + [1] * worse + [1] * 20 + [0] * 10)
    differ = better + worse
    as_large = [n for n in range(differ + 1) if abs(2 * n - differ) >= abs(better - worse)]
    assert p_value(tuned, base) == pytest.approx(sum(math.comb(differ, n) for n in as_large) / 2**differ)


@pytest.mark.parametrize("key", ["f1", "f1_macro"])
def test_a_score_that_is_no_mean_is_enumerated_by_swapping_answers(key: str) -> None:
    references = ["a,b", "c", "none", "a", "b,c", "none", "c", "a"]
    answers = [
        ["a", "c", "x", "b", "b,c", "none", "a,c", "none"],
        ["a,b", "b", "none", "a", "b,c", "a", "c", "none"],
    ]
    task = Task(metric="f1")

    def difference(swaps: tuple[int, ...]) -> float:
        first, second = ([answers[model ^ swap][n] for n, swap in enumerate(swaps)] for model in (0, 1))
        return score(task, references, first)[key].value - score(task, references, second)[key].value

    observed = abs(difference((0,) * 8))
    every = [abs(difference(swaps)) >= observed - 1e-9 for swaps in itertools.product((0, 1), repeat=8)]
    first, second = (score(task, references, given)[key] for given in answers)
    assert p_value(first, second) == pytest.approx(np.mean(every))
    assert p_value(second, first) == p_value(first, second)


def test_draws_come_near_the_exact_value(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    tuned, base = means(random.random(12) + 0.15), means(random.random(12))
    exact = p_value(tuned, base)
    drawn = p_value(tuned, base, draws=4_000)  # 2^12 ways are more than 4,001
    assert 0.02 < exact < 0.9 and drawn != exact
    assert drawn == pytest.approx(exact, abs=0.03)  # four standard errors
    for at_once in (1, 13, 12 * 100):
        monkeypatch.setattr(significance, "_SWAPS_AT_ONCE", at_once)
        assert p_value(tuned, base, draws=4_000) == drawn
    assert p_value(tuned, base, draws=4_000, seed=1) != drawn


def test_draws_never_give_zero_and_equal_models_give_one() -> None:
    assert p_value(means([1] * 40), means([0] * 40), draws=99) == 1 / 100
    assert p_value(means([1] * 2), means([0] * 2)) == 0.5
    assert p_value(means([1, 0, 1]), means([1, 0, 1])) == 1.0


@pytest.mark.parametrize("kind", ["continuous", "right or wrong"])
def test_the_test_keeps_its_level_and_finds_what_is_there(kind: str) -> None:
    random = np.random.default_rng(2)

    def rejected(gain: float) -> float:
        small = 0
        for number in range(400):
            difficulty = random.normal(0, 1, 60)
            tuned, base = difficulty + gain + random.normal(0, 1, 60), difficulty + random.normal(0, 1, 60)
            if kind == "right or wrong":
                tuned, base = tuned > 0, base > 0
            small += p_value(means(tuned), means(base), draws=99, seed=number) <= 0.05
        return small / 400

    assert 0.01 <= rejected(0.0) <= 0.08  # Monte-Carlo error 0.011
    assert rejected(0.8) >= (0.95 if kind == "continuous" else 0.7)


def test_items_that_cannot_be_paired_are_refused() -> None:
    with pytest.raises(ValueError, match="3 tuned and 2 base items"):
        p_value(means([1, 0, 1]), means([1, 0]))
    with pytest.raises(ValueError, match="at least one item"):
        p_value(means([]), means([]))


def test_holm_rejects_step_by_step() -> None:
    """Rejection at every level as the definition says it: from the smallest on, while p <= level / (hypotheses left)."""
    random = np.random.default_rng(3)
    for count in (1, 2, 5):
        values = list(random.random(count) ** 3)
        corrected = holm(values)
        for level in np.linspace(0.001, 0.999, 200):
            rejected = set()
            for step, index in enumerate(np.argsort(values)):
                if values[index] > level / (count - step):
                    break
                rejected.add(int(index))
            assert {n for n, value in enumerate(corrected) if value <= level} == rejected
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        holm([0.2, 1.2])
