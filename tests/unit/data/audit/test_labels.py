"""Labels: when answers are labels, which spellings are one label, which never are, and what is said about their numbers."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fullrank.data.audit import labels
from fullrank.data.convert import Conversation, Document, Pair
from fullrank.data.subject import Subject, subject_of
from fullrank.records import Finding, Place

BANKING77 = Path(__file__).resolve().parents[5] / "shared/data/banking77/train.jsonl"
Rows = list[tuple[str, str]]


class Facts:
    """One split held in memory."""

    is_test = False

    def __init__(self, rows: Rows, name: str = "train") -> None:
        self.name = name
        self.all = [subject_of(Pair(*row)) for row in rows]
        self.columns = labels.facts(self.all)

    def __len__(self) -> int:
        return len(self.all)

    def column(self, name: str) -> np.ndarray:
        return self.columns[name]

    def row(self, name: str, number: int) -> np.ndarray:
        raise AssertionError("no check of labels reads rows")

    def place(self, record: int) -> Place:
        return Place(path=f"{self.name}.jsonl", line=record + 1, split=self.name)

    def subjects(self, records: Sequence[int]) -> Iterator[Subject]:
        assert list(records) == sorted(records)
        return (self.all[record] for record in records)


def concluded(*splits: Facts) -> list[Finding]:
    return labels.conclude(splits, {split.name: labels.short_answers(split.all) for split in splits})


def found(rows: Rows, kind: str = "label_spelling") -> list[Finding]:
    return [finding for finding in concluded(Facts(rows)) if finding.kind == kind]


def answers(**counts: int) -> Rows:
    return [(f"question {n} of {answer}", answer) for answer, count in counts.items() for n in range(count)]


def counted(counts: dict[str, int]) -> Rows:
    return [(f"question {n} of {answer}", answer) for answer, count in counts.items() for n in range(count)]


# ---- what is a label set --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counts", "number"),
    [
        ({"yes": 30, "no": 20}, 2),
        ({"A": 10, "B": 10, "C": 10, "D": 10}, 4),
        ({str(n): 10 for n in range(1, 6)}, 5),  # stars
        ({"positive": 40, "Positive": 5, "negative": 40, "no idea what this is": 1}, 2),
    ],
)
def test_repeated_short_answers_are_labels(counts: dict[str, int], number: int) -> None:
    known = labels.label_set(labels.short_answers(Facts(counted(counts)).all))
    assert known is not None and len(known.counts) == number


@pytest.mark.parametrize(
    "rows",
    [
        counted({"yes": 10, "no": 9}),  # too few to tell
        [(f"q{n}", f"the answer to it is {n}") for n in range(500)],
        [(f"q{n}", str(n % 60)) for n in range(600)],  # results of a calculation come back too
        [(f"q{n}", "yes, " + "because of this and that " * 5) for n in range(100)],
        counted({"yes": 70}) + [(f"q{n}", f"only {n} knows") for n in range(30)],
    ],
)
def test_other_answers_are_none(rows: Rows) -> None:
    assert labels.label_set(labels.short_answers(Facts(rows).all)) is None
    assert concluded(Facts(rows)) == []


def test_raw_text_is_no_answer() -> None:
    documents = [subject_of(Document("yes")) for _ in range(50)]
    assert labels.short_answers(documents) == {"answered": 0, "counts": {}}
    assert labels.facts(documents)["label"].tolist() == [1] * 50


def test_too_many_distinct_answers_end_the_counting() -> None:
    many = [subject_of(Pair("q", f"answer {n}")) for n in range(labels.MOST_DISTINCT + 1)]
    assert labels.short_answers(many) == {"answered": len(many), "counts": None}
    assert labels.short_answers(many[:-1])["counts"] is not None
    one = labels.short_answers([subject_of(Pair("q", "yes"))])
    assert labels.gather([one, one]) == {"answered": 2, "counts": {"yes": 2}}
    assert labels.gather([one, labels.short_answers(many)]) == {"answered": len(many) + 1, "counts": None}


def test_a_split_counts_its_own_records_of_a_shard() -> None:
    rows = answers(yes=30, no=20) + [("q", "long " * 50)] * 3
    subjects = [subject_of(Pair(*row)) for row in rows] + [subject_of(Document("yes"))] * 4
    shard, column = labels.short_answers(subjects), labels.facts(subjects)["label"]
    assert labels.gather([shard], column) == labels.gather([shard]) == {"answered": 53, "counts": {"yes": 30, "no": 20}}
    assert labels.gather([shard], column[25:52]) == {"answered": 27, "counts": {"yes": 5, "no": 20}}
    assert labels.gather([{"answered": 9, "counts": None}], column) == {"answered": 53, "counts": None}


def test_an_answer_is_hashed_to_the_last_space() -> None:
    subjects = [subject_of(Pair("q", text)) for text in ("yes", "yes ", "Yes", "yes", "x" * 65, "two\nlines", "last\n")]
    column = labels.facts(subjects)["label"]
    assert column.dtype == np.uint64
    assert column[0] == column[3] == labels.label_hash("yes")
    assert len({int(value) for value in column[[0, 1, 2, 6]]}) == 4
    assert column[4] == column[5] == 0


def test_the_last_turn_is_the_answer() -> None:
    chat = Conversation([{"role": "user", "content": "a"}, {"role": "assistant", "content": "spam"}])
    assert labels.short_answers([subject_of(chat)])["counts"] == {"spam": 1}


# ---- one label ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("label", "other"),
    [
        ("card_arrival", "Card arrival"),
        ("card_arrival", "CARD-ARRIVAL"),
        ("card_arrival", "cardArrival"),
        ("card_arrival", "card_arrival."),
        ("card_arrival", '"card_arrival"'),
        ("card_arrival", "**card_arrival**"),
        ("card_arrival", "card_arrival "),
        ("card_arrival", "card_arrival\n"),
        ("card_arrival", "card\u200b_arrival"),
        ("card_arrival", "card__arrival"),
        ("card_arrival", "card_arival"),
        ("card_arrival", "crad_arrival"),
        ("card_arrival", "card_arrvial"),
        ("card_arrival", "card_arrivals"),
        ("card_arrival", "cardarrivl"),
        ("card_arrival", "Label: card_arrival"),
        ("card_arrival", "card_arrival (the card is late)"),
        ("card_arrival", "card_arrival because the card is late"),
        ("card_arrival", "card_arrival\n\nThe customer asks when the card arrives, and for nothing else."),
        ("spam", "Spam"),
        ("spam", "spma"),
        ("spam", "spams"),
        ("positive", "postive"),
        ("yes", "Yes, since the abstract says so in its last sentence."),
        ("B", "b"),
        ("B", "B."),
        ("B", "(B)"),
        ("class 1", "class_1"),
        ("1.5", "1.5 "),
    ],
)
def test_spellings_of_one_label(label: str, other: str) -> None:
    rows = [*counted({label: 60, "something_else": 60, "third_one": 60}), ("the odd one", other)]
    assert [(finding.count, [place.line for place in finding.records]) for finding in found(rows)] == [(1, [181])]


@pytest.mark.parametrize(
    ("label", "other"),
    [
        ("card_payment_fee_charged", "card_payment_fee_charged2"),
        ("type_1", "type_2"),
        ("1", "2"),
        ("A", "B"),
        ("A", "A+"),
        ("A", "A-"),
        ("A", "A*"),
        ("AA", "AAA"),
        ("C", "C++"),
        ("1", "-1"),
        ("1.5", "15"),
        ("1/2", "12"),
        ("E11", "E11.9"),
        ("positive", "negative"),
        ("pending_top_up", "pending_transfer"),
        ("top_up_by_cash", "top_up_by_card"),
        ("symptomatic", "asymptomatic"),
        ("increase_of_limit", "decrease_of_limit"),
        ("hypertension", "hypotension"),
        ("possible", "impossible"),
        ("payer_information", "payee_information"),
        ("maternity_leave", "paternity_leave"),
        ("card_working", "card_not_working"),
        ("transfer_in_time", "transfer_on_time"),
        ("plan_ii_contribution", "plan_i_contribution"),
        ("Zambia", "Gambia"),
        ("Australia", "Austria"),
        ("prednisone", "prednisolone"),
        ("en-fr", "en-de"),
        ("spam", "scam"),
        ("positive", "positive, negative"),
        ("sports", "sports: football"),
        ("no", "not applicable here"),
    ],
)
@pytest.mark.parametrize("count", [1, 3])
def test_different_labels_stay_apart(label: str, other: str, count: int) -> None:
    rows = counted({label: 60, "something_else": 60, "negative" if label == "positive" else "third_one": 60, other: count})
    assert found(rows) == []


def test_a_typing_error_is_rare() -> None:
    assert found(counted({"payment": 60, "paymant": 3, "else": 60}))
    assert not found(counted({"payment": 60, "paymant": 20, "else": 60}))


def test_a_long_label_may_be_wrong_many_times_over() -> None:
    assert found(counted({"card_arrival": 60, "card_arival": 30, "something_else": 60}))
    assert not found(counted({"card_arrival": 60, "card_arival": 31, "something_else": 60}))
    assert not found(counted({"lender_account": 60, "sender_account": 30, "something_else": 60}))


def test_where_labels_differ_by_a_letter_a_letter_is_no_slip() -> None:
    assert found(counted({"grade_pass_all": 60, "grade_pass_alt": 1}))
    assert not found(counted({"grade_pass_all": 60, "grade_pass_ell": 60, "grade_pass_alt": 1}))  # as near to each other
    assert not found(counted({"grade_pass_all": 60, "grade_pass_elt": 60, "grade_pass_alt": 1}))  # as near to both


def test_both_spellings_may_be_common() -> None:
    (finding,) = found(answers(Yes=50, yes=49, no=60))
    assert "'Yes' (50 records)" in finding.what and finding.count == 49 and finding.severity == "warning"
    assert [place.line for place in finding.records] == list(range(51, 100))


def test_the_commonest_of_a_misspelt_group_is_the_label() -> None:
    (finding,) = found(counted({"card_arrival": 100, "Card arrival": 4, "card_arival": 2, "Card Arival": 1, "lost_card": 90}))
    assert finding.count == 7 and len(finding.records) == 7
    assert finding.advice.startswith("write 'card_arrival' alone")


def test_each_label_is_one_finding_and_names_its_split() -> None:
    train = Facts(answers(yes=50, no=50, Yes=2))
    test = Facts(answers(yes=20, no=20, No=1), "test")
    chat = Facts([(f"q{n}", f"a story of {n}") for n in range(20)], "chat")
    findings = [finding for finding in concluded(train, test, chat) if finding.kind == "label_spelling"]
    assert [(f.count, {p.split for p in f.records}) for f in findings] == [(2, {"train"}), (1, {"test"})]


# ---- against independent references ---------------------------------------------------------------------------------


def osa(a: str, b: str) -> int:
    """Optimal string alignment distance by the textbook's table."""
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i in range(len(a) + 1):
        for j in range(len(b) + 1):
            if not i or not j:
                table[i][j] = i + j
                continue
            table[i][j] = min(table[i - 1][j] + 1, table[i][j - 1] + 1, table[i - 1][j - 1] + (a[i - 1] != b[j - 1]))
            if i > 1 and j > 1 and a[i - 1] == b[j - 2] and a[i - 2] == b[j - 1]:
                table[i][j] = min(table[i][j], table[i - 2][j - 2] + 1)
    return table[-1][-1]


def edited(text: str, draw: random.Random, edits: int) -> str:
    for _ in range(edits):
        at = draw.randrange(len(text))
        text = draw.choice(
            [
                text[:at] + text[at + 1 :],
                text[:at] + draw.choice("aeiot") + text[at:],
                text[:at] + draw.choice("aeiot") + text[at + 1 :],
                text[: at - 1] + text[at] + text[at - 1] + text[at + 1 :] if at else text,
            ]
        )
    return text


def test_distances_are_those_of_the_textbook() -> None:
    pytest.importorskip("rapidfuzz")
    draw = random.Random(0)
    finder = labels._Finder()
    for _ in range(500):
        a = "".join(draw.choices("abcdef", k=draw.randint(4, 12)))
        b = edited(a, draw, draw.randint(0, 3))
        assert finder.edits(a, b) == min(osa(a, b), 3)


def test_without_rapidfuzz_distances_are_never_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rapidfuzz", None)
    draw = random.Random(0)
    finder = labels._Finder()
    exact = 0
    for _ in range(500):
        a = "".join(draw.choices("abcdefghij", k=draw.randint(6, 14)))
        b = edited(a, draw, 1)
        assert finder.edits(a, b) >= min(osa(a, b), 3)
        exact += finder.edits(a, b) == osa(a, b)
    assert exact >= 490
    assert found(counted({"card_arrival": 60, "card_arival": 1, "lost": 60}))


# ---- real data ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def banking() -> Rows:
    if not BANKING77.is_file():
        pytest.skip(f"{BANKING77} is not there")
    with BANKING77.open(encoding="utf-8") as file:
        return [(row["prompt"], row["completion"]) for row in map(json.loads, file)]


def test_clean_banking77_has_nothing_to_say(banking: Rows) -> None:
    assert concluded(Facts(banking)) == []


def respelt(label: str, draw: random.Random) -> str:
    """Another spelling of a label, as people and programs write them."""
    words = label.split("_")
    at = draw.randrange(1, len(label) - 1)
    return draw.choice(
        [
            " ".join(words),
            "-".join(words),
            label.upper(),
            label.capitalize(),
            " ".join(words).title(),
            "".join(word.title() for word in words),
            label + ".",
            " " + label,
            f"'{label}'",
            label[:at] + label[at + 1 :],
            label[:at] + label[at] + label[at:],
            label[: at - 1] + label[at] + label[at - 1] + label[at + 1 :],
            label[:at] + draw.choice("aeiourstln") + label[at + 1 :],
        ]
    )


def test_planted_spellings_in_banking77_are_found(banking: Rows) -> None:
    right = wrong = missed = 0
    for seed in range(3):
        draw = random.Random(seed)
        rows = list(banking)
        planted = set()
        for record in draw.sample(range(len(rows)), 200):
            prompt, label = rows[record]
            spelling = respelt(label, draw)
            if spelling != label:
                rows[record] = (prompt, spelling)
                planted.add(record + 1)
        named = {place.line for finding in found(rows) for place in finding.records}
        right += len(named & planted)
        wrong += len(named - planted)
        missed += len(planted - named)
    print(f"label_spelling on BANKING77: recall {right / (right + missed):.3f}, precision {right / (right + wrong):.3f}")
    assert right / (right + missed) >= 0.95
    assert right / (right + wrong) >= 0.95


# ---- balance, rare and unseen labels --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counts", "severity"),
    [
        ({"yes": 90, "no": 10}, None),
        ({"yes": 200, "no": 20}, "note"),
        ({"yes": 2000, "no": 20}, "warning"),
        ({"yes": 40, "no": 8}, "warning"),  # fewer than ten
    ],
)
def test_balance(counts: dict[str, int], severity: str | None) -> None:
    findings = found(counted(counts), "label_balance")
    assert [finding.severity for finding in findings] == ([severity] if severity else [])
    if findings:
        assert findings[0].count == len(findings[0].records) == counts["no"]
        assert f"'no' ({counts['no']})" in findings[0].what


def test_spellings_count_for_their_label() -> None:
    assert not found(answers(yes=90, no=5, No=5), "label_balance")


def test_answers_that_are_all_the_same() -> None:
    (finding,) = concluded(Facts(answers(yes=40)))
    assert finding.kind == "label_balance" and finding.severity == "warning" and "all" not in finding.records


def test_answers_like_no_label() -> None:
    (finding,) = concluded(Facts(counted({"yes": 50, "no": 50, "perhaps tomorrow": 1, "who knows": 2})))
    assert (finding.kind, finding.severity, finding.count) == ("label_rare", "note", 3)
    assert [place.line for place in finding.records] == [101, 102, 103]


def test_labels_that_training_never_has() -> None:
    train = Facts(answers(yes=50, no=50))
    test = Facts(answers(yes=10, NO=10, maybe=3), "test")
    findings = {finding.kind: finding for finding in concluded(train, test)}
    assert findings["label_unseen"].count == 3
    assert {(place.split, place.line) for place in findings["label_unseen"].records} == {("test", n) for n in (21, 22, 23)}


def test_more_records_than_are_listed_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labels, "_MOST_RECORDS", 5)
    (finding,) = found(answers(yes=50, Yes=20, no=50))
    assert finding.count == 20 and len(finding.records) == 5


def test_a_column_is_searched_in_blocks() -> None:
    column = np.zeros(2_500_001, dtype=np.uint64)
    column[[0, 999_999, 1_000_000, 2_500_000]] = 7
    assert np.flatnonzero(labels.is_one_of(column, [9, 7, 3])).tolist() == [0, 999_999, 1_000_000, 2_500_000]
    assert not labels.is_one_of(column, []).any()


def test_json_keeps_what_a_shard_counted() -> None:
    counted_once: Any = labels.short_answers(Facts(answers(yes=3)).all)
    assert json.loads(json.dumps(counted_once)) == counted_once
