"""Scores against values computed by hand, by other code written for the purpose, and by rouge_score itself."""

from __future__ import annotations

import math
import random
import sys
from typing import Any

import numpy as np
import pytest

from fullrank.errors import DataError, UsageError
from fullrank.evaluate.metrics import Items, labels, loss_items, score
from fullrank.recipe import Task


def value(task: Task, references: list[str], answers: list[str], key: str = "") -> float:
    return score(task, references, answers)[key or task.key].value


# ---- exact match ----------------------------------------------------------------------------------------------------


def test_exact_match_is_the_share_of_equal_strings() -> None:
    scores = score(Task(metric="exact_match"), ["a", "b", "c d", "e"], [" a\n", "B", "c  d", "e"])
    assert list(scores) == ["exact_match"]
    assert scores["exact_match"].value == 0.5
    assert scores["exact_match"].per_item == [1.0, 0.0, 0.0, 1.0]


def test_the_pattern_picks_what_is_compared() -> None:
    task = Task(metric="exact_match", name="number", pattern=r"#### (-?\d+)")
    references = ["so\n#### 18", "#### 3", "#### -4"]
    assert score(task, references, ["other words\n#### 18", "3", "#### 5\n#### -4"])["number"].per_item == [
        1.0,
        0.0,
        0.0,
    ]


def test_a_group_that_takes_no_part_in_the_match_is_no_match() -> None:
    task = Task(metric="exact_match", pattern=r"Answer(?:: (\w+))?")
    assert value(task, ["Answer: yes"], ["Answer"]) == 0.0


@pytest.mark.parametrize("metric", ["exact_match", "f1", "rouge_l"])
def test_a_reference_that_the_pattern_does_not_match_is_an_error_that_says_where(metric: Any) -> None:
    task = Task(metric=metric, pattern=r"#### (\d+)")
    with pytest.raises(DataError, match=r"test record 2: task .*does not match the reference 'none here'"):
        score(task, ["#### 1", "none here"], ["", ""])
    with pytest.raises(DataError, match=r"^test\.jsonl:9: "):
        score(task, ["#### 1", "none here"], ["", ""], places=["test.jsonl:7", "test.jsonl:9"])


@pytest.mark.parametrize(("references", "answers"), [([], []), (["a"], []), (["a"], ["a", "b"])])
def test_lists_that_do_not_match_are_refused(references: list[str], answers: list[str]) -> None:
    with pytest.raises(ValueError, match="both must be of one length"):
        score(Task(metric="exact_match"), references, answers)


# ---- F1 -------------------------------------------------------------------------------------------------------------

F1 = Task(metric="f1")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("N1, n6 ,N10", {"n1", "n6", "n10"}),
        ("N1,,N1, ", {"n1"}),
        ("none", set()),
        (" None ", set()),
        ("", set()),
        ("none, N1", {"n1"}),
        ("N1 N6", {"n1 n6"}),
    ],
)
def test_labels_are_trimmed_and_case_folded(text: str, found: set[str]) -> None:
    assert labels(F1, text) == found


def test_separator_and_none_are_the_tasks() -> None:
    task = Task(metric="f1", separator=";", none="keine")
    assert labels(task, "A; b,c") == {"a", "b,c"}
    assert labels(task, "Keine") == set()
    assert labels(task, "none") == {"none"}


def test_f1_by_hand() -> None:
    # tp: a, b = 2; fp: c, x = 2; fn: c = 1 -> micro 4 / (4 + 2 + 1). Labels: a 1, b 1, c 0 (fp 1, fn 1).
    scores = score(F1, ["a,b", "c", "none"], ["b,a,c", "none", "x"])
    assert scores["f1"].value == pytest.approx(4 / 7)
    assert scores["f1"].per_item == pytest.approx([4 / 5, 0.0, 0.0])
    assert scores["f1_macro"].value == pytest.approx(2 / 3)
    assert scores["f1_macro"].per_item == pytest.approx([1.0, 0.0, 0.0])


def test_a_label_that_is_in_no_reference_lowers_micro_only() -> None:
    with_stranger, without = score(F1, ["a"], ["a,x"]), score(F1, ["a"], ["a"])
    assert with_stranger["f1"].value == pytest.approx(2 / 3)
    assert with_stranger["f1_macro"].value == without["f1_macro"].value == without["f1"].value == 1.0


@pytest.mark.parametrize(("answers", "f1"), [(["none", ""], 1.0), (["none", "a"], 0.0)])
def test_f1_where_every_reference_is_empty(answers: list[str], f1: float) -> None:
    scores = score(F1, ["none", "none"], answers)
    assert scores["f1"].value == scores["f1_macro"].value == f1
    assert scores["f1"].per_item == scores["f1_macro"].per_item == [1.0, f1]


def test_an_answer_that_cannot_be_read_is_one_wrong_label() -> None:
    task = Task(metric="f1", pattern=r"Violations: (.*)")
    scores = score(task, ["Violations: none", "Violations: a"], ["all is well", "Violations: a"])
    assert scores["f1"].per_item == [0.0, 1.0]
    assert scores["f1"].value == pytest.approx(2 / 3)
    assert scores["f1_macro"].value == 1.0
    assert scores["f1_macro"].per_item == [0.0, 1.0]


def _brute_force(references: list[set[str]], answers: list[set[str]]) -> tuple[float, float]:
    """Micro and macro F1 by asking, of every item and label, whether it was wanted and whether it was given."""
    universe = set().union(*references, *answers)
    cells = [(label, label in want, label in give) for label in universe for want, give in zip(references, answers, strict=True)]

    def f1(some: list[tuple[str, bool, bool]]) -> float:
        hits = sum(want and give for _, want, give in some)
        given, wanted = sum(give for _, _, give in some), sum(want for _, want, _ in some)
        if not given and not wanted:
            return 1.0
        precision, recall = hits / given if given else 0.0, hits / wanted if wanted else 0.0
        return 2 * precision * recall / (precision + recall) if hits else 0.0

    wanted_labels = set().union(*references)
    macro = [f1([cell for cell in cells if cell[0] == label]) for label in sorted(wanted_labels)]
    return f1(cells), sum(macro) / len(macro) if macro else float(not any(answers))


@pytest.mark.parametrize("seed", range(20))
def test_f1_equals_a_count_over_every_item_and_label(seed: int) -> None:
    draw = random.Random(seed)

    def some_sets(letters: str, share: float) -> list[set[str]]:
        return [{letter for letter in letters if draw.random() < share} for _ in range(9)]

    references, answers = some_sets("abcdef", seed / 40), some_sets("abcdefgh", 0.4)
    answers = [set(want) if draw.random() < 0.5 else give for want, give in zip(references, answers, strict=True)]
    scores = score(F1, [",".join(s) or "none" for s in references], [",".join(s) or "none" for s in answers])
    micro, macro = _brute_force(references, answers)
    assert scores["f1"].value == pytest.approx(micro)
    assert scores["f1_macro"].value == pytest.approx(macro)
    for number, (want, give) in enumerate(zip(references, answers, strict=True)):
        one_micro, one_macro = _brute_force([want], [give])
        assert scores["f1"].per_item[number] == pytest.approx(one_micro)
        assert scores["f1_macro"].per_item[number] == pytest.approx(one_macro)


@pytest.mark.parametrize("key", ["f1", "f1_macro"])
def test_the_sums_of_a_resample_give_the_score_of_the_resample(key: str) -> None:
    references, answers = ["a,b", "c", "none", "a", "none"], ["a", "c,x", "none", "b", "y"]
    items = score(F1, references, answers)[key]
    draws = np.random.default_rng(0).integers(5, size=(30, 5))
    sums = np.stack([items.stats_NK[draw].sum(axis=0) for draw in draws])
    expected = [value(F1, [references[i] for i in draw], [answers[i] for i in draw], key) for draw in draws]
    assert items.reduce(sums) == pytest.approx(expected)


# ---- ROUGE-L --------------------------------------------------------------------------------------------------------

ROUGE = Task(metric="rouge_l")


def test_rouge_l_by_hand() -> None:
    # LCS "the cat the mat" of 6 and 5 words: precision 4/5, recall 4/6.
    pytest.importorskip("rouge_score")
    items = score(ROUGE, ["The cat sat on the mat.", "same"], ["the cat is the mat", "same"])["rouge_l"]
    assert items.per_item == pytest.approx([8 / 11, 1.0])
    assert items.value == pytest.approx((8 / 11 + 1) / 2)


def test_rouge_l_equals_the_package() -> None:
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"], use_stemmer=False)
    draw = random.Random(0)
    texts = [" ".join(draw.choices(["bank", "banks", "Ratio,", "3.5%", "below", "the", "limit"], k=12)) for _ in range(40)]
    references, answers = texts[:20], texts[20:]
    expected = [scorer.score(r, a)["rougeL"].fmeasure for r, a in zip(references, answers, strict=True)]
    assert score(ROUGE, references, answers)["rouge_l"].per_item == pytest.approx(expected)


def test_rouge_l_of_an_answer_that_the_pattern_does_not_match_is_zero() -> None:
    pytest.importorskip("rouge_score")
    task = Task(metric="rouge_l", pattern=r"Directive: (.*)")
    assert value(task, ["Directive: raise capital"], ["raise capital"]) == 0.0


def test_rouge_l_refuses_references_it_cannot_see() -> None:
    pytest.importorskip("rouge_score")
    with pytest.raises(DataError, match=r"test record 1: .* holds none"):
        score(ROUGE, ["\u0431\u0430\u043d\u043a"], ["\u0431\u0430\u043d\u043a"])


def test_rouge_l_without_the_extra_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    with pytest.raises(UsageError, match=r"pip install 'fullrank\[rouge\]'"):
        score(ROUGE, ["a"], ["a"])


# ---- likelihood -----------------------------------------------------------------------------------------------------


def test_every_token_weighs_the_same_in_the_validation_loss() -> None:
    scores = loss_items([2.0, 30.0], [1, 9])
    assert scores["validation_loss"].value == pytest.approx(3.2)
    assert scores["validation_loss"].per_item == pytest.approx([2.0, 30 / 9])
    assert scores["perplexity"].value == pytest.approx(math.exp(3.2))


@pytest.mark.parametrize(("losses", "tokens"), [([], []), ([1.0], [0]), ([1.0], [1, 2])])
def test_losses_without_tokens_are_refused(losses: list[float], tokens: list[int]) -> None:
    with pytest.raises(ValueError, match="at least one supervised token"):
        loss_items(losses, tokens)


def test_items_keep_the_name_of_the_task() -> None:
    assert list(score(Task(metric="f1", name="codes"), ["a"], ["a"])) == ["codes", "codes_macro"]
    assert isinstance(score(F1, ["a"], ["a"])["f1"], Items)
