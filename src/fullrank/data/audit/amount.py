"""Amount: whether there is enough data for the size of the model, for its labels, and for what is to be read off at the end.

Rules of thumb, each with its source, never a promise: below them published work either did not go or found results that depend on
chance. The audit warns where a rule is missed by far and notes where it is missed; it never stops a run for it.

Promises: the numbers given are the numbers judged, so a finding can be checked by hand. What makes up for little data (its
quality, how near it is to what the model knows) is not seen here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from fullrank.records import Finding, Severity
from fullrank.units import format_count, plural

#: Models called 7B have 6.6 (Llama) to 7.7 (Qwen) billion parameters.
_LARGE = 6.5e9

#: Consistently labelled examples that full fine-tuning from 7B on is usually advised to have; a rule of practice.
_LARGE_EXAMPLES = 10_000

#: LIMA (Zhou et al. 2023, section 2): 1,000 curated examples of about 750,000 tokens in all taught a 65B model the manner of its
#: answers, not new knowledge. Fewer, for a large model, is less than the least that is known to have worked.
_LIMA_EXAMPLES = 1_000

#: From LIMA's 750,000 tokens at 65 billion parameters: parameters for each token.
_PARAMETERS_PER_TOKEN = 65e9 / 750e3

#: Around a thousand examples, what full fine-tuning ends in depends on the seed (Dodge et al. 2020, Fine-Tuning Pretrained
#: Language Models; Zhang et al. 2021, Revisiting Few-sample BERT Fine-tuning). A tenth of that misses the rule by far.
_FEW = 1_000
_VERY_FEW = 100

#: Examples a label: few-shot intent detection is measured at 10 and at 30 (Casanueva et al. 2020, Efficient Intent Detection with
#: Dual Sentence Encoders), and both stay behind the 130 of the full set.
_PER_LABEL_LEAST = 10
_PER_LABEL = 30

#: Half widths of the 95 % interval, in points, that make a score useless for telling two models apart, and coarse.
_USELESS = 10.0
_COARSE = 5.0


def conclude(
    train_records: int,
    supervised_tokens: int,
    validation_records: int,
    tests: Mapping[str, int],
    parameters: int,
    labels: int | None,
) -> list[Finding]:
    """`too_little_data` findings; none of them names records, since what is meant are those that are missing.

    Args:
        train_records: records trained on.
        supervised_tokens: their tokens that carry loss.
        validation_records: records validated on.
        tests: test set's name -> its records.
        parameters: of the model.
        labels: how many labels the answers are, None where the data is no labelling task.
    """
    return [
        *_training(train_records, supervised_tokens, parameters, labels),
        *_labels(train_records, labels),
        *_measured("validation", validation_records, "the step to keep is chosen by it"),
        *(finding for name, records in tests.items() for finding in _measured(name, records, "the report's scores come from it")),
    ]


def half_width(records: int) -> float:
    """Half the 95 % interval of a share of right answers at its widest, in points: 1.96 sqrt(0.25 / n), as at p = 0.5.

    Miller 2024, Adding Error Bars to Evals. Below a few hundred records the true interval is wider still (Bowyer et al. 2025,
    Don't Use the CLT in LLM Evals With Fewer Than a Few Hundred Datapoints).
    """
    return 100 * 1.96 * math.sqrt(0.25 / records)


def _training(records: int, tokens: int, parameters: int, labels: int | None) -> Iterator[Finding]:
    model = f"a model of {format_count(parameters)} parameters"
    if parameters >= _LARGE and records < _LARGE_EXAMPLES:
        yield _finding(
            "warning" if records < _LIMA_EXAMPLES else "note",
            records,
            f"{plural(records, 'training record')} for {model}: from 7B on, {_LARGE_EXAMPLES:,} consistently labelled ones are "
            f"the rule; {_LIMA_EXAMPLES:,} curated ones taught 65B a manner of answering (LIMA, Zhou et al. 2023), no knowledge",
            "collect more, take a smaller model, or compare with LoRA, which has less to overfit with",
        )
    elif records < _FEW:
        yield _finding(
            "warning" if records < _VERY_FEW else "note",
            records,
            f"{plural(records, 'training record')}: below about {_FEW:,} the result of full fine-tuning depends on the seed "
            "(Dodge et al. 2020, Zhang et al. 2021)",
            "collect more, or train with several seeds and compare",
        )
    # A label is a handful of tokens however well it is learned: there, records for each label are what counts.
    if labels is None and tokens * _PARAMETERS_PER_TOKEN < parameters:
        yield _finding(
            "note",
            records,
            f"{plural(tokens, 'supervised token')} for {model}: fewer for its size than the 750,000 that LIMA had for 65B "
            f"(here {format_count(math.ceil(parameters / _PARAMETERS_PER_TOKEN))})",
            "collect more, or write fuller answers",
        )


def _labels(records: int, labels: int | None) -> Iterator[Finding]:
    if not labels or records >= _PER_LABEL * labels:
        return
    yield _finding(
        "warning" if records < _PER_LABEL_LEAST * labels else "note",
        records,
        f"{records / labels:.0f} training records for each of {plural(labels, 'label')}: accuracy still climbs from "
        f"{_PER_LABEL_LEAST} to {_PER_LABEL} and beyond (Casanueva et al. 2020)",
        f"collect at least {_PER_LABEL} for each label, or merge labels",
    )


def _measured(name: str, records: int, use: str) -> Iterator[Finding]:
    if records < 1 or half_width(records) <= _COARSE:
        return
    width = half_width(records)
    enough = math.ceil(0.25 * (196 / _COARSE) ** 2)
    yield _finding(
        "warning" if width > _USELESS else "note",
        records,
        f"{plural(records, 'record')} in {name}: a share of right answers is known to ± {width:.0f} points at best, and {use}",
        f"hold out {enough:,} records for ± {_COARSE:.0f} points, or read differences smaller than that as chance",
    )


def _finding(severity: Severity, records: int, what: str, advice: str) -> Finding:
    return Finding(kind="too_little_data", severity=severity, what=what, records=[], count=records, advice=advice)
