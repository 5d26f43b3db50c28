"""Intervals against textbook formulas, exact enumeration and simulations of fixed seed."""

from __future__ import annotations

import math
import statistics as theory
from collections.abc import Sequence

import numpy as np
import pytest

from fullrank.evaluate.metrics import Array, Items, Scale, loss_items, score
from fullrank.evaluate.statistics import interval, paired_difference, t_quantile
from fullrank.recipe import Task
from fullrank.records import Score


def means(values: Sequence[float] | Array, scale: Scale = "linear") -> Items:
    """Items whose score is the mean of the values."""
    stats = np.column_stack([np.asarray(values, np.float64), np.ones(len(values))])
    return Items(stats, lambda sums: np.asarray(sums[..., 0] / sums[..., 1]), scale)


def right_of(right: int, items: int) -> Items:
    return means([1.0] * right + [0.0] * (items - right), "share")


def wilson(right: float, items: float, quantile: float) -> tuple[float, float]:
    """The two shares that lie `quantile` of their own standard errors from the observed one, found by bisection."""

    def end(inside: float, outside: float) -> float:
        for _ in range(100):
            middle = (inside + outside) / 2
            error = math.sqrt(middle * (1 - middle) / items)
            inside, outside = (middle, outside) if abs(right / items - middle) <= quantile * error else (inside, middle)
        return inside

    return end(right / items, 0.0), end(right / items, 1.0)


NORMAL = np.random.default_rng(7).normal(3.0, 2.0, size=400)


@pytest.mark.parametrize(
    ("degrees", "level", "t"), [(1, 0.95, 12.706), (2, 0.95, 4.303), (9, 0.99, 3.250), (59, 0.95, 2.001), (1e9, 0.9, 1.645)]
)
def test_the_quantiles_are_those_of_the_tables(degrees: float, level: float, t: float) -> None:
    assert t_quantile(degrees, level) == pytest.approx(t, abs=6e-4)


def test_degrees_between_whole_numbers_have_quantiles_between() -> None:
    drawn = np.random.default_rng(0).standard_t(2.5, size=400_000)
    assert t_quantile(2.5, 0.9) == pytest.approx(np.quantile(np.abs(drawn), 0.9), rel=0.01)  # Monte-Carlo error 0.003


@pytest.mark.parametrize("level", [0.5, 0.9, 0.95])
def test_the_interval_of_a_normal_mean_is_the_textbook_one(level: float) -> None:
    found = interval(means(NORMAL), level=level)
    half = theory.NormalDist().inv_cdf((1 + level) / 2) * theory.stdev(NORMAL) / math.sqrt(400)
    assert found.value == pytest.approx(NORMAL.mean())
    # the normal quantile is up to 0.4 % below that of 399 degrees of freedom
    assert (found.value - found.low, found.high - found.value) == pytest.approx((half, half), rel=0.004)


@pytest.mark.parametrize(("right", "items"), [(70, 100), (1, 60), (59, 60), (3, 8)])
def test_the_interval_of_a_share_is_wilsons(right: int, items: int) -> None:
    found = interval(right_of(right, items))
    # the variance over items - 1 makes them worth one item less
    low, high = wilson(right / items * (items - 1), items - 1, t_quantile(items - 1, 0.95))
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-9)


def test_all_right_and_all_wrong_leave_some_width() -> None:
    right, wrong = interval(right_of(60, 60)), interval(right_of(0, 60))
    assert (right.value, right.high, wrong.value, wrong.low) == (1.0, 1.0, 0.0, 0.0)
    assert right.low == pytest.approx(wilson(60, 60, t_quantile(59, 0.95))[0], abs=1e-9)
    assert wrong.high == pytest.approx(1 - right.low)
    assert right.low <= 0.025 ** (1 / 60)  # the exact binomial lower end (Clopper & Pearson 1934) is covered


def test_one_item_says_next_to_nothing() -> None:
    for value in (0.0, 0.25, 1.0):
        found = interval(means([value], "share"))
        assert found.low <= value <= found.high and found.high - found.low > 0.97
    loss = interval(means([0.25]))
    assert (loss.value, loss.low, loss.high) == (0.25, 0.25, 0.25)


def test_items_without_labels_do_not_make_a_perfect_f1_surer() -> None:
    """Ten sets found of ten are ten successes, whatever the number of empty sets besides."""
    task = Task(metric="f1")
    few = interval(score(task, ["a"] * 10, ["a"] * 10)["f1"])
    many = interval(score(task, ["a"] * 10 + ["none"] * 50, ["a"] * 10 + ["none"] * 50)["f1"])
    assert few.low < 0.75 and many.low < 0.75 and many.high == 1.0


@pytest.mark.parametrize("items", [20, 60, 200])
def test_the_intervals_of_shares_cover_the_truth_by_exact_enumeration(items: int) -> None:
    found = [interval(right_of(right, items)) for right in range(items + 1)]
    covered = []
    for truth in np.linspace(0.02, 0.98, 97):
        chances = [math.comb(items, right) * truth**right * (1 - truth) ** (items - right) for right in range(items + 1)]
        covered.append(sum(p for p, one in zip(chances, found, strict=True) if one.low <= truth <= one.high))
    assert min(covered) > 0.91 and 0.94 < float(np.mean(covered)) < 0.97  # shares are discrete: coverage jumps with the truth


def simulated_f1(random: np.random.Generator, items: int, truth: float) -> dict[str, Items]:
    """Three labels on 40 % of the items each; as many are added as are missed, so that F1 is the share found."""
    has = random.random((items, 3)) < 0.4
    found = np.where(has, random.random((items, 3)) < truth, random.random((items, 3)) < (1 - truth) * 0.4 / 0.6)
    texts = [[",".join(f"l{n}" for n in np.flatnonzero(row)) or "none" for row in rows] for rows in (has, found)]
    return score(Task(metric="f1"), texts[0], texts[1])


@pytest.mark.parametrize("truth", [0.1, 0.5, 0.95])
def test_the_intervals_of_f1_cover_the_truth(truth: float) -> None:
    random = np.random.default_rng(3)
    for key in ("f1", "f1_macro"):
        found = [interval(simulated_f1(random, 60, truth)[key]) for _ in range(250)]
        coverage = np.mean([one.low <= truth <= one.high for one in found])
        assert 0.91 <= coverage <= 0.99  # Monte-Carlo error 0.014


@pytest.mark.parametrize("truth", [0.05, 0.5, 0.95])
def test_the_intervals_of_continuous_scores_cover_the_truth(truth: float) -> None:
    random = np.random.default_rng(4)
    found = [interval(means(random.beta(4 * truth, 4 * (1 - truth), 60), "share")) for _ in range(600)]
    assert 0.915 <= np.mean([one.low <= truth <= one.high for one in found]) <= 0.975  # Monte-Carlo error 0.009


def test_the_variance_of_f1_is_that_of_a_plain_loop_of_resamples() -> None:
    items = simulated_f1(np.random.default_rng(5), 300, 0.6)
    random = np.random.default_rng(6)
    for key in ("f1", "f1_macro"):
        stats, reduce = items[key].stats_NK, items[key].reduce
        plain = [float(reduce(stats[random.integers(300, size=300)].sum(axis=0))) for _ in range(4000)]
        found = interval(items[key])
        assert (found.low, found.high) == pytest.approx(tuple(np.quantile(plain, [0.025, 0.975])), abs=0.006)


def test_perplexity_and_loss_have_intervals_that_correspond() -> None:
    random = np.random.default_rng(1)
    tokens = random.integers(1, 50, size=80)
    found = {key: interval(i) for key, i in loss_items(list(tokens * random.uniform(1, 3, 80)), list(tokens)).items()}
    assert found["perplexity"].low == pytest.approx(np.exp(found["validation_loss"].low))
    assert found["perplexity"].high == pytest.approx(np.exp(found["validation_loss"].high))


# ---- differences ----------------------------------------------------------------------------------------------------


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


def test_the_difference_of_unrelated_shares_is_newcombes() -> None:
    """0.8 and 0.6 of the same 400 items, crossed so that they are uncorrelated: the squares of the ends' distances add up."""
    tuned, base = means([1.0] * 320 + [0.0] * 80, "share"), means([1.0, 1.0, 1.0, 0.0, 0.0] * 80, "share")
    found = paired_difference(tuned, base)
    (low_tuned, high_tuned), (low_base, high_base) = wilson(320, 400, 1.966), wilson(240, 400, 1.966)
    low = 0.2 - math.hypot(0.8 - low_tuned, high_base - 0.6)
    high = 0.2 + math.hypot(high_tuned - 0.8, 0.6 - low_base)
    # one item less by the jackknife, two more by which they differ: within half a per cent of the width
    assert (found.value, found.low, found.high) == pytest.approx((0.2, low, high), abs=1e-3)


@pytest.mark.parametrize(("values", "items"), [([1.0], 60), ([0.0], 60), ([1.0, 0.0], 60), ([0.3], 200)])
def test_models_that_differ_on_no_item_may_differ_a_little(values: list[float], items: int) -> None:
    same = means(np.resize(values, items), "share")
    found = paired_difference(same, same)
    assert found.value == 0.0 and found.low < 0.0 < found.high
    assert 1.5 / items < found.high < 0.15 and found.low == pytest.approx(-found.high, abs=0.1)


def test_a_loss_does_not_differ_from_itself() -> None:
    found = paired_difference(means(NORMAL), means(NORMAL))
    assert (found.value, found.low, found.high) == pytest.approx((0.0, 0.0, 0.0))


@pytest.mark.parametrize(("better", "worse"), [(0.05, 0.0), (0.1, 0.05), (0.3, 0.1)])
def test_the_intervals_of_differences_of_shares_cover_the_truth(better: float, worse: float) -> None:
    """Items on which only one model is right, the others answered alike."""
    random = np.random.default_rng(12)
    covered = []
    for _ in range(500):
        kind = random.random(60)
        both = random.random(60) < 0.5
        tuned = np.where(kind < better, 1, np.where(kind < better + worse, 0, both))
        base = np.where(kind < better, 0, np.where(kind < better + worse, 1, both))
        found = paired_difference(means(tuned, "share"), means(base, "share"))
        covered.append(found.low <= better - worse <= found.high)
    assert np.mean(covered) >= 0.925  # Monte-Carlo error 0.01; above 0.95 where few items differ


def test_a_difference_stays_in_its_range() -> None:
    found = paired_difference(right_of(5, 5), right_of(0, 5))
    assert found.value == found.high == 1.0 and 0 < found.low < 1


# ---- seeds ----------------------------------------------------------------------------------------------------------


def crossed(random: np.random.Generator, seeds: int, items: int, of_seeds: float, of_items: float) -> list[Items]:
    """Scores 1 + seed + item + rest, of standard deviations `of_seeds`, `of_items` and 1."""
    values = 1 + random.normal(0, of_seeds, (seeds, 1)) + random.normal(0, of_items, items) + random.normal(0, 1, (seeds, items))
    return [means(row) for row in values]


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("of_seeds", [0.0, 0.1, 1.0])
def test_intervals_over_seeds_and_items_cover_the_truth(seeds: int, of_seeds: float) -> None:
    random = np.random.default_rng(13)
    found = [interval(crossed(random, seeds, 60, of_seeds, 1.0)) for _ in range(500)]
    assert 0.92 <= np.mean([one.low <= 1 <= one.high for one in found]) <= 0.99  # cautious where seeds hardly differ


def test_seeds_that_differ_much_have_the_t_interval_over_seeds() -> None:
    runs = crossed(np.random.default_rng(14), 3, 1000, 50.0, 0.1)
    values = [run.value for run in runs]
    found = interval(runs)
    half = 4.303 * theory.stdev(values) / math.sqrt(3)
    assert (found.value, found.high - found.value) == pytest.approx((theory.mean(values), half), rel=2e-3)


def test_equal_seeds_have_the_interval_of_one() -> None:
    assert interval([means(NORMAL)] * 3).model_dump() == pytest.approx(interval(means(NORMAL)).model_dump())


def test_a_difference_over_seeds_pairs_the_items_and_not_the_seeds() -> None:
    random = np.random.default_rng(15)
    covered, widths = [], []
    for _ in range(300):
        difficulty = random.normal(0, 3, 60)
        models = [
            [means(difficulty + mean + random.normal(0, 0.3) + random.normal(0, 1, 60)) for _ in range(3)] for mean in (1.5, 1.0)
        ]
        found = paired_difference(models[0], models[1])
        covered.append(found.low <= 0.5 <= found.high)
        widths.append(found.high - found.low)
    assert np.mean(covered) >= 0.92
    assert np.median(widths) < 2 * 2 * math.sqrt(2 * 9 / 60)  # what two unpaired samples of items would leave


def test_items_that_cannot_be_paired_or_counted_are_refused() -> None:
    with pytest.raises(ValueError, match="400 tuned and 3 base items"):
        paired_difference(means(NORMAL), means(NORMAL[:3]))
    with pytest.raises(ValueError, match="at least one item"):
        interval(means(np.array([])))
    with pytest.raises(ValueError, match=r"\[400, 3\] items"):
        interval([means(NORMAL), means(NORMAL[:3])])
    with pytest.raises(ValueError, match="at least one item"):
        interval([])


def test_intervals_are_the_same_every_time() -> None:
    found: list[Score] = [interval(means(NORMAL)) for _ in range(2)]
    assert found[0] == found[1]
