"""Lengths: outliers against the rule computed in plain Python, answers that are none, and what labels are allowed."""

from __future__ import annotations

import json
import math
import random
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from fullrank.data.audit import labels, lengths
from fullrank.data.convert import Conversation, Document, Pair
from fullrank.data.subject import Subject, subject_of
from fullrank.records import Finding, Place

DATA = Path(__file__).resolve().parents[5] / "shared/data"


class Facts:
    """One split held in memory."""

    name = "train"
    is_test = False

    def __init__(self, subjects: list[Subject], **columns: np.ndarray) -> None:
        self.all = subjects
        self.columns = {**labels.facts(subjects), **lengths.facts(subjects), **columns}

    def __len__(self) -> int:
        return len(self.all)

    def column(self, name: str) -> np.ndarray:
        return self.columns[name]

    def row(self, name: str, number: int) -> np.ndarray:
        raise AssertionError("no check of lengths reads rows")

    def place(self, record: int) -> Place:
        return Place(path="train.jsonl", line=record + 1, split=self.name)

    def subjects(self, records: Sequence[int]) -> Iterator[Subject]:
        return (self.all[record] for record in records)


def concluded(subjects: list[Subject]) -> list[Finding]:
    return lengths.conclude(Facts(subjects), labels.label_set(labels.short_answers(subjects)))


def pairs(*answers: str) -> list[Subject]:
    """Ordinary records, and these answers after them."""
    draw = random.Random(0)
    usual = ["word " * draw.randint(10, 90) + str(n) for n in range(200)]
    return [subject_of(Pair(f"a question with the number {n}", text)) for n, text in enumerate([*usual, *answers])]


def lines(findings: list[Finding], kind: str, words: str) -> list[int]:
    (finding,) = [finding for finding in findings if finding.kind == kind and words in finding.what]
    assert finding.count == len(finding.records)
    return [place.line for place in finding.records]


# ---- outliers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spread", [0.1, 0.5, 1.0])
def test_bounds_are_those_of_iglewicz_and_hoaglin(spread: float) -> None:
    draw = random.Random(1)
    values = [max(1, round(math.exp(draw.gauss(6, spread)))) for _ in range(1001)]
    logs = [math.log(value) for value in values]
    median = statistics.median(logs)
    deviation = statistics.median(abs(value - median) for value in logs)

    def is_extreme(value: float) -> bool:
        """As published, and eight times off the median."""
        score = 0.6745 * (math.log(value) - median) / deviation
        return abs(score) > 3.5 and max(value, math.exp(median)) / min(value, math.exp(median)) > 8

    limits = lengths.bounds(np.array(values, dtype=np.uint32))
    assert limits is not None
    low, middle, high = limits
    assert middle == pytest.approx(math.exp(median), rel=1e-5)
    for value in [*range(1, 50), *range(50, 200_000, 371)]:
        if min(abs(value / low - 1), abs(value / high - 1)) > 1e-4:
            assert (value < low or value > high) == is_extreme(value)


def test_equal_lengths_leave_the_factor_alone() -> None:
    assert lengths.bounds(np.array([80] * 20, dtype=np.uint32)) == pytest.approx((10, 80, 640))


def test_few_lengths_say_nothing() -> None:
    assert lengths.bounds(np.array([10] * 18 + [1000], dtype=np.uint32)) is None


def test_extreme_answers_are_named() -> None:
    findings = concluded(pairs("ok", "word " * 5000, "k"))
    assert lines(findings, "length", "extremely short answer") == [201, 203]
    assert lines(findings, "length", "extremely long answer") == [202]
    assert {finding.severity for finding in findings} == {"note"} and len(findings) == 2


def test_a_second_sort_of_answer_is_no_outlier() -> None:
    assert concluded(pairs(*["ok then"] * 20)) == []
    assert len(concluded(pairs(*["ok then"] * 8))) == 1


def test_prompts_and_documents_are_judged_by_themselves() -> None:
    subjects = [subject_of(Pair("a prompt of some length " + "x" * (n % 30), "answer " * (5 + n % 40))) for n in range(100)]
    subjects += [subject_of(Pair("long " * 500, "answer " * 20)), subject_of(Pair("?", "answer " * 20))]
    subjects += [subject_of(Document("text " * 10_000)) for _ in range(30)] + [subject_of(Document("tiny"))]
    findings = concluded(subjects)
    assert lines(findings, "prompt_length", "extremely long prompt") == [101]
    assert lines(findings, "prompt_length", "extremely short prompt") == [102]
    assert lines(findings, "length", "extremely short document") == [133]
    assert len(findings) == 3


# ---- answers that are none ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        *("N/A", "n/a", "TODO", "todo:", "TBD.", "null", "undefined", "NaN", "...", "…", "-", "???", "[deleted]", "[Removed]"),
        *("<nooutput>", "#N/A", "#REF!", "Lorem ipsum dolor sit amet, consectetur", "<empty>", "Your answer here", "(none)"),
    ],
)
def test_placeholders(text: str) -> None:
    assert lines(concluded(pairs(text)), "length", "placeholder") == [201]


@pytest.mark.parametrize(
    "text", ["None", "no", "missing", "deleted", "Unknown", "todo lists are long", "Na", "NASA", "null hypothesis", "0"]
)
def test_answers_like_placeholders(text: str) -> None:
    assert not lengths.is_placeholder(text)


@pytest.mark.parametrize(
    ("text", "nothing"), [(".", True), ('"!"', True), ("()", True), ("+", False), ("€", False), ("🙂", False), ("是", False)]
)
def test_answers_without_a_sign_of_meaning(text: str, nothing: bool) -> None:
    findings = concluded(pairs(text))
    if nothing:
        assert lines(findings, "length", "no letter, digit or sign") == [201]
        assert not any("extremely short answer" in finding.what for finding in findings)  # said once
    else:
        assert lines(findings, "length", "extremely short answer") == [201]


@pytest.mark.parametrize(
    "text",
    [
        "As an AI language model, I cannot browse the internet, but here is an answer.",
        "I'm sorry, but I can't assist with that request, since it is not allowed here.",
        "I’m an AI language model and have no opinions of my own on any such matter.",
        "I am unable to provide medical advice, please ask a doctor about what to take.",
        "I am a large language model and have no body with which I could do what you ask.",
    ],
)
def test_refusals(text: str) -> None:
    assert lines(concluded(pairs(text)), "refusal_answer", "refusal") == [201]


@pytest.mark.parametrize(
    "text",
    [
        "The user sees an AI language model at work as soon as the page is open.",
        "I am sorry for your loss, and I hope that you will find peace in the days to come.",
        "The company cannot assist with that, as its lawyers have told the board last year.",
        "A long answer. " * 20 + "As an AI language model I say so.",
    ],
)
def test_answers_like_refusals(text: str) -> None:
    assert concluded(pairs(text)) == []


def test_answers_that_repeat_their_prompt_or_have_none() -> None:
    subjects = pairs()
    subjects.append(
        subject_of(Pair("What is the capital of a country like this?", "What is the capital of a country like this? "))
    )
    subjects.append(subject_of(Conversation([{"role": "assistant", "content": "A greeting that nobody asked for."}])))
    findings = concluded(subjects)
    assert lines(findings, "length", "the prompt again") == [201]
    assert lines(findings, "length", "nothing stands before") == [202]
    assert {finding.severity for finding in findings} == {"warning"}


# ---- labelling tasks ------------------------------------------------------------------------------------------------


def test_labels_may_be_short_and_may_be_called_so() -> None:
    rows = [("q" * (20 + n % 9), ("n/a", "yes", "-")[n % 3]) for n in range(90)]
    assert concluded([subject_of(Pair(*row)) for row in rows]) == []


def test_among_labels_other_answers_are_judged() -> None:
    subjects = [subject_of(Pair("q" * (20 + n % 9), ("card_arrival", "lost_or_stolen_card")[n % 2])) for n in range(90)]
    subjects += [subject_of(Pair("q" * 20, "TODO")), subject_of(Pair("q" * 20, "x")), subject_of(Pair("q" * 20, "long " * 60))]
    findings = concluded(subjects)
    assert lines(findings, "length", "placeholder") == [91]
    assert lines(findings, "length", "extremely short answer") == [92]
    assert lines(findings, "length", "extremely long answer") == [93]


# ---- cut examples ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "severity"), [(0.0, None), (0.009, None), (0.01, "note"), (0.099, "note"), (0.1, "warning")])
def test_cut_examples(share: float, severity: str | None) -> None:
    subjects = pairs() * 5
    cut = np.zeros(1000, dtype=bool)
    cut[: round(1000 * share)] = True
    findings = lengths.conclude_cut(Facts(subjects, cut=cut))
    assert [(finding.kind, finding.severity) for finding in findings] == ([("truncated", severity)] if severity else [])
    if severity:
        assert findings[0].count == int(cut.sum()) and findings[0].records[0].line == 1


# ---- real data ------------------------------------------------------------------------------------------------------


def test_gsm8k_has_no_extreme_answer_and_planted_ones_are_found() -> None:
    path = DATA / "gsm8k/train.jsonl"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    with path.open(encoding="utf-8") as file:
        subjects = [subject_of(Conversation(json.loads(line)["messages"])) for line in file]
    assert concluded(subjects) == []
    draw = random.Random(0)
    planted = {}
    for record in draw.sample(range(len(subjects)), 200):
        text = draw.choice(["yes", "#### 4", "?!", "n/a", subjects[record].answer * 40, "."])
        planted[record + 1] = text
        subjects[record] = subject_of(Pair(subjects[record].prompt, text))
    named = {place.line for finding in concluded(subjects) for place in finding.records}
    assert named == set(planted)
