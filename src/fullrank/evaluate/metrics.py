"""Scores of answers against references, item by item.

Each score is an `Items`: rows of statistics whose sum gives the score, so that intervals are cheap. Texts are compared as they
are, white space around them aside; labels are compared without regard to case. Nothing here generates answers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fullrank.errors import DataError, missing_extra
from fullrank.evaluate import structured
from fullrank.evaluate.custom import custom
from fullrank.evaluate.items import Array, Items, Scale, mean, place, ratio, shortened
from fullrank.evaluate.numeric import is_same, last_number
from fullrank.evaluate.overlap import overlap
from fullrank.recipe import Task
from fullrank.run import file_digest

__all__ = ["Array", "Items", "Scale", "digests", "labels", "loss_items", "score"]


def score(
    task: Task,
    references: Sequence[str],
    answers: Sequence[str],
    places: Sequence[str] = (),
    prompts: Sequence[str] = (),
) -> dict[str, Items]:
    """The scores of a task over generated answers: one, named `task.key`; some bring a second one, as `task.keys` has it.

    Where the task has a pattern, what is scored is the first group of its first match in the text. An answer that it
    does not match is wrong: it scores 0, f1 takes it as one label that is in no reference, bleu and chrf as an empty text, and a
    function of the user's is told an empty text.

    * exact_match: share of answers that equal their reference, white space around both aside.
    * f1: over sets of labels, parsed by `labels`. Micro: 2 tp / (2 tp + fp + fn) of the true positives, false positives
      and false negatives counted over all items (Lewis et al. 2004, RCV1); 1 where all three are 0, that is where every
      set is empty and every answer right. Macro: the mean of each label's own F1 ("averaged F1" in Opitz & Burst 2019)
      over the labels that occur in the references. A label that occurs in answers only lowers the micro score but has
      no F1 of its own, so that two models are averaged over the same labels. Where the references hold no label at all,
      macro is 1 if the answers hold none either, else 0.
    * rouge_l: mean over the items of the F-measure of the longest common subsequence of words (Lin 2004, section 3), as
      the package rouge_score computes it without stemming; its words are runs of a-z and 0-9 in lower case.
    * numeric: share of answers whose last number equals the reference's last number (Cobbe et al. 2021, GSM8K), by the rules of
      `fullrank.evaluate.numeric`. An answer without a number is wrong.
    * bleu, chrf: sacrebleu's corpus BLEU (Papineni et al. 2002) and chrF2 (Popović 2015), as ratios
      (`fullrank.evaluate.overlap`).
    * json_valid: share of answers that are JSON (RFC 8259), and valid against `json_schema` where there is one.
    * json_fields: of the references' leaf fields, the share that the answers have at the same path (keys, and places in lists)
      with an equal value, numbers being equal as numbers; every field weighs the same over all items. `<key>_whole`: share of
      answers that equal their reference altogether, fields that it does not have counting against it. An answer that is no JSON
      has no field.
    * python: mean of what the function returns for the items.

    Args:
        references: what each of the N answers should be.
        answers: the N generated answers.
        places: where each reference stands (file:line), for messages; its number by default.
        prompts: what each item was asked, for a function of the user's; empty texts by default.

    Raises:
        DataError: the pattern does not match a reference, or the metric cannot read one.
        UsageError: an extra is missing, a JSON Schema is none, or a function of the user's fails.
        ValueError: no items, or lists of different lengths.
    """
    if not references or len(references) != len(answers):
        raise ValueError(f"{len(references)} references and {len(answers)} answers; both must be of one length, at least 1")
    expected: list[str] = []
    for number, reference in enumerate(references):
        part = _scored_part(task, reference)
        if part is None:
            raise DataError(
                f"{place(places, number)}: task {task.key}: the pattern {task.pattern!r} does not match the reference "
                f"{shortened(reference)!r}",
                hint="correct the task's `pattern`, or the test record",
            )
        expected.append(part)
    given = [_scored_part(task, answer) for answer in answers]
    match task.metric:
        case "exact_match":
            return {task.key: mean([float(e == g) for e, g in zip(expected, given, strict=True)])}
        case "f1":
            return _set_f1(task, expected, given)
        case "rouge_l":
            return {task.key: _rouge_l(task, expected, given, places)}
        case "numeric":
            return {task.key: _numeric(task, expected, given, places)}
        case "bleu" | "chrf":
            return {task.key: overlap(task, expected, given, places)}
        case "json_valid":
            return {task.key: _json_valid(task, expected, given, places)}
        case "json_fields":
            return _json_fields(task, expected, given, places)
        case "python":
            return {task.key: custom(task, expected, given, prompts or [""] * len(expected), places)}
        case "choice":
            raise ValueError("choice compares likelihoods (fullrank.evaluate.choice), not answers")


def digests(task: Task) -> list[str]:
    """SHA-256 of the files that a task's scores depend on."""
    files = [task.json_schema, task.function.rpartition(":")[0] if task.function else None]
    return [file_digest(Path(file)) for file in files if file]


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
        "validation_loss": Items(stats_NK, ratio),
        "perplexity": Items(stats_NK, lambda sums: np.exp(ratio(sums)), scale="log"),
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
                f"{place(places, number)}: task {task.key}: ROUGE-L compares words of a-z and 0-9, and the reference "
                f"{shortened(reference)!r} holds none",
                hint="score this text by exact_match, or correct the test record",
            )
        scores.append(float(scorer.score(reference, answer or "")["rougeL"].fmeasure))
    return mean(scores)


# ---- numbers --------------------------------------------------------------------------------------------------------


def _numeric(task: Task, expected: list[str], given: list[str | None], places: Sequence[str]) -> Items:
    scores = []
    for number, (reference, answer) in enumerate(zip(expected, given, strict=True)):
        wanted, found = last_number(reference), last_number(answer or "")
        if wanted is None:
            raise DataError(
                f"{place(places, number)}: task {task.key}: there is no number in the reference {shortened(reference)!r}",
                hint="score this text by exact_match, or correct the test record (or the task's `pattern`)",
            )
        scores.append(float(found is not None and is_same(wanted, found)))
    return mean(scores)


# ---- JSON -----------------------------------------------------------------------------------------------------------


def _json_valid(task: Task, expected: list[str], given: list[str | None], places: Sequence[str]) -> Items:
    check = structured.schema_check(Path(task.json_schema), f"task {task.key}") if task.json_schema else lambda _: ""
    for number, reference in enumerate(expected):
        if against := check(_reference(task, reference, places, number)):
            raise DataError(
                f"{place(places, number)}: task {task.key}: the reference is not valid against {task.json_schema}: "
                f"{shortened(against)}",
                hint="correct the test record, or the schema",
            )

    def is_valid(answer: str | None) -> bool:
        try:
            return answer is not None and not check(structured.parse(answer))
        except structured.NotJson:
            return False

    return mean([float(is_valid(answer)) for answer in given])


def _json_fields(task: Task, expected: list[str], given: list[str | None], places: Sequence[str]) -> dict[str, Items]:
    stats_N2 = np.zeros((len(expected), 2))  # fields that are equal, fields of the reference
    whole = [0.0] * len(expected)
    for number, (text, answer) in enumerate(zip(expected, given, strict=True)):
        reference = _reference(task, text, places, number)
        stats_N2[number] = structured.fields(reference, reference)
        try:
            found = structured.parse(answer or "")
            stats_N2[number] = structured.fields(reference, found)
            whole[number] = float(structured.is_equal(reference, found))
        except (structured.NotJson, RecursionError):
            stats_N2[number, 0] = 0
    return {task.keys[0]: Items(stats_N2, ratio, scale="share"), task.keys[1]: mean(whole)}


def _reference(task: Task, text: str, places: Sequence[str], number: int) -> object:
    try:
        return structured.parse(text)
    except structured.NotJson as error:
        raise DataError(
            f"{place(places, number)}: task {task.key}: the reference {shortened(text)!r} is not JSON: {error}",
            hint="correct the test record, or give the task a `pattern` whose group holds the JSON",
        ) from None
