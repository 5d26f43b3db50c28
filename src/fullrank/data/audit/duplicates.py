"""What records have to do with one another: duplicates, near duplicates, leaks between splits, contradictory answers.

**exact_duplicate**: records of one split that are equal in normal form (`fullrank.data.audit.similarity`): case, spacing and
punctuation aside. **near_duplicate**: records of one split that are nearly the same, as that file defines it. **leak**: what
stands in training and also in validation or a test set, or in validation and a test set: the same record, nearly the same, or the
same prompt. **label_conflict**: one prompt, in whatever splits, with answers that are not nearly the same.

Groups are connected components: every member equals, or nearly equals, at least one other. Near duplicates are told of one record
of each set of equal ones. A prompt with more than `COMMON_PROMPT` different answers is an instruction rather than a question:
that two splits have it in common is no leak. Prompts must be equal (in normal form) to conflict: of the pairs in BANKING77 whose
prompts are only nearly the same and whose labels differ, nearly all differ in the word that decides (`activate`, `reactivate my
card`).

How near duplicates are found: candidates are pairs whose MinHash signatures agree in one of `BANDS` bands of `ROWS` values
(Broder 1997; Leskovec, Rajaraman, Ullman, "Mining of Massive Datasets", chapter 3), over shingles of `SHINGLE` characters; a pair
of Jaccard similarity s agrees somewhere with probability 1 - (1 - s^ROWS)^BANDS: 0.87 at 0.5, 0.99 at 0.6. Every candidate is
then read and compared with its partner. System prompts take no part in the signature: a long one in common makes no two records
alike.

Where candidates are too many, fewer are compared, and `Conclusion.sampled` says so: in a bucket of more than `WINDOW` + 1 records
each is compared with the `WINDOW` next to it when sorted by the bands that follow (the sorted neighbourhood of Hernandez and
Stolfo 1995); where single bands give far more than `MOST_COMPARISONS` pairs, two successive bands must agree; of what is left,
pairs of different splits and then those that agree in most bands are compared.

Promises: groups do not depend on the order of shards or records unless something was sampled; memory stays within a few columns
whatever is found; nothing is called a near duplicate that was not compared in full. Hashes have 64 bits: that among 8 million
records any two different ones are taken for equal has probability 2e-6.
"""

from __future__ import annotations

import hashlib
import tempfile
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fullrank.data.audit.finding import Finding, Place, SplitFacts
from fullrank.data.audit.personal import without_secrets
from fullrank.data.audit.similarity import LABEL_WORDS, Face, nearly_same, normalise, words
from fullrank.data.subject import Subject
from fullrank.records import Severity

#: Characters of a shingle. Of 3, 4 and 5, with the bands below, 4 finds 99.3 % of the near duplicates of BANKING77 with 17
#: candidates a record, 3 finds 99.9 % with 37, 5 finds 97.7 % with 12.
SHINGLE = 4

#: The signature: `BANDS` bands of `ROWS` hash values.
BANDS = 32
ROWS = 4

#: Neighbours that a record of a large bucket is compared with.
WINDOW = 32

#: Pairs that are read and compared at most, those that agree in most bands first: about a minute of work.
MOST_COMPARISONS = 500_000

#: Bytes of text that candidates may take on the disk while they are compared.
MOST_BYTES = 2 * 2**30

#: A prompt with more different answers than this is an instruction, not a question.
COMMON_PROMPT = 10

#: Duplicates are a warning from this share of superfluous records in a training split on, below it a note.
NOTABLE_SHARE = 0.001

#: Findings of one kind; records listed with one finding; records listed with all findings of a kind.
MOST_FINDINGS = 10_000
MOST_RECORDS = 10_000
MOST_LISTED = 100_000

Hashes = NDArray[np.uint64]
Indices = NDArray[np.int64]

_KINDS = frozenset(("exact_duplicate", "near_duplicate", "leak", "label_conflict"))
_SEED = 42
# Characters hashed at once: arrays of 2 MB stay near the processor, and a book is signed in pieces.
_PIECE = 2**18
# Odd multipliers of splitmix64 (Steele, Lea, Flood 2014) and xxHash64, one for each character of a shingle or value of a band.
_FACTORS = tuple(np.uint64(factor) for factor in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0xC2B2AE3D27D4EB4F))
# Bytes of text held while candidates are compared; their words take up to twenty times as much.
_MOST_HELD = 4 * 2**20
# Labels told in the words of a finding.
_TOLD_ANSWERS = 4


# ---- one record -----------------------------------------------------------------------------------------------------


def left_out() -> dict[str, str]:
    """Checks that cannot be made with the packages installed, and why."""
    missing = [package for package in ("rensa", "rapidfuzz") if find_spec(package) is None]
    if not missing:
        return {}
    are = "is" if len(missing) == 1 else "are"
    reason = f"{' and '.join(missing)} {are} not installed (pip install 'fullrank[data]')"
    return {"near_duplicate": reason, "leak": f"found for equal records and prompts only, not for nearly the same: {reason}"}


def sign(subjects: Sequence[Subject], *, near: bool = True) -> dict[str, NDArray[Any]]:
    """What the relational checks keep of N records.

    Args:
        near: whether near duplicates are looked for.

    Returns:
        `raw`, `exact`: uint64 (N), hashes of all texts of a record as written, and in normal form; `prompt`: uint64 (N), hash of
        the prompt in normal form, 0 where there is none; `answer`: uint64 (N), hash of the answer in normal form; `answer_words`:
        uint16 (N), at most 65,535; `bands`: uint32 (BANDS, N), left out where rensa is not installed
        and where near duplicates are not looked for.
    """
    count = len(subjects)
    columns: dict[str, NDArray[Any]] = {name: np.zeros(count, dtype=np.uint64) for name in ("raw", "exact", "prompt", "answer")}
    columns["answer_words"] = np.zeros(count, dtype=np.uint16)
    signed = []
    for number, subject in enumerate(subjects):
        normal = [normalise(part.text) for part in subject.parts]
        known = {part.text: text for part, text in zip(subject.parts, normal, strict=True)}
        columns["raw"][number] = _hash("\x1e".join(part.text for part in subject.parts))
        columns["exact"][number] = _hash("\x1e".join(normal))
        if subject.prompt.strip():
            columns["prompt"][number] = _hash(known.get(subject.prompt) or normalise(subject.prompt))
        columns["answer"][number] = _hash(known.get(subject.answer) or normalise(subject.answer))
        columns["answer_words"][number] = min(len(words(subject.answer)), np.iinfo(np.uint16).max)
        own = (text for part, text in zip(subject.parts, normal, strict=True) if part.role not in ("system", "developer"))
        signed.append(" ".join(own) or " ")
    if near and find_spec("rensa") is not None:
        columns["bands"] = _bands(signed)
    return columns


def _hash(text: str) -> int:
    """64 bits of BLAKE2b, never 0."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little") or 1


def _bands(texts: Sequence[str]) -> NDArray[np.uint32]:
    """The values of the bands: uint32 (BANDS, texts)."""
    signatures = np.full((len(texts), BANDS * ROWS), np.iinfo(np.uint32).max, dtype=np.uint32)
    for owners, pieces in _pieces(texts):
        # The minimum over a text is the minimum over its pieces.
        signatures[owners] = np.minimum(signatures[owners], _signatures(pieces))
    values = signatures.reshape(len(texts), BANDS, ROWS)
    folded = np.zeros((len(texts), BANDS), dtype=np.uint64)
    for row in range(ROWS):
        folded = (folded + values[:, :, row]) * _FACTORS[row]
        folded ^= folded >> np.uint64(32)
    return np.ascontiguousarray((folded >> np.uint64(32)).astype(np.uint32).T)


def _pieces(texts: Sequence[str]) -> Iterator[tuple[list[int], list[str]]]:
    """Texts in batches of about `_PIECE` characters, with their numbers, each of which occurs once in a batch."""
    owners: list[int] = []
    batch: list[str] = []
    room = _PIECE
    for number, text in enumerate(texts):
        # A piece ends with the characters that the next begins with, so that every shingle is in one of them.
        for start in range(0, max(len(text) - SHINGLE + 1, 1), _PIECE):
            piece = text[start : start + _PIECE + SHINGLE - 1].ljust(SHINGLE, "\0")
            if batch and len(piece) > room:
                yield owners, batch
                owners, batch, room = [], [], _PIECE
            owners.append(number)
            batch.append(piece)
            room -= len(piece)
    if batch:
        yield owners, batch


def _signatures(texts: Sequence[str]) -> NDArray[np.uint32]:
    """MinHash signatures over shingles of characters: uint32 (texts, BANDS * ROWS); every text holds one at least."""
    from rensa import RMinHash

    characters = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), dtype="<u4").astype(np.uint64)
    count = len(characters) - SHINGLE + 1
    shingles = np.zeros(count, dtype=np.uint64)
    for place in range(SHINGLE):
        shingles += characters[place : place + count] * _FACTORS[place]
    shingles ^= shingles >> np.uint64(31)
    shingles *= _FACTORS[0]
    shingles ^= shingles >> np.uint64(32)
    # Those that begin with the last characters of a text reach into the next.
    ends = np.cumsum([len(text) for text in texts])
    own = np.ones(len(characters), dtype=bool)
    own[(ends[:, None] - np.arange(1, SHINGLE)).ravel()] = False
    offsets = np.append(0, ends - (SHINGLE - 1) * np.arange(1, len(texts) + 1)).astype(np.uint64)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(shingles[own[:count]], offsets, BANDS * ROWS, _SEED)
    return np.array(matrix.to_rows(), dtype=np.uint32)


# ---- all records ----------------------------------------------------------------------------------------------------


class Leaks:
    """Which records were told to be leaks of one another."""

    def __init__(self, starts: dict[str, int], roots: NDArray[np.int32]) -> None:
        self._starts = starts
        self._roots = roots

    def group(self, split: str, records: Indices) -> NDArray[np.int32]:
        """The number of each record's group: (records). Records of one group have one number, others a number of their own."""
        return self._roots[self._starts[split] + records]


@dataclass(frozen=True)
class Conclusion:
    """What the relational checks found."""

    findings: list[Finding]
    sampled: dict[str, str]
    """Kinds for which not every candidate was compared, and which were."""
    leaks: Leaks


def conclude(splits: Sequence[SplitFacts], *, skip: frozenset[str] = frozenset(), scratch: Path | None = None) -> Conclusion:
    """Duplicates, near duplicates, leaks and contradictions over all splits.

    Args:
        splits: train first, then validation, then test sets; their columns are those of `sign`.
        skip: kinds that are not looked for.
        scratch: folder for the texts of candidates while they are compared; that of temporary files where none is given.
    """
    corpus = _Corpus(splits)
    wanted = _KINDS - skip
    within, across = "near_duplicate" in wanted, "leak" in wanted and len(set(corpus.ranks.tolist())) > 1
    near, leaks = Sets(corpus.total), Sets(corpus.total)
    if not corpus.total:
        return Conclusion([], {}, Leaks(corpus.start_of, leaks.roots()))
    prompts = _same_prompts(corpus.column("prompt"), corpus.column("answer"))
    if across:
        leaks.join_groups(corpus.crossing(groups_of(corpus.column("exact"))))
        leaks.join_groups(corpus.crossing(prompts.groups.select(prompts.answers <= COMMON_PROMPT)))
    conflicts = prompts.select((prompts.answers >= 2) & ("label_conflict" in wanted))
    is_label = corpus.column("answer_words") <= LABEL_WORDS
    sampled: dict[str, str] = {}
    notes: list[str] = []
    pairs = np.empty((0, 2), dtype=np.int64)
    comparable = not left_out()
    if comparable and (within or across):
        pairs, notes = _candidates(corpus, within=within, across=across)
    doubtful = _doubtful(conflicts, is_label) if comparable else np.empty(0, dtype=np.int64)
    affordable = np.cumsum(conflicts.answers[doubtful] * (conflicts.answers[doubtful] - 1) // 2) <= MOST_COMPARISONS // 4
    if not affordable.all():
        doubtful = doubtful[affordable]
        sampled["label_conflict"] = f"long answers were compared for {len(doubtful):,} prompts, those to others may be alike"
    read = [pairs.ravel(), conflicts.first_answers(doubtful, COMMON_PROMPT), _told(conflicts, is_label)]
    with _Texts(corpus, _ascending(np.concatenate(read)), scratch) as texts:
        contradict = np.ones(len(conflicts.answers), dtype=bool)
        for number in doubtful.tolist():
            answers = conflicts.first_answers(np.array([number]), COMMON_PROMPT)
            contradict[number] = not _agree(answers, corpus, texts, near)
        for a, b in _in_turn(pairs):
            sets = leaks if corpus.splits_differ(a, b) else near
            if not sets.joined(a, b) and texts.same(a, b):
                sets.join(a, b)
        if texts.unread:
            notes.append(
                f"{texts.unread:,} candidates were not compared, since the others' texts take {MOST_BYTES / 2**30:.0f} GiB"
            )
        if notes:
            sampled |= {kind: "; ".join(notes) for kind, asked in (("near_duplicate", within), ("leak", across)) if asked}
        findings = [
            *(_exact_duplicates(corpus) if "exact_duplicate" in wanted else ()),
            *(_near_duplicates(corpus, near) if within else ()),
            *(_leaks(corpus, leaks) if across else ()),
            *_conflicts(corpus, conflicts.select(contradict), is_label, texts),
        ]
    return Conclusion(findings, sampled, Leaks(corpus.start_of, leaks.roots()))


class _Corpus:
    """The splits, one after another: the number of a record counts through all of them."""

    def __init__(self, splits: Sequence[SplitFacts]) -> None:
        self.splits = splits
        self.starts = np.cumsum([0, *(len(split) for split in splits)]).astype(np.int64)
        self.start_of = {split.name: int(start) for split, start in zip(splits, self.starts, strict=False)}
        self.total = int(self.starts[-1])
        self._bounds: list[int] = self.starts.tolist()
        self.ranks = np.array([2 if split.is_test else int(split.name != "train") for split in splits], dtype=np.int8)
        """0 for training, 1 for validation, 2 for test sets: a record in two ranks is a leak."""

    def column(self, name: str) -> NDArray[Any]:
        return _joined([np.asarray(split.column(name)) for split in self.splits])

    def row(self, number: int) -> NDArray[np.uint32]:
        return _joined([np.asarray(split.row("bands", number)) for split in self.splits])

    def split_numbers(self, records: Indices) -> Indices:
        return np.searchsorted(self.starts, records, side="right") - 1

    def splits_differ(self, a: int, b: int) -> bool:
        return bisect_right(self._bounds, a) != bisect_right(self._bounds, b)

    def crossing(self, groups: Groups) -> Groups:
        """The groups whose members are of more than one rank."""
        if not len(groups):
            return groups
        ranks = self.ranks[self.split_numbers(groups.members)]
        return groups.select(np.minimum.reduceat(ranks, groups.bounds[:-1]) != np.maximum.reduceat(ranks, groups.bounds[:-1]))

    def place(self, record: int) -> Place:
        split = bisect_right(self._bounds, record) - 1
        return self.splits[split].place(record - self._bounds[split])

    def subjects(self, records: Indices) -> Iterator[Subject]:
        """Records read again; `records` ascends."""
        owners = self.split_numbers(records)
        for number, split in enumerate(self.splits):
            own = records[owners == number] - self.starts[number]
            if len(own):
                yield from split.subjects(own.tolist())


def _joined(parts: list[NDArray[Any]]) -> NDArray[Any]:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


class Groups(NamedTuple):
    """Sets of two records or more."""

    members: Indices
    """Records, group after group."""
    bounds: Indices
    """Where each group begins, and the end of the last: (groups + 1)."""

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def sizes(self) -> Indices:
        return np.diff(self.bounds)

    def group(self, number: int) -> Indices:
        return self.members[self.bounds[number] : self.bounds[number + 1]]

    def first(self) -> Indices:
        """The least member of each group: (groups)."""
        return np.minimum.reduceat(self.members, self.bounds[:-1]) if len(self) else self.bounds[:0]

    def select(self, which: NDArray[np.bool_]) -> Groups:
        """The groups for which `which` (groups) is true."""
        sizes = self.sizes()
        return Groups(self.members[np.repeat(which, sizes)], np.concatenate(([0], np.cumsum(sizes[which]))))


def groups_of(keys: NDArray[Any]) -> Groups:
    """Records that have a key in common: keys (N)."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    as_before = np.zeros(len(keys) + 1, dtype=bool)
    as_before[1:-1] = ordered[1:] == ordered[:-1]
    shared = as_before[1:] | as_before[:-1]
    begins = np.flatnonzero(~as_before[:-1][shared])
    return Groups(order[shared], np.append(begins, np.count_nonzero(shared)))


class Sets:
    """Disjoint sets of records, joined pair by pair (union-find with path halving, Tarjan and van Leeuwen 1984)."""

    def __init__(self, count: int) -> None:
        self._parents = array("i")
        self._parents.frombytes(np.arange(count, dtype=np.int32).tobytes())

    def _root(self, record: int) -> int:
        parents = self._parents
        while parents[record] != record:
            parents[record] = record = parents[parents[record]]
        return record

    def joined(self, a: int, b: int) -> bool:
        return self._root(a) == self._root(b)

    def join(self, a: int, b: int) -> None:
        a, b = self._root(a), self._root(b)
        self._parents[max(a, b)] = min(a, b)

    def join_groups(self, groups: Groups) -> None:
        for number in range(len(groups)):
            first, *others = groups.group(number).tolist()
            for other in others:
                self.join(first, other)

    def roots(self) -> NDArray[np.int32]:
        """The first record of each record's set: (count)."""
        roots = np.array(self._parents, dtype=np.int32)
        while not np.array_equal(above := roots[roots], roots):
            roots = above
        return roots


# ---- one prompt, several answers ------------------------------------------------------------------------------------


class _Prompts(NamedTuple):
    """Records with one prompt, those with one answer side by side."""

    groups: Groups
    begins: NDArray[np.bool_]
    """Whether a member is the first with its answer: (members)."""
    answers: Indices
    """Different answers in each group: (groups)."""

    def select(self, which: NDArray[np.bool_]) -> _Prompts:
        return _Prompts(self.groups.select(which), self.begins[np.repeat(which, self.groups.sizes())], self.answers[which])

    def first_answers(self, numbers: Indices, most: int) -> Indices:
        """The first record with each answer, `most` of them in each of the groups `numbers`."""
        bounds = self.groups.bounds
        found = [np.flatnonzero(self.begins[bounds[n] : bounds[n + 1]])[:most] + bounds[n] for n in numbers.tolist()]
        return self.groups.members[np.concatenate(found)] if found else np.empty(0, dtype=np.int64)


def _same_prompts(prompt: Hashes, answer: Hashes) -> _Prompts:
    groups = groups_of(prompt)
    if len(groups):
        groups = groups.select(prompt[groups.members[groups.bounds[:-1]]] != 0)
    if not len(groups):
        return _Prompts(groups, np.empty(0, dtype=bool), np.empty(0, dtype=np.int64))
    owners = np.repeat(np.arange(len(groups)), groups.sizes())
    members = groups.members[np.lexsort((groups.members, answer[groups.members], owners))]
    answers = answer[members]
    begins = np.concatenate(([True], (answers[1:] != answers[:-1]) | (owners[1:] != owners[:-1])))
    return _Prompts(Groups(members, groups.bounds), begins, np.add.reduceat(begins.astype(np.int64), groups.bounds[:-1]))


def _doubtful(conflicts: _Prompts, is_label: NDArray[np.bool_]) -> Indices:
    """Groups whose answers may be nearly the same: all of them longer than labels, and not too many to compare."""
    if not len(conflicts.groups):
        return np.empty(0, dtype=np.int64)
    any_label = np.logical_or.reduceat(is_label[conflicts.groups.members], conflicts.groups.bounds[:-1])
    return np.flatnonzero(~any_label & (conflicts.answers <= COMMON_PROMPT))


def _told(conflicts: _Prompts, is_label: NDArray[np.bool_]) -> Indices:
    """Records whose labels are told in findings."""
    if not len(conflicts.groups):
        return np.empty(0, dtype=np.int64)
    all_labels = np.logical_and.reduceat(is_label[conflicts.groups.members], conflicts.groups.bounds[:-1])
    return conflicts.first_answers(np.flatnonzero(all_labels)[:MOST_FINDINGS], _TOLD_ANSWERS)


def _agree(records: Indices, corpus: _Corpus, texts: _Texts, near: Sets) -> bool:
    """Whether answers to one prompt are all nearly the same; those that are make their records nearly the same."""
    agreeing = Sets(len(records))
    for i, a in enumerate(records.tolist()):
        for j, b in enumerate(records[:i].tolist()):
            if texts.same(a, b):
                agreeing.join(i, j)
                if not corpus.splits_differ(a, b):
                    near.join(a, b)
    return not agreeing.roots().any()


# ---- candidates and their texts -------------------------------------------------------------------------------------


def _candidates(corpus: _Corpus, *, within: bool, across: bool) -> tuple[Indices, list[str]]:
    """Pairs that may be nearly the same, ascending: (pairs, 2); and, in words, what was not looked at.

    Pairs within one split and pairs across ranks, as asked for. One record of each set of equal ones in a split stands for all.
    """
    exact = corpus.column("exact")
    spans = zip(corpus.starts[:-1].tolist(), corpus.starts[1:].tolist(), strict=True)
    firsts = [begin + np.unique(exact[begin:end], return_index=True)[1].astype(np.int32) for begin, end in spans]
    records = np.sort(np.concatenate(firsts))
    # Half of a hash is enough to tell which of two records comes first, or that two labels differ.
    tie = exact[records].astype(np.uint32)
    del exact, firsts
    answer = corpus.column("answer")[records].astype(np.uint32)
    with_prompt = corpus.column("prompt")[records] != 0
    is_label = (corpus.column("answer_words")[records] <= LABEL_WORDS) & with_prompt
    split = np.repeat(np.arange(len(corpus.splits), dtype=np.int16), np.diff(corpus.starts))[records]
    ranks = corpus.ranks[split]

    def promising(a: Indices, b: Indices) -> NDArray[np.bool_]:
        asked_for = ((split[a] == split[b]) & within) | ((ranks[a] != ranks[b]) & across)
        # A label that differs settles it, and so does a prompt that only one of the two has.
        settled = ((is_label[a] | is_label[b]) & (answer[a] != answer[b])) | (with_prompt[a] != with_prompt[b])
        chosen: NDArray[np.bool_] = asked_for & ~settled & (tie[a] != tie[b])
        return chosen

    # The band in turn and the two after it, by which large buckets are sorted.
    bands = [corpus.row(number)[records] for number in range(3)]
    found, crowd = _row_pairs(bands, tie, promising, successive=False)
    successive = len(found) * BANDS > 4 * MOST_COMPARISONS
    keys, counts, dropped = np.empty(0, dtype=np.uint64), np.empty(0, dtype=np.uint8), 0
    crowded = np.zeros(len(records), dtype=np.uint8)
    for number in range(BANDS):
        if number or successive:
            found, crowd = _row_pairs(bands, tie, promising, successive=successive)
        crowded[crowd] += 1
        keys, counts = _merged(keys, counts, found)
        # While bands are still to come, more is kept than will be compared: agreements add up.
        most = MOST_COMPARISONS * (2 if number < BANDS - 1 else 1)
        if len(keys) > most:
            dropped += len(keys) - most
            kept = _most_agreeing(keys, counts, most, split)
            keys, counts = keys[kept], counts[kept]
        bands = [*bands[1:], corpus.row((number + 3) % BANDS)[records]]
    notes = []
    if successive:
        notes.append("pairs had to agree in two successive bands: those that share three quarters of their shingles do")
    # In the other bands such a record had its chance.
    if often := int(np.count_nonzero(crowded > BANDS // 2)):
        notes.append(f"{often:,} records have more than {WINDOW} like them: each was compared with {WINDOW} of those in a band")
    if dropped:
        notes.append(f"the {MOST_COMPARISONS:,} most promising pairs were compared, {dropped:,} others were not")
    pairs = np.stack([keys >> np.uint64(32), keys & np.uint64(2**32 - 1)], axis=1).astype(np.int64)
    return records[pairs].astype(np.int64), notes


def _row_pairs(
    bands: Sequence[NDArray[np.uint32]],
    tie: NDArray[np.uint32],
    promising: Callable[[Indices, Indices], NDArray[np.bool_]],
    *,
    successive: bool,
) -> tuple[Hashes, Indices]:
    """Pairs that agree in the first of some bands, or in the first two.

    Args:
        bands: values of the band in turn and of the two after it, each (N).
        tie: what settles the order of records that agree in all of these (N).
        promising: which of some pairs are worth a comparison.
        successive: whether the first two bands must agree.

    Returns:
        Pairs as smaller number * 2^32 + larger, ascending; and the records in buckets too large to be compared in full.
    """
    values = bands[0].astype(np.uint64) << np.uint64(32) | bands[1] if successive else bands[0]
    buckets = groups_of(values)
    members, sizes = buckets.members, buckets.sizes()
    owners = np.repeat(np.arange(len(buckets), dtype=np.int32), sizes)
    large = np.repeat(sizes > WINDOW + 1, sizes)
    crowd = members[large]
    if len(crowd):
        members[large] = crowd[np.lexsort((tie[crowd], bands[2][crowd], bands[1][crowd], owners[large]))]
    found: list[Hashes] = []
    room = MOST_COMPARISONS
    first = np.arange(len(members), dtype=np.int32)
    for distance in range(1, WINDOW + 1):
        first = first[: np.searchsorted(first, len(members) - distance)]
        first = first[owners[first] == owners[first + distance]]
        if not len(first) or room < 0:
            break
        a, b = members[first], members[first + distance]
        chosen = promising(a, b)
        low, high = np.minimum(a, b)[chosen].astype(np.uint64), np.maximum(a, b)[chosen].astype(np.uint64)
        found.append(low << np.uint64(32) | high)
        room -= len(low)
    return (_ascending(np.concatenate(found)) if found else np.empty(0, dtype=np.uint64)), crowd


def _ascending(values: NDArray[Any]) -> NDArray[Any]:
    """Different values in ascending order (`np.unique` goes by hash tables, which take several times as long here)."""
    values = np.sort(values)
    return values[np.append(True, values[1:] != values[:-1])] if len(values) else values


def _merged(keys: Hashes, counts: NDArray[np.uint8], found: Hashes) -> tuple[Hashes, NDArray[np.uint8]]:
    """Pairs and the number of bands they agree in, with those of one more band; all ascending."""
    if not len(keys):
        return found, np.ones(len(found), dtype=np.uint8)
    places = np.minimum(np.searchsorted(keys, found), len(keys) - 1)
    known = keys[places] == found
    counts[places[known]] += 1
    new = found[~known]
    where = np.searchsorted(keys, new)
    return np.insert(keys, where, new), np.insert(counts, where, 1)


def _most_agreeing(keys: Hashes, counts: NDArray[np.uint8], most: int, split: NDArray[np.int16]) -> Indices:
    """Which pairs to keep: those across splits, then those that agree in most bands; ascending."""
    across = split[keys >> np.uint64(32)] != split[keys & np.uint64(2**32 - 1)]
    worth = counts.astype(np.int16) + np.where(across, BANDS, 0).astype(np.int16)
    return np.sort(np.argpartition(-worth, most)[:most])


def _in_turn(pairs: Indices) -> Iterator[tuple[int, int]]:
    """Pairs as numbers of Python's, which take ten times the room: a part of them at a time."""
    for start in range(0, len(pairs), 2**16):
        yield from map(tuple, pairs[start : start + 2**16].tolist())


class _Texts:
    """The texts of candidates: read once from their sources and kept in a temporary file, since they may not fit into memory."""

    def __init__(self, corpus: _Corpus, records: Indices, scratch: Path | None) -> None:
        self._file = tempfile.TemporaryFile(dir=scratch)  # noqa: SIM115 (closed on exit)
        self._bounds = np.zeros(2 * len(records) + 1, dtype=np.int64)
        self._faces: dict[int, Face] = {}
        self._held = 0
        known = end = 0
        for subject in corpus.subjects(records):
            if end > MOST_BYTES:
                break
            for bound, text in enumerate((subject.prompt, subject.answer), 2 * known + 1):
                end += self._file.write(text.encode("utf-8", "surrogatepass"))
                self._bounds[bound] = end
            known += 1
        self._records = records[:known]
        self.unread = len(records) - known
        """Records whose texts were not read, since the file had reached its size."""

    def __enter__(self) -> _Texts:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def face(self, record: int) -> Face | None:
        """A record as it is compared; None for one that was not read."""
        if (known := self._faces.get(record)) is not None:
            return known
        number = int(np.searchsorted(self._records, record))
        if number == len(self._records) or self._records[number] != record:
            return None
        begin, middle, end = self._bounds[2 * number : 2 * number + 3].tolist()
        self._file.seek(begin)
        prompt, answer = (self._file.read(size).decode("utf-8", "surrogatepass") for size in (middle - begin, end - middle))
        self._held += end - begin
        if self._held > _MOST_HELD:
            self._faces, self._held = {}, end - begin
        self._faces[record] = face = Face(prompt, answer)
        return face

    def same(self, a: int, b: int) -> bool:
        """Whether two records are nearly the same; False where one was not read."""
        first, second = self.face(a), self.face(b)
        return first is not None and second is not None and nearly_same(first, second)


# ---- findings -------------------------------------------------------------------------------------------------------


#: The number of a group and its members, ascending -> what was found, what to do.
Describe = Callable[[int, Indices], tuple[str, str]]


class Batch(NamedTuple):
    """Groups of one severity, and the words for them."""

    severity: Severity
    groups: Groups
    describe: Describe


def tell(kind: str, batches: Iterable[Batch], place: Callable[[int], Place]) -> list[Finding]:
    """One finding for each group, in the order of their first members.

    Of more than `MOST_FINDINGS` groups the largest are told, and the others in one finding a batch. Where more than `MOST_LISTED`
    records are concerned, each finding lists its share of them; `count` is always the true number.
    """
    batches = [batch for batch in batches if len(batch.groups)]
    groups = sum(len(batch.groups) for batch in batches)
    records = sum(len(batch.groups.members) for batch in batches)
    listed = MOST_RECORDS if records <= MOST_LISTED else max(2, MOST_LISTED // min(groups, MOST_FINDINGS))
    room = MOST_FINDINGS
    findings = []
    for left, (severity, found, describe) in zip(range(len(batches) - 1, -1, -1), batches, strict=True):
        largest = np.argsort(-found.sizes(), kind="stable")
        # Every batch still to come has room for one finding at least.
        room -= left
        told, others = (largest, largest[:0]) if len(found) <= room else (largest[: room - 1], largest[room - 1 :])
        room += left - min(len(found), room)
        for number in told[np.argsort(found.first()[told], kind="stable")].tolist():
            members = np.sort(found.group(number))
            what, advice = describe(number, members)
            # Of too many the last is listed, too: of a leak, what it leaked into.
            ends = members if len(members) <= listed else np.append(members[: listed - 1], members[-1])
            places = [place(record) for record in ends.tolist()]
            findings.append(Finding(kind=kind, severity=severity, what=what, records=places, count=len(members), advice=advice))
        if len(others):
            rest = np.zeros(len(found), dtype=bool)
            rest[others] = True
            members = np.sort(found.select(rest).members)
            number = int(others[0])
            advice = describe(number, np.sort(found.group(number)))[1]
            what = f"{len(others):,} more groups of this kind"
            places = [place(record) for record in members[:MOST_RECORDS].tolist()]
            findings.append(Finding(kind=kind, severity=severity, what=what, records=places, count=len(members), advice=advice))
    return findings


def _by_split(corpus: _Corpus, groups: Groups, describe: Describe) -> list[Batch]:
    """Duplicates within splits: a warning where training repeats a notable share of its records, a note elsewhere."""
    owners = corpus.split_numbers(groups.first())
    batches = []
    for number in sorted(set(owners.tolist())):
        own = groups.select(owners == number)
        superfluous = len(own.members) - len(own)
        notable = corpus.ranks[number] == 0 and superfluous >= NOTABLE_SHARE * len(corpus.splits[number])
        batches.append(Batch("warning" if notable else "note", own, describe))
    return batches


def _exact_duplicates(corpus: _Corpus) -> list[Finding]:
    exact, raw = corpus.column("exact"), corpus.column("raw")

    def describe(_: int, members: Indices) -> tuple[str, str]:
        but = " but for case, spacing or punctuation" if len(set(raw[members].tolist())) > 1 else ""
        what = f"{len(members):,} records are the same{but}"
        return what, "keep one of them, unless it is meant to be learned more often than others"

    batches = []
    for begin, end in zip(corpus.starts[:-1].tolist(), corpus.starts[1:].tolist(), strict=True):
        groups = groups_of(exact[begin:end])
        batches += _by_split(corpus, Groups(groups.members + begin, groups.bounds), describe)
    return tell("exact_duplicate", batches, corpus.place)


def _near_duplicates(corpus: _Corpus, near: Sets) -> list[Finding]:
    def describe(_: int, members: Indices) -> tuple[str, str]:
        what = f"{len(members):,} records are nearly the same: a few words or letters differ"
        return what, "compare them and keep the best, unless the variation is meant"

    return tell("near_duplicate", _by_split(corpus, groups_of(near.roots()), describe), corpus.place)


def _leaks(corpus: _Corpus, leaks: Sets) -> list[Finding]:
    exact, prompt = corpus.column("exact"), corpus.column("prompt")

    def describe(_: int, members: Indices) -> tuple[str, str]:
        owners = corpus.split_numbers(members)
        names = [corpus.splits[number].name for number in sorted(set(owners.tolist()))]
        ranks = corpus.ranks[owners]
        if _shared(exact[members], ranks):
            common = "the same record"
        elif _shared(prompt[members], ranks):
            common = "the same prompt"
        else:
            common = "nearly the same record"
        what = f"{common} stands in {', '.join(names[:-1])} and {names[-1]}"
        return what, f"remove it from {names[0]}: a score on what was learned by heart says nothing about new cases"

    return tell("leak", [Batch("error", groups_of(leaks.roots()), describe)], corpus.place)


def _shared(keys: Hashes, ranks: NDArray[np.int8]) -> bool:
    """Whether one key, 0 aside, occurs in two ranks."""
    known: dict[int, int] = {}
    return any(key and known.setdefault(key, rank) != rank for key, rank in zip(keys.tolist(), ranks.tolist(), strict=True))


def _conflicts(corpus: _Corpus, conflicts: _Prompts, is_label: NDArray[np.bool_], texts: _Texts) -> list[Finding]:
    if not len(conflicts.groups):
        return []
    all_labels = np.logical_and.reduceat(is_label[conflicts.groups.members], conflicts.groups.bounds[:-1])
    labels, others = conflicts.select(all_labels), conflicts.select(~all_labels)

    def contradiction(number: int, _: Indices) -> tuple[str, str]:
        firsts = labels.first_answers(np.array([number]), _TOLD_ANSWERS)
        answers_told = [face.answer for record in firsts.tolist() if (face := texts.face(record)) is not None]
        told = [" ".join(without_secrets(answer).split()) for answer in answers_told]
        answers = int(labels.answers[number])
        what = f"one prompt has {answers:,} different answers: {', '.join(told)}{', ...' if answers > len(told) else ''}"
        return what, "decide which answer is right, and correct or remove the others: as it is the model can only learn to guess"

    def variety(number: int, _: Indices) -> tuple[str, str]:
        what = f"one prompt has {int(others.answers[number]):,} different answers"
        return what, "keep them if all are good answers; where they contradict one another, correct or remove the wrong ones"

    batches = [Batch("warning", labels.groups, contradiction), Batch("note", others.groups, variety)]
    return tell("label_conflict", batches, corpus.place)
