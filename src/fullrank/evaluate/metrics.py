"""Scores of answers against references, item by item.

A score is a function of sums: each item contributes a row of statistics (hits and misses, losses and tokens), and the
score is computed from the rows' sum. So the score of any resample of the items costs one weighted sum, and so does
the score without one item, which is what makes intervals (`fullrank.evaluate.statistics`) cheap; an item's own score is the
metric over it alone.

Texts are compared as they are, white space around them aside; labels are compared without regard to case. Nothing here
generates answers or knows a model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fullrank.errors import DataError, missing_extra
from fullrank.recipe import Task

Array = NDArray[np.float64]

#: Where a score lives: in [0, 1]; without bounds; above 0, with errors that multiply. Intervals are computed by it.
Scale = Literal["share", "linear", "log"]


@dataclass(frozen=True)
class Items:
    """One score's statistics over N items.

    Args:
        stats_NK: K sufficient statistics of each item.
        reduce: sums of statistics [..., K] -> scores [...].
        scale: where the score lives.
    """

    stats_NK: Array
    reduce: Callable[[Array], Array]
    scale: Scale = "linear"

    @property
    def value(self) -> float:
        """The score over all items."""
        return float(self.reduce(self.stats_NK.sum(axis=0)))

    @property
    def per_item(self) -> list[float]:
        """The score of each item alone."""
        return [float(score) for score in self.reduce(self.stats_NK)]


def score(task: Task, references: Sequence[str], answers: Sequence[str], places: Sequence[str] = ()) -> dict[str, Items]:
    """The scores of a task: one, named `task.key`; f1 brings the macro average as `<key>_macro` with it.

    Where the task has a pattern, what is scored is the first group of its first match in the text. An answer that it
    does not match is wrong: exact_match and rouge_l score it 0, f1 takes it as one label that is in no reference.

    * exact_match: share of answers that equal their reference, white space around both aside.
    * f1: over sets of labels, parsed by `labels`. Micro: 2 tp / (2 tp + fp + fn) of the true positives, false positives
      and false negatives counted over all items (Lewis et al. 2004, RCV1); 1 where all three are 0, that is where every
      set is empty and every answer right. Macro: the mean of each label's own F1 ("averaged F1" in Opitz & Burst 2019)
      over the labels that occur in the references. A label that occurs in answers only lowers the micro score but has
      no F1 of its own, so that two models are averaged over the same labels. Where the references hold no label at all,
      macro is 1 if the answers hold none either, else 0.
    * rouge_l: mean over the items of the F-measure of the longest common subsequence of words (Lin 2004, section 3), as
      the package rouge_score computes it without stemming; its words are runs of a-z and 0-9 in lower case.

    Args:
        references: what each of the N answers should be.
        answers: the N generated answers.
        places: where each reference stands (file:line), for messages; its number by default.

    Raises:
        DataError: the pattern does not match a reference, or ROUGE-L finds no word in one.
        UsageError: rouge_l without the `rouge` extra.
        ValueError: no items, or lists of different lengths.
    """
    if not references or len(references) != len(answers):
        raise ValueError(f"{len(references)} references and {len(answers)} answers; both must be of one length, at least 1")
    expected: list[str] = []
    for number, reference in enumerate(references):
        part = _scored_part(task, reference)
        if part is None:
            raise DataError(
                f"{_place(places, number)}: task {task.key}: the pattern {task.pattern!r} does not match the reference "
                f"{_shortened(reference)!r}",
                hint="correct the task's `pattern`, or the test record",
            )
        expected.append(part)
    given = [_scored_part(task, answer) for answer in answers]
    if task.metric == "exact_match":
        return {task.key: _mean([float(e == g) for e, g in zip(expected, given, strict=True)])}
    if task.metric == "f1":
        return _set_f1(task, expected, given)
    return {task.key: _rouge_l(task, expected, given, places)}


def loss_items(loss_sums_N: Sequence[float], tokens_N: Sequence[int]) -> dict[str, Items]:
    """`validation_loss` (nats per supervised token, every token weighing the same) and `perplexity`, its exponential.

    Args:
        loss_sums_N: sum of each example's token losses, nats.
        tokens_N: each example's supervised tokens.

    Raises:
        ValueError: no examples, lists of different lengths, or an example without supervised tokens.
    """
    if not len(loss_sums_N) or len(loss_sums_N) != len(tokens_N) or min(tokens_N) < 1:
        raise ValueError("every example needs its loss and at least one supervised token, and there must be one")
    stats_NK = np.column_stack([np.asarray(loss_sums_N, np.float64), np.asarray(tokens_N, np.float64)])
    return {
        "validation_loss": Items(stats_NK, _ratio),
        "perplexity": Items(stats_NK, lambda sums: np.exp(_ratio(sums)), scale="log"),
    }


def labels(task: Task, text: str) -> frozenset[str]:
    """The set of labels in a text, case-folded: the matches of `label_pattern`, or else the parts between separators, trimmed,
    without `none` and blanks."""
    if task.label_pattern is not None:
        return frozenset(match[0].casefold() for match in re.finditer(task.label_pattern, text))
    parts = {part.strip().casefold() for part in text.split(task.separator)}
    return frozenset(parts - {"", task.none.strip().casefold()})


def _scored_part(task: Task, text: str) -> str | None:
    """What of a text is scored; None where the pattern does not match."""
    if task.pattern is None:
        return text.strip()
    match = re.search(task.pattern, text)
    return match[1].strip() if match and match[1] is not None else None


def _ratio(sums: Array) -> Array:
    return np.asarray(sums[..., 0] / sums[..., 1])


def _mean(scores: Sequence[float]) -> Items:
    """The mean of one number in [0, 1] an item, as the ratio of two sums."""
    return Items(np.column_stack([np.asarray(scores, np.float64), np.ones(len(scores))]), _ratio, scale="share")


# ---- set F1 ---------------------------------------------------------------------------------------------------------

#: What an answer holds that the pattern does not match. No parsed label equals it, since they are case-folded.
_UNREADABLE = "UNREADABLE"


def _set_f1(task: Task, expected: list[str], given: list[str | None]) -> dict[str, Items]:
    wanted = [labels(task, text) for text in expected]
    found = [frozenset({_UNREADABLE}) if text is None else labels(task, text) for text in given]
    known = sorted(frozenset().union(*wanted))
    column = {label: index for index, label in enumerate(known)}
    counts_NL3 = np.zeros((len(wanted), len(known), 3))  # of each label: true positives, false positives, false negatives
    outside_N1 = np.zeros((len(wanted), 1))  # labels of the answer that occur in no reference
    for number, (want, find) in enumerate(zip(wanted, found, strict=True)):
        for kind, group in enumerate((want & find, find - want, want - find)):
            for label in group:
                if label in column:
                    counts_NL3[number, column[label], kind] += 1
                else:
                    outside_N1[number, 0] += 1
    micro_N3 = counts_NL3.sum(axis=1)
    micro_N3[:, 1] += outside_N1[:, 0]
    macro_NK = np.concatenate([counts_NL3.reshape(len(wanted), -1), outside_N1], axis=1)
    return {
        task.key: Items(micro_N3, _micro_f1, scale="share"),
        f"{task.key}_macro": Items(macro_NK, _macro_f1, scale="share"),
    }


def _f1(counts: Array, when_empty: float) -> Array:
    """F1 of counts [..., (tp, fp, fn)]; `when_empty` where all three are 0."""
    doubled = 2 * counts[..., 0]
    total = doubled + counts[..., 1] + counts[..., 2]
    return np.where(total > 0, doubled / np.where(total > 0, total, 1), when_empty)


def _micro_f1(sums: Array) -> Array:
    return _f1(sums, when_empty=1.0)


def _macro_f1(sums: Array) -> Array:
    """Mean F1 over the labels that occur in the references of the sums [..., (tp, fp, fn) a label and one outside]."""
    counts = sums[..., :-1].reshape(*sums.shape[:-1], -1, 3)
    occurs = counts[..., 0] + counts[..., 2] > 0
    labels_counted = occurs.sum(axis=-1)
    mean = (_f1(counts, when_empty=0.0) * occurs).sum(axis=-1) / np.maximum(labels_counted, 1)
    nothing_found = counts[..., 1].sum(axis=-1) + sums[..., -1] == 0
    return np.asarray(np.where(labels_counted > 0, mean, nothing_found), np.float64)


# ---- ROUGE-L --------------------------------------------------------------------------------------------------------


def _rouge_l(task: Task, expected: list[str], given: list[str | None], places: Sequence[str]) -> Items:
    try:
        from rouge_score import rouge_scorer
    except ImportError:
        raise missing_extra("rouge_score", "rouge", f"the task {task.key} (rouge_l)") from None
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)
    scores = []
    for number, (reference, answer) in enumerate(zip(expected, given, strict=True)):
        if not re.search("[a-z0-9]", reference.lower()):
            raise DataError(
                f"{_place(places, number)}: task {task.key}: ROUGE-L compares words of a-z and 0-9, and the reference "
                f"{_shortened(reference)!r} holds none",
                hint="score this text by exact_match, or correct the test record",
            )
        scores.append(float(scorer.score(reference, answer or "")["rougeL"].fmeasure))
    return _mean(scores)


# ---- messages -------------------------------------------------------------------------------------------------------


def _place(places: Sequence[str], number: int) -> str:
    return places[number] if places else f"test record {number + 1}"


def _shortened(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."
