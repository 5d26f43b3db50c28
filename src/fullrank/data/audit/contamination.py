"""Passages of test records that stand in training records: a score on such records measures memory.

The rule is that of GPT-3 (Brown et al. 2020, appendix C): a test record is contaminated when a run of `LONGEST` of its words
stands in a training record, words in normal form (`fullrank.data.audit.similarity`: lower case, no punctuation), never across the
turns of a conversation. A question of fewer words counts as a whole, from `SHORTEST` words on. As in GPT-3, what occurs in more
than `COMMON` different training records is boilerplate; so is what stands in more than `OWN` test records: the columns of a
table, a passage with several questions, an instruction. System prompts are not looked at.

The larger the share of a test record's passages that one training record holds, the graver: an error from `DIRTY` on, a warning
from `NOT_CLEAN` on, below it a note (the limits of Llama 2, Touvron et al. 2023, appendix A.6). What is found by a short question
alone is no error. Leaks are told as leaks, not here.

Promises: every run of words of every training record is looked up; what is found is the same words in the same order, up to a
collision of 64-bit hashes (among 10^9 runs in training and 10^6 in the tests: 5e-5). What it does not do: other words for the
same, or a translation, are not found.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fullrank.data.audit.duplicates import Batch, Groups, Hashes, Indices, Leaks, tell
from fullrank.data.audit.finding import Finding, Place, SplitFacts
from fullrank.data.audit.similarity import normalise, words
from fullrank.data.subject import Subject
from fullrank.records import Severity
from fullrank.units import plural

#: Words of a passage.
LONGEST = 13

#: Fewest words of a question that is looked for as a whole.
SHORTEST = 8

#: A passage in more different training records than this is boilerplate.
COMMON = 10

#: A passage in more test records than this is what they have in common, not what they ask.
OWN = 2

#: Shares of a test record's passages in one training record from which on the finding is an error, and a warning.
DIRTY = 0.8
NOT_CLEAN = 0.2

#: Passages that are looked for at most: each takes about 40 bytes in every worker.
MOST_GRAMS = 2_000_000

# Texts are hashed together, this many characters at once (arrays of 2 MB stay near the processor), a long text in runs of words.
_PIECE = 2**18
_CUT = 2**14
# Test records whose passages are collected together.
_BATCH = 256
# An odd base has an inverse modulo 2^64, so the hash of a run follows from two prefix sums (Karp and Rabin 1987).
_BASE = 0x9E3779B97F4A7C15
_MIX = np.uint64(0xBF58476D1CE4E5B9)


@dataclass(frozen=True)
class Grams:
    """The passages of the test records, small enough to be sent to every worker."""

    hashes: Hashes
    """Passages, ascending: (passages)."""
    bounds: Indices
    """Where the test records of each passage begin in `items`, and the end of the last: (passages + 1)."""
    items: NDArray[np.uint32]
    """Test records, counted through all test sets in the order given, passage after passage."""
    passages: NDArray[np.uint32]
    """Passages of each test record: (test records)."""
    short: NDArray[np.bool_]
    """Test records looked for as a whole, being shorter than a passage: (test records)."""
    lengths: tuple[int, ...]
    """Words of passages, every length that occurs."""
    stride: int
    """Every passage that begins at such a word is looked for; 1: all of them."""

    @property
    def digest(self) -> str:
        """What the results of `look` depend on, for keys of caches: 32 hexadecimal digits."""
        state = hashlib.blake2b(digest_size=16)
        for part in (self.hashes, np.array(self.lengths)):
            state.update(part.tobytes())
        return state.hexdigest()

    @property
    def note(self) -> str:
        """What is not looked for, in words; empty where everything is."""
        notes = []
        if missing := int(np.count_nonzero(self.passages == 0)):
            notes.append(f"{plural(missing, 'test record')} with no passage of {SHORTEST} words of their own not looked for")
        if self.stride > 1:
            notes.append(f"one passage in {self.stride} of each test record looked for")
        return "; ".join(notes)

    @cached_property
    def _marks(self) -> NDArray[np.bool_]:
        """Whether some passage's hash has certain leading bits: most runs are settled by one look."""
        marks = np.zeros(2 ** max(16, int(len(self.hashes) * 8).bit_length()), dtype=bool)
        marks[self.hashes >> self._shift(marks)] = True
        return marks

    @staticmethod
    def _shift(marks: NDArray[np.bool_]) -> np.uint64:
        return np.uint64(65 - len(marks).bit_length())

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_marks"}

    def look(self, subjects: Sequence[Subject]) -> NDArray[np.uint32]:
        """Passages that stand in training records.

        Returns:
            uint32 (2, hits): the number of the record in `subjects`, and the number of the passage; every pair once, and of a
            passage that stands in more than `COMMON` + 1 of the records no more than that many.
        """
        found: list[Hashes] = []
        for piece in _pieces(subjects) if len(self.hashes) else ():
            for length in self.lengths:
                hashes, starts = piece.runs(length)
                likely = np.flatnonzero(self._marks[hashes >> self._shift(self._marks)])
                places = np.minimum(np.searchsorted(self.hashes, hashes[likely]), len(self.hashes) - 1)
                equal = self.hashes[places] == hashes[likely]
                records = piece.records[piece.texts[starts[likely[equal]]]]
                found.append(places[equal].astype(np.uint64) << np.uint64(32) | records)
        # By passage, then by record.
        keys = np.sort(np.concatenate(found)) if found else np.empty(0, dtype=np.uint64)
        keys = keys[np.append(True, keys[1:] != keys[:-1])] if len(keys) else keys
        passages = keys >> np.uint64(32)
        kept = np.ones(len(keys), dtype=bool)
        kept[COMMON + 1 :] = passages[COMMON + 1 :] != passages[: -COMMON - 1]
        return np.stack([keys[kept] & np.uint64(2**32 - 1), passages[kept]]).astype(np.uint32)


def grams(subjects: Iterable[Subject]) -> Grams:
    """The passages of test records: of all test sets, one after another."""
    remaining, count, stride = iter(subjects), 0, 1
    parts = [_Found.none()]
    while batch := list(islice(remaining, _BATCH)):
        parts += [piece.passages(count) for piece in _pieces(batch)]
        count += len(batch)
        while sum(len(part.hashes) for part in parts) > MOST_GRAMS:
            stride *= 2
            parts = [part.where(part.words % stride == 0) for part in parts]
    found = _Found.joined(parts)
    found = found.where(np.lexsort((found.items, found.hashes)))
    again = (found.hashes[1:] == found.hashes[:-1]) & (found.items[1:] == found.items[:-1])
    found = found.where(np.append(True, ~again)[: len(found.hashes)])
    begins = np.flatnonzero(np.append(True, found.hashes[1:] != found.hashes[:-1])[: len(found.hashes)])
    sizes = np.diff(np.append(begins, len(found.hashes)))
    found, begins, sizes = found.where(np.repeat(sizes <= OWN, sizes)), begins[sizes <= OWN], sizes[sizes <= OWN]
    long = np.bincount(found.items[found.lengths == LONGEST], minlength=count)
    return Grams(
        hashes=found.hashes[np.cumsum(sizes) - sizes],
        bounds=np.append(0, np.cumsum(sizes)),
        items=found.items,
        passages=np.bincount(found.items, minlength=count).astype(np.uint32),
        short=long == 0,
        lengths=tuple(sorted(set(found.lengths.tolist()))),
        stride=stride,
    )


def conclude(
    train: SplitFacts, tests: Sequence[SplitFacts], passages: Grams, hits: NDArray[np.uint32], leaks: Leaks
) -> list[Finding]:
    """One finding for each test record that stands in training records, in part or as a whole.

    Args:
        train: the training split, with the column `exact` of `fullrank.data.audit.duplicates.sign`.
        tests: the test sets whose records, one set after another, `passages` was made of.
        passages: what was looked for.
        hits: what `Grams.look` found, (2, hits), records counted through the whole of the training split.
        leaks: pairs that are told as leaks.
    """
    records, found = hits[0].astype(np.int64), hits[1].astype(np.int64)
    # Equal records count once among those that make a passage boilerplate.
    exact = np.asarray(train.column("exact"))[records]
    order = np.lexsort((exact, found))
    new = np.append(True, (exact[order][1:] != exact[order][:-1]) | (found[order][1:] != found[order][:-1]))[: len(order)]
    holders = np.bincount(found[order][new], minlength=len(passages.hashes))
    kept = holders[found] <= COMMON
    records, found = records[kept], found[kept]
    sizes = np.diff(passages.bounds)[found]
    records, first = np.repeat(records, sizes), np.repeat(passages.bounds[found] - (np.cumsum(sizes) - sizes), sizes)
    items = passages.items[first + np.arange(len(first))].astype(np.int64)

    starts = np.cumsum([0, *(len(test) for test in tests)])
    leaked = np.zeros(len(items), dtype=bool)
    for test, begin, end in zip(tests, starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        own = np.flatnonzero((items >= begin) & (items < end))
        if not len(own):
            continue
        leaked[own] = leaks.group(train.name, records[own]) == leaks.group(test.name, items[own] - begin)
    if leaked.all():
        return []
    pairs, times = np.unique(items[~leaked] << 32 | records[~leaked], return_counts=True)
    items, records = pairs >> 32, pairs & (2**32 - 1)
    begins = np.flatnonzero(np.append(True, items[1:] != items[:-1]))
    concerned, most = items[begins], np.maximum.reduceat(times, begins)
    share = most / passages.passages[concerned]
    # Test records are numbered before training records: the one that a finding is about comes first in it.
    counts = np.diff(np.append(begins, len(items)))
    members = np.insert(records + starts[-1], begins, concerned)
    groups = Groups(members, np.append(0, np.cumsum(counts + 1)))
    dirty = (share >= DIRTY) & ~passages.short[concerned]

    def place(record: int) -> Place:
        if record >= starts[-1]:
            return train.place(record - int(starts[-1]))
        number = int(np.searchsorted(starts, record, side="right")) - 1
        return tests[number].place(record - int(starts[number]))

    def batch(severity: Severity, which: NDArray[np.bool_]) -> Batch:
        about = concerned[which]
        most_of, out_of, is_short = most[which], passages.passages[about], passages.short[about]

        def describe(number: int, members: Indices) -> tuple[str, str]:
            of_it = "the question" if is_short[number] else f"{most_of[number]} of {out_of[number]} passages of {LONGEST} words"
            what = f"{of_it} of a test record found in {plural(len(members) - 1, 'training record')}"
            return what, "remove them from training, or the test record from the test: its score measures memory"

        return Batch(severity, groups.select(which), describe)

    not_clean = ~dirty & (share >= NOT_CLEAN)
    batches = [batch("error", dirty), batch("warning", not_clean), batch("note", ~dirty & ~not_clean)]
    return tell("contamination", batches, place)


# ---- words and their hashes -----------------------------------------------------------------------------------------


class _Found(NamedTuple):
    """Passages of test records: each (passages)."""

    hashes: Hashes
    items: NDArray[np.uint32]
    words: NDArray[np.uint32]
    """The word of its text that the passage begins with, from 0."""
    lengths: NDArray[np.uint8]
    """Words of the passage."""

    @classmethod
    def none(cls) -> _Found:
        number = np.empty(0, dtype=np.uint32)
        return cls(np.empty(0, dtype=np.uint64), number, number, np.empty(0, dtype=np.uint8))

    @classmethod
    def joined(cls, parts: Sequence[_Found]) -> _Found:
        return cls(
            np.concatenate([part.hashes for part in parts]),
            np.concatenate([part.items for part in parts]),
            np.concatenate([part.words for part in parts]),
            np.concatenate([part.lengths for part in parts]),
        )

    def where(self, which: NDArray[Any]) -> _Found:
        return _Found(self.hashes[which], self.items[which], self.words[which], self.lengths[which])


class _Piece:
    """Texts whose runs of words are hashed together.

    Args:
        texts: words in normal form, separated by spaces, at least one in each.
        records: the record of each text.
        questions: which texts are whole questions, neither answers nor parts of long texts.
    """

    def __init__(self, texts: list[str], records: list[int], questions: list[bool]) -> None:
        self.records = np.array(records, dtype=np.uint64)
        self.questions = np.array(questions, dtype=bool)
        characters = np.frombuffer("\n".join(texts).encode("utf-8", "surrogatepass"), dtype=np.uint8)
        powers, inverses = _powers(1 << len(characters).bit_length())
        gaps = np.flatnonzero((characters == ord(" ")) | (characters == ord("\n")))
        starts, ends = np.append(0, gaps + 1), np.append(gaps, len(characters))
        sums = np.append(np.uint64(0), np.cumsum((characters.astype(np.uint64) + np.uint64(1)) * powers[: len(characters)]))
        self.texts = np.append(0, np.cumsum(characters[gaps] == ord("\n")))
        """The text of each word: (words)."""
        self._begins, self._ends, self._inverses = sums[starts], sums[ends], inverses[starts]

    def runs(self, length: int) -> tuple[Hashes, Indices]:
        """The runs of so many words within one text: their hashes, and the words they begin with, each (runs)."""
        starts = np.flatnonzero(self.texts[length - 1 :] == self.texts[: max(len(self.texts) - length + 1, 0)])
        hashes = (self._ends[starts + length - 1] - self._begins[starts]) * self._inverses[starts]
        hashes ^= hashes >> np.uint64(32)
        hashes *= _MIX
        hashes ^= hashes >> np.uint64(29)
        return hashes, starts

    def passages(self, before: int) -> _Found:
        """The passages of test records; `before`: test records that came before those of this piece."""
        sizes = np.bincount(self.texts)
        begins = np.cumsum(sizes) - sizes
        found = []
        for length in range(SHORTEST, LONGEST + 1):
            hashes, starts = self.runs(length)
            owners = self.texts[starts]
            if length < LONGEST:
                whole = (sizes[owners] == length) & self.questions[owners]
                hashes, starts, owners = hashes[whole], starts[whole], owners[whole]
            items = (self.records[owners] + np.uint64(before)).astype(np.uint32)
            places = (starts - begins[owners]).astype(np.uint32)
            found.append(_Found(hashes, items, places, np.full(len(items), length, dtype=np.uint8)))
        return _Found.joined(found)


def _pieces(subjects: Sequence[Subject]) -> Iterator[_Piece]:
    """The texts of records, system prompts left out, a long text in runs that overlap by a passage less one word."""
    texts: list[str] = []
    records: list[int] = []
    questions: list[bool] = []
    room = _PIECE
    for number, subject in enumerate(subjects):
        for part in subject.parts:
            if part.role in ("system", "developer"):
                continue
            found = words(normalise(part.text))
            for start in range(0, max(len(found) - LONGEST + 1, min(len(found), 1)), _CUT):
                text = " ".join(found[start : start + _CUT + LONGEST - 1])
                if texts and len(text) > room:
                    yield _Piece(texts, records, questions)
                    texts, records, questions, room = [], [], [], _PIECE
                texts.append(text)
                records.append(number)
                questions.append(part.role != "assistant")
                room -= len(text)
    if texts:
        yield _Piece(texts, records, questions)


@cache
def _powers(count: int) -> tuple[Hashes, Hashes]:
    """Powers of the base and of its inverse, modulo 2^64: each (count)."""
    exponents = np.ones(count, dtype=np.uint64)
    inverses = exponents.copy()
    exponents[1:], inverses[1:] = np.uint64(_BASE), np.uint64(pow(_BASE, -1, 2**64))
    return np.cumprod(exponents), np.cumprod(inverses)
