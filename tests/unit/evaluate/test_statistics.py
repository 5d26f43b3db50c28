"""Bootstrap intervals against theory and against a plain resampling loop."""

from __future__ import annotations

import statistics as theory

import numpy as np
import pytest

from fullrank.evaluate import statistics
from fullrank.evaluate.metrics import Array, Items, loss_items, score
from fullrank.evaluate.statistics import interval, paired_difference
from fullrank.recipe import Task


def means(values: Array) -> Items:
    """Items whose score is the mean of the values."""
    return Items(np.column_stack([values, np.ones(len(values))]), lambda sums: np.asarray(sums[..., 0] / sums[..., 1]))


NORMAL = np.random.default_rng(7).normal(3.0, 2.0, size=400)


@pytest.mark.parametrize("level", [0.5, 0.9, 0.95])
def test_the_interval_of_a_normal_mean_is_the_textbook_one(level: float) -> None:
    found = interval(means(NORMAL), resamples=20_000, level=level)
    standard_error = NORMAL.std() / np.sqrt(len(NORMAL))
    half = theory.NormalDist().inv_cdf((1 + level) / 2) * standard_error
    assert found.value == pytest.approx(NORMAL.mean())
    assert found.low == pytest.approx(NORMAL.mean() - half, abs=0.06 * standard_error)
    assert found.high == pytest.approx(NORMAL.mean() + half, abs=0.06 * standard_error)


def test_the_interval_of_a_share_is_the_binomial_one() -> None:
    answers = ["a"] * 70 + ["b"] * 30
    found = interval(score(Task(metric="exact_match"), ["a"] * 100, answers)["exact_match"])
    half = 1.96 * np.sqrt(0.7 * 0.3 / 100)
    assert (found.value, found.low, found.high) == pytest.approx((0.7, 0.7 - half, 0.7 + half), abs=0.015)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    intervals = [interval(means(random.normal(1.0, 1.0, 60)), resamples=400, seed=n, level=0.9) for n in range(300)]
    coverage = np.mean([found.low <= 1.0 <= found.high for found in intervals])
    assert 0.85 <= coverage <= 0.94


def test_the_interval_equals_a_plain_loop_for_a_score_that_is_no_mean() -> None:
    references = ["a,b", "c", "none", "a", "b,c", "none", "c", "a"]
    answers = ["a", "c", "x", "b", "b,c", "none", "a,c", "none"]
    task = Task(metric="f1")
    random = np.random.default_rng(99)
    for key in ("f1", "f1_macro"):
        plain = []
        for _ in range(4000):
            draw = random.integers(8, size=8)
            plain.append(score(task, [references[i] for i in draw], [answers[i] for i in draw])[key].value)
        found = interval(score(task, references, answers)[key], resamples=4000)
        assert (found.low, found.high) == pytest.approx(tuple(np.quantile(plain, [0.025, 0.975])), abs=0.04)


def test_perplexity_and_loss_have_intervals_that_correspond() -> None:
    random = np.random.default_rng(1)
    tokens = random.integers(1, 50, size=80)
    found = {key: interval(i) for key, i in loss_items(list(tokens * random.uniform(1, 3, 80)), list(tokens)).items()}
    assert found["perplexity"].low == pytest.approx(np.exp(found["validation_loss"].low), rel=1e-3)
    assert found["perplexity"].high == pytest.approx(np.exp(found["validation_loss"].high), rel=1e-3)


def test_equal_seeds_give_equal_intervals_and_others_do_not() -> None:
    assert interval(means(NORMAL), seed=3) == interval(means(NORMAL), seed=3)
    assert interval(means(NORMAL), seed=3) != interval(means(NORMAL), seed=4)


@pytest.mark.parametrize("at_once", [1, 401, 400 * 700])
def test_how_many_draws_are_held_at_once_does_not_matter(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = interval(means(NORMAL))
    monkeypatch.setattr(statistics, "_DRAWS_AT_ONCE", at_once)
    assert interval(means(NORMAL)).model_dump() == pytest.approx(expected.model_dump())


def test_a_single_item_has_an_interval_of_no_width() -> None:
    found = interval(means(np.array([0.25])))
    assert (found.value, found.low, found.high) == (0.25, 0.25, 0.25)


def test_a_difference_in_pairs_is_narrower_than_one_of_strangers() -> None:
    base = means(NORMAL)
    tuned = means(NORMAL + 0.5 + np.random.default_rng(8).normal(0.0, 0.2, 400))
    shuffled = means(np.random.default_rng(9).permutation(tuned.stats_NK[:, 0]))
    paired, unpaired = paired_difference(tuned, base), paired_difference(shuffled, base)
    assert paired.value == pytest.approx(unpaired.value) == pytest.approx(tuned.value - base.value)
    assert paired.low < paired.value < paired.high
    assert paired.high - paired.low < 0.2 * (unpaired.high - unpaired.low)


def test_the_difference_of_two_means_is_the_mean_of_the_differences() -> None:
    tuned, base = NORMAL + np.sin(NORMAL), NORMAL
    paired, of_differences = paired_difference(means(tuned), means(base)), interval(means(tuned - base))
    assert paired.model_dump() == pytest.approx(of_differences.model_dump())


def test_a_model_does_not_differ_from_itself() -> None:
    found = paired_difference(means(NORMAL), means(NORMAL))
    assert (found.value, found.low, found.high) == (0.0, 0.0, 0.0)


def test_items_that_cannot_be_paired_or_drawn_are_refused() -> None:
    with pytest.raises(ValueError, match="400 tuned and 3 base items"):
        paired_difference(means(NORMAL), means(NORMAL[:3]))
    with pytest.raises(ValueError, match="at least one item"):
        interval(means(np.array([])))
