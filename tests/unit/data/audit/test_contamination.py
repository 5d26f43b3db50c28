"""Passages of test records in training records: compared with sets of word runs taken one by one."""

from __future__ import annotations

import json
import pickle
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from fullrank.data.audit import contamination, duplicates
from fullrank.data.audit.contamination import COMMON, LONGEST, OWN, SHORTEST, Grams, conclude, grams
from fullrank.data.audit.duplicates import Leaks, sign
from fullrank.data.convert import Conversation, Document, Pair
from fullrank.data.subject import Subject, subject_of
from fullrank.records import Finding, Place

DATA = Path(__file__).resolve().parents[5] / "shared/data"
Record = Subject | tuple[str, str] | str


class Split:
    """One split held in memory."""

    def __init__(self, name: str, records: Sequence[Record]) -> None:
        self.name = name
        self.is_test = name != "train"
        self.all = [subject(record) for record in records]
        self.columns = sign(self.all)

    def __len__(self) -> int:
        return len(self.all)

    def column(self, name: str) -> np.ndarray:
        return self.columns[name]

    def row(self, name: str, number: int) -> np.ndarray:
        return self.columns[name][number]

    def place(self, record: int) -> Place:
        return Place(path=f"{self.name}.jsonl", line=record + 1, split=self.name)

    def subjects(self, records: Sequence[int]) -> Iterator[Subject]:
        return (self.all[record] for record in records)


def subject(record: Record) -> Subject:
    if isinstance(record, Subject):
        return record
    return subject_of(Document(record) if isinstance(record, str) else Pair(*record))


def looked(passages: Grams, records: Sequence[Subject], batch: int) -> np.ndarray:
    """The hits in records that come in batches, as a pool of workers finds them."""
    hits = []
    for start in range(0, len(records), batch):
        found = pickle.loads(pickle.dumps(passages)).look(records[start : start + batch]).astype(np.int64)
        hits.append(found + np.array([[start], [0]]))
    return np.concatenate(hits, axis=1)


def concluded(train: Sequence[Record], *tests: Sequence[Record], batch: int = 3) -> list[Finding]:
    splits = [Split("train", train), *(Split(f"test{n or ''}", test) for n, test in enumerate(tests))]
    passages = grams(one for split in splits[1:] for one in split.all)
    leaks = duplicates.conclude(splits).leaks
    return conclude(splits[0], splits[1:], passages, looked(passages, splits[0].all, batch), leaks)


def told(findings: Sequence[Finding]) -> dict[tuple[str, int], set[int]]:
    """Test record -> training records, from 0."""
    found = {}
    for finding in findings:
        first, *others = finding.records
        assert finding.kind == "contamination" and finding.count == len(finding.records) and finding.advice
        assert first.split != "train" and all(place.split == "train" for place in others)
        found[first.split, first.line - 1] = {place.line - 1 for place in others}
    assert len(found) == len(findings)
    return found


def text(draw: random.Random, count: int) -> str:
    return " ".join("".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 7))) for _ in range(count))


DRAW = random.Random(11)
QUESTION, ANSWER = text(DRAW, 40), text(DRAW, 30)
BEFORE, AFTER = text(DRAW, 25), text(DRAW, 25)


def part(whole: str, start: int, count: int) -> str:
    return " ".join(whole.split()[start : start + count])


def test_what_is_found_is_what_sets_of_word_runs_have_in_common() -> None:
    """An independent account of the rule, on texts of so few words that runs meet by chance and on purpose."""
    draw = random.Random(2)
    base = [text(draw, draw.randint(3, 60)).split() for _ in range(30)]
    tests, train = [], []
    for words in base:
        tests.append((" ".join(words), " ".join(draw.choice(base)[:9])))
    for _ in range(300):
        words = text(draw, draw.randint(5, 30)).split()
        source = draw.choice(base)
        start = draw.randrange(len(source))
        piece = source[start : start + draw.randint(5, 40)] if draw.random() < 0.8 else source
        place = draw.randint(0, len(words))
        train.append((" ".join(words[:place] + piece + words[place:]).upper().replace(" ", ", "), "yes"))

    def runs(words: list[str], length: int) -> set[tuple[str, ...]]:
        return {tuple(words[n : n + length]) for n in range(len(words) - length + 1)}

    wanted = [
        runs(asked.split(), LONGEST) | ({tuple(asked.split())} if SHORTEST <= len(asked.split()) < LONGEST else set())
        for asked, _ in tests
    ]
    held = [
        set().union(*(runs(asked.lower().replace(",", "").split(), n) for n in range(SHORTEST, LONGEST + 1)))
        for asked, _ in train
    ]
    wanted = [{run for run in own if sum(run in other for other in wanted) <= OWN} for own in wanted]
    wanted = [{run for run in own if sum(run in other for other in held) <= COMMON} for own in wanted]
    expected = {
        ("test", number): found
        for number, own in enumerate(wanted)
        if (found := {n for n, other in enumerate(held) if own & other})
    }
    # Whether a pair is a leak is another question: here none is taken for one.
    splits = Split("train", train), Split("test", tests)
    apart = Leaks({"train": 0, "test": len(train)}, np.arange(len(train) + len(tests), dtype=np.int32))
    passages = grams(splits[1].all)
    for batch in (1, 7, 300):
        found = conclude(splits[0], [splits[1]], passages, looked(passages, splits[0].all, batch), apart)
        assert told(found) == expected
    assert len(expected) > 15 and sum(map(len, expected.values())) > 60


@pytest.mark.parametrize(
    ("train", "test", "severity"),
    [
        pytest.param(f"{BEFORE} {QUESTION} {ANSWER} {AFTER}", (QUESTION, ANSWER), "error", id="all of it"),
        pytest.param(f"{BEFORE} {part(QUESTION, 5, 30)} {AFTER}", (QUESTION, "yes"), "warning", id="most of the question"),
        pytest.param(f"{BEFORE} {part(QUESTION, 5, LONGEST)} {AFTER}", (QUESTION, "yes"), "note", id="one passage"),
        pytest.param(f"{BEFORE} {part(QUESTION, 5, LONGEST - 1)} {AFTER}", (QUESTION, "yes"), None, id="a word too few"),
        pytest.param(
            f"{BEFORE}, {part(QUESTION, 5, 20).upper()}... {AFTER}", (QUESTION, "yes"), "warning", id="in other letters"
        ),
        pytest.param(
            f"{BEFORE} {part(QUESTION, 0, 10)} {AFTER}", (part(QUESTION, 0, 10), "yes"), "warning", id="a short question"
        ),
        pytest.param(f"{BEFORE} {part(QUESTION, 0, 7)} {AFTER}", (part(QUESTION, 0, 7), "yes"), None, id="too short a question"),
        pytest.param(f"{BEFORE} {part(ANSWER, 0, 10)} {AFTER}", (QUESTION, part(ANSWER, 0, 10)), None, id="a short answer"),
        pytest.param(f"{BEFORE} {part(QUESTION, 0, 9)} no {part(QUESTION, 9, 9)}", (QUESTION, "yes"), None, id="a word put in"),
        pytest.param((part(QUESTION, 0, 7), part(QUESTION, 7, 7)), (part(QUESTION, 0, 14), "yes"), None, id="across turns"),
        pytest.param(f"{BEFORE} {part(QUESTION, 0, 20)}", f"{AFTER} {part(QUESTION, 0, 20)} {ANSWER}", "note", id="raw text"),
    ],
)
def test_what_counts_as_contamination(train: Record, test: Record, severity: str | None) -> None:
    found = concluded([("another one", "of no matter"), train], [("something else", "altogether"), test])
    assert told(found) == ({("test", 1): {1}} if severity else {})
    assert [finding.severity for finding in found] == [severity] * bool(severity)


def test_the_words_say_how_much_was_found() -> None:
    found = concluded([f"{part(QUESTION, 5, 30)}", f"{part(QUESTION, 0, 14)} x"], [(QUESTION, "yes")])
    assert found[0].what == "18 of 28 passages of 13 words of a test record found in 2 training records"
    short = concluded([f"{BEFORE} {part(QUESTION, 0, 9)}"], [(part(QUESTION, 0, 9), "yes")])
    assert short[0].what == "the question of a test record found in 1 training record"


def test_passages_in_scripts_without_spaces_are_runs_of_characters() -> None:
    asked = "\u8bf7\u95ee\u6211\u7684\u94f6\u884c\u5361\u4ec0\u4e48\u65f6\u5019\u80fd\u5230\u5462"
    assert told(concluded([f"\u4f60\u597d\uff0c{asked}\uff1f\u8c22\u8c22"], [(asked, "yes")])) == {("test", 0): {0}}
    assert not concluded(["\u8bf7\u95ee\u6211\u7684\u94f6\u884c\u5361\u4e22\u4e86"], [(asked, "yes")])


def test_what_many_training_records_hold_is_boilerplate() -> None:
    test = [(f"{BEFORE} {QUESTION}", "yes")]
    few = [f"{BEFORE} {text(DRAW, 20)}" for _ in range(COMMON)]
    assert told(concluded(few, test)) == {("test", 0): set(range(COMMON))}
    many = [*few, f"{BEFORE} {text(DRAW, 20)}"]
    for batch in (2, 100):
        assert not concluded(many, test, batch=batch)
    # Copies of one record are no sign of boilerplate.
    assert told(concluded([few[0]] * (COMMON + 5), test)) == {("test", 0): set(range(COMMON + 5))}
    assert told(concluded([*many, f"{text(DRAW, 9)} {QUESTION}"], test)) == {("test", 0): {COMMON + 1}}


def test_what_several_test_records_have_in_common_is_not_what_they_ask() -> None:
    train = [f"{AFTER} {BEFORE}"]
    tests = [(f"{BEFORE} {text(DRAW, 15)}", "yes") for _ in range(OWN + 1)]
    assert told(concluded(train, tests[:OWN])) == {("test", number): {0} for number in range(OWN)}
    assert not concluded(train, tests)
    assert not concluded(train, tests[:OWN], tests[OWN:])


def test_system_prompts_are_not_looked_at() -> None:
    def chat(system: str, user: str) -> Subject:
        turns = [("system", system), ("user", user), ("assistant", "yes")]
        return subject_of(Conversation([{"role": role, "content": content} for role, content in turns]))

    assert not concluded([chat(QUESTION, "one")], [chat(QUESTION, text(DRAW, 15))])
    assert told(concluded([chat("x", QUESTION + " one")], [chat("y", BEFORE + " " + QUESTION)])) == {("test", 0): {0}}


def test_leaks_are_told_as_leaks_only() -> None:
    records = [(QUESTION, "yes"), (f"{QUESTION} {BEFORE}", "x"), (QUESTION.replace(part(QUESTION, 3, 1), "slip"), "yes")]
    assert told(concluded(records, [(AFTER, "no")], [(QUESTION, "yes")])) == {("test1", 0): {1}}


@pytest.mark.parametrize(("piece", "cut"), [(2**18, 2**14), (40, 20), (40, 1), (1, 7)])
def test_a_long_text_is_looked_at_in_runs_that_miss_nothing(monkeypatch: pytest.MonkeyPatch, piece: int, cut: int) -> None:
    monkeypatch.setattr(contamination, "_PIECE", piece)
    monkeypatch.setattr(contamination, "_CUT", cut)
    draw = random.Random(5)
    book, page = text(draw, 200), text(draw, 60)
    passages = grams([subject((book, "yes")), subject(page)])
    assert passages.passages.tolist() == [200 - LONGEST + 1, 60 - LONGEST + 1]
    hits = passages.look([subject(f"a b {book} c"), subject("nothing"), subject(f"{page} {book}")])
    per_record = [set(hits[1][hits[0] == number].tolist()) for number in range(3)]
    assert list(map(len, per_record)) == [188, 0, 188 + 48] and hits.dtype == np.uint32
    assert hits.shape[1] == sum(map(len, per_record))


def test_hits_of_boilerplate_are_few_however_much_of_it_there_is() -> None:
    passages = grams([subject((QUESTION, "yes"))])
    hits = passages.look([subject(f"{number} {QUESTION}") for number in range(200)])
    assert np.bincount(hits[1]).tolist() == [COMMON + 1] * len(passages.hashes)


def test_passages_are_thinned_out_where_there_are_too_many_and_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = grams([subject(text(random.Random(8), 300))])
    assert len(whole.hashes) == 288 and whole.note == "" and whole.stride == 1
    monkeypatch.setattr(contamination, "MOST_GRAMS", 100)
    thinned = grams([subject(text(random.Random(8), 300))])
    assert thinned.stride == 4 and len(thinned.hashes) == 72 and set(thinned.hashes.tolist()) < set(whole.hashes.tolist())
    assert thinned.note == "one passage in 4 of each test record looked for"
    again = part(text(random.Random(8), 300), 101, LONGEST + 3)
    assert thinned.look([subject(f"x {again} y")]).shape == (2, 1)
    assert thinned.digest != whole.digest


def test_what_cannot_be_looked_for_is_said() -> None:
    passages = grams([subject(("a short one", "yes")), subject((QUESTION, "yes")), subject("tiny")])
    assert passages.note == "2 test records with no passage of 8 words of their own not looked for"
    assert passages.passages.tolist() == [0, 28, 0]


def test_nothing_is_found_for_nothing() -> None:
    nothing = grams([])
    assert nothing.look([subject(QUESTION)]).shape == (2, 0) and nothing.note == ""
    assert grams([subject(QUESTION)]).look([]).shape == (2, 0)
    assert concluded([QUESTION], []) == []
    assert concluded([BEFORE], [QUESTION]) == []
    # A test set without records has no place among the splits that leaks are told of.
    train, empty, test = Split("train", [f"{BEFORE} {QUESTION}"]), Split("empty", []), Split("test", [QUESTION])
    passages, leaks = grams(test.all), Leaks({"train": 0, "test": 1}, np.arange(2, dtype=np.int32))
    assert len(conclude(train, [empty, test], passages, passages.look(train.all), leaks)) == 1


def test_passages_travel_light() -> None:
    passages = grams([subject(text(random.Random(n), 60)) for n in range(200)])
    passages.look([subject(QUESTION)])
    size = len(pickle.dumps(passages))
    assert size < 40 * len(passages.hashes)
    received = pickle.loads(pickle.dumps(passages))
    assert passages.digest == grams([subject(text(random.Random(n), 60)) for n in range(200)]).digest
    assert received.digest == passages.digest
    np.testing.assert_array_equal(
        received.look([subject(text(random.Random(3), 60))]), passages.look([subject(text(random.Random(3), 60))])
    )


# ---- real data -------------------------------------------------------------------------------------------------------


def test_questions_hidden_in_longer_texts_are_found_in_real_data() -> None:
    path = DATA / "gsm8k"
    if not path.exists():
        pytest.skip(f"needs {path}")
    train, test = (
        [
            subject_of(Conversation(json.loads(line)["messages"]))
            for line in (path / name).read_text("utf-8").split("\n")[:count]
            if line
        ]
        for name, count in (("train.jsonl", 1500), ("test.jsonl", 300))
    )
    draw = random.Random(6)
    expected: dict[tuple[str, int], set[int]] = {}
    for number in draw.sample(range(300), 50):
        words = test[number].prompt.split()
        half = " ".join(words[: max(2 * LONGEST, len(words) // 2)])
        expected["test", number] = {len(train)}
        train.append(subject(f"{draw.choice(train).answer} {half} {draw.choice(train).prompt}"))
    clean = told(concluded(train[:1500], test, batch=500))
    assert len(clean) <= 3  # passages of sums and of stock phrases, all of them notes or warnings
    found = told(concluded(train, test, batch=500))
    assert sum(expected[one] <= found.get(one, set()) for one in expected) >= 49
    assert set(found) - set(expected) <= set(clean)
