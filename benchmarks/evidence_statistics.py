"""How often the intervals of scores cover the truth, and how often the tests cry wolf, on simulated test sets.

    python benchmarks/evidence_statistics.py

Test sets are drawn from populations whose score is known exactly; every interval and p-value is the shipped code's, and the plain
percentile bootstrap, on the same sets, stands beside it (its draws of items are shared by the sets of a cell, which makes no
interval other than it would be alone). Writes `results/evidence-statistics.json`. One core, some minutes.

Populations: `accuracy` has right and wrong items. `f1` and `f1_macro` have sets of four labels, the rarest on 15 % of the items,
with an ability an item that makes its labels right or wrong together; false positives are as many as false negatives, so that
each label's F1 is its recall. `rouge_l` has scores spread over [0, 1]; `rouge_l_exact` mostly exact answers (or, below 0.5,
mostly worthless ones) and some partial. Every score is a function of one uniform number an item (and label), which two
models share on some of the items.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from record import target, write

from fullrank.evaluate.metrics import Array, Items, score
from fullrank.evaluate.significance import p_value
from fullrank.evaluate.statistics import interval, paired_difference
from fullrank.recipe import Task

METRICS = ("accuracy", "f1", "f1_macro", "rouge_l", "rouge_l_exact")
TRUTHS = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95)
SETS = {60: 2000, 200: 2000, 1000: 1000}  # simulated test sets a cell, by items
#: True scores of two models, and the share of items on which one uniform number decides both.
PAIRS = ((0.05, 0.05, 0.5), (0.5, 0.5, 0.8), (0.9, 0.95, 0.5), (0.25, 0.75, 0.5), (0.05, 0.95, 0.5), (0.5, 0.6, 0.0))
NULLS = ((0.05, 0.3), (0.5, 0.5), (0.9, 0.5))  # true score of both models, and the share of items as above
RESAMPLES = 1000
DRAWS = 199  # of the permutation test; (199 + 1) * 0.05 is whole, so that the level can be met exactly
LOWEST, HIGHEST, LEVEL = 0.93, 0.97, 0.055


# ---- populations ----------------------------------------------------------------------------------------------------


@lru_cache
def beta(mean: float, concentration: float) -> Array:
    """The quantiles of a Beta distribution as a table; the table itself is the population, its mean is exact."""
    return np.sort(np.random.default_rng(5).beta(concentration * mean, concentration * (1 - mean), 200_001))


def looked_up(table: Array, uniform: Array) -> Array:
    return table[(uniform * len(table)).astype(np.int64)]


@dataclass(frozen=True)
class Drawn:
    """Test sets [sets, items, K] of one model, with the true score."""

    stats: Array
    truth: float
    reduce: Callable[[Array], Array]

    def items(self) -> Iterator[Items]:
        return (Items(stats, self.reduce, scale="share") for stats in self.stats)


PREVALENCE = np.array([0.4, 0.3, 0.2, 0.15])


@lru_cache
def reduces(metric: str) -> Callable[[Array], Array]:
    """The shipped function from sums to the score."""
    if metric.startswith("f1"):
        names = [f"l{number}" for number in range(len(PREVALENCE))]
        return score(Task(metric="f1"), names, names)[metric].reduce
    return score(Task(metric="exact_match"), ["a"], ["a"])["exact_match"].reduce


def means(metric: str, mean: float, uniform: Array) -> Drawn:
    """Items whose score is the mean of numbers in [0, 1]."""
    if metric == "accuracy":
        values, truth = (uniform < mean).astype(np.float64), mean
    elif metric == "rouge_l":
        table = beta(mean, 4.0)
        values, truth = looked_up(table, uniform), float(table.mean())
    elif metric == "rare":  # half of the items near the mean, the other half right or wrong
        table = beta(mean, 4.0)
        values = np.where(uniform < 0.5, uniform < mean / 2, looked_up(table, np.clip(2 * uniform - 1, 0, 1 - 1e-12)))
        truth = (mean + float(table.mean())) / 2
    else:
        away = min(mean, 1 - mean)  # from what most items score
        table = beta(max(0.3, away), 6.0)
        share = away / max(0.3, away)
        from_top = uniform if mean > 0.5 else 1 - uniform - 2**-54
        values = np.where(from_top < share, looked_up(table, np.clip(from_top / share, 0, 1 - 1e-12)), 0.0)
        truth = share * float(table.mean())
        if mean > 0.5:
            values, truth = 1 - values, 1 - truth
    return Drawn(np.stack([values, np.ones_like(values)], axis=-1), truth, reduces("accuracy"))


def label_sets(metric: str, mean: float, has: Array, uniform: Array, ability: Array, prevalence: Array = PREVALENCE) -> Drawn:
    """Items with sets of labels; recalls differ by label, their mean is `mean`."""
    recalls = mean * (1 + min(0.3, 0.5 * (1 - mean) / mean) * np.array([-1, 0.5, 1, -0.5]))
    table = beta(mean, 3.0)
    able, middle = looked_up(table, ability)[..., None], float(table.mean())
    recall = np.where(recalls <= middle, able * recalls / middle, 1 - (1 - able) * (1 - recalls) / (1 - middle))
    true = has & (uniform < recall)
    false = ~has & (uniform > 1 - prevalence / (1 - prevalence) * (1 - recall))
    counts = np.stack([true, false, has & ~true], axis=-1).astype(np.float64)
    if metric == "f1":
        return Drawn(counts.sum(axis=2), float(prevalence @ recalls / prevalence.sum()), reduces(metric))
    outside = np.zeros((*counts.shape[:2], 1))
    flat = np.concatenate([counts.reshape(*counts.shape[:2], -1), outside], axis=-1)
    return Drawn(flat, float(recalls.mean()), reduces(metric))


def two_models(
    random: np.random.Generator,
    metric: str,
    sets: int,
    items: int,
    true: tuple[float, ...],
    shared: float,
    prevalence: Array = PREVALENCE,
) -> list[Drawn]:
    """One model for each true score, on the same items; on the `shared` items one number decides all."""
    labels = (len(prevalence),) if metric.startswith("f1") else ()
    same = random.random((sets, items)) < shared
    has = random.random((sets, items, *labels)) < prevalence if labels else np.empty(0)
    common, able = random.random((sets, items, *labels)), random.random((sets, items))
    drawn = []
    for mean in true:
        own = np.where(same[..., None] if labels else same, common, random.random(common.shape))
        if labels:
            ability = np.where(same, able, random.random(able.shape))
            drawn.append(label_sets(metric, mean, has, own, ability, prevalence))
        else:
            drawn.append(means(metric, mean, own))
    return drawn


# ---- measures -------------------------------------------------------------------------------------------------------


def share_covered(lows_highs: list[tuple[float, float]], truth: float) -> float:
    return float(np.mean([low - 1e-9 <= truth <= high + 1e-9 for low, high in lows_highs]))


def percentile(random: np.random.Generator, drawn: list[Drawn]) -> list[tuple[float, float]]:
    """Percentile bootstrap intervals of a score, or of the second's less the first's."""
    items = drawn[0].stats.shape[1]
    counts = random.multinomial(items, np.full(items, 1 / items), size=RESAMPLES).astype(np.float64)
    found = []
    for first in range(0, len(drawn[0].stats), 200):
        scores = []
        for model in drawn:
            stats = model.stats[first : first + 200]
            sums = counts @ stats.transpose(1, 0, 2).reshape(items, -1)
            scores.append(model.reduce(sums.reshape(RESAMPLES, *stats.shape[::2])))
        low, high = np.quantile(scores[-1] - scores[0] if len(scores) > 1 else scores[0], [0.025, 0.975], axis=0)
        found += list(zip(low, high, strict=True))
    return found


def cell(
    random: np.random.Generator, metric: str, items: int, true: tuple[float, ...], shared: float, **more: Any
) -> dict[str, Any]:
    """Coverage of a score, or of a difference of two."""
    sets = SETS[items]
    drawn = two_models(random, metric, sets, items, true, shared, **more)
    if len(drawn) == 1:
        truth = drawn[0].truth
        found = [interval(one) for one in drawn[0].items()]
    else:
        truth = drawn[1].truth - drawn[0].truth
        found = [paired_difference(tuned, base) for base, tuned in zip(drawn[0].items(), drawn[1].items(), strict=True)]
    plain = percentile(random, drawn)
    return {
        "metric": metric,
        "items": items,
        "true": [round(one.truth, 4) for one in drawn],
        "shared": shared,
        "coverage": share_covered([(one.low, one.high) for one in found], truth),
        "percentile": share_covered(plain, truth),
        "width": round(float(np.mean([one.high - one.low for one in found])), 4),
        "percentile_width": round(float(np.mean([high - low for low, high in plain])), 4),
        "monte_carlo_error": round(float(np.sqrt(0.95 * 0.05 / sets)), 4),
    }


def rejected(random: np.random.Generator, metric: str, items: int, true: tuple[float, float], shared: float) -> dict[str, Any]:
    """How often the permutation test calls a difference significant at 0.05."""
    sets = SETS[items]
    base, tuned = two_models(random, metric, sets, items, true, shared)
    values = [
        p_value(one, other, draws=DRAWS, seed=number)
        for number, (one, other) in enumerate(zip(tuned.items(), base.items(), strict=True))
    ]
    rate = float(np.mean(np.array(values) <= 0.05))
    return {"metric": metric, "items": items, "true": list(true), "shared": shared, "sets": sets, "rejected": rate}


def seeds_cell(random: np.random.Generator, seeds: int, items: int, centre: float, between: float) -> dict[str, Any]:
    """Accuracy of seeds on the same items: logits are `centre` + seed + item, of standard deviations `between` and 1.5."""
    sets = 1000
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    both = np.sqrt(1.5**2 + between**2)  # the sum of the two is normal, too: one Gauss-Hermite sum gives the truth
    truth = float((weights / (1 + np.exp(-centre - both * nodes))).sum() / weights.sum())
    reduce = reduces("accuracy")
    of_seeds = random.multinomial(seeds, np.full(seeds, 1 / seeds), size=RESAMPLES) / seeds
    of_items = random.multinomial(items, np.full(items, 1 / items), size=RESAMPLES) / items
    ours, first, plain = [], [], []
    for _ in range(sets):
        logits = centre + random.normal(0, 1.5, items) + random.normal(0, between, (seeds, 1))
        right = (random.random((seeds, items)) < 1 / (1 + np.exp(-logits))).astype(np.float64)
        runs = [Items(np.column_stack([row, np.ones(items)]), reduce, scale="share") for row in right]
        one, only = interval(runs), interval(runs[0])
        ours.append((one.low, one.high))
        first.append((only.low, only.high))
        plain.append(tuple(np.quantile(((of_seeds @ right) * of_items).sum(axis=1), [0.025, 0.975])))
    return {
        "seeds": seeds,
        "items": items,
        "true": round(truth, 4),
        "between_seeds": between,
        "coverage": share_covered(ours, truth),
        "two_level_bootstrap": share_covered(plain, truth),
        "one_seed_alone": share_covered(first, truth),
        "width": round(float(np.mean([high - low for low, high in ours])), 4),
        "monte_carlo_error": round(float(np.sqrt(0.95 * 0.05 / sets)), 4),
    }


def main() -> None:
    """Simulates all cells and writes the result."""
    started = time.process_time()
    random = np.random.default_rng(20)
    scores = [cell(random, metric, items, (true,), 0.0) for metric in METRICS for items in SETS for true in TRUTHS]
    print(f"scores: {time.process_time() - started:.0f} s", flush=True)
    differences = [
        cell(random, metric, items, (base, tuned), shared)
        for metric in METRICS
        for items in SETS
        for base, tuned, shared in PAIRS
    ]
    print(f"differences: {time.process_time() - started:.0f} s", flush=True)
    level = [
        rejected(random, metric, items, (true, true), shared) for metric in METRICS for items in SETS for true, shared in NULLS
    ]
    power = [rejected(random, metric, 200, (0.5, 0.6), 0.5) for metric in METRICS]
    print(f"tests: {time.process_time() - started:.0f} s", flush=True)
    seeds = [
        seeds_cell(random, count, 200, centre, between)
        for count in (3, 5)
        for centre, between in ((0.0, 0.0), (0.0, 0.3), (2.5, 0.3), (2.5, 0.6))
    ]
    beyond = [
        {"what": "rare large errors among many small ones"} | cell(random, "rare", 60, (0.95,), 0.0),
        {"what": "one label on 10 % of 60 items"}
        | cell(random, "f1_macro", 60, (0.95,), 0.0, prevalence=np.array([0.4, 0.3, 0.2, 0.1])),
        {"what": "models that differ on about 2 of 60 items, all one way"} | cell(random, "f1", 60, (0.5, 0.52), 1.0),
    ]
    figures = {
        "populations": __doc__.split("\n\n")[-1].replace("\n", " ").strip(),
        "level": 0.95,
        "scores": scores,
        "differences": differences,
        "tests": {"null": level, "power_0.5_to_0.6": power, "draws": DRAWS},
        "seeds": seeds,
        "beyond_what_it_can": beyond,
        "process_seconds": round(time.process_time() - started),
    }
    path = write("evidence-statistics", figures, list(targets(scores, differences, level, seeds)))
    print(f"wrote {path}")


def targets(scores: list[Any], differences: list[Any], level: list[Any], seeds: list[Any]) -> Iterator[dict[str, Any]]:
    """Worst cells over all and by metric; the highest coverage only where neither end of [0, 1] is near."""
    for name, cells in (("scores", scores), ("differences", differences)):
        for metric in ("all metrics", *METRICS):
            chosen = [one for one in cells if metric in ("all metrics", one["metric"])]
            lowest = min(one["coverage"] for one in chosen)
            plain = min(one["percentile"] for one in chosen)
            words = f"lowest coverage of 95 % intervals of {name}, {metric} (percentile bootstrap: {plain:.3f})"
            yield target(words, LOWEST, lowest, "ratio", at_most=False)
    inside = [one["coverage"] for one in scores if 0.2 < one["true"][0] < 0.8]
    yield target("highest coverage of 95 % intervals of scores between 0.2 and 0.8", HIGHEST, max(inside), "ratio", at_most=True)
    for metric in METRICS:
        chosen = [one for one in level if one["metric"] == metric]
        rate = sum(one["rejected"] * one["sets"] for one in chosen) / sum(one["sets"] for one in chosen)
        yield target(f"level of the permutation test at 0.05, {metric}, all cells", LEVEL, round(rate, 4), "ratio", at_most=True)
    for items, sets in SETS.items():
        worst = max(one["rejected"] for one in level if one["items"] == items)
        noise = float(np.sqrt(0.05 * 0.95 / sets))
        words = f"level of the permutation test at 0.05, worst cell of {items} items (Monte-Carlo error {noise:.4f})"
        yield target(words, LEVEL, worst, "ratio", at_most=True)
    for count in (3, 5):
        lowest = min(one["coverage"] for one in seeds if one["seeds"] == count)
        plain = min(one["two_level_bootstrap"] for one in seeds if one["seeds"] == count)
        words = f"lowest coverage of 95 % intervals over {count} seeds and 200 items (two-level bootstrap: {plain:.3f})"
        yield target(words, LOWEST, lowest, "ratio", at_most=False)


if __name__ == "__main__":
    main()
