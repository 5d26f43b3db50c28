"""Languages: sure where they are told, silent where they are not; the mix, strays and answers that change the language."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from fullrank.data.audit import languages
from fullrank.data.audit.sightings import MOST_RECORDS
from fullrank.data.convert import Conversation, Document, Pair
from fullrank.data.subject import Subject, subject_of
from fullrank.records import Place

DATA = Path(__file__).resolve().parents[5] / "shared/data"

#: The first article of the Universal Declaration of Human Rights, or its beginning.
ARTICLE = {
    "en": "All human beings are born free and equal in dignity and rights. They are endowed with reason and conscience.",
    "de": "Alle Menschen sind frei und gleich an Würde und Rechten geboren. Sie sind mit Vernunft und Gewissen begabt.",
    "fr": "Tous les êtres humains naissent libres et égaux en dignité et en droits. Ils sont doués de raison et de conscience.",
    "es": "Todos los seres humanos nacen libres e iguales en dignidad y derechos y, dotados como están de razón y conciencia.",
    "it": "Tutti gli esseri umani nascono liberi ed eguali in dignità e diritti. Essi sono dotati di ragione e di coscienza.",
    "nl": "Alle mensen worden vrij en gelijk in waardigheid en rechten geboren. Zij zijn begiftigd met verstand en geweten.",
    "pl": "Wszyscy ludzie rodzą się wolni i równi pod względem swej godności i swych praw. Są oni obdarzeni rozumem.",
    "ru": "Все люди рождаются свободными и равными в своем достоинстве и правах. Они наделены разумом и совестью.",
    "tr": "Bütün insanlar hür, haysiyet ve haklar bakımından eşit doğarlar. Akıl ve vicdana sahiptirler.",
    "ar": "يولد جميع الناس أحرارًا متساوين في الكرامة والحقوق. وقد وهبوا عقلًا وضميرًا.",
    "hi": "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है।",
    "zh": "人人生而自由，在尊严和权利上一律平等。他们赋有理性和良心，并应以兄弟关系的精神相对待。",
    "ja": "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。",
    "ko": "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다.",
}


class Facts:
    """One split held in memory."""

    is_test = False

    def __init__(self, records: Sequence[tuple[str, str]], name: str = "train") -> None:
        self.name = name
        self.columns = languages.facts([subject_of(Pair(prompt, answer)) for prompt, answer in records])

    def __len__(self) -> int:
        return len(self.columns["prompt_language"])

    def column(self, name: str) -> np.ndarray:
        return self.columns[name]

    def row(self, name: str, number: int) -> np.ndarray:
        raise AssertionError("languages need no rows")

    def place(self, record: int) -> Place:
        return Place(path=f"{self.name}.jsonl", line=record + 1, split=self.name)

    def subjects(self, records: Sequence[int]) -> Iterator[Subject]:
        raise AssertionError("languages are concluded from facts alone")


def told(text: str) -> str:
    column = languages.facts([subject_of(Document(text))])["answer_language"]
    assert column.dtype == np.uint16
    return languages.language_of(int(column[0]))


def test_codes_are_stable_and_go_both_ways() -> None:
    # In base 27: e is 5, n is 14.
    assert languages.code_of("en") == 5 * 27**2 + 14 * 27
    assert languages.code_of("zzz") == 27**3 - 1 < 2**16
    assert languages.language_of(languages.UNDETERMINED) == ""
    for language in ("en", "de", "gsw", "pcm", "aa"):
        assert languages.language_of(languages.code_of(language)) == language


@pytest.mark.parametrize("language", ARTICLE)
def test_languages_of_the_world(language: str) -> None:
    assert told(ARTICLE[language]) == language
    assert told(ARTICLE[language][: len(ARTICLE[language]) // 2]) in (language, "")


@pytest.mark.parametrize(
    "text",
    [
        "Où?", "Guten Tag", "card_arrival", "42",
        "SELECT Notes FROM 1-1000181-1 WHERE Slogan = 'X'", "#### 72", "x" * 200, "5" * 200,
        "Sarah", "Maria and Anna", "$<<100/2=50>>50. 50 + 30 = 80", "", "日本", "Calcium, Zinc, Iron",
    ],
)  # fmt: skip
def test_what_says_nothing_stays_undetermined(text: str) -> None:
    assert told(text) == ""


def test_english_is_known_without_asking_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def never() -> None:
        raise AssertionError("asked")

    monkeypatch.setattr(languages, "_identifier", never)
    assert told("What would you do if they asked you how much the house should cost?") == "en"
    with pytest.raises(AssertionError, match="asked"):
        told("Alle mensen worden vrij en gelijk in waardigheid en rechten geboren, of niet.")


def test_prompt_and_answer_are_told_apart() -> None:
    system = {"role": "system", "content": "You are a helpful assistant who answers every question. " * 5}
    chat = Conversation(
        [system, {"role": "user", "content": ARTICLE["de"]}, {"role": "assistant", "content": ARTICLE["fr"]}],
    )
    facts = languages.facts([subject_of(chat), subject_of(Document(ARTICLE["ru"])), subject_of(Pair(ARTICLE["en"], "b"))])
    assert languages.sampled() == {"language": "the last 150 characters of each prompt and the first 150 of each answer"}
    # The end of the prompt is looked at: the question, not the instructions before it.
    assert [languages.language_of(int(code)) for code in facts["prompt_language"]] == ["de", "", "en"]
    assert [languages.language_of(int(code)) for code in facts["answer_language"]] == ["fr", "ru", ""]


def test_mix_strays_and_changes() -> None:
    english, german, french = ARTICLE["en"], ARTICLE["de"], ARTICLE["fr"]
    records = [(english, english)] * 95 + [(german, german), ("Hm?", french), (english, german), (french, english), ("a", "b")]
    mix, foreign_german, foreign_french, changed = languages.conclude([Facts(records)])
    assert (mix.kind, mix.severity, mix.count, mix.records) == ("language", "note", 100, [])
    assert mix.what == "languages of train: en 96.0 %, de 2.0 %, fr 1.0 %, not determined 1.0 %"
    assert (foreign_german.severity, foreign_german.count, [p.line for p in foreign_german.records]) == ("warning", 1, [96])
    assert foreign_german.what == "1 record in 'de', in data that is 'en' otherwise"
    assert [p.line for p in foreign_french.records] == [97]
    assert (changed.severity, changed.count, [p.line for p in changed.records]) == ("warning", 2, [98, 99])


def test_a_test_set_in_another_language_is_measured_by_the_training_data() -> None:
    train, test = Facts([(ARTICLE["en"], "x")] * 20), Facts([(ARTICLE["es"], "x")] * 3, "test")
    findings = languages.conclude([train, test])
    assert [finding.severity for finding in findings] == ["note", "note", "warning"]
    assert [(place.split, place.line) for place in findings[2].records] == [("test", 1), ("test", 2), ("test", 3)]


def test_mixed_data_has_no_strays_and_translation_is_a_task() -> None:
    findings = languages.conclude([Facts([(ARTICLE["en"], ARTICLE["de"])] * 6 + [(ARTICLE["en"], ARTICLE["en"])] * 5)])
    assert [(finding.severity, finding.count) for finding in findings] == [("note", 11), ("note", 6)]
    assert "another language than the prompt" in findings[1].what


def test_long_lists_end_and_the_count_goes_on() -> None:
    facts = Facts([("a", "b")])
    codes = np.full(200_000, languages.code_of("en"), dtype=np.uint16)
    codes[: MOST_RECORDS + 5] = languages.code_of("fr")
    facts.columns = {"prompt_language": codes, "answer_language": np.zeros_like(codes)}
    _, foreign = languages.conclude([facts])
    assert foreign.count == MOST_RECORDS + 5
    assert len(foreign.records) == MOST_RECORDS


def test_nothing_is_said_of_labels_and_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    assert languages.conclude([Facts([("a", "b")] * 5)]) == []
    assert languages.left_out() == {}
    monkeypatch.setitem(sys.modules, "py3langid", None)
    assert "py3langid" in languages.left_out()["language"]
    facts = Facts([(ARTICLE["en"], ARTICLE["de"])] * 3)
    assert not facts.column("prompt_language").any() and facts.column("prompt_language").dtype == np.uint16
    assert languages.conclude([facts]) == []


# ---- real data ------------------------------------------------------------------------------------------------------

#: Every text of these English files that comes out as another language, with the part it is: each of them is one, or names only
#: things in it.
NATURAL = {
    "mmlu/test.jsonl": {(994, "answer_language", "la")},
    "rasbt_instruction/alpaca.jsonl": {(7, "answer_language", "fr"), (501, "answer_language", "ja")},
}


def subject_in(row: dict[str, object]) -> Subject:
    if "messages" in row:
        return subject_of(Conversation(row["messages"]))  # type: ignore[arg-type]
    if "question" in row:
        return subject_of(Pair(row["question"], "\n".join(row["choices"])))  # type: ignore[arg-type]
    if "instruction" in row:
        return subject_of(Pair(f"{row['instruction']}\n\n{row['input']}", str(row["output"])))
    return subject_of(Pair(str(row["prompt"]), str(row["completion"])))


@pytest.mark.parametrize(
    ("name", "share_of_prompts"),
    [
        ("banking77/train.jsonl", 0.8),
        ("gsm8k/train.jsonl", 0.99),
        ("mmlu/test.jsonl", 0.9),
        ("pubmedqa/train.jsonl", 0.99),
        ("rasbt_instruction/alpaca.jsonl", 0.7),
        ("wikisql_text2sql/train.jsonl", 0.8),
    ],
)
def test_english_data_is_english(name: str, share_of_prompts: float) -> None:
    path = DATA / name
    if not path.exists():
        pytest.skip(f"needs {path}")
    facts = languages.facts([subject_in(json.loads(line)) for line in path.open(encoding="utf-8")])
    english = languages.code_of("en")
    assert np.mean(facts["prompt_language"] == english) >= share_of_prompts
    others = {
        (int(record) + 1, column, languages.language_of(int(codes[record])))
        for column, codes in facts.items()
        for record in np.flatnonzero((codes != english) & (codes != languages.UNDETERMINED))
    }
    assert others == NATURAL.get(name, set())
