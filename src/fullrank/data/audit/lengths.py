"""Lengths: answers and prompts that are empty, a mere placeholder, or far shorter or longer than the rest.

What an answer is by itself (nothing but punctuation, `N/A`, a refusal, its own prompt again) is marked in the worker; how long it
is against all others is concluded from two columns of lengths in characters. A length is extreme by the modified z-score of its
logarithm (Iglewicz & Hoaglin 1993, How to Detect and Handle Outliers: 0.6745 (x - median) / MAD, beyond 3.5), and only where it
is eight times off the median too: the logarithm, because lengths of texts are skewed as log-normals are; the factor, because in
data of nearly equal lengths a few characters more are no matter. What a twentieth of the records have is no outlier but a second
sort of record, and is not reported.

In a labelling task a label is as long as it is, so only other answers are judged, and a placeholder that is as frequent as labels
are is a label. Raw text has no prompt; only its documents' lengths are looked at.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fullrank.data.audit.finding import SplitFacts
from fullrank.data.audit.labels import LabelSet, is_one_of, label_hash
from fullrank.data.subject import Subject
from fullrank.records import Finding, Place, Severity

#: Entries listed in one finding.
_MOST_RECORDS = 10_000

#: Marks of an answer, one bit each.
NOTHING = 1
PLACEHOLDER = 2
REFUSAL = 4
ECHO = 8
NO_PROMPT = 16
DOCUMENT = 32

#: Modified z-score beyond which a value is an outlier (Iglewicz & Hoaglin 1993).
_OUTLYING = 3.5

#: Times the median, or its fraction, that an extreme length is at least.
_FACTOR = 8.0

#: Share of the records up to which extreme lengths are outliers.
_OUTLIERS = 0.05

#: Fewer lengths have no distribution to be outside of.
_FEWEST = 20

#: Share of examples cut from which it is worth a word, and a warning: at a tenth, what the model learns is where answers are cut.
_CUT = 0.01
_CUT_MUCH = 0.1

#: What stands where an answer should, in lower case: from spreadsheets (#N/A), scripts (undefined), instruction sets (Alpaca has
#: <nooutput>) and templates. `none`, `no` and `unknown` are left out: they answer questions.
_PLACEHOLDERS = frozenset(
    [
        *("n/a", "#n/a", "n.a.", "n.a", "null", "nil", "nan", "undefined", "tbd", "tba", "tbc", "todo", "to do", "fixme", "xxx"),
        *("nooutput", "noinput", "no output", "no answer", "no response", "no content", "placeholder", "object object", "asdf"),
        *("answer here", "your answer here", "insert answer here", "text here", "your text here", "insert text here"),
        *("#ref!", "#value!", "#name?", "#div/0!", "lorem ipsum"),
    ]
)
#: Words that are a placeholder in brackets only: `[deleted]`, `<empty>`.
_IN_BRACKETS = frozenset(["deleted", "removed", "redacted", "blank", "empty", "missing", "none", "answer", "output", "response"])
_MARKUP = " \t\r\n\"'`*_<>()[]{}"
_DASHES = ("...", "…", "-", "--", "---", "?", "??", "???")

#: No placeholder is longer than this many characters, lorem ipsum aside.
_LONGEST_PLACEHOLDER = 40

#: Refusals, and a model speaking of itself: the phrases that are filtered out of ShareGPT dumps before training (FastChat's
#: `optional_clean` and its followers).
_REFUSAL = re.compile(
    r"\bas an? (?:ai|artificial intelligence|large language model|language model)\b"
    r"|\bi(?:'m| am) (?:just |only )?an? (?:ai|artificial intelligence|large language model|language model)\b"
    r"|\b(?:sorry|apologi[sz]e),? (?:but )?(?:as an? |i (?:can(?:no|')t|am (?:not able|unable)|'m unable|won't|don't have)\b)"
    r"|\bi (?:cannot|can't|am unable to|'m unable to) (?:fulfil+|assist|help|comply|provide|answer|complete|process)\b"
)
#: One of these is in every refusal; looking for them first is ten times as fast as the expression.
_HINTS = ("as a", "i am ", "i'm ", "sorry", "apolog", "i cannot", "i can't")
#: Refusals come first in an answer; the same words further down are usually about something.
_OPENING = 200


# ---- in the worker --------------------------------------------------------------------------------------------------


def facts(subjects: Sequence[Subject]) -> dict[str, np.ndarray]:
    """`answer_chars` and `prompt_chars`, uint32_N: lengths as written; `answer_marks`, uint8_N: the marks above, summed."""
    count = len(subjects)
    return {
        "answer_chars": np.fromiter((len(subject.answer) for subject in subjects), dtype=np.uint32, count=count),
        "prompt_chars": np.fromiter((len(subject.prompt) for subject in subjects), dtype=np.uint32, count=count),
        "answer_marks": np.fromiter((_marks(subject) for subject in subjects), dtype=np.uint8, count=count),
    }


def _marks(subject: Subject) -> int:
    if any(part.role == "document" for part in subject.parts):
        return DOCUMENT
    answer, prompt = subject.answer.strip(), subject.prompt.strip()
    marks = 0
    if is_placeholder(answer):
        marks |= PLACEHOLDER
    elif says_nothing(answer):
        marks |= NOTHING
    elif _is_refusal(answer):
        marks |= REFUSAL
    if not prompt:
        marks |= NO_PROMPT
    elif answer == prompt:
        marks |= ECHO
    return marks


def _is_refusal(text: str) -> bool:
    opening = text[:_OPENING].lower().replace("’", "'")
    return any(hint in opening for hint in _HINTS) and _REFUSAL.search(opening) is not None


def says_nothing(text: str) -> bool:
    """No letter, digit or sign of meaning (+, €, an emoji): punctuation, white space and control characters only."""
    return not any(unicodedata.category(character)[0] in "LNSM" for character in text)


def is_placeholder(text: str) -> bool:
    """Text that stands where an answer should: `N/A`, `TODO`, `...`, `[deleted]`, lorem ipsum."""
    if text.startswith("Lorem ipsum dolor"):
        return True
    if len(text) > _LONGEST_PLACEHOLDER:
        return False
    bare = text.strip(_MARKUP).casefold()
    if bare in _DASHES or bare in _PLACEHOLDERS or bare.rstrip(".:;") in _PLACEHOLDERS:
        return True
    return text[:1] in tuple("[<({") and text[-1:] in tuple("]>)}") and bare in _IN_BRACKETS


# ---- in the parent --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sort:
    """One sort of finding: which records, and the words for them."""

    kind: str
    severity: Severity
    records: np.ndarray
    what: str
    advice: str


def conclude(split: SplitFacts, labels: LabelSet | None) -> list[Finding]:
    """`length`, `prompt_length` and `refusal_answer` findings of one split, one for each sort of thing.

    Args:
        split: columns `answer_chars`, `prompt_chars`, `answer_marks`, and `label` where `labels` is given.
        labels: what `fullrank.data.audit.labels.label_set` found in the training answers.
    """
    marks = np.asarray(split.column("answer_marks"))
    free = np.ones(len(marks), dtype=bool)
    """Answers that are none of the labels."""
    if labels is not None:
        free = ~is_one_of(split.column("label"), labels.hashes - _not_meant(labels))
    sorts = [*_marked(marks, free)]
    asked = (marks & DOCUMENT) == 0
    said = marks & (PLACEHOLDER | NOTHING) > 0
    lengths = np.asarray(split.column("answer_chars"))
    sorts += _extremes(lengths, asked, free & ~said, "answer")
    sorts += _extremes(lengths, ~asked, free, "document")
    lengths = np.asarray(split.column("prompt_chars"))
    sorts += _extremes(lengths, asked & (marks & NO_PROMPT == 0), asked, "prompt")
    return [
        Finding(
            kind=sort.kind,
            severity=sort.severity,
            what=f"{len(sort.records):,} of {len(split):,} records of {split.name}: {sort.what}",
            records=_places(split, sort.records),
            count=len(sort.records),
            advice=sort.advice,
        )
        for sort in sorts
        if len(sort.records)
    ]


def _not_meant(labels: LabelSet) -> frozenset[int]:
    """Hashes of placeholders that are labels only by their number: far rarer than labels are, and so nobody's answer."""
    usual = float(np.median(list(labels.counts.values())))
    rare = [
        label for label, count in labels.counts.items() if count < usual / 2 and (is_placeholder(label) or says_nothing(label))
    ]
    return frozenset(label_hash(text) for label in rare for text in (label, label.lower(), label.upper()))


def _marked(marks: np.ndarray, free: np.ndarray) -> list[_Sort]:
    """What was marked in the worker; marks_N, free_N (not one of the labels)."""
    return [
        _Sort(
            "length",
            "warning",
            np.flatnonzero(free & (marks & PLACEHOLDER > 0)),
            "the answer is a placeholder (N/A, TODO, ..., [deleted] and the like)",
            "write the answers or remove the records: the model learns to say this",
        ),
        _Sort(
            "length",
            "warning",
            np.flatnonzero(free & (marks & NOTHING > 0)),
            "the answer has no letter, digit or sign in it",
            "write the answers or remove the records",
        ),
        _Sort(
            "refusal_answer",
            "note",
            np.flatnonzero(marks & REFUSAL > 0),
            "the answer is a refusal, or speaks of itself as an AI model",
            "keep those that are meant; a model copies refusals readily, and its maker's name with them",
        ),
        _Sort(
            "length",
            "warning",
            np.flatnonzero(marks & ECHO > 0),
            "the answer is the prompt again",
            "write the answers or remove the records: the model learns to repeat what it is asked",
        ),
        _Sort(
            "length",
            "warning",
            np.flatnonzero(marks & NO_PROMPT > 0),
            "nothing stands before the answer",
            "write the prompts, or use the form `text` where nothing is asked",
        ),
    ]


def _extremes(lengths: np.ndarray, counted: np.ndarray, judged: np.ndarray, noun: str) -> list[_Sort]:
    """Extremely short and extremely long texts; lengths_N, counted_N (make up the usual lengths), judged_N of one split."""
    usual = bounds(lengths[counted])
    if usual is None:
        return []
    low, median, high = usual
    among = counted & judged
    kind = "prompt_length" if noun == "prompt" else "length"
    short, long = np.flatnonzero(among & (lengths < low)), np.flatnonzero(among & (lengths > high))
    most = _OUTLIERS * np.count_nonzero(counted)
    against = f"characters, where half of them have {median:,.0f} or more"
    return [
        _Sort(
            kind,
            "note",
            short if len(short) <= most else short[:0],
            f"an extremely short {noun}: fewer than {np.ceil(low):,.0f} {against}",
            "look at some of them: text may be cut off or missing",
        ),
        _Sort(
            kind,
            "note",
            long if len(long) <= most else long[:0],
            f"an extremely long {noun}: more than {high:,.0f} {against}",
            "look at some of them: several records may have run together, or a whole document slipped in",
        ),
    ]


def bounds(lengths: np.ndarray) -> tuple[float, float, float] | None:
    """(shortest usual, median, longest usual) length; None where nothing can be said.

    Iglewicz & Hoaglin's rule on the logarithm of lengths_N, and eight times off the median, which alone decides where more than
    half of the lengths are the same (their MAD is 0, and every other one is infinitely far out). Says nothing of fewer than 20.
    """
    if len(lengths) < _FEWEST:
        return None
    logs = np.log(np.maximum(lengths, 1), dtype=np.float32)
    middle = float(np.median(logs))
    mad = float(np.median(np.abs(logs - middle)))
    reach = max(_OUTLYING * mad / 0.6745, float(np.log(_FACTOR)))
    return float(np.exp(middle - reach)), float(np.exp(middle)), float(np.exp(middle + reach))


def conclude_cut(split: SplitFacts) -> list[Finding]:
    """`truncated`: how many records of a split lost tokens to `data.max_length`.

    Args:
        split: column `cut`, bool_N: at least one example of the record is not whole.
    """
    cut = np.asarray(split.column("cut"))
    records = np.flatnonzero(cut)
    share = len(records) / max(1, len(split))
    if share < _CUT:
        return []
    return [
        Finding(
            kind="truncated",
            severity="warning" if share >= _CUT_MUCH else "note",
            what=f"{len(records):,} of {len(split):,} records of {split.name} ({share:.0%}) are cut at data.max_length",
            records=_places(split, records),
            count=len(records),
            advice="raise data.max_length, or shorten these records; a model learns to end where its examples end",
        )
    ]


def _places(split: SplitFacts, records: np.ndarray) -> list[Place]:
    return [split.place(int(record)) for record in records[:_MOST_RECORDS]]
