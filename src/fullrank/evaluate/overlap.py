"""BLEU and chrF as sacrebleu computes them (Post 2018, "A Call for Clarity in Reporting BLEU Scores"; extra `bleu`).

sacrebleu's own statistics of each item are kept, and its own function turns their sum into a score, so that the score over all
items is its corpus score, and that of a resample is what it would say of the resampled corpus. Ratios in [0, 1]: a hundredth of
the numbers it prints.

BLEU (Papineni et al. 2002) asks for all four n-gram orders, which a text of three words does not have; `effective_order` leaves
out the orders that no answer has. It changes nothing where any answer has four words, and lets a short answer have a score of its
own.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from fullrank.errors import DataError, missing_extra
from fullrank.evaluate.items import Array, Items, place
from fullrank.recipe import Task


def overlap(task: Task, expected: Sequence[str], given: Sequence[str | None], places: Sequence[str]) -> Items:
    """BLEU or chrF of answers; one that the task's pattern does not match counts as empty.

    Raises:
        DataError: an empty reference.
        UsageError: sacrebleu is not installed.
    """
    try:
        library: Any = importlib.import_module("sacrebleu.metrics")
    except ImportError:
        raise missing_extra("sacrebleu", "bleu", f"the task {task.key} ({task.metric})") from None
    for number, reference in enumerate(expected):
        if not reference.strip():
            raise DataError(f"{place(places, number)}: task {task.key}: the reference is empty, so no n-gram can be compared")
    # force: a text that ends in " ." is as the model wrote it
    metric: Any = (
        library.BLEU(tokenize=task.tokenize, effective_order=True, force=True) if task.metric == "bleu" else library.CHRF()
    )
    stats_NK = metric._extract_corpus_statistics([answer or "" for answer in given], [list(expected)])
    stats = np.asarray(stats_NK, np.float64)
    return Items(stats, partial(_reduced, metric), scale="share", signature=str(metric.get_signature()))


def _reduced(metric: Any, sums: Array) -> Array:
    rows = sums.reshape(-1, sums.shape[-1])
    scores = [metric._compute_score_from_stats([round(value) for value in row]).score / 100 for row in rows.tolist()]
    return np.minimum(np.asarray(scores, np.float64), 1.0).reshape(sums.shape[:-1])  # exp(log 100) is a little above 100
