"""The tokenizer audit: how the words of the domain are split, and which would gain most from a place in the vocabulary.

Terms come from a glossary, or are mined: frequent in this data and rare in general text. There is no frequency list of general
text at hand, but there is a record of one, the vocabulary itself: byte-pair merges are learned most frequent first (Sennrich et
al. 2016, Neural Machine Translation of Rare Words with Subword Units), so the rank of a word among the tokens that begin words
tells how frequent it was where the tokenizer was trained. By Zipf's law the word of rank r makes up 0.1 / r of a text; a word
that is no token at all is rarer than the last one that is. The quotient of the frequency here and that one is the weirdness of
Ahmad et al. 1999 (University of Surrey Participation in TREC-8), and a word is a term from ten on. It must also come back in
several records, so that neither a misspelling nor the hero of one story is a term. Words that belong together (exchange rate)
are found by normalised pointwise mutual information (Bouma 2009); those inside longer ones are left out unless they also stand
alone, the idea of the C-value (Frantzi et al. 2000).

Gains are counted, not estimated: the data's own spellings in their own places, `(pieces - 1) x occurrences / tokens`; for
several terms together every stretch of text is counted once, the longest term first. What more tokens cost (rows of the
embedding that must be learned) is not weighed here, and a term added alters how words that contain it are split.

Promises: memory is bounded by a sample of a stated number of characters, spread evenly over the records, and counts are exact
within it; same data, same card. Falls short: in scripts written without spaces every character is a word, so terms of more than
three characters are not mined; a small vocabulary has no record of general text, and nothing is mined with it; that a common
word means something else here is not seen.
"""

from __future__ import annotations

import csv
import json
import math
import re
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from fullrank.data.subject import Subject
from fullrank.errors import DataError
from fullrank.records import Term, TermsCard
from fullrank.units import plural

#: Characters counted at most: about 350,000 words, in which a word that makes up one in 70,000 stands five times.
SAMPLE = 2_000_000

#: A term occurs this often, and in as many records: less is chance or one text's own.
_OCCURRENCES = 5
_RECORDS = 3

#: Times as frequent here as in general text.
_WEIRD = 10.0

#: Share of a text that its most frequent word makes up, by Zipf's law for English (0.1 / rank).
_ZIPF = 0.1

#: Fewer tokens that begin words are no record of general text.
_FEWEST_RANKS = 5_000

#: The glue of language is no term, nor does a term begin or end with it: the first so many tokens that begin words, in any
#: language that the tokenizer knows well, and the function words of English, further down among words that mean something.
_GLUE = 200
_FUNCTION_WORDS = """
    about across after again against all along also although always am among an and another any anyone are around as at be
    became because become been before behind being below beneath beside besides between beyond but by came can come could
    despite did do does doing done down during each eight either else even ever every except few first five for found four
    from get gets getting go going got had has have having he her here hers him his how however i if in instead into is it
    its just last less let like made make makes many may maybe me might mine more most much must my near need needs neither
    never nine no nor not now of off often on once one only onto or other our out outside over own past per please quite
    rather said same second seven several shall she should shown since six so some still such ten than that the their them
    then there these they this those though three through thus to today too toward towards two under unless unlike until up
    upon us use used very via want wants was we were what when where whereas whether which while who whom whose why will
    with within without would yes yet you your yours
"""

#: Normalised pointwise mutual information from which words belong together; 0 is chance, 1 never one without the other. Set by
#: eye on medical abstracts and bank customers' questions: odds ratio and virtual card lie above, high risk and debit card below.
_TOGETHER = 0.35

#: Characters of the longest term.
_LONGEST = 100

#: Words of the longest mined term.
_MOST_WORDS = 3

#: Absent terms of a glossary that are listed, and bad lines of one that are named.
_MOST_LISTED = 20

_MINED = (
    f"at least {_WEIRD:.0f} times as frequent as in general text by the word's rank in the vocabulary (Zipf: 0.1 / rank), in "
    f"{_OCCURRENCES} places and {_RECORDS} records or more; several words, one of them such a one: normalised pointwise mutual "
    f"information from {_TOGETHER} on"
)


def audit_terms(
    subjects: Iterable[Subject],
    tokenizer: Tokenizer,
    glossary: Path | None,
    *,
    records: int | None = None,
    most: int = 50,
    characters: int = SAMPLE,
) -> TermsCard:
    """How `tokenizer` splits the terms of a glossary, or of the data where there is none.

    Args:
        subjects: the training records, in order, or an even part of them; read once, forward.
        tokenizer: of the `tokenizers` library (`backend_tokenizer` of a fast transformers tokenizer); not changed.
        glossary: text with one term a line, or .csv, .tsv, .jsonl or .ndjson with a column `term`.
        records: how many training records there are, where `subjects` are a part of them.
        most: terms listed on the card.
        characters: size of the sample.

    Raises:
        DataError: the glossary cannot be read, or has lines without a term, each named.
    """
    given = read_glossary(glossary) if glossary is not None else None
    splitter = _Splitter(tokenizer)
    sample = _Sample(characters)
    for subject in subjects:
        sample.take(subject)
    words = _Words.of(sample, splitter)
    rarity = dict.fromkeys(given) if given is not None else _mined(sample, words, splitter)
    index = _Index.of(list(rarity), abbreviations=given is not None)
    matches = index.count(sample)
    return _card(sample, words, splitter, index, matches, rarity, glossary, most, records or sample.seen)


# ---- glossary -------------------------------------------------------------------------------------------------------


def read_glossary(path: Path) -> list[str]:
    """The terms of a glossary file, without repetitions (case aside), in its order.

    Raises:
        DataError: naming file and line of everything that is no term.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: the glossary cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(f"{path}:{line}: the glossary is not UTF-8", hint="save it as UTF-8") from None
    kind = path.suffix.lower()
    if kind in (".csv", ".tsv"):
        lines = _table(path, text, "\t" if kind == ".tsv" else ",")
    elif kind in (".jsonl", ".ndjson"):
        lines = _json_lines(text)
    else:
        lines = ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())
    terms: dict[str, str] = {}
    problems = []
    for number, value in lines:
        term = " ".join(value.split()) if isinstance(value, str) else ""
        if isinstance(value, _Problem):
            problems.append(f"{path}:{number}: {value}")
        elif not term:
            problems.append(f"{path}:{number}: no term: {value!r:.80}")
        elif len(term) > _LONGEST:
            problems.append(f"{path}:{number}: a term has at most {_LONGEST} characters, this line has {len(term):,}")
        else:
            terms.setdefault(term.casefold(), term)
    if problems:
        more = [f"and {len(problems) - _MOST_LISTED:,} more lines"] if len(problems) > _MOST_LISTED else []
        raise DataError("\n".join(problems[:_MOST_LISTED] + more), hint="a glossary has one term a line, or a column `term`")
    if not terms:
        raise DataError(
            f"{path}: the glossary has no term", hint="write one term a line, or leave the glossary out: terms are mined then"
        )
    return list(terms.values())


class _Problem(str):
    """What is wrong with a line."""


def _table(path: Path, text: str, delimiter: str) -> Iterator[tuple[int, Any]]:
    rows = csv.reader(text.splitlines(keepends=True), delimiter=delimiter, strict=True)
    try:
        header = [name.strip() for name in next(rows, [])]
        if "term" not in header:
            raise DataError(f"{path}:1: no column `term` (columns found: {', '.join(header) or 'none'})")
        column = header.index("term")
        for row in rows:
            if row:
                yield rows.line_num, row[column] if column < len(row) else None
    except csv.Error as error:
        yield rows.line_num, _Problem(f"no valid CSV: {error}")


def _json_lines(text: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            yield number, _Problem(f"no valid JSON: {error}")
            continue
        yield number, value.get("term") if isinstance(value, dict) else _Problem("an object with `term` is expected")


# ---- the sample -----------------------------------------------------------------------------------------------------


class _Sample:
    """Records spread evenly over all, at most so many characters; one text of a record is cut at a quarter of that.

    Takes every record until the sample is full, then lets go of every other one and takes every second, and so on.
    """

    def __init__(self, characters: int) -> None:
        self.limit = characters
        self.seen = 0
        self.step = 1
        self.cut = 0
        self.characters = 0
        self.records: list[list[tuple[bool, str]]] = []
        """Of each record the texts, and whether the model learns to write them."""

    def take(self, subject: Subject) -> None:
        number = self.seen
        self.seen += 1
        if number % self.step:
            return
        texts = []
        for part in subject.parts:
            self.cut += len(part.text) > self.limit // 4
            texts.append((part.role in ("assistant", "document"), part.text[: self.limit // 4]))
        self.records.append(texts)
        self.characters += _length(texts)
        while self.characters > self.limit and len(self.records) > 1:
            self.characters -= sum(map(_length, self.records[1::2]))
            del self.records[1::2]
            self.step *= 2

    def texts(self) -> Iterator[str]:
        return (text for record in self.records for _, text in record)

    def described(self, records: int) -> str:
        """In words, which part of so many records this is; empty for all."""
        parts = [f"{len(self.records):,} of {plural(records, 'record')}, spread evenly"] if len(self.records) < records else []
        parts += [f"{plural(self.cut, 'long text')} up to {self.limit // 4:,} characters"] if self.cut else []
        return "; ".join(parts)


def _length(texts: Iterable[tuple[bool, str]]) -> int:
    return sum(len(text) for _, text in texts)


# ---- words ----------------------------------------------------------------------------------------------------------

_KANA_AND_HAN = "\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
#: Scripts written without spaces: Thai and Lao, Myanmar, Khmer, kana, Han.
_UNSPACED = f"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff{_KANA_AND_HAN}"
#: Marks that belong to the letter before them and are no `\w`: combining accents, Hebrew and Arabic vowels, Indic signs.
_MARKS = "\u0300-\u036f\u0483-\u0489\u0591-\u05c7\u0610-\u061a\u064b-\u065f\u0670\u06d6-\u06ed\u0900-\u0963\u0966-\u0dff"
_RUN = rf"(?:[^\W{_UNSPACED}]++[{_MARKS}]*+)++"
#: Letters, digits and underscores, joined by single hyphens, points, colons and slashes (us-gaap:Assets, COVID-19); one character
#: in scripts without spaces. An apostrophe ends a word: don't is two.
WORD = re.compile(rf"{_RUN}(?:[-.:/]{_RUN})*+|[{_UNSPACED}]")
_UNSPACED_CHARACTER = re.compile(f"[{_UNSPACED}]")


class _Piece(NamedTuple):
    text: str
    broken: bool


class _Splitter:
    """Splits forms as they stand in a text: ` card` after a space, `card` after anything else."""

    #: Stands before every form; nothing merges with a new line across the border of a word.
    _BEFORE = "\n"
    _BATCH = 10_000

    def __init__(self, tokenizer: Tokenizer) -> None:
        if tokenizer.truncation or tokenizer.padding:
            tokenizer = Tokenizer.from_str(tokenizer.to_str())
            tokenizer.no_truncation()
            tokenizer.no_padding()
        self.tokenizer = tokenizer
        stages = [stage.__getstate__() for stage in (tokenizer.pre_tokenizer, tokenizer.decoder) if stage is not None]
        self.bytes = _byte_of_character() if any(b'"ByteLevel"' in stage for stage in stages) else None
        # A Unigram model does not say which of its pieces stands for the unknown; it is called so.
        unknown = getattr(tokenizer.model, "unk_token", None) or "<unk>"
        self.unknown = tokenizer.token_to_id(unknown)
        self.ranks = self._ranks()

    def _ranks(self) -> list[int]:
        """Ids of the tokens that begin a word, ascending: the place of one is its rank."""
        vocabulary = self.tokenizer.get_vocab(with_added_tokens=False)
        for marker in ("Ġ", "▁"):
            ids = sorted(number for token, number in vocabulary.items() if token.startswith(marker) and token[1:].isalpha())
            if ids:
                return ids
        return sorted(number for token, number in vocabulary.items() if not token.startswith("##") and token.isalpha())

    def count(self, texts: Iterable[str]) -> int:
        """Tokens of whole texts."""
        total = 0
        iterator = iter(texts)
        while batch := list(islice(iterator, 256)):
            total += sum(len(encoding) for encoding in self.tokenizer.encode_batch_fast(batch, add_special_tokens=False))
        return total

    def lengths(self, forms: Sequence[str]) -> list[int]:
        """How many tokens each form is; at least one, where a normaliser leaves nothing of it."""
        return [max(1, len(ids)) for ids in self._ids(forms)]

    def _ids(self, forms: Sequence[str]) -> Iterator[list[int]]:
        for start in range(0, len(forms), self._BATCH):
            batch = [self._BEFORE + form for form in forms[start : start + self._BATCH]]
            for encoding in self.tokenizer.encode_batch(batch, add_special_tokens=False):
                yield [number for number, (_, end) in zip(encoding.ids, encoding.offsets, strict=True) if end > len(self._BEFORE)]

    def pieces(self, form: str) -> list[_Piece]:
        """The tokens of a form as text."""
        ids = next(self._ids([form]))
        pieces = [self._piece(number) for number in ids]
        if self.bytes is not None and self.tokenizer.normalizer is None:
            # A vocabulary without some of the bytes, and without a token for the unknown, drops them and says nothing.
            kept = sum(len(self.tokenizer.id_to_token(number) or "") for number in ids)
            if kept < len(form.encode("utf-8", "replace")):
                pieces.append(_Piece("<lost>", True))
        return pieces

    def _piece(self, number: int) -> _Piece:
        token = self.tokenizer.id_to_token(number) or ""
        if number == self.unknown or re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            return _Piece(token, True)
        if self.bytes is None:
            return _Piece(token.replace("▁", " "), False)
        if any(letter not in self.bytes for letter in token):  # an added token is as it is written
            return _Piece(token, False)
        raw = bytes(self.bytes[letter] for letter in token)
        try:
            return _Piece(raw.decode(), False)
        except UnicodeDecodeError:
            return _Piece("".join(f"<0x{byte:02X}>" for byte in raw), True)

    def shares(self, words: Sequence[str]) -> list[float]:
        """Share of general text that each word makes up, at most; by the commonest of its forms in the vocabulary."""
        if len(self.ranks) < _FEWEST_RANKS:
            return [1.0] * len(words)
        forms = [form for word in words for form in (" " + word, " " + word.lower(), " " + word.capitalize(), word)]
        shares = []
        ranks = (
            bisect_right(self.ranks, ids[0]) if len(ids) == 1 and ids[0] != self.unknown else len(self.ranks)
            for ids in self._ids(forms)
        )
        for _ in words:
            shares.append(_ZIPF / max(1, min(islice(ranks, 4))))
        return shares


def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: the printable character that stands for each byte in a byte-level vocabulary."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


@dataclass
class _Words:
    """What the words of the sample are and how they are split."""

    forms: Counter[str]
    """Words as they stand, a space before them included -> occurrences."""
    answers: Counter[str]
    """The same over answers alone."""
    lengths: dict[str, int]
    """Tokens of each form."""

    @classmethod
    def of(cls, sample: _Sample, splitter: _Splitter) -> _Words:
        forms: Counter[str] = Counter()
        answers: Counter[str] = Counter()
        for record in sample.records:
            for is_answer, text in record:
                here = Counter(_form(text, match.start(), match.end()) for match in WORD.finditer(text))
                forms.update(here)
                if is_answer:
                    answers.update(here)
        return cls(forms, answers, dict(zip(forms, splitter.lengths(list(forms)), strict=True)))


def _form(text: str, start: int, end: int) -> str:
    return text[start - 1 : end] if start and text[start - 1] == " " else text[start:end]


# ---- mining ---------------------------------------------------------------------------------------------------------


def _mined(sample: _Sample, words: _Words, splitter: _Splitter) -> dict[str, float | None]:
    """Terms of the data in their commonest spelling -> times as frequent as in general text; None for several words."""
    spellings: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for form, count in words.forms.items():
        spellings[form.strip().casefold()][form.strip()] += count
    total = max(1, words.forms.total())
    counts = {word: group.total() for word, group in spellings.items()}
    common = [word for word, count in counts.items() if count >= _OCCURRENCES]
    commonest = {word: _commonest(spellings[word]) for word in common}
    shares = dict(zip(common, splitter.shares([commonest[word] for word in common]), strict=True))
    glue = {word for word in common if shares[word] >= _ZIPF / _GLUE} | set(_FUNCTION_WORDS.split())
    weird = {commonest[word]: counts[word] / total / shares[word] for word in common if _is_term(word) and word not in glue}
    single = {word: rarity for word, rarity in weird.items() if rarity >= _WEIRD}
    return {**single, **dict.fromkeys(_several(sample, counts, glue, {word.casefold() for word in single}, total))}


def _is_term(word: str) -> bool:
    """A word that may be a term: begins with a letter, has three characters or more and not mostly digits."""
    letters = sum(character.isalpha() for character in word)
    return word[0].isalpha() and 3 <= len(word) <= _LONGEST and 2 * letters >= sum(character.isalnum() for character in word)


def _commonest(spellings: Mapping[str, int]) -> str:
    return min(spellings, key=lambda text: (-spellings[text], text))


def _several(sample: _Sample, counts: Mapping[str, int], glue: set[str], single: set[str], total: int) -> list[str]:
    """Terms of two and three words that stand side by side, one space between them (none in scripts without).

    One of the words is a term by itself, so that what general text says as well (both sides) is none.
    """
    together: Counter[str] = Counter()
    for text in sample.texts():
        run: list[str] = []
        """The last words, nothing but a space between any two."""
        previous = -1
        for match in WORD.finditer(text):
            word = match[0].casefold()
            gap = text[previous : match.start()] if previous >= 0 else "\n"
            previous = match.end()
            if not (gap == " " or (gap == "" and _UNSPACED_CHARACTER.match(word))):
                run.clear()
            if counts[word] < _OCCURRENCES or word[0].isdigit():
                run.clear()
                continue
            run.append(word)
            del run[:-_MOST_WORDS]
            for size in range(2, len(run) + 1):
                if word not in glue and run[-size] not in glue:
                    together["\t".join(run[-size:])] += 1
    frequent = {joined: count for joined, count in together.items() if count >= _OCCURRENCES}
    kept = {joined: count for joined, count in frequent.items() if _npmi(joined, count, counts, total) >= _TOGETHER}
    inside: Counter[str] = Counter()
    for joined, count in kept.items():
        parts = joined.split("\t")
        for start, stop in ((0, -1), (1, len(parts))) if len(parts) > 2 else ():
            shorter = "\t".join(parts[start:stop])
            inside[shorter] = max(inside[shorter], count)
    terms = []
    for joined, count in kept.items():
        parts = joined.split("\t")
        unspaced = any(_UNSPACED_CHARACTER.match(part) for part in parts)
        if count - inside[joined] >= _OCCURRENCES and (unspaced or not single.isdisjoint(parts)):
            terms.append("".join(part if _UNSPACED_CHARACTER.match(part) else " " + part for part in parts).strip())
    return terms


def _npmi(joined: str, count: int, counts: Mapping[str, int], total: int) -> float:
    """Normalised pointwise mutual information of n words that stand together: ln(p / product of p_i) / (-(n - 1) ln p)."""
    parts = joined.split("\t")
    share = math.log(count / total)
    return (share - sum(math.log(counts[part] / total) for part in parts)) / (-(len(parts) - 1) * share) if share else 1.0


# ---- finding terms in text ------------------------------------------------------------------------------------------


@dataclass
class _Entry:
    """A term as it is looked for."""

    text: str
    folded: str
    words: int
    exact: bool
    """Compared as written: an abbreviation like AT is not the word at."""
    before: int
    after: int
    """Characters of the term before its first and after its last word: (R)-, C++."""
    forms: Counter[str] = field(default_factory=Counter)
    """As it stands in the data, a space before it included -> occurrences."""
    records: int = 0


@dataclass
class _Index:
    """All terms, to be found by their first word."""

    entries: list[_Entry]
    by_word: dict[str, list[_Entry]]
    anywhere: list[_Entry]
    """Terms of signs alone: € or ±."""

    @classmethod
    def of(cls, terms: Sequence[str], abbreviations: bool) -> _Index:
        by_word: defaultdict[str, list[_Entry]] = defaultdict(list)
        entries, anywhere = [], []
        for text in terms:
            found = list(WORD.finditer(text))
            exact = abbreviations and text.isupper() and len(text) <= 5
            if not found:
                entry = _Entry(text, text.lower(), 1, exact, 0, 0)
                anywhere.append(entry)
            else:
                entry = _Entry(text, text.lower(), len(found), exact, found[0].start(), len(text) - found[-1].end())
                by_word[found[0][0].lower()].append(entry)
            entries.append(entry)
        return cls(entries, dict(by_word), anywhere)

    def count(self, sample: _Sample) -> list[list[_Match]]:
        """Counts every term's occurrences and records; returns the occurrences in each text of the sample."""
        everywhere = []
        for record in sample.records:
            here: set[int] = set()
            for _, text in record:
                matches = self.matches(text)
                everywhere.append(matches)
                for start, end, entry in matches:
                    entry.forms[_form(text, start, end)] += 1
                    entry.records += id(entry) not in here
                    here.add(id(entry))
        return everywhere

    def matches(self, text: str) -> list[_Match]:
        """Every occurrence, of terms inside terms too; by their start, the longest first."""
        folded = text.lower()
        if len(folded) != len(text):  # a dotted capital I becomes two characters, and places shift
            folded = text
        found = []
        for entry in self.anywhere:
            where, what = (text, entry.text) if entry.exact else (folded, entry.folded)
            found += [_Match(match.start(), match.end(), entry) for match in re.finditer(re.escape(what), where)]
        words = list(WORD.finditer(folded)) if self.by_word else []
        for number, word in enumerate(words):
            for entry in self.by_word.get(word[0], ()):
                if number + entry.words > len(words) or word.start() < entry.before:
                    continue
                start, end = word.start() - entry.before, words[number + entry.words - 1].end() + entry.after
                written, what = (text, entry.text) if entry.exact else (folded, entry.folded)
                # A term may be broken over two lines.
                if written[start:end] == what or (entry.words > 1 and " ".join(written[start:end].split()) == what):
                    found.append(_Match(start, end, entry))
        found.sort(key=lambda match: (match.start, -match.end))
        return found


class _Match(NamedTuple):
    start: int
    end: int
    entry: _Entry


def _saved_together(
    sample: _Sample, matches: Sequence[Sequence[_Match]], sets: Sequence[set[int]], lengths: Mapping[str, int]
) -> list[int]:
    """Tokens saved if the terms of each set (their ids) were one token each; every stretch of text counts once, longest first."""
    saved = [0] * len(sets)
    for text, found in zip(sample.texts(), matches, strict=True):
        until = [0] * len(sets)
        for start, end, entry in found:
            for number, chosen in enumerate(sets):
                if start >= until[number] and id(entry) in chosen:
                    saved[number] += lengths[_form(text, start, end)] - 1
                    until[number] = end
    return saved


# ---- the card -------------------------------------------------------------------------------------------------------


def _card(
    sample: _Sample,
    words: _Words,
    splitter: _Splitter,
    index: _Index,
    matches: Sequence[Sequence[_Match]],
    rarity: Mapping[str, float | None],
    glossary: Path | None,
    most: int,
    records: int,
) -> TermsCard:
    answers = [text for record in sample.records for is_answer, text in record if is_answer]
    answer_tokens = splitter.count(answers)
    tokens = answer_tokens + splitter.count(text for record in sample.records for is_answer, text in record if not is_answer)
    # A single story has its own words in one record only; with fewer records than asked for, all of them must have it.
    needed = 1 if glossary is not None else min(_RECORDS, len(sample.records))
    occurring = [entry for entry in index.entries if entry.records >= needed]
    forms = list(dict.fromkeys(form for entry in occurring for form in entry.forms))
    lengths = dict(zip(forms, splitter.lengths(forms), strict=True))
    saved = {id(entry): sum(count * (lengths[form] - 1) for form, count in entry.forms.items()) for entry in occurring}
    occurring.sort(key=lambda entry: (-saved[id(entry)], -entry.forms.total(), entry.text))
    chosen = [{id(entry) for entry in occurring[:best]} for best in (10, 50, len(occurring))]
    together = _saved_together(sample, matches, chosen, lengths)
    terms = {entry.text.casefold() for entry in occurring if entry.words == 1}
    ordinary = Counter(
        {form: n for form, n in words.forms.items() if form.strip().isalpha() and form.strip().casefold() not in terms}
    )
    in_terms = sum(count * lengths[form] for entry in occurring for form, count in entry.forms.items())
    absent = [entry.text for entry in index.entries if not entry.records] if glossary is not None else []
    return TermsCard(
        glossary=str(glossary) if glossary is not None else None,
        measure="terms of the glossary, case aside" if glossary is not None else _MINED,
        records=records,
        sampled=sample.described(records),
        characters=sample.characters,
        tokens=tokens,
        bytes_per_token=_bytes(sample.texts()) / max(1, tokens),
        fertility=_fertility(words.forms, words.lengths),
        split_words=sum(n for form, n in words.forms.items() if words.lengths[form] > 1) / max(1, words.forms.total()),
        answer_tokens=answer_tokens,
        answer_bytes_per_token=_bytes(answers) / max(1, answer_tokens),
        answer_fertility=_fertility(words.answers, words.lengths),
        ordinary_fertility=_fertility(ordinary, words.lengths),
        term_fertility=in_terms / max(1, sum(entry.words * entry.forms.total() for entry in occurring)),
        terms=[_term(entry, splitter, lengths, saved[id(entry)], tokens, rarity[entry.text]) for entry in occurring[:most]],
        found=len(occurring),
        absent=absent[:_MOST_LISTED],
        absent_count=len(absent),
        saved_by_10=1000 * together[0] / max(1, tokens),
        saved_by_50=1000 * together[1] / max(1, tokens),
        saved_by_all=1000 * together[2] / max(1, tokens),
    )


def _term(entry: _Entry, splitter: _Splitter, lengths: Mapping[str, int], saved: int, tokens: int, rarity: float | None) -> Term:
    spellings: Counter[str] = Counter()
    for form, count in entry.forms.items():
        spellings[form.strip()] += count
    text = _commonest(spellings)
    splits = [splitter.pieces(form) for form in (" " + text, text, " " + text[0].upper() + text[1:])]
    occurrences = entry.forms.total()
    return Term(
        text=text,
        words=entry.words,
        occurrences=occurrences,
        records=entry.records,
        pieces=[piece.text for piece in splits[0]],
        pieces_bare=[piece.text for piece in splits[1]],
        pieces_capital=[piece.text for piece in splits[2]],
        broken=list(dict.fromkeys(piece.text for split in splits for piece in split if piece.broken)),
        fertility=sum(count * lengths[form] for form, count in entry.forms.items()) / (entry.words * occurrences),
        saved_per_1000=1000 * saved / max(1, tokens),
        rarity=rarity,
    )


def _fertility(forms: Counter[str], lengths: Mapping[str, int]) -> float:
    """Tokens per word; 0 of no words."""
    return sum(count * lengths[form] for form, count in forms.items()) / max(1, forms.total())


def _bytes(texts: Iterable[str]) -> int:
    return sum(len(text.encode("utf-8", "replace")) for text in texts)
