"""Intervals of scores and of the difference between two models on the same items, for one training seed or several.

Every metric takes the same way. The leave-one-out jackknife gives each item's effect on the score, and from the effects
the variance of the score (Efron & Stein 1981, Annals of Statistics 9(3)). A score in [0, 1] then has Wilson's interval
(1927, JASA 22) at the number of right-or-wrong items that would have this variance, its effective number (Korn & Graubard
1998, Survey Methodology 24(2); Dean & Pagano 2015, Journal of Survey Statistics and Methodology 3(4)), with the quantile of
Student's t. For items that are right or wrong this is Wilson's interval itself, but for n - 1 and t. Scores without bounds
have the t interval. A difference combines the intervals of its two scores (Newcombe 1998, Statistics in Medicine 17(22);
for any two intervals Zou & Donner 2008, Statistics in Medicine 27(10)).

Nothing is drawn, so there is no seed to choose. `benchmarks/evidence_statistics.py` measures how often the intervals cover
the truth, beside the percentile bootstrap, which they replaced because it is too short where few items err.

An interval speaks of the items, and of the seeds that are given. It cannot know errors of a kind that no item showed: rare
large errors among many small ones, or labels on a handful of items, are covered less often than the level says.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from fullrank.evaluate.metrics import Array, Items, Scale
from fullrank.records import Score

#: A variance of a score in [0, 1] that is taken for none: below what rounding leaves.
_NO_VARIANCE = 1e-14


def interval(items: Items | Sequence[Items], level: float = 0.95) -> Score:
    """The score over all items with its interval.

    Where the items of a score in [0, 1] do not vary, as when all are right, they are taken as that many items that are
    right or wrong, which is as uncertain as such a score can be: 60 right answers of 60 give 0.94 to 1. A single item leaves
    nearly the whole range. For scores without bounds, such items leave no width.

    Args:
        items: N items; or those of several training seeds of one method, the same items in the same order, where the score is
            the mean over the seeds and the interval speaks of seeds and items (see `_estimate`).
        level: how often the interval is to cover the expected score, in (0, 1).

    Raises:
        ValueError: no items, or seeds with different numbers of items.
    """
    found = _estimate(_seeds(items))
    low, high = _bounds(found, t_quantile(found.degrees, level))
    return Score(value=found.value, low=low, high=high)


def paired_difference(tuned: Items | Sequence[Items], base: Items | Sequence[Items], level: float = 0.95) -> Score:
    """tuned - base over the same items, with its interval.

    With l, u the ends of either interval and r the correlation of the two estimates over the items,

        low = d - sqrt((tuned - l_tuned)² - 2 r (tuned - l_tuned)(u_base - base) + (u_base - base)²)

    and high with the other ends (Newcombe 1998, method 10; Zou & Donner 2008, equation 4). Of scores in [0, 1], r is computed
    as if the two models also differed on two more items, once either way, so that models that differ on no item have an
    interval of some width, too: Bonett & Price 2012 (Journal of Educational and Behavioral Statistics 37(4)) add them for items
    that are right or wrong. Here they differ by the typical size of what differs, sum w² / sum |w|. It corrects an r that is
    too high where few items differ (Newcombe's own correction, for continuity, is too small there). Of scores without bounds
    and single seeds this is the paired t interval.

    Args:
        tuned, base: the same N items, in the same order, under two models; or those of several training seeds of either.
        level: as in `interval`.

    Raises:
        ValueError: no items, or different numbers of items.
    """
    of_tuned, of_base = _estimate(_seeds(tuned)), _estimate(_seeds(base))
    if len(of_tuned.effects_N) != len(of_base.effects_N):
        raise ValueError(f"{len(of_tuned.effects_N)} tuned and {len(of_base.effects_N)} base items cannot be paired")
    difference = of_tuned.value - of_base.value
    of_items = _items_variance_of_difference(of_tuned, of_base)
    correlation = _correlation(of_tuned, of_base, of_items)
    # where items make most of each score's variance but seeds most of the difference's, the few degrees are the seeds'
    t = t_quantile(_degrees(of_items, len(of_tuned.effects_N), [of_tuned, of_base]), level)
    (low_tuned, high_tuned), (low_base, high_base) = _bounds(of_tuned, t), _bounds(of_base, t)
    below = _combined(of_tuned.value - low_tuned, high_base - of_base.value, correlation)
    above = _combined(high_tuned - of_tuned.value, of_base.value - low_base, correlation)
    low, high = difference - below, difference + above
    if of_tuned.scale == "share":
        low, high = max(low, -1.0), min(high, 1.0)
    return Score(value=difference, low=low, high=high)


@dataclass(frozen=True)
class _Estimate:
    """A score and how much it varies; on the scale `log` the variances are of its logarithm.

    Args:
        effects_N: what each item adds to the score, times N - 1 and with mean 0.
        of_items: the variance that the choice of the items gives the score.
        of_seeds: the variance that the seeds add to it; 0 for one seed.
        seeds_spread: the squared variance of the seeds' mean over its degrees of freedom; 0 for one seed.
        equal_items: how many items of equal weight the items are worth.
    """

    value: float
    effects_N: Array
    of_items: float
    of_seeds: float
    seeds_spread: float
    equal_items: float
    scale: Scale

    @property
    def variance(self) -> float:
        return self.of_items + self.of_seeds

    @property
    def degrees(self) -> float:
        return _degrees(self.of_items, len(self.effects_N), [self])


def _seeds(items: Items | Sequence[Items]) -> Sequence[Items]:
    seeds = [items] if isinstance(items, Items) else list(items)
    if not seeds or not len(seeds[0].stats_NK):
        raise ValueError("an interval needs at least one item")
    if len({len(seed.stats_NK) for seed in seeds}) > 1:
        raise ValueError(f"seeds of {[len(seed.stats_NK) for seed in seeds]} items; all must answer the same items")
    return seeds


def _estimate(seeds: Sequence[Items]) -> _Estimate:
    """The mean score of S seeds on N items, S at least 1.

    Seeds and items are crossed, each a sample: the variance of the mean is that of the items' mean effects / N, plus that of
    the seeds' scores / S, less what both count, the variance of what is left / (S N) (two-way random effects, Searle, Casella &
    McCulloch 1992, chapter 4). Its degrees of freedom are Satterthwaite's (1946, Biometrics Bulletin 2(6)). With 3 seeds they are
    near 2 where the seeds differ more than the items explain: the interval is then some 4 standard errors to either side,
    and that is what 3 seeds can say. Resampling 3 seeds instead gives intervals that are far too short there.

    Scores on the scale `log` are averaged as their logarithms.
    """
    count, items = len(seeds), len(seeds[0].stats_NK)
    scale = seeds[0].scale
    values_S, effects_SN = (np.array(part) for part in zip(*(_jackknife(seed) for seed in seeds), strict=True))
    effects_N = effects_SN.mean(axis=0)
    of_items = float((effects_N**2).sum()) / _pairs(items)
    of_seeds = seeds_spread = 0.0
    if count > 1:
        of_means = float(values_S.var(ddof=1)) / count
        of_both = float(((effects_SN - effects_N) ** 2).sum()) / ((count - 1) * count * _pairs(items))
        of_seeds, seeds_spread = max(of_means - of_both, 0.0), of_means**2 / (count - 1)
    value = float(values_S.mean())
    weights_N = np.abs(np.mean([seed.stats_NK for seed in seeds], axis=0)).sum(axis=1)
    worth = float(weights_N.sum() ** 2 / (weights_N**2).sum()) if weights_N.any() else float(items)  # Kish 1965, section 11.7
    return _Estimate(
        value=math.exp(value) if scale == "log" else value,
        effects_N=effects_N,
        of_items=of_items,
        of_seeds=of_seeds,
        seeds_spread=seeds_spread,
        equal_items=worth,
        scale=scale,
    )


def _pairs(items: int) -> int:
    """N (N - 1): what squared effects are divided by for the variance of the score; 1 for a single item, whose effect is 0."""
    return items * max(items - 1, 1)


def _degrees(of_items: float, items: int, found: list[_Estimate]) -> float:
    """Satterthwaite's degrees of freedom of the sum of the variances of items and of the seeds of each estimate; at least 1."""
    at_most = float(max(items - 1, 1))
    units = [_unit(one) ** 2 for one in found] if len(found) > 1 else [1.0]
    variance = of_items + sum(unit * one.of_seeds for unit, one in zip(units, found, strict=True))
    spread = of_items**2 / at_most
    spread += sum(unit**2 * one.seeds_spread for unit, one in zip(units, found, strict=True))
    return min(max(variance**2 / spread, 1.0), at_most) if spread > 0 else at_most


def _jackknife(items: Items) -> tuple[float, Array]:
    """The score, or its logarithm on the scale `log`, and what each item adds to it, times N - 1 and with mean 0: [N]."""
    stats_NK = items.stats_NK
    value = items.value
    if len(stats_NK) < 2:
        return math.log(value) if items.scale == "log" else value, np.zeros(len(stats_NK))
    without_N = items.reduce(stats_NK.sum(axis=0) - stats_NK)
    if items.scale == "log":
        value, without_N = math.log(value), np.log(without_N)
    return value, (len(stats_NK) - 1) * (without_N.mean() - without_N)


def _bounds(found: _Estimate, t: float) -> tuple[float, float]:
    """The ends of a score's interval, t standard errors away."""
    value = found.value
    if found.scale == "log":
        factor = math.exp(t * math.sqrt(found.variance))
        return value / factor, value * factor
    if found.scale == "linear":
        half = t * math.sqrt(found.variance)
        return value - half, value + half
    spread = value * (1 - value)
    varies = found.variance > _NO_VARIANCE and spread > _NO_VARIANCE
    return _wilson(value, spread / found.variance if varies else found.equal_items, t)


def _wilson(share: float, items: float, quantile: float) -> tuple[float, float]:
    """Wilson's score interval (1927) of a share of so many items."""
    shift = quantile**2 / items
    middle = (share + shift / 2) / (1 + shift)
    half = quantile / (1 + shift) * math.sqrt(max(share * (1 - share), 0.0) / items + shift / (4 * items))
    return max(0.0, min(middle - half, share)), min(1.0, max(middle + half, share))


def _combined(one: float, other: float, correlation: float) -> float:
    return math.sqrt(max(one**2 - 2 * correlation * one * other + other**2, 0.0))


def _unit(found: _Estimate) -> float:
    """What turns effects and standard errors into the score's own unit: a change of the logarithm times the value."""
    return found.value if found.scale == "log" else 1.0


def _items_variance_of_difference(tuned: _Estimate, base: _Estimate) -> float:
    """What the choice of the items gives tuned - base, with two more items that differ where scores are in [0, 1]."""
    items = len(tuned.effects_N)
    apart_N = _unit(tuned) * tuned.effects_N - _unit(base) * base.effects_N
    variance = float((apart_N**2).sum()) / _pairs(items)
    if tuned.scale == "share":
        variance += 2 * _size(apart_N + tuned.value - base.value, apart_N) ** 2 / items**2
    return variance


def _correlation(tuned: _Estimate, base: _Estimate, of_difference: float) -> float:
    """Of the two estimates, from what the items give each and the difference; 0 where one does not vary."""
    each = [_unit(one) ** 2 * one.variance for one in (tuned, base)]
    if min(each) <= (_NO_VARIANCE if tuned.scale == "share" else 0.0):
        return 0.0
    of_items = sum(_unit(one) ** 2 * one.of_items for one in (tuned, base))
    return min(max((of_items - of_difference) / (2 * math.sqrt(each[0] * each[1])), -1.0), 1.0)


def _size(differences_N: Array, centred_N: Array) -> float:
    """By how much the models differ on an item where they do; 1, a whole item, where they differ on none.

    Measured from 0 it is 1 for items that are right or wrong. Differences that are all alike would count whole; so they are
    also measured from their mean, where twice the size is 1 for items of which some differ by 1 and the others not at all.
    """

    def typical(values_N: Array) -> float:
        whole = float(np.abs(values_N).sum())
        return float((values_N**2).sum()) / whole if whole > 1e-9 else 0.0

    return min(typical(differences_N), 2 * typical(centred_N)) if np.abs(differences_N).sum() > 1e-9 else 1.0


_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(64)


@lru_cache(maxsize=1024)
def t_quantile(degrees: float, level: float) -> float:
    """The t with P(|T| < t) = level, of Student's T with so many degrees of freedom (any number from 1 on).

    With T = sqrt(degrees) tan(angle) the density is cos(angle)^(degrees - 1), up to its integral; integrated by Gauss-Legendre
    and bisected. Above 10,000 degrees that of 10,000 is given (0.02 % above the normal distribution's).
    """
    degrees = min(degrees, 10_000.0)
    whole = math.exp(0.5 * math.log(math.pi) + math.lgamma(degrees / 2) - math.lgamma((degrees + 1) / 2)) / 2
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        angles = middle / 2 * (_NODES + 1)
        inside = middle / 2 * float(np.dot(_WEIGHTS, np.cos(angles) ** (degrees - 1))) / whole
        low, high = (middle, high) if inside < level else (low, middle)
    return math.sqrt(degrees) * math.tan(low)
