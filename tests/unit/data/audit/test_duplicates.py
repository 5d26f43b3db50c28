"""Duplicates, leaks and contradictions: compared with all pairs taken one by one, and with definitions written another way."""

from __future__ import annotations

import itertools
import json
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fullrank.data.audit import duplicates
from fullrank.data.audit.duplicates import Batch, Groups, Sets, conclude, groups_of, left_out, sign, tell
from fullrank.data.audit.similarity import Face, nearly_same, normalise, words
from fullrank.data.convert import Conversation, Document, Pair
from fullrank.data.subject import Subject, subject_of
from fullrank.records import Finding, Place

DATA = Path(__file__).resolve().parents[5] / "shared/data"


class Split:
    """One split held in memory, its columns signed in batches."""

    def __init__(
        self, name: str, records: Sequence[Subject | tuple[str, str] | str], *, is_test: bool = False, batch: int = 7
    ) -> None:
        self.name = name
        self.is_test = is_test
        self.all = [subject(record) for record in records]
        signed = [sign(self.all[start : start + batch]) for start in range(0, max(len(self.all), 1), batch)]
        self.columns = {key: np.concatenate([part[key] for part in signed], axis=-1) for key in signed[0]}
        self.asked: list[int] = []

    def __len__(self) -> int:
        return len(self.all)

    def column(self, name: str) -> np.ndarray:
        return self.columns[name]

    def row(self, name: str, number: int) -> np.ndarray:
        return self.columns[name][number]

    def place(self, record: int) -> Place:
        return Place(path=f"{self.name}.jsonl", line=record + 1, split=self.name)

    def subjects(self, records: Sequence[int]) -> Iterator[Subject]:
        assert list(records) == sorted(set(records))
        self.asked += records
        return (self.all[record] for record in records)


def subject(record: Subject | tuple[str, str] | str) -> Subject:
    if isinstance(record, Subject):
        return record
    return subject_of(Document(record) if isinstance(record, str) else Pair(*record))


def chat(*turns: str, system: str = "") -> Subject:
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    messages += [{"role": ("user", "assistant")[n % 2], "content": turn} for n, turn in enumerate(turns)]
    return subject_of(Conversation(messages))


def face(record: Subject | tuple[str, str] | str) -> Face:
    return Face.of(subject(record))


def told(findings: Sequence[Finding], kind: str) -> set[frozenset[tuple[str, int]]]:
    """The groups of a kind, as (split, record from 0)."""
    groups = [frozenset((place.split, place.line - 1) for place in found.records) for found in findings if found.kind == kind]
    assert len(groups) == len(set(groups))
    assert all(len(group) == found.count for group, found in zip(groups, (f for f in findings if f.kind == kind), strict=True))
    return set(groups)


def only(findings: Sequence[Finding], kind: str) -> Finding:
    found = [finding for finding in findings if finding.kind == kind]
    assert len(found) == 1, found
    return found[0]


# ---- the form texts are compared in ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("How do I top-up?", "how do i   top up"),
        ("My card hasn't arrived.", "MY CARD HASN\u2019T ARRIVED!"),
        ("a\n\n b\tc", "a b c"),
        ("caf\u00e9", "cafe\u0301"),
        ("\uff21\uff22\uff23\uff11", "abc1"),
        ("Stra\u00dfe", "STRASSE"),
        ("zero\u200bwidth", "zerowidth"),
        ("\u201cquoted\u201d \u2014 text\u2026", '"quoted" - text...'),
        ("card_arrival", "Card arrival"),
        ("\u4f60\u597d\u3002", "\u4f60\u597d"),
    ],
)
def test_case_spacing_punctuation_and_encodings_of_one_character_make_no_difference(a: str, b: str) -> None:
    assert normalise(a) == normalise(b)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("what is 5 - 3", "what is 5 * 3"),
        ("what is 5 - 3", "what is 5 3"),
        ("-5 degrees", "5 degrees"),
        ("it costs $5", "it costs 5%"),
        ("3.5 metres", "35 metres"),
        ("1,000", "1.5"),
        ("a < b", "a > b"),
        ("???", "!!!"),
        ("resume", "r\u00e9sum\u00e9"),
    ],
)
def test_what_carries_meaning_makes_a_difference(a: str, b: str) -> None:
    assert normalise(a) != normalise(b)


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="aB \u00e9\u00df9.,-'?\u2019\u200b\u2014\n\u4f60x", max_size=30))
def test_ascii_and_other_texts_are_normalised_alike(text: str) -> None:
    # An ASCII text takes another path than one with a single other letter at its end.
    ascii_only = "".join(character for character in text if character.isascii())
    assert normalise(ascii_only + " x") + " \u03c9" == normalise(ascii_only + " x \u03c9")
    bare = "".join(c for c in normalise(text) if not c.isspace() and unicodedata.category(c)[0] in "LN")
    letters = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    assert bare == "".join(c for c in letters if unicodedata.category(c)[0] in "LN")


# ---- nearly the same -------------------------------------------------------------------------------------------------


def edits(a: str, b: str) -> int:
    """The Levenshtein distance from its recursion."""
    before = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        now = [i]
        for j, y in enumerate(b, 1):
            now.append(min(now[-1] + 1, before[j] + 1, before[j - 1] + (x != y)))
        before = now
    return before[-1]


def common_letters(a: str, b: str) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for x in a:
        before = 0
        for n, y in enumerate(b, start=1):
            before, row[n] = row[n], before + 1 if x == y else max(row[n], row[n - 1])
    return row[-1]


def is_slip(a: str, b: str) -> bool:
    return min(len(a), len(b)) >= 3 and edits(a, b) <= (2 if max(len(a), len(b)) >= 8 else 1)


def reference(a: str, b: str) -> bool:
    """Raw texts that are nearly the same, from the definition."""
    x, y = Counter(a.split()), Counter(b.split())
    only_x, only_y = list((x - y).elements()), list((y - x).elements())
    short, long = sorted((only_x, only_y), key=len)
    slips = max(sum(map(is_slip, short, order)) for order in itertools.permutations(long, len(short)))
    words = max(sum(x.values()), sum(y.values()))
    in_order = 2 * common_letters(a, b) / (len(a) + len(b)) >= 0.82 - 1e-9
    reordered = 2 * common_letters(" ".join(sorted(a.split())), " ".join(sorted(b.split()))) / (len(a) + len(b)) >= 0.82 - 1e-9
    left = len(long) - slips
    if words >= 4 and ((in_order and left <= max(1, 0.2 * words + 1e-9)) or (reordered and left <= 0.1 * words + 1e-9)):
        return True
    moved = (
        max(sum(len(w) + 1 for w in only_x), sum(len(w) + 1 for w in only_y))
        if abs(len(a) - len(b)) <= 0.15 * max(len(a), len(b))
        else 999
    )
    return 1 - min(edits(a, b), moved) / max(len(a), len(b)) >= 0.85 - 1e-9


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_raw_texts_are_nearly_the_same_where_the_definition_says_so(data: st.DataObject) -> None:
    vocabulary = st.sampled_from(["card", "my", "is", "transfer", "still", "pending", "why", "cards", "the", "a"])
    first = data.draw(st.lists(vocabulary, min_size=1, max_size=12))
    second = list(first)
    for _ in range(data.draw(st.integers(0, 3))):
        place = data.draw(st.integers(0, len(second) - 1))
        change = data.draw(st.sampled_from(["replace", "add", "remove", "move", "misspell"]))
        if change == "replace":
            second[place] = data.draw(vocabulary)
        elif change == "add":
            second.insert(place, data.draw(vocabulary))
        elif change == "remove" and len(second) > 1:
            del second[place]
        elif change == "move":
            second = second[place:] + second[:place]
        elif change == "misspell":
            second[place] = second[place][:-1] + "q"
    a, b = " ".join(first), " ".join(second)
    assert nearly_same(face(a), face(b)) == reference(a, b)
    assert nearly_same(face(a), face(b)) == nearly_same(face(b), face(a))


QUESTION = "How do I know if my card will arrive before next week?"
NEAR = [
    "How do I know if my card will arive before next week?",
    "How do I know if my card will arrive before next month?",
    "How do I know my card will arrive before next week?",
    "How do I know if my new card will arrive before next week?",
    "how do i know, if my card will arrive before next WEEK",
    "Before next week, how do I know if my card will arrive?",
]


@pytest.mark.parametrize("other", NEAR)
def test_a_question_with_a_slip_or_one_other_word_is_nearly_the_same_if_its_label_is(other: str) -> None:
    assert nearly_same(face((QUESTION, "card_arrival")), face((other, "card arrival")))
    assert not nearly_same(face((QUESTION, "card_arrival")), face((other, "lost_card")))


TABLE = "table: 1-1000181-1\ncolumns: State/territory, Colour, Format, Current slogan, Current series, Notes\nQ: {}\nA:"
STORY = "Tom went to the market with his sister Ann. He bought {} apples and gave half of them to her. {}"


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        pytest.param(
            (TABLE.format("What is the format for South Australia?"), "yes"),
            (TABLE.format("Which slogan began in June 2011?"), "yes"),
            False,
            id="two questions about one table",
        ),
        pytest.param(
            (TABLE.format("What is the format for South Australia?"), "yes"),
            (TABLE.format("What is the format of South Australia?"), "yes"),
            True,
            id="one question about one table",
        ),
        pytest.param(
            (TABLE.format("What is the format?").replace("Notes", "Note"), "yes"),
            (TABLE.format("What is the format?"), "yes"),
            True,
            id="a slip in the table",
        ),
        pytest.param(
            (TABLE.format("who won"), "SELECT a FROM t WHERE name = 'x' ORDER BY y"),
            (TABLE.format("who won please"), "SELECT a FROM t WHERE name = 'x' ORDER BY y"),
            True,
            id="words added to a short question",
        ),
        pytest.param(
            (STORY.format(12, "How many are left?"), "He has 6 apples left, #### 6"),
            (STORY.format(14, "How many are left?"), "He has 7 apples left, #### 7"),
            False,
            id="another problem",
        ),
        pytest.param(
            (STORY.format(12, "Are any left?"), "yes"), (STORY.format(14, "Are any left?"), "yes"), False, id="other numbers"
        ),
        pytest.param(
            (STORY.format(12, "Are any left?"), "yes"), (STORY.format("", "Are any left?"), "yes"), True, id="a number lost"
        ),
        pytest.param(
            (STORY.format(12, "How many has he left now?"), "He has 6 apples left after giving half away"),
            (STORY.format(12, "How many has he left now?"), "He has 7 apples left after giving half away"),
            False,
            id="another result",
        ),
        pytest.param(
            ("Which NHL team has the player Mike Loach now?", "SELECT team FROM players WHERE player = 'Mike Loach'"),
            ("Which NHL team has the player Mike Leach now?", "SELECT team FROM players WHERE player = 'Mike Leach'"),
            False,
            id="the answer follows",
        ),
        pytest.param(
            ("Which NHL team has the player Mike Loach now?", "SELECT team FROM players WHERE player = 'Mike Loach'"),
            ("Which NHL team has the player Mike Leach now?", "SELECT team FROM players WHERE player = 'Mike Loach'"),
            True,
            id="the answer does not follow",
        ),
        pytest.param(
            ("Name an opposite", "The opposite of light is dark."),
            ("Name an opposite", "The opposite of light is heavy."),
            False,
            id="one word is all",
        ),
        pytest.param(
            ("Say it in passive voice", "A delicious meal was cooked by the chef."),
            ("Say it in passive voice", "Cooked by the chef was a delicious meal."),
            True,
            id="a clause moved in the answer to one prompt",
        ),
        pytest.param(
            ("What is the opposite of old, please?", "The opposite of 'old' is 'young' of course."),
            ("What is the opposite of young, please?", "The opposite of 'young' is 'old' of course."),
            False,
            id="a clause moved in the answer to another prompt",
        ),
        pytest.param(
            ("Where is my card? It has been weeks.\nHi you", "It is on its way to you"),
            ("Where is my card? It has been weeks.\nHello you", "It is on its way to you"),
            True,
            id="another word in a short line",
        ),
        pytest.param(
            (STORY.format(12, "Are any left?"), "yes"),
            (STORY.format("some", "Are any left?"), "yes"),
            True,
            id="a number put into words",
        ),
        pytest.param(
            ("I sent money abroad last week", "international transfer"),
            ("I sent money abroad last week", "international transfers"),
            False,
            id="labels are equal or not",
        ),
        pytest.param(("What is it?", "x" * 50), "x" * 50, False, id="raw text and an answer"),
        pytest.param(
            "Page last changed on 3 May 2024 " + "by the same hand " * 9,
            "Page last changed on 4 June 2025 " + "by the same hand " * 9,
            True,
            id="a page with another date",
        ),
        pytest.param("x" * 30_000, "x" * 29_999 + "y", False, id="a slip in a long text without spaces"),
        pytest.param("word other " * 3_000 + " one", "word other " * 3_000 + " two", True, id="a long text"),
    ],
)
def test_what_speaks_for_and_against(a: tuple[str, str] | str, b: tuple[str, str] | str, same: bool) -> None:
    assert nearly_same(face(a), face(b)) == nearly_same(face(b), face(a)) == same
    assert nearly_same(face(a), face(a))


def test_a_system_prompt_in_common_makes_no_two_chats_alike() -> None:
    system = "You are a helpful assistant of a bank in the north of Italy. You never give financial advice. Be kind and brief."
    asked = chat("Where is my card?", "It is on its way, please wait.", system=system)
    other = chat("Can I open an account?", "It is on its way, please wait.", system=system)
    assert not nearly_same(Face.of(asked), Face.of(other))
    assert nearly_same(Face.of(asked), Face.of(chat("Where is my crad?", "It is on its way, please wait.", system=system)))
    assert (sign([asked])["bands"] == sign([chat("Where is my card?", "It is on its way, please wait.")])["bands"]).all()


def test_characters_are_words_where_no_spaces_are_written() -> None:
    assert words("abc \u6211\u6709\u4e00\u5f20\u5361") == ["abc", "\u6211", "\u6709", "\u4e00", "\u5f20", "\u5361"]
    a, b = "\u6211\u7684\u5361\u4ec0\u4e48\u65f6\u5019\u5230\uff1f", "\u6211\u7684\u5361\u4ec0\u4e48\u65f6\u5019\u6765\uff1f"
    assert nearly_same(face((a, "arrival")), face((b, "arrival")))


# ---- one record ------------------------------------------------------------------------------------------------------


def test_a_signature_depends_on_the_record_alone() -> None:
    records = [subject((f"question {n} about {'cards ' * n}", f"answer {n}")) for n in range(40)]
    whole, alone = sign(records), [sign([record]) for record in records]
    assert {name: (array.dtype.name, array.shape) for name, array in whole.items()} == {
        **dict.fromkeys(("raw", "exact", "prompt", "answer"), ("uint64", (40,))),
        "answer_words": ("uint16", (40,)),
        "bands": ("uint32", (duplicates.BANDS, 40)),
    }
    for name, array in whole.items():
        np.testing.assert_array_equal(array, np.concatenate([one[name] for one in alone], axis=-1))
    assert {name: array.shape[-1] for name, array in sign([]).items()} == dict.fromkeys(whole, 0)


@pytest.mark.parametrize("piece", [4, 5, 64])
def test_a_long_text_is_signed_in_pieces_as_it_would_be_at_once(monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    draw = random.Random(1)
    records = [subject("".join(draw.choices("abcdef \u00e9\u4f60", k=size))) for size in (1, 3, 4, 5, 70, 400)]
    expected = sign(records)["bands"]
    monkeypatch.setattr(duplicates, "_PIECE", piece)
    np.testing.assert_array_equal(sign(records)["bands"], expected)


def test_bands_agree_as_often_as_the_theory_says() -> None:
    """Four values agree with probability s^4 (MMDS, section 3.4), s being the Jaccard similarity of the shingles."""
    draw = random.Random(0)
    agreed: dict[float, list[float]] = {0.5: [], 0.8: []}
    for share, seen in agreed.items():
        for _ in range(150):
            common = draw.sample(range(0x5000, 0x9000), 300)
            kept = round(300 * 2 * share / (1 + share))
            # Texts of characters that occur once, so that shingles are as different as characters; runs keep shingles whole.
            a = "".join(map(chr, common))
            b = "".join(map(chr, [*common[:kept], *draw.sample(range(0xA000, 0xD000), 300 - kept)]))
            shingles = [{text[i : i + 4] for i in range(len(text) - 3)} for text in (a, b)]
            jaccard = len(shingles[0] & shingles[1]) / len(shingles[0] | shingles[1])
            bands = duplicates._bands([a, b])
            seen.append(float((bands[:, 0] == bands[:, 1]).mean()) - jaccard**4)
        assert abs(np.mean(seen)) < 0.02


def test_hashes_tell_records_apart_by_what_they_say() -> None:
    same = sign([subject(("Where is it?", "here")), chat("where is it", "HERE"), chat("Where is it?", "here")])
    assert len(set(same["exact"].tolist())) == 1
    assert [same["raw"][0] == other for other in same["raw"]] == [True, False, True]
    apart = sign([subject(("a b", "c")), subject(("a", "b c")), subject("a b c"), chat("a b", "c", "more", "c")])
    assert len(set(apart["exact"].tolist())) == 4
    assert apart["prompt"][2] == 0 and 0 not in apart["prompt"][[0, 1, 3]]
    assert apart["answer"][0] == apart["answer"][3] and apart["answer_words"].tolist() == [1, 2, 3, 1]


# ---- all records -----------------------------------------------------------------------------------------------------


def planted(count: int, seed: int) -> list[tuple[str, str]]:
    """Questions and labels, a third of them repeated with slips."""
    draw = random.Random(seed)
    vocabulary = [
        a + b for a in ("ba", "de", "fi", "go", "lu", "mo", "ne", "pi", "ra", "su") for b in ("ck", "ll", "nd", "rt", "st", "x")
    ]
    records = []
    for _ in range(count):
        text = draw.choices(vocabulary, k=draw.randint(6, 25))
        answer = draw.choice(["yes", "no", " ".join(draw.choices(vocabulary, k=30))])
        records.append((" ".join(text), answer))
        while draw.random() < 0.35:
            text = list(text)
            text[draw.randrange(len(text))] = draw.choice(vocabulary)
            records.append((" ".join(text).upper() if draw.random() < 0.5 else " ".join(text), answer))
    draw.shuffle(records)
    return records


def components(numbers: Sequence[Any], linked: Any) -> set[frozenset[Any]]:
    """Connected components of two members or more, by walking from neighbour to neighbour."""
    neighbours: dict[Any, set[Any]] = {number: set() for number in numbers}
    for a, b in combinations(numbers, 2):
        if linked(a, b):
            neighbours[a].add(b)
            neighbours[b].add(a)
    found, seen = set(), set()
    for start in numbers:
        reached, front = set(), {start} - seen
        while front:
            reached |= front
            front = set().union(*(neighbours[number] for number in front)) - reached
        seen |= reached
        if len(reached) > 1:
            found.add(frozenset(reached))
    return found


def test_groups_are_those_of_all_pairs_compared_one_by_one() -> None:
    train, test = planted(150, 1), planted(60, 2)
    train += [test[3], (test[4][0].upper(), test[4][1]), (test[5][0] + " ba", test[5][1])]
    splits = [Split("train", train), Split("validation", train[:1] + planted(20, 3)), Split("test", test, is_test=True)]
    found = conclude(splits)
    assert not found.sampled
    records = [(split.name, number) for split in splits for number in range(len(split))]
    known = {(split.name, number): Face.of(split.all[number]) for split in splits for number in range(len(split))}
    form = {record: (normalise(one.prompt), normalise(one.answer)) for record, one in known.items()}
    firsts: dict[Any, tuple[str, int]] = {}
    for record in records:
        firsts.setdefault((record[0], form[record]), record)
    distinct = list(firsts.values())

    equal = components(records, lambda a, b: a[0] == b[0] and form[a] == form[b])
    near = components(distinct, lambda a, b: a[0] == b[0] and nearly_same(known[a], known[b]))
    leaked = components(
        records,
        lambda a, b: (
            a[0] != b[0] and (form[a][0] == form[b][0] or (a in distinct and b in distinct and nearly_same(known[a], known[b])))
        ),
    )
    assert len(equal) >= 4 and len(near) > 10 and len(leaked) == 4
    assert told(found.findings, "exact_duplicate") == equal
    assert told(found.findings, "near_duplicate") == near
    assert told(found.findings, "leak") == leaked
    for finding in found.findings:
        assert [place.line for place in finding.records if place.split == "train"] == sorted(
            place.line for place in finding.records if place.split == "train"
        )


def test_groups_do_not_depend_on_the_order_of_records_or_on_batches() -> None:
    records = planted(120, 5) + [("which way is it", answer) for answer in ("left", "right", "left")]
    numbers = list(range(len(records)))
    random.Random(9).shuffle(numbers)

    def said(group: frozenset[tuple[str, int]]) -> frozenset[str]:
        return frozenset(normalise(" ".join(records[record])) for _, record in group)

    first = conclude([Split("train", records)])
    second = conclude([Split("train", [records[number] for number in numbers], batch=50)])
    for kind in ("exact_duplicate", "near_duplicate", "label_conflict"):
        mapped = {frozenset((split, numbers[record]) for split, record in group) for group in told(second.findings, kind)}
        if kind == "near_duplicate":  # of equal records the first is told
            assert {said(group) for group in mapped} == {said(group) for group in told(first.findings, kind)}
        else:
            assert mapped == told(first.findings, kind)
        assert mapped


def test_the_words_say_what_kind_of_equality_it_is() -> None:
    found = conclude([Split("train", [("where is my card", "lost")] * 2 + [("Who are you?", "me"), ("who are you", "me")])])
    first, second = found.findings
    assert {first.kind, second.kind} == {"exact_duplicate"}
    assert first.what == "2 records are the same" and [place.line for place in first.records] == [1, 2]
    assert second.what == "2 records are the same but for case, spacing or punctuation"
    assert first.advice and first.severity == "warning"


def test_few_duplicates_are_a_note_and_so_are_those_outside_training() -> None:
    unlike = [(f"{n} {'abcdefghij'[n % 10] * (3 + n // 10)}", "x") for n in range(1000)]
    few = conclude([Split("train", [*unlike, unlike[0]], batch=500)], skip=frozenset({"near_duplicate"}))
    assert only(few.findings, "exact_duplicate").severity == "note"
    one_in_a_thousand = conclude([Split("train", [*unlike[1:], unlike[1]], batch=500)], skip=frozenset({"near_duplicate"}))
    assert only(one_in_a_thousand.findings, "exact_duplicate").severity == "warning"
    held_out = conclude([Split("train", [("a b c", "d")]), Split("test", [("e f g", "h")] * 2, is_test=True)])
    assert only(held_out.findings, "exact_duplicate").severity == "note"


def test_a_leak_is_told_once_and_as_nothing_else() -> None:
    long = "Please explain to me how I can get a new card after the old one was stolen in a foreign country"
    splits = [
        Split("train", [("Where is my card?", "card_arrival"), (long, "stolen"), ("What about fees?", "fees"), ("own", "own")]),
        Split("validation", [("where is my card", "card_arrival")]),
        Split(
            "test", [(long.replace("new", "another"), "stolen"), ("WHAT ABOUT FEES", "charge"), ("else", "else")], is_test=True
        ),
        Split("second", [("else", "else")], is_test=True),
    ]
    found = conclude(splits)
    assert {finding.severity for finding in found.findings if finding.kind == "leak"} == {"error"}
    assert told(found.findings, "leak") == {
        frozenset({("train", 0), ("validation", 0)}),
        frozenset({("train", 1), ("test", 0)}),
        frozenset({("train", 2), ("test", 1)}),
    }
    assert [finding.what for finding in found.findings if finding.kind == "leak"] == [
        "the same record stands in train and validation",
        "nearly the same record stands in train and test",
        "the same prompt stands in train and test",
    ]
    assert "remove it from train" in only(found.findings[:1], "leak").advice
    assert {finding.kind for finding in found.findings} == {"leak", "label_conflict"}
    assert found.leaks.group("train", np.array([1]))[0] == found.leaks.group("test", np.array([0]))[0]
    assert found.leaks.group("train", np.array([3]))[0] != found.leaks.group("second", np.array([0]))[0]
    none = conclude(splits, skip=frozenset({"leak", "label_conflict"}))
    assert not none.findings
    assert none.leaks.group("train", np.array([1]))[0] != none.leaks.group("test", np.array([0]))[0]


def test_what_validation_and_a_test_set_share_is_a_leak() -> None:
    splits = [Split("train", []), Split("validation", [("a b c d", "x")]), Split("test", [("a b c d", "x")], is_test=True)]
    assert only(conclude(splits).findings, "leak").what == "the same record stands in validation and test"


def test_test_sets_may_have_records_in_common() -> None:
    tests = [
        [("where is the card that i asked for", "lost"), ("a b", "c")],
        [("where is the card I asked for", "lost"), ("a b", "c")],
    ]
    splits = [Split("train", [("else", "x")]), *(Split(f"test{n}", test, is_test=True) for n, test in enumerate(tests))]
    assert not conclude(splits).findings


def test_an_instruction_in_common_is_no_leak_but_an_equal_record_is() -> None:
    fixed = "Write a short poem."
    train = [(fixed, f"poem {n} {'abcdefghijklm'[n] * 20} and so on and on") for n in range(duplicates.COMMON_PROMPT)]
    other = (fixed, "zzz another poem that no one has ever written down before")
    assert only(conclude([Split("train", train[:-1]), Split("test", [other], is_test=True)]).findings, "leak").count == 10
    assert not told(conclude([Split("train", train), Split("test", [other], is_test=True)]).findings, "leak")
    repeated = conclude([Split("train", train), Split("test", [other, train[2]], is_test=True)])
    assert told(repeated.findings, "leak") == {frozenset({("train", 2), ("test", 1)})}


def test_contradictory_labels_are_named() -> None:
    rows = [("Is it late?", "yes"), ("is it late", "No."), ("is it late", "YES"), ("other", "yes"), ("x", "y"), ("x", "y!")]
    found = only(conclude([Split("train", rows)]).findings, "label_conflict")
    assert found.severity == "warning" and found.count == 3 and [place.line for place in found.records] == [1, 2, 3]
    assert sorted(re.split(": |, ", found.what)[1:]) == ["No.", "yes"] and found.what.startswith(
        "one prompt has 2 different answers"
    )
    many = only(conclude([Split("train", [("x", f"label {n}") for n in range(6)])]).findings, "label_conflict")
    assert many.what.startswith("one prompt has 6 different answers: label") and many.what.endswith(", ...")


def test_long_answers_to_one_prompt_are_a_note_unless_they_are_nearly_the_same() -> None:
    good = "Open the app, go to the settings, choose your card and press the button that says replace, then wait for a week"
    other = "You cannot do that yourself; call us on a weekday, and we will send you a form that you have to sign in our branch"
    slip = good.replace("settings", "setings")
    rows = [("How?", good), ("How?", other), ("Why?", good), ("Why?", slip), ("When?", good), ("When?", slip), ("When?", other)]
    found = conclude([Split("train", rows)]).findings
    assert told(found, "label_conflict") == {
        frozenset({("train", 0), ("train", 1)}),
        frozenset({("train", n) for n in (4, 5, 6)}),
    }
    assert {finding.severity for finding in found if finding.kind == "label_conflict"} == {"note"}
    assert told(found, "near_duplicate") == {frozenset({("train", 2), ("train", 3)}), frozenset({("train", 4), ("train", 5)})}


def test_contradictions_across_splits_are_told_and_raw_text_has_none() -> None:
    splits = [
        Split("train", [("Is it?", "yes"), *(f"text {n}" for n in range(3))]),
        Split("test", [("is it", "no"), "text"], is_test=True),
    ]
    assert told(conclude(splits).findings, "label_conflict") == {frozenset({("train", 0), ("test", 0)})}


@pytest.mark.parametrize(
    "splits", [[], [Split("train", [])], [Split("train", [("a", "b")])], [Split("train", []), Split("validation", [])]]
)
def test_nothing_is_found_in_nothing(splits: list[Split]) -> None:
    assert conclude(splits).findings == []


def test_kinds_that_are_skipped_are_not_looked_for() -> None:
    rows = [("a b c d e f g h", "x"), ("a b c d e f g h", "x"), ("a b c d e f g i", "x"), ("q", "yes"), ("q", "no")]
    splits = [Split("train", rows), Split("test", rows[:1], is_test=True)]
    kinds = {"exact_duplicate", "near_duplicate", "leak", "label_conflict"}
    for skipped in kinds:
        assert {finding.kind for finding in conclude(splits, skip=frozenset({skipped})).findings} == kinds - {skipped}


# ---- much of it ------------------------------------------------------------------------------------------------------


def alike(count: int) -> list[tuple[str, str]]:
    """Records each of which is nearly the same as every other."""
    text = "the quick brown fox jumps over the lazy dog while the cat sleeps in the sun and dreams of mice and milk all day {}"
    return [(text.format("".join("abcdefghij"[int(digit)] for digit in str(n))), "yes") for n in range(count)]


def test_a_large_bucket_is_compared_with_a_window_and_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    monkeypatch.setattr(duplicates, "nearly_same", lambda a, b: compared.append(1) or nearly_same(a, b))
    monkeypatch.setattr(duplicates, "WINDOW", 3)
    found = conclude([Split("train", alike(200), batch=100)])
    assert only(found.findings, "near_duplicate").count == 200
    assert list(found.sampled) == ["near_duplicate"]
    assert "200 records have more than 3 like them" in found.sampled["near_duplicate"]
    assert len(compared) < 200 * 3  # of 19,900 pairs


def test_where_pairs_are_too_many_those_across_splits_and_the_most_alike_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    monkeypatch.setattr(duplicates, "nearly_same", lambda a, b: compared.append(1) or False)
    monkeypatch.setattr(duplicates, "MOST_COMPARISONS", 30)
    splits = [Split("train", alike(60)), Split("test", [alike(61)[-1]], is_test=True)]
    found = conclude(splits)
    assert 0 < len(compared) <= 30
    assert (
        "two successive bands" in found.sampled["leak"] and "the 30 most promising pairs were compared" in found.sampled["leak"]
    )
    keys = np.array([0 << 32 | 1, 0 << 32 | 2, 1 << 32 | 2, 1 << 32 | 3], dtype=np.uint64)
    counts, split = np.array([3, 9, 2, 1], dtype=np.uint8), np.array([0, 0, 0, 1], dtype=np.int16)
    assert duplicates._most_agreeing(keys, counts, 2, split).tolist() == [1, 3]


def test_in_a_large_bucket_those_that_agree_in_the_next_bands_are_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "WINDOW", 1)
    tie = np.array([5, 4, 3, 2, 1, 0, 6], dtype=np.uint32)
    bands = [np.array(band, dtype=np.uint32) for band in ([7, 7, 7, 7, 7, 7, 8], [3, 1, 3, 1, 2, 2, 9], [0, 0, 0, 0, 4, 4, 9])]

    def everything(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.ones(len(a), dtype=bool)

    found, crowd = duplicates._row_pairs(bands, tie, everything, successive=False)
    pairs = {(int(key) >> 32, int(key) & 0xFFFFFFFF) for key in found}
    assert {(1, 3), (4, 5), (0, 2)} <= pairs and len(pairs) == 5 and sorted(crowd.tolist()) == [0, 1, 2, 3, 4, 5]
    found, crowd = duplicates._row_pairs(bands, tie, everything, successive=True)
    assert {(int(key) >> 32, int(key) & 0xFFFFFFFF) for key in found} == {(1, 3), (4, 5), (0, 2)} and not len(crowd)


def test_pairs_of_many_bands_are_counted() -> None:
    keys, counts = np.empty(0, dtype=np.uint64), np.empty(0, dtype=np.uint8)
    draw, expected = random.Random(4), Counter[int]()
    for _ in range(32):
        found = sorted(set(draw.choices(range(50), k=20)))
        expected.update(found)
        keys, counts = duplicates._merged(keys, counts, np.array(found, dtype=np.uint64))
    assert dict(zip(keys.tolist(), counts.tolist(), strict=True)) == dict(expected) and keys.tolist() == sorted(keys.tolist())


def test_texts_that_do_not_fit_are_said_not_to_be_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(duplicates, "MOST_BYTES", 1000)
    monkeypatch.setattr(duplicates, "_MOST_HELD", 500)
    split = Split("train", alike(40))
    found = conclude([split], scratch=tmp_path)
    unread = 40 - only(found.findings, "near_duplicate").count
    assert 20 < unread < 40 and f"{unread} candidates were not compared" in found.sampled["near_duplicate"]
    assert not list(tmp_path.iterdir())


def test_candidates_are_read_once_and_others_not_at_all() -> None:
    split = Split(
        "train", [*alike(5), *((f"{n}, that is {n * n} or {n**5} {'abcdefghijklmnopqrst'[n]}", f"{n}") for n in range(20))]
    )
    conclude([split])
    assert split.asked == [0, 1, 2, 3, 4]


def test_more_findings_than_are_told_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "MOST_FINDINGS", 4)
    sizes = [2, 5, 3, 2, 4, 2, 2]
    bounds = np.cumsum([0, *sizes])
    groups = Groups(np.arange(bounds[-1])[::-1].copy(), bounds)
    warning = Batch("warning", groups, lambda number, members: (f"group {number} of {len(members)}", "advice"))
    note = Batch("note", groups.select(np.array(sizes) == 3), lambda number, members: ("", ""))

    def place(record: int) -> Place:
        return Place(path="f", line=record + 1, split="train")

    found = tell("kind", [warning, note], place)
    assert [(finding.severity, finding.count) for finding in found] == [
        ("warning", 4),
        ("warning", 5),
        ("warning", 11),
        ("note", 3),
    ]
    assert found[2].what == "5 more groups of this kind" and found[2].advice == "advice"
    assert sum(finding.count for finding in found) == sum(sizes) + 3
    monkeypatch.setattr(duplicates, "MOST_RECORDS", 2)
    cut = tell("kind", [note], place)[0]
    assert cut.count == 3 and [p.line for p in cut.records] == [found[3].records[0].line, found[3].records[-1].line]
    monkeypatch.setattr(duplicates, "MOST_RECORDS", 10)
    monkeypatch.setattr(duplicates, "MOST_LISTED", 9)
    assert [len(finding.records) for finding in tell("kind", [warning], place)[:3]] == [2, 2, 2]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 8), max_size=30), st.lists(st.tuples(st.integers(0, 29), st.integers(0, 29)), max_size=40))
def test_groups_and_sets_are_those_of_plain_python(keys: list[int], pairs: list[tuple[int, int]]) -> None:
    groups = groups_of(np.array(keys, dtype=np.uint64))
    expected = {frozenset(n for n, other in enumerate(keys) if other == key) for key in keys if keys.count(key) > 1}
    assert {frozenset(groups.group(number).tolist()) for number in range(len(groups))} == expected
    assert groups.first().tolist() == [min(groups.group(number)) for number in range(len(groups))]
    sets = Sets(30)
    for a, b in pairs:
        sets.join(a, b)
    linked = {frozenset(pair) for pair in pairs}
    connected = components(range(30), lambda a, b: frozenset((a, b)) in linked)
    roots = sets.roots()
    assert {frozenset(np.flatnonzero(roots == root).tolist()) for root in roots if (roots == root).sum() > 1} == connected
    assert all(roots[member] == min(group) for group in connected for member in group)


# ---- without the libraries -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["rensa", "rapidfuzz"])
def test_without_a_library_the_rest_is_found_and_what_is_left_out_said(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    assert left_out() == {}
    find_spec = duplicates.find_spec
    monkeypatch.setattr(duplicates, "find_spec", lambda name: None if name == missing else find_spec(name))
    monkeypatch.setitem(__import__("sys").modules, missing, None)
    assert set(left_out()) == {"near_duplicate", "leak"}
    assert f"{missing} is not installed (pip install 'fullrank[data]')" in left_out()["near_duplicate"]
    long = "an answer of rather more words than a label has"
    rows = [*alike(3), ("a b", "x"), ("a b", "x"), ("c", "yes"), ("c", "no"), ("d", long), ("d", long + "s")]
    splits = [Split("train", rows), Split("test", [("a b", "x")], is_test=True)]
    assert ("bands" in splits[0].columns) == (missing != "rensa")
    found = conclude(splits)
    assert Counter(finding.kind for finding in found.findings) == {"exact_duplicate": 1, "leak": 1, "label_conflict": 2}


# ---- real data -------------------------------------------------------------------------------------------------------


def read(name: str) -> list[Subject]:
    path = DATA / name
    if not path.exists():
        pytest.skip(f"needs {path}")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    return [subject_of(Conversation(r["messages"]) if "messages" in r else Pair(r["prompt"], r["completion"])) for r in rows]


def test_the_known_flaws_of_banking77_are_found() -> None:
    splits = [
        Split("train", read("banking77/train.jsonl"), batch=500),
        Split("test", read("banking77/test.jsonl"), is_test=True, batch=500),
    ]
    found = conclude(splits)
    equal = {
        place.line
        for f in found.findings
        if f.kind == "leak" and f.what.startswith("the same record")
        for place in f.records
        if place.split == "test"
    }
    assert {555, 977, 978, 1433, 1475, 2150} <= equal
    rows = Counter((s.prompt.strip(), s.answer) for s in splits[0].all)
    repeated = {
        place.line for f in found.findings if f.kind == "exact_duplicate" for place in f.records if place.split == "train"
    }
    assert {n for n, s in enumerate(splits[0].all, 1) if rows[s.prompt.strip(), s.answer] > 1} <= repeated


def test_a_set_without_flaws_has_no_findings_but_what_is_planted_in_it() -> None:
    train, test = read("gsm8k/train.jsonl")[:1500], read("gsm8k/test.jsonl")[:300]
    assert not conclude([Split("train", train, batch=500), Split("test", test, is_test=True)]).findings
    draw = random.Random(3)
    expected = set()
    for n in draw.sample(range(300), 40):
        asked = test[n].prompt.split()
        place = draw.choice([n for n, word in enumerate(asked) if word.isalpha()])
        asked[place] = draw.choice(["apples", "quickly", asked[place][::-1] + "e"])
        expected.add(frozenset({("train", len(train)), ("test", n)}))
        train.append(subject((" ".join(asked), test[n].answer)))
    assert told(conclude([Split("train", train, batch=500), Split("test", test, is_test=True)]).findings, "leak") == expected
