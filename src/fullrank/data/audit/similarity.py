"""When two records say the same: the form texts are compared in, and how much may differ.

Promises: whether two records are nearly the same depends on those two alone, never on what else is in the data or in which order
it stands, so any pair can be checked by hand. What it does not do: it compares letters and words, not meaning; another wording of
a question is another question here.

**Normal form.** Unicode NFKC (UAX #15) and case folded; punctuation and white space become one space; apostrophes and invisible
format characters (category Cf) go. Operators and currency signs stay (`+ * / = < > % $ ...`), and so does a minus before a digit:
`5 - 3` and `5 * 3` are two questions.

**Nearly the same text.** With d the edits that lead from one text to the other and n the length of the longer, two texts are
nearly the same when 1 - d / n is at least `SIMILARITY` counted in characters, or at least `WORD_SIMILARITY` counted in words
(one may differ from `LEAST_WORDS` on) while they agree in `LETTER_SIMILARITY` of their letters (Indel similarity). Where they do
so only with their words in alphabetical order (a clause was moved), `MOVED_SIMILARITY` of the words must be the same. Edits in
words are the words that one text has and the other lacks, the larger of the two counts, and a word with a slip of the finger (one
letter; two from eight letters on) is none. Edits in characters are the Levenshtein distance, or the characters of those words
where that is less. Texts of more than 20,000 characters are compared by their words alone, a slip being a word like another.

**Nearly the same record.** The prompts are nearly the same, the answers are, and none of these speaks against it:

- *Context is not content.* Lines and sentences that both prompts hold (a table's columns, a passage, a system prompt) are taken
  away before the prompts are compared: two questions about one table are two records. What is left counts as at least
  `LEAST_CONTENT` characters, so that a typing error in a turn of two words is one. Where words were only added, prompts are
  compared whole.
- *Numbers count.* Where each side has a number that the other lacks, it is another problem, or another result.
- *The answer follows.* Where words were exchanged in the prompt and the same words in the answer, it is another record of the
  same pattern (`How old is Ann?`, `Ann is ...`).

Answers are held to more than prompts, since in `The opposite of light is dark` one word is all. Labels and facts, up to
`LABEL_WORDS` words, must be equal in normal form; longer ones agree in `ANSWER_SIMILARITY` of their characters, order counted.
Only where the prompts are equal, or an answer has `LONG_ANSWER_WORDS` words or more, may clauses have moved, and words have been
added or left out (not exchanged) within `WORD_SIMILARITY`. Raw text is compared whole, its numbers as words among others: the
copy of a page is a copy though its date was changed.

The limits were set on BANKING77 (Casanueva et al. 2020), whose questions have 47 characters in the median: of pairs that share
their label, those within the limits were read and say the same thing in all but the same words; beyond them come other wordings.
Answers: on the instruction set of Raschka 2024, where shorter limits join `A synonym for quick is fast` and `... is rapid`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

from fullrank.data.subject import Subject

#: Share of characters that must be the same.
SIMILARITY = 0.85

#: Share of words that must be the same: one in five may differ.
WORD_SIMILARITY = 0.8

#: Words are counted from this many on, and one of them may differ.
LEAST_WORDS = 4

#: Share of words that must be the same where they stand in another order.
MOVED_SIMILARITY = 0.9

#: Where words are counted, the share of letters that must be the same as well: with one word in five exchanged another thing may
#: be asked.
LETTER_SIMILARITY = 0.82

#: Share of characters that must be the same in answers longer than labels.
ANSWER_SIMILARITY = 0.9

#: Characters that what is left of two prompts counts as, at the least, when the context they share was taken away.
LEAST_CONTENT = 40

#: Answers of up to this many words are labels or facts: classes, yes or no, names, numbers.
LABEL_WORDS = 5

#: From this length on clauses may have moved within an answer whatever the prompts.
LONG_ANSWER_WORDS = 20

# The Levenshtein distance takes time in the product of both lengths; above this length words alone are compared.
_MOST_CHARACTERS = 20_000

# ASCII in one pass: letters lowered, punctuation to spaces. What carries meaning in arithmetic, code and prices stays.
_PUNCTUATION = '.,;:!?"()[]{}`_'
_ASCII = bytes(
    ord(" ") if chr(code) in _PUNCTUATION or code < 32 or code == 127 else ord(chr(code).lower()) for code in range(128)
) + bytes(range(128, 256))
_MEANINGFUL = frozenset("#%&*/@\\")
_APOSTROPHES = frozenset("'\u2018\u2019\u02bc")
_DASHES = frozenset("-\u2010\u2011\u2012\u2013\u2014\u2212")

# A hyphen or dash that is no minus sign: no digit follows it, or it follows a letter.
_NO_MINUS = re.compile(r"-(?!\s?\d)|(?<=[^\W\d_])-")

# Where one unit of a text ends and the next begins: a line break, or the end of a sentence.
_UNIT_ENDS = re.compile(r"[\r\n\u2028\u2029]+|(?<=[.!?])\s+|(?<=[\u3002\uff01\uff1f])")

# Scripts written without spaces, where a character stands for a word: Han, Hiragana, Katakana.
_IDEOGRAPH = re.compile("([\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff])")

_NUMBER = re.compile(r"\d+")


def normalise(text: str) -> str:
    """A text in the form it is compared in; a text of nothing but punctuation stays as it is, but for outer white space."""
    if text.isascii():
        plain = text.encode().translate(_ASCII, b"'").decode()
    else:
        # Case folding may undo composition (UAX #15, section 5.1): composed again after it.
        folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
        plain = folded.translate(_UNICODE)
    if "-" in plain:
        plain = _NO_MINUS.sub(" ", plain)
    return " ".join(plain.split()) or text.strip()


class _Unicode(dict[int, int | str | None]):
    """What becomes of a character outside ASCII texts: found out when it is first met."""

    def __missing__(self, code: int) -> int | str | None:
        character = chr(code)
        category = unicodedata.category(character)
        kept: int | str | None = code
        if character in _APOSTROPHES or category == "Cf":
            kept = None
        elif character in _DASHES:
            kept = "-"
        elif category == "Cc" or (category[0] == "P" and character not in _MEANINGFUL):
            kept = " "
        self[code] = kept
        return kept


_UNICODE = _Unicode()


def words(text: str) -> list[str]:
    """The words of a text; in scripts without spaces every character is one."""
    return (text if text.isascii() else _IDEOGRAPH.sub(r" \1 ", text)).split()


@dataclass(frozen=True)
class Face:
    """A record as it is compared with others; what is needed of it is computed once."""

    prompt: str
    """As written; empty for raw text."""
    answer: str

    @classmethod
    def of(cls, subject: Subject) -> Face:
        return cls(subject.prompt, subject.answer)

    @cached_property
    def asked(self) -> str:
        return normalise(self.prompt)

    @cached_property
    def asked_words(self) -> _Bag:
        return _bag(words(self.asked))

    @cached_property
    def units(self) -> list[str]:
        """Lines and sentences of the prompt in normal form, numbered."""
        return list(_numbered(filter(None, map(normalise, _UNIT_ENDS.split(self.prompt)))))

    @cached_property
    def answered(self) -> str:
        return normalise(self.answer)

    @cached_property
    def answered_words(self) -> _Bag:
        return _bag(words(self.answered))

    @cached_property
    def is_label(self) -> bool:
        """Whether the answer is a label or a fact."""
        return len(words(self.answer)) <= LABEL_WORDS


def nearly_same(a: Face, b: Face) -> bool:
    """Whether two records are nearly the same, as the head of this file defines it; equal ones are."""
    if not a.prompt.strip() or not b.prompt.strip():
        exchanged = a.answered_words - b.answered_words, b.answered_words - a.answered_words
        return a.prompt.strip() == b.prompt.strip() and _alike(a.answered, b.answered, exchanged)
    return _same_answer(a, b) and _same_question(a, b)


def _same_answer(a: Face, b: Face) -> bool:
    if a.answered == b.answered:
        return True
    if a.is_label or b.is_label:
        return False
    mine, theirs = a.answered_words - b.answered_words, b.answered_words - a.answered_words
    if _numbers_differ(mine, theirs):
        return False
    longer = max(len(a.answered_words), len(b.answered_words))
    moved = a.asked == b.asked or longer >= LONG_ANSWER_WORDS
    if moved and (not mine or not theirs) and max(len(mine), len(theirs)) <= _budget(WORD_SIMILARITY, longer):
        return True
    budget = _budget(ANSWER_SIMILARITY, max(len(a.answered), len(b.answered)))
    return _within(budget, a.answered, b.answered, (mine, theirs) if moved else None)


def _same_question(a: Face, b: Face) -> bool:
    if a.asked == b.asked:
        return True
    mine, theirs = exchanged = a.asked_words - b.asked_words, b.asked_words - a.asked_words
    if not mine or not theirs:
        return _alike(a.asked, b.asked, exchanged)
    if _numbers_differ(mine, theirs):
        return False
    if a.answered != b.answered:
        followed = not set(_plain(mine)).isdisjoint(_plain(a.answered_words - b.answered_words))
        if followed and not set(_plain(theirs)).isdisjoint(_plain(b.answered_words - a.answered_words)):
            return False
    # Taking away what both have changes nothing in the words that only one of them has.
    least = min(LEAST_CONTENT, max(len(a.asked), len(b.asked)))
    return _alike(_without(a.units, b.units), _without(b.units, a.units), exchanged, least)


def _alike(a: str, b: str, exchanged: tuple[_Bag, _Bag], least: int = 0) -> bool:
    """Whether two texts in normal form are nearly the same.

    Args:
        exchanged: the words that only the one has, and those that only the other has.
        least: characters that the texts count as, at the least.
    """
    if _few_words_differ(a, b, exchanged, least):
        return True
    return _within(_budget(SIMILARITY, max(len(a), len(b), least)), a, b, exchanged)


def _few_words_differ(a: str, b: str, exchanged: tuple[_Bag, _Bag], least: int) -> bool:
    mine, theirs = map(len, exchanged)
    count = max(len(words(a)), len(words(b)))
    if count < LEAST_WORDS:
        return False
    budget = max(1, _budget(WORD_SIMILARITY, count))
    if max(len(a), len(b)) > _MOST_CHARACTERS:
        return max(mine, theirs) <= budget
    # A word with a slip takes one from either side. Every word is compared with every other, so the letters are asked first.
    if abs(mine - theirs) > budget:
        return False
    if _letters(a, b, least) < LETTER_SIMILARITY:
        if _letters(" ".join(sorted(a.split())), " ".join(sorted(b.split())), least) < LETTER_SIMILARITY:
            return False
        budget = _budget(MOVED_SIMILARITY, count)
    return max(mine, theirs) <= budget or max(map(len, _without_slips(*exchanged))) <= budget


def _without_slips(mine: _Bag, theirs: _Bag) -> tuple[list[str], list[str]]:
    """The words that have no counterpart on the other side: the same word but for a slip of the finger."""
    from rapidfuzz.distance import OSA

    left, others = [], sorted(_plain(theirs))
    for word in sorted(_plain(mine)):
        slips = (other for other in others if min(len(word), len(other)) >= 3)
        found = next((other for other in slips if OSA.distance(word, other) <= 1 + (max(len(word), len(other)) >= 8)), None)
        if found is None:
            left.append(word)
        else:
            others.remove(found)
    return left, others


def _letters(a: str, b: str, least: int) -> float:
    """Indel similarity of two texts that count as `least` characters at the least."""
    from rapidfuzz.distance import Indel

    return 1 - Indel.distance(a, b) / max(len(a) + len(b), 2 * least, 1)


def _budget(similarity: float, length: int) -> int:
    """Edits that a similarity allows at a length. The small number keeps 0.2 x 10 from falling below 2."""
    return int((1 - similarity) * length + 1e-9)


def _within(budget: int, a: str, b: str, exchanged: tuple[_Bag, _Bag] | None) -> bool:
    """Whether so many edits in characters lead from one text to the other; `exchanged`: words that one has and the other lacks,
    where order does not count."""
    if abs(len(a) - len(b)) > budget:
        return False
    if exchanged and max(map(_characters, exchanged)) <= budget:
        return True
    if max(len(a), len(b)) > _MOST_CHARACTERS:
        return False
    from rapidfuzz.distance import Levenshtein

    return Levenshtein.distance(a, b, score_cutoff=budget) <= budget


# ---- words as sets --------------------------------------------------------------------------------------------------

# The words of a text, repeated ones numbered (`the`, `the<NUL>1`): sets of them subtract as multisets do, and quickly.
_Bag = frozenset[str]


def _numbered(found: Iterable[str]) -> Iterator[str]:
    times: dict[str, int] = {}
    for text in found:
        count = times.get(text, 0)
        times[text] = count + 1
        yield f"{text}\0{count}" if count else text


def _bag(found: Iterable[str]) -> _Bag:
    return frozenset(_numbered(found))


def _without(units: list[str], others: list[str]) -> str:
    """A text without the units it shares with another."""
    shared = set(others)
    return " ".join(unit.partition("\0")[0] for unit in units if unit not in shared)


def _plain(bag: _Bag) -> list[str]:
    return [word.partition("\0")[0] for word in bag]


def _characters(bag: _Bag) -> int:
    """Characters of words and the spaces between them."""
    return sum(len(word) + 1 for word in _plain(bag))


def _numbers_differ(mine: _Bag, theirs: _Bag) -> bool:
    """Whether of two sets of words each has a number that the other lacks."""
    a, b = (_bag(_NUMBER.findall(" ".join(_plain(bag)))) for bag in (mine, theirs))
    return bool(a - b) and bool(b - a)
