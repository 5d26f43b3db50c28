"""BLEU and chrF: equal to sacrebleu's corpus scores where it is installed; without it, what is made of statistics, by hand."""

from __future__ import annotations

import itertools
import math
import random
import sys
import types
from collections import Counter
from typing import Any

import pytest

from fullrank.errors import DataError, UsageError
from fullrank.evaluate.metrics import score
from fullrank.recipe import Task

BLEU, CHRF = Task(metric="bleu"), Task(metric="chrf")
WORDS = "the bank holds less capital than a ratio asks for , and it must act .".split()  # noqa: SIM905 - a sentence reads better


def texts(seed: int, n: int = 40) -> tuple[list[str], list[str]]:
    """References of 4 to 12 words, and answers that keep most of them in place."""
    rng = random.Random(seed)
    references = [[rng.choice(WORDS) for _ in range(rng.randint(4, 12))] for _ in range(n)]
    answers = [[w if rng.random() < 0.8 else rng.choice(WORDS) for w in words][: rng.randint(1, 12)] for words in references]
    return [" ".join(words) for words in references], [" ".join(words) for words in answers]


@pytest.mark.parametrize("tokenize", ["13a", "char", "none"])
def test_bleu_is_sacrebleus_corpus_score(tokenize: Any) -> None:
    metrics = pytest.importorskip("sacrebleu.metrics", reason="sacrebleu (extra bleu) is not installed")
    references, answers = texts(0)
    items = score(Task(metric="bleu", tokenize=tokenize), references, answers)["bleu"]
    theirs = metrics.BLEU(tokenize=tokenize)  # without effective_order: there are answers of four words
    assert items.value == pytest.approx(theirs.corpus_score(answers, [references]).score / 100, abs=1e-12)
    sentence = metrics.BLEU(tokenize=tokenize, effective_order=True)
    expected = [sentence.sentence_score(a, [r]).score / 100 for a, r in zip(answers, references, strict=True)]
    assert items.per_item == pytest.approx(expected, abs=1e-12)
    assert f"tok:{tokenize}" in items.signature and "version:" in items.signature


def test_chrf_is_sacrebleus_corpus_score() -> None:
    metrics = pytest.importorskip("sacrebleu.metrics", reason="sacrebleu (extra bleu) is not installed")
    references, answers = texts(1)
    items = score(CHRF, references, answers)["chrf"]
    assert items.value == pytest.approx(metrics.CHRF().corpus_score(answers, [references]).score / 100, abs=1e-12)
    assert "nc:6|nw:0" in items.signature


def test_bleu_by_hand() -> None:
    pytest.importorskip("sacrebleu", reason="sacrebleu (extra bleu) is not installed")
    # "a b c d f" against "a b c d e": 4/5 words, 3/4 pairs, 2/3 triples, 1/2 of four; equally long
    assert score(BLEU, ["a b c d e"], ["a b c d f"])["bleu"].value == pytest.approx((4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)


class _Metric:
    """Stands for sacrebleu's metrics where it is not installed: pairs of words that both texts have, of those of the answer."""

    def __init__(self, **keys: Any) -> None:
        self.keys = keys

    def _extract_corpus_statistics(self, hypotheses: list[str], references: list[list[str]]) -> list[list[int]]:
        def pairs(text: str) -> Counter[tuple[str, str]]:
            return Counter(itertools.pairwise(text.split()))

        rows = zip(map(pairs, hypotheses), map(pairs, references[0]), strict=True)
        return [[(hyp & ref).total(), hyp.total()] for hyp, ref in rows]

    def _compute_score_from_stats(self, stats: list[int]) -> Any:
        assert all(type(value) is int for value in stats)
        return types.SimpleNamespace(score=100 * stats[0] / stats[1] if stats[1] else 0.0)

    def get_signature(self) -> str:
        return f"pairs:{self.keys.get('tokenize')}"


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("sacrebleu.metrics")
    module.BLEU = module.CHRF = _Metric  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sacrebleu", types.ModuleType("sacrebleu"))
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", module)


@pytest.mark.usefixtures("stand_in")
def test_statistics_are_summed_before_they_are_a_score() -> None:
    task = Task(metric="bleu", pattern="said: (.*)", tokenize="char")
    answers = ["said: a b c d", "said: a x", "nothing"]  # 3 of 3, 0 of 1, 0 of 0
    items = score(task, ["said: a b c d", "said: a b", "said: a b"], answers)["bleu"]
    assert items.value == pytest.approx(3 / 4)
    assert items.per_item == [1.0, 0.0, 0.0]
    assert math.isclose(items.reduce(2 * items.stats_NK[:1] + items.stats_NK[1:2])[0], 6 / 7)
    assert items.signature == "pairs:char"


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("task", [BLEU, CHRF], ids=lambda task: task.metric)
def test_an_empty_reference_is_an_error(task: Task) -> None:
    with pytest.raises(DataError, match=r"^test record 2: task .*: the reference is empty"):
        score(task, ["a b", "  "], ["a", "b"])


@pytest.mark.parametrize("task", [BLEU, CHRF], ids=lambda task: task.metric)
def test_without_the_extra_it_is_said_how_to_install_it(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    with pytest.raises(UsageError) as raised:
        score(task, ["a"], ["a"])
    assert "pip install 'fullrank[bleu]'" in str(raised.value)
