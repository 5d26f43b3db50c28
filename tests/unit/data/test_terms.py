"""The tokenizer audit: what is mined, what is counted, and gains checked against a tokenizer that has the terms."""

from __future__ import annotations

import json
import math
import random
import re
from collections import Counter
from collections.abc import Container
from pathlib import Path
from typing import Any

import pytest
import tiny
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from fullrank.data import terms
from fullrank.data.convert import Conversation, Document, Pair
from fullrank.data.subject import Subject, subject_of
from fullrank.data.terms import audit_terms, read_glossary
from fullrank.errors import DataError
from fullrank.records import Term, TermsCard

DATA = Path(__file__).resolve().parents[4] / "shared/data"

# ---- a tokenizer whose general text is known ------------------------------------------------------------------------

_SYLLABLES = [a + b for a in "bdfgklmnprstv" for b in "aeiou"]
#: The word of rank r, from 0: three syllables each.
WORDS = [a + b + c for a in _SYLLABLES for b in _SYLLABLES[:10] for c in _SYLLABLES[:10]][:6_000]


def general(words: list[str] = WORDS) -> Tokenizer:
    """A Unigram tokenizer that knows these words, the most frequent first, and the letters everything else is made of."""
    pieces = [("<unk>", 0.0), *((f"▁{word}", -math.log(10 * (rank + 1))) for rank, word in enumerate(words))]
    pieces += [(letter, -30.0) for letter in ["▁", *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,-_\n"]]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def documents(texts: list[str]) -> list[Subject]:
    return [subject_of(Document(text)) for text in texts]


def general_text(words: int, seed: int, without: Container[str] = ()) -> list[str]:
    """Words by Zipf's law, without the rarest: a few of thousands would be frequent by chance."""
    weights = [0.0 if word in without or rank >= 1_000 else 1 / (rank + 1) for rank, word in enumerate(WORDS)]
    return random.Random(seed).choices(WORDS, weights, k=words)


def filled(counts: dict[str, int], records: int = 40, words: int = 500) -> list[Subject]:
    """Records of so many words each: the given ones spread evenly, among general words as frequent as their rank says."""
    rows = [general_text(words, seed, counts) for seed in range(records)]
    draw = random.Random(0)
    free = [draw.sample(range(words), words) for _ in rows]
    for number, word in enumerate(word for word, count in counts.items() for _ in range(count)):
        rows[number % records][free[number % records].pop()] = word
    return documents([" ".join(row) for row in rows])


def of(card: TermsCard, text: str) -> Term:
    (term,) = [term for term in card.terms if term.text == text]
    return term


# ---- mining ---------------------------------------------------------------------------------------------------------


def test_a_word_ten_times_as_frequent_as_its_rank_says_is_a_term() -> None:
    total = 40 * 500
    # By 0.1 / rank the words of rank 301, 302 and 501 stand 6.6, 6.6 and 4.0 times in 20,000; that of rank 51 is glue.
    counts = {WORDS[50]: 900, WORDS[300]: 64, WORDS[301]: 70, WORDS[500]: 45, "xylophone": 12}
    card = audit_terms(filled(counts), general(), None)
    found = {term.text: term for term in card.terms}
    assert set(found) == {WORDS[301], WORDS[500], "xylophone"}
    assert found[WORDS[500]].rarity == pytest.approx(45 / total / (0.1 / 501))
    assert found[WORDS[301]].rarity == pytest.approx(70 / total / (0.1 / 302))
    assert found["xylophone"].rarity == pytest.approx(12 / total / (0.1 / len(WORDS)))  # rarer than the last word known
    assert card.found == 3 and card.glossary is None and card.sampled == ""


@pytest.mark.parametrize(
    ("texts", "mined"),
    [
        (["quartz quartz"] * 3, True),
        (["quartz quartz quartz quartz quartz", "quartz", "agate"], False),  # the word of two records
        (["quartz", "quartz", "quartz", "quartz"], False),  # a slip made four times
        (["1929quartz quartz1929 19291929quartz"] * 20, False),
        (["qz"] * 20, False),
    ],
)
def test_a_term_comes_back_in_several_records(texts: list[str], mined: bool) -> None:
    ordinary = [" ".join(WORDS[3_000 + n : 3_040 + n]) for n in range(0, 2_000, 40)]
    card = audit_terms(
        documents([f"{text} {other}" for text, other in zip(texts + [""] * 50, ordinary, strict=False)]), general(), None
    )
    assert ("quartz" in {term.text for term in card.terms}) is mined


def test_words_that_belong_together_are_one_term() -> None:
    draw = random.Random(0)
    texts = []
    for number in range(60):
        row = general_text(100, number)
        row[10:13] = ["quartz", "crystal", "lattice"]
        row[50] = draw.choice(["quartz", "crystal", "lattice"])
        row[70:73] = [WORDS[0], "quartz", WORDS[1]]
        texts.append(" ".join(row))
    card = audit_terms(documents(texts), general(), None)
    assert {term.text for term in card.terms} == {"quartz crystal lattice", "quartz", "crystal", "lattice"}
    together = of(card, "quartz crystal lattice")
    assert (together.words, together.occurrences, together.records, together.rarity) == (3, 60, 60, None)


def test_a_term_across_a_stop_or_a_line_is_none() -> None:
    texts = [f"quartz. crystal {WORDS[3_000 + n]} quartz\ncrystal {WORDS[4_000 + n]}" for n in range(30)]
    assert {term.words for term in audit_terms(documents(texts), general(), None).terms} == {1}


def test_scripts_without_spaces() -> None:
    draw = random.Random(0)
    hanzi = [chr(0x4E00 + n) for n in range(400)]
    texts = ["".join(draw.choices(hanzi, k=20)) + "石英" + "".join(draw.choices(hanzi, k=20)) for _ in range(60)]
    card = audit_terms(documents(texts), general(), None)
    assert [(term.text, term.occurrences) for term in card.terms] == [("石英", 60)]
    assert card.fertility == 1.0  # each character is a word, and unknown
    assert of(card, "石英").broken == ["<unk>"]


def test_a_small_vocabulary_mines_nothing() -> None:
    card = audit_terms(filled({"xylophone": 100}), tiny.tokenizer().backend_tokenizer, None)
    assert card.terms == [] and card.found == 0 and card.saved_by_all == 0.0
    assert card.fertility > 1.0 and card.ordinary_fertility == card.fertility


# ---- glossaries -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("g.txt", "\ufeffcapital ratio\r\n\nIFRS 9\nCapital  Ratio\n"),
        ("g.csv", 'id,term\n1,capital ratio\n\n2,"IFRS 9"\n'),
        ("g.tsv", "term\tnote\ncapital ratio\tx\nIFRS 9\t\n"),
        ("g.jsonl", '{"term": "capital ratio"}\n\n{"term": " IFRS 9 ", "note": 1}\n'),
    ],
)
def test_glossaries(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_bytes(content.encode())
    assert read_glossary(tmp_path / name) == ["capital ratio", "IFRS 9"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (
            "g.jsonl",
            b'{"term": "a"}\n{"word": "b"}\n[]\n{bad\n{"term": 3}\n',
            ["g.jsonl:2: no term", "g.jsonl:3: ", "g.jsonl:4: no valid JSON", "g.jsonl:5: no term: 3"],
        ),
        ("g.csv", b"word\na\n", ["g.csv:1: no column `term` (columns found: word)"]),
        ("g.csv", b"id,term\n1,a\n2\n3,\n", ["g.csv:3: no term", "g.csv:4: no term"]),
        ("g.csv", b'term\n"a\n', ["g.csv:2: no valid CSV"]),
        ("g.txt", b"good\n" + b"x" * 101 + b"\n", ["g.txt:2: a term has at most 100 characters, this line has 101"]),
        ("g.txt", b"good\nb\xe4d\n", ["g.txt:2: the glossary is not UTF-8"]),
        ("g.txt", b"\n\n", ["g.txt: the glossary has no term"]),
    ],
)
def test_bad_lines_of_a_glossary_are_named(tmp_path: Path, name: str, content: bytes, said: list[str]) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_glossary(tmp_path / name)
    lines = caught.value.message.split("\n")
    assert len(lines) == len(said) and all(words in line for words, line in zip(said, lines, strict=True))


def test_a_glossary_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        audit_terms([], general(), tmp_path / "none.txt")


def test_many_bad_lines_are_counted(tmp_path: Path) -> None:
    (tmp_path / "g.jsonl").write_text("{}\n" * 100, encoding="utf-8")
    with pytest.raises(DataError, match="and 80 more lines"):
        read_glossary(tmp_path / "g.jsonl")


@pytest.mark.parametrize(
    ("term", "text", "occurrences"),
    [
        (
            "capital ratio",
            "Capital ratio, the CAPITAL RATIO and capital\nratios, capital\nratio; capitalratio, capital, ratio",
            3,
        ),
        ("AT", "AT at At AT&T", 2),
        ("C++", "C++ is no C, and c++11 or C+ is not C++", 2),
        ("C", "C++ is no C, and Cc is not", 2),
        ("€", "5 € or €6", 2),
        ("us-gaap:Assets", "us-gaap:Assets us-gaap:AssetsNet us-gaap:assets", 2),
        ("top_up", "top_up top_up_limit my top_up.", 2),
        ("石英", "我有石英石和石英", 2),
        ("AI技術", "生成AI技術と技術", 1),
        ("naïve", "Naïve NAÏVE naive", 2),
        ("i", "İ i I", 1),  # a dotted capital I has no lower case of one character: compared as written there
        ("absent", "present", 0),
    ],
)
def test_occurrences_of_a_term(tmp_path: Path, term: str, text: str, occurrences: int) -> None:
    (tmp_path / "g.txt").write_text(f"{term}\nnowhere to be seen\n", encoding="utf-8")
    card = audit_terms(documents([text, "", "other words"]), general(), tmp_path / "g.txt")
    assert [(t.occurrences, t.records) for t in card.terms] == ([(occurrences, 1)] if occurrences else [])
    assert card.absent_count == len(card.absent) == (1 if occurrences else 2) and "nowhere to be seen" in card.absent
    assert card.glossary == str(tmp_path / "g.txt")


# ---- pieces ---------------------------------------------------------------------------------------------------------


def byte_fallback() -> Tokenizer:
    letters = [*"acdr", "▁c", "ar", "▁car", "▁card"]
    vocabulary = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *letters]
    merges = [("▁", "c"), ("a", "r"), ("▁c", "ar"), ("▁car", "d")]
    model = models.BPE({t: n for n, t in enumerate(vocabulary)}, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    return tokenizer


def word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "card": 1, "##s": 2}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def test_pieces_and_those_that_are_broken(tmp_path: Path) -> None:
    def split(tokenizer: Tokenizer, word: str) -> Term:
        (tmp_path / "g.txt").write_text(word, encoding="utf-8")
        (term,) = audit_terms(documents([f"a {word} and ({word})"]), tokenizer, tmp_path / "g.txt").terms
        return term

    card = split(byte_fallback(), "card")
    assert (card.pieces, card.pieces_bare, card.broken) == ([" card"], ["c", "ar", "d"], ["<0x43>"])
    assert card.pieces_capital == [" ", "<0x43>", "ar", "d"]
    assert card.fertility == 2.0  # once after a space, once after a bracket
    assert split(byte_fallback(), "é").broken == ["<0xC3>", "<0xA9>", "<0x89>"]

    assert split(word_piece(), "cards").pieces == ["card", "##s"]
    assert split(word_piece(), "zebra").broken == ["[UNK]"]

    bytes_only = tiny.tokenizer().backend_tokenizer
    assert split(bytes_only, "the").pieces == [" the"]
    assert "".join(split(bytes_only, "bank").pieces_bare) == "bank"
    euro = split(bytes_only, "€")
    assert euro.pieces_bare == euro.broken[-3:] == ["<0xE2>", "<0x82>", "<0xAC>"]


def test_bytes_that_a_vocabulary_lacks_are_said_to_be_lost(tmp_path: Path) -> None:
    vocabulary = {letter: n for n, letter in enumerate([*"abc", "Ġ", "Ċ"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    (tmp_path / "g.txt").write_text("abé", encoding="utf-8")
    (term,) = audit_terms(documents(["x abé"]), tokenizer, tmp_path / "g.txt").terms
    assert term.pieces == [" ", "a", "b", "<lost>"] and "<lost>" in term.broken


def test_the_tokenizer_is_not_changed_and_not_limited(tmp_path: Path) -> None:
    tokenizer = general()
    free = audit_terms(filled({"xylophone": 100}), tokenizer, None)
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=512)
    assert audit_terms(filled({"xylophone": 100}), tokenizer, None) == free
    assert tokenizer.truncation["max_length"] == 3 and tokenizer.padding["length"] == 512


# ---- numbers --------------------------------------------------------------------------------------------------------


def test_the_numbers_of_a_small_text(tmp_path: Path) -> None:
    """Worked out by hand: a known word is one token, an unknown letter by letter with its space."""
    a, b = WORDS[10], WORDS[20]
    prompt, answer = f"{a} {a} quartz", f"{b} {b} {b} jade"
    (tmp_path / "g.txt").write_text("quartz\njade\n", encoding="utf-8")
    card = audit_terms([subject_of(Pair(prompt, answer))], general(), tmp_path / "g.txt")
    # A first word has no space before it, so it is spelt out: six letters.
    prompt_tokens, answer_tokens = 6 + 1 + 7, 6 + 2 + 5
    assert (card.records, card.characters, card.sampled) == (1, len(prompt + answer), "")
    assert (card.tokens, card.answer_tokens) == (prompt_tokens + answer_tokens, answer_tokens)
    assert card.bytes_per_token == pytest.approx(len(prompt + answer) / 27)
    assert card.answer_bytes_per_token == pytest.approx(len(answer) / 13)
    assert card.fertility == pytest.approx(27 / 7)
    assert card.answer_fertility == pytest.approx(13 / 4)
    assert card.split_words == pytest.approx(4 / 7)
    assert card.ordinary_fertility == pytest.approx((6 + 1 + 6 + 2) / 5)
    assert card.term_fertility == pytest.approx((7 + 5) / 2)
    assert [(t.text, t.fertility, t.occurrences) for t in card.terms] == [("quartz", 7.0, 1), ("jade", 5.0, 1)]
    assert of(card, "quartz").saved_per_1000 == pytest.approx(1000 * 6 / 27)
    assert card.saved_by_10 == card.saved_by_50 == card.saved_by_all == pytest.approx(1000 * 10 / 27)


def test_a_word_inside_two_terms_is_saved_once(tmp_path: Path) -> None:
    (tmp_path / "g.txt").write_text("quartz\nquartz crystal\ncrystal\n", encoding="utf-8")
    card = audit_terms(documents([f"{WORDS[0]} quartz crystal {WORDS[0]} crystal"]), general(), tmp_path / "g.txt")
    assert {t.text: t.occurrences for t in card.terms} == {"quartz crystal": 1, "crystal": 2, "quartz": 1}
    # quartz crystal as one token saves 14, the other crystal 7.
    assert card.saved_by_all == pytest.approx(1000 * (14 + 7) / card.tokens)


def test_turns_of_the_assistant_are_answers() -> None:
    turns = [("system", "a"), ("user", "b b"), ("assistant", "c c c"), ("user", "d"), ("assistant", "e")]
    chat = Conversation([{"role": role, "content": text} for role, text in turns])
    card = audit_terms([subject_of(chat)], general(), None)
    whole = general().encode_batch(["c c c", "e"])
    assert card.answer_tokens == sum(len(encoding.ids) for encoding in whole)


def test_no_data() -> None:
    card = audit_terms([], general(), None)
    assert (card.records, card.tokens, card.terms, card.fertility) == (0, 0, [], 0.0)


# ---- the sample -----------------------------------------------------------------------------------------------------


def test_the_sample_is_spread_evenly_and_bounded() -> None:
    sample = terms._Sample(1_000)
    most = 0
    for number in range(1_000):
        sample.take(subject_of(Document(f"{number:010}")))
        most = max(most, sample.characters)
    assert most <= 1_010 and sample.seen == 1_000
    numbers = [int(text) for text in sample.texts()]
    assert numbers == list(range(0, 1_000, sample.step)) and sample.step == 16
    assert sample.described(1_000) == "63 of 1,000 records, spread evenly"
    assert sample.described(9_000) == "63 of 9,000 records, spread evenly"


def test_a_long_text_is_cut() -> None:
    sample = terms._Sample(1_000)
    sample.take(subject_of(Document("x" * 5_000)))
    assert sample.characters == 250 and sample.described(1) == "1 long text up to 250 characters"


def test_a_sample_tells_what_all_would() -> None:
    data = filled({"xylophone": 2_000, "zither": 500}, records=400, words=250)
    whole, part = audit_terms(data, general(), None), audit_terms(data, general(), None, characters=200_000)
    assert part.sampled == "100 of 400 records, spread evenly" and part.records == whole.records == 400
    assert {term.text for term in part.terms} >= {"xylophone", "zither"}
    assert of(part, "xylophone").saved_per_1000 == pytest.approx(of(whole, "xylophone").saved_per_1000, rel=0.1)
    assert part == audit_terms(data, general(), None, characters=200_000)
    assert part == audit_terms(data[::4], general(), None, records=400)


# ---- real data ------------------------------------------------------------------------------------------------------


def real(path: str) -> tuple[Tokenizer, list[Subject]]:
    found = sorted(Path("~/.cache/fullrank/models").expanduser().glob("smollm2-135m-instruct-*/tokenizer.json"))
    if not found or not (DATA / path).is_file():
        pytest.skip(f"the embedded SmolLM2 tokenizer or {DATA / path} is not there")
    rows: list[dict[str, Any]] = [json.loads(line) for line in (DATA / path).read_text(encoding="utf-8").split("\n") if line]
    examples = (Conversation(row["messages"]) if "messages" in row else Pair(row["prompt"], row["completion"]) for row in rows)
    return Tokenizer.from_file(str(found[0])), [subject_of(example) for example in examples]


def test_medical_terms_are_mined_and_ordinary_words_are_not() -> None:
    tokenizer, subjects = real("pubmedqa/train.jsonl")
    card = audit_terms(subjects, tokenizer, None, most=10_000)
    found = {term.text.casefold() for term in card.terms}
    expected = {
        "laparoscopic",
        "appendicitis",
        "preoperative",
        "metastases",
        "cholecystectomy",
        "odds ratio",
        "logistic regression",
    }
    assert expected <= found
    ordinary = {
        "the",
        "of",
        "and",
        "was",
        "were",
        "with",
        "between",
        "after",
        "this",
        "people",
        "time",
        "water",
        "of the",
        "in the",
        "there was",
    }
    assert not ordinary & found
    assert card.term_fertility > card.ordinary_fertility


def test_counts_are_those_of_a_plain_search() -> None:
    tokenizer, subjects = real("banking77/train.jsonl")
    subjects = subjects[::10]
    card = audit_terms(subjects, tokenizer, None, most=200)
    texts = [part.text for subject in subjects for part in subject.parts]
    assert card.tokens == sum(len(tokenizer.encode(text, add_special_tokens=False).ids) for text in texts)
    checked = 0
    for term in card.terms:
        if term.words > 1 or not term.text.isalpha():
            continue
        # No letter, digit, underscore or joined word on either side.
        pattern = re.compile(rf"(?<![\w])(?<!\w[-.:/]){term.text}(?![\w])(?![-.:/]\w)", re.IGNORECASE)
        tokens = occurrences = 0
        for text in texts:
            places = [match.span() for match in pattern.finditer(text)]
            offsets = tokenizer.encode(text, add_special_tokens=False).offsets if places else []
            occurrences += len(places)
            tokens += sum(start < end_ and end > start_ for start_, end_ in places for start, end in offsets)
        assert term.occurrences == occurrences, term.text
        assert term.fertility == pytest.approx(tokens / occurrences), term.text
        checked += 1
    assert checked > 20


def test_gains_are_what_a_tokenizer_with_the_terms_gains() -> None:
    tokenizer, subjects = real("banking77/train.jsonl")
    subjects = subjects[::5]
    card = audit_terms(subjects, tokenizer, None, most=10)
    texts = [part.text for subject in subjects for part in subject.parts]
    larger = Tokenizer.from_str(tokenizer.to_str())
    # Every spelling that is there, so that nothing but whole words becomes a token; the space before it included.
    spellings: Counter[str] = Counter()
    for term in card.terms:
        for text in texts:
            spellings.update(match[0] for match in re.finditer(re.escape(term.text), text, re.IGNORECASE))
    larger.add_tokens([AddedToken(text, single_word=True, lstrip=True, normalized=False) for text in spellings])
    before, after = (sum(len(t.encode(text, add_special_tokens=False).ids) for text in texts) for t in (tokenizer, larger))
    assert before == card.tokens
    assert card.saved_by_10 == pytest.approx(1000 * (before - after) / before, rel=0.02)
