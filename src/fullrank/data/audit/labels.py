"""Labels: whether the answers are labels, how evenly they are spread, and different spellings of one label.

A labelling task is told from its answers: at least four fifths of them are short lines that come back five times or more. Only
then is anything said here. Two spellings are one label where they differ in nothing but case, white space, joining marks, quotes
or a final stop; and where the rarer is a slip of the pen away from the commoner (`misspelt` has the rule). Digits, signs, added
words and contrasting prefixes (import, export) always make another label. Which label is right for a record is not judged.

Promises: an answer is compared as it was written, to the last space; records are found by the hash of their exact answer, so
millions of them take one column of eight bytes each. Does not see: synonyms, labels inside long answers of free text, several
labels in one answer.
"""

from __future__ import annotations

import difflib
import hashlib
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import TypedDict

import numpy as np

from fullrank.data.audit.finding import SplitFacts
from fullrank.data.subject import Subject
from fullrank.records import Finding, Place, Severity
from fullrank.units import plural

#: Longest answer, in characters, that may be a label: BANKING77's longest has 49, and a sentence rarely has fewer than 64.
LONGEST_LABEL = 64

#: More distinct short answers than this in one shard are no label set; the largest in common use have about a thousand classes.
MOST_DISTINCT = 2_000

#: Fewer answers say nothing about being labels.
FEWEST_ANSWERS = 20

#: An answer that comes back this often is repeated on purpose.
REPEATED = 5

#: Share of answers that must be repeated for the data to be a labelling task; the rest is what the audit is here to find.
COVERED = 0.8

#: Numbers that come back are labels (stars, classes) up to this many of them, results of a calculation beyond.
MOST_NUMBERS = 20

#: What stands in the column of hashes for an answer that is too long for a label, and for raw text.
_LONG, _RAW = 0, 1

#: Records of a mapped column that are looked at at a time.
_BLOCK = 1_000_000

#: Entries listed in one finding.
_MOST_RECORDS = 10_000

#: Spellings shown in one finding's line.
_MOST_SHOWN = 4


class ShortAnswers(TypedDict):
    """Short answers of some records, as JSON keeps them."""

    answered: int
    """Records with an answer: all but raw text."""
    counts: dict[str, int] | None
    """Exact answer of one short line -> how many records have it; None where there were too many to be labels."""


# ---- in the worker --------------------------------------------------------------------------------------------------


def facts(subjects: Sequence[Subject]) -> dict[str, np.ndarray]:
    """`label`, uint64_N: the hash of a short answer as written; 0 for longer ones, 1 for raw text."""
    return {"label": np.fromiter(map(_label, subjects), dtype=np.uint64, count=len(subjects))}


def _label(subject: Subject) -> int:
    text = _short(subject)
    return label_hash(text) if text is not None else _LONG if _is_answer(subject) else _RAW


def short_answers(subjects: Iterable[Subject]) -> ShortAnswers:
    """The short answers of one shard, counted; given up (None) at more than `MOST_DISTINCT` distinct ones."""
    answered = 0
    counts: Counter[str] | None = Counter()
    for subject in subjects:
        if not _is_answer(subject):
            continue
        answered += 1
        text = _short(subject)
        if text is not None and counts is not None:
            counts[text] += 1
            if len(counts) > MOST_DISTINCT:
                counts = None
    return {"answered": answered, "counts": None if counts is None else dict(counts)}


def label_hash(text: str) -> int:
    """64 bits of BLAKE2b over the text; never one of the two numbers that stand for no label."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return max(int.from_bytes(digest, "little"), _RAW + 1)


def _is_answer(subject: Subject) -> bool:
    return all(part.role != "document" for part in subject.parts)


def _short(subject: Subject) -> str | None:
    text = subject.answer
    if len(text) > LONGEST_LABEL or "\n" in text.strip() or not text.strip() or not _is_answer(subject):
        return None
    return text


# ---- in the parent --------------------------------------------------------------------------------------------------


def gather(shards: Iterable[ShortAnswers], column: np.ndarray | None = None) -> ShortAnswers:
    """The short answers of a split from those of its shards, with the same end to patience for the sum.

    Args:
        shards: of every shard that has records of the split.
        column: `label` of the split's records, uint64_N: what is counted, since shards also have records of other splits, and
            records that were dropped. Without it everything in the shards counts.
    """
    answered = 0
    counts: Counter[str] | None = Counter()
    for shard in shards:
        answered += shard["answered"]
        if shard["counts"] is None:
            counts = None
        elif counts is not None:
            counts.update(shard["counts"])
            if len(counts) > 10 * MOST_DISTINCT:  # typing errors add up over shards, labels do not
                counts = None
    if column is not None:
        answered, counts = _recounted(column, counts)
    return {"answered": answered, "counts": None if counts is None else dict(counts)}


def _recounted(column: np.ndarray, texts: Iterable[str] | None) -> tuple[int, Counter[str] | None]:
    """(answers, how many are each of the texts) by the hashes of column_N, a million at a time."""
    text_of = {label_hash(text): text for text in texts or ()}
    answered = 0
    counts: Counter[str] = Counter()
    for start in range(0, len(column), _BLOCK):
        block = np.asarray(column[start : start + _BLOCK])
        answered += int(np.count_nonzero(block != _RAW))
        if text_of:
            values, numbers = np.unique(block, return_counts=True)
            found = zip(values.tolist(), numbers.tolist(), strict=True)
            counts.update({text_of[value]: number for value, number in found if value in text_of})
    return answered, None if texts is None else counts


@dataclass(frozen=True)
class LabelSet:
    """The labels of a labelling task."""

    counts: Mapping[str, int]
    """Label in its commonest spelling -> training records, other spellings of the same label included; commonest first."""
    hashes: frozenset[int]
    """`label_hash` of every spelling of these labels."""


def label_set(train: ShortAnswers) -> LabelSet | None:
    """The labels that training answers consist of; None where the data is no labelling task by the rule above."""
    counts, answered = train["counts"], train["answered"]
    if counts is None or answered < FEWEST_ANSWERS:
        return None
    groups = [Counter(group) for group in _by_label(counts).values()]
    labels = sorted((group for group in groups if group.total() >= REPEATED), key=lambda group: -group.total())
    if not labels or sum(group.total() for group in labels) < COVERED * answered:
        return None
    numbers = sum(bool(re.fullmatch(r"[\W_]*\d[\d\W_]*", _commonest(group))) for group in labels)
    if numbers > max(MOST_NUMBERS, len(labels) / 2) or len(labels) > MOST_DISTINCT:
        return None
    hashes = frozenset(label_hash(spelling) for group in labels for spelling in group)
    return LabelSet({_commonest(group): group.total() for group in labels}, hashes)


def conclude(splits: Sequence[SplitFacts], answers: Mapping[str, ShortAnswers]) -> list[Finding]:
    """What is wrong with the labels: `label_spelling`, `label_balance`, `label_unseen`; nothing where there are none.

    Args:
        splits: train among them; column `label`. At most 10,000 records of each are read again, those whose answers are too long
            for a label while nearly all others are labels.
        answers: split's name -> its gathered short answers.
    """
    known = label_set(answers["train"]) if "train" in answers else None
    if known is None:
        return []
    # A split of another task has other answers; it would only confuse.
    alike = [split for split in splits if split.name == "train" or _same_task(answers[split.name], known)]
    total: Counter[str] = Counter()
    for split in alike:
        total.update(answers[split.name]["counts"] or {})
    groups = _by_label(total)
    embedded = _Embedded(groups)
    inside = {label: of for label, group in groups.items() if (of := embedded.of(label, sum(group.values()))) is not None}
    real = {label: group for label, group in groups.items() if label not in inside}
    return [
        *_spelling(groups, inside, embedded, alike),
        *_balance(real, alike, answers["train"]),
        *_unseen(real, alike, answers),
    ]


def _same_task(answers: ShortAnswers, known: LabelSet) -> bool:
    keys = {_key(label) for label in known.counts}
    counts = answers["counts"] or {}
    seen = sum(count for text, count in counts.items() if _key(text) in keys)
    return answers["answered"] > 0 and seen >= COVERED / 2 * answers["answered"]


# ---- which spellings are one label ----------------------------------------------------------------------------------

#: What joins the words of a label, or dresses it up, and means nothing by itself.
_JOINS = r"\s_\-‐-―./\\,;:|()\[\]{}\"'`´’‘“”«»"
_RUN = re.compile(rf"[{_JOINS}]+")
_DRESS = "\"'`´’‘“”«»()[]{}<>.,;:!?… \t\r\n"


def _set_of(words: str) -> frozenset[str]:
    return frozenset(words.split())


#: Endings and beginnings that turn a word into its counterpart, by the letters in which the two words differ once the rest is
#: taken off. Slips of the pen look the same, so these always count as another label.
_PREFIXES = _set_of(
    """
    a ab ac ad an anti co con de dis down dys em en endo epi ex extra fe hetero homo hyper hypo il im in infra inter intra
    ir macro micro mid mis mono multi non off on out over para peri poly post pre pro re semi sub super trans un under uni
    up
    """
)
_SUFFIXES = (
    ("er", "ee"),
    ("or", "ee"),
    ("ate", "ite"),
    ("ate", "ide"),
    ("ite", "ide"),
    ("ane", "ene"),
    ("ene", "yne"),
    ("ol", "al"),
)

#: Short English words, so that one of them in the place of another is no slip: in_transfer, on_transfer.
_SHORT_WORDS = _set_of(
    """
    a i am an as at be by do go he if in is it me my no of on or so to up us we all and any are bad but can day did end far
    few for get got had has her him his hot how its let low man men mid net new non not now off old one our out own pay per
    pin put red run sad say see set she sum tax ten the too top try two use via was way who why win yes yet you fax tan box
    bus car cat dog
    """
)


@lru_cache(maxsize=100_000)
def _key(text: str) -> str:
    """What all spellings of a label have in common: no case, no joining marks, no dress; digits and signs stay what they are."""
    plain = "".join(c for c in unicodedata.normalize("NFKC", text) if unicodedata.category(c) != "Cf")
    plain = re.sub(r"^\s*(\*+|_+)(.+)\1\s*$", r"\2", plain)  # **label**, as Markdown has it; A* is a mark
    bare = plain.rstrip(_DRESS).lstrip(_DRESS.replace(".", ""))
    bare = bare.lstrip(".") if not re.match(r"\.+\d", bare) else bare
    key = _RUN.sub(lambda run: _joint(bare, run), bare)
    if not key:
        return plain.strip()
    return key if len(key) == 1 else key.casefold()  # of single letters, both cases may be labels


def _joint(text: str, run: re.Match[str]) -> str:
    """What is left of a run of joining marks: nothing, but between or before digits, where it tells numbers apart."""
    before, after = text[: run.start()][-1:], text[run.end() :][:1]
    if not after:
        return "-" if run[0] == "-" else ""  # A- is a mark
    if not after.isdigit():
        return ""
    if before.isdigit():
        return run[0].strip() or " "
    return run[0][-1] if run[0][-1] in "-." and not before.isalpha() else ""


def _words(text: str) -> list[str]:
    """The words of a label: `cardArrival`, `card_arrival` and `Card arrival` have two."""
    spaced = re.sub(r"(?<=[a-z\d])(?=[A-Z])", " ", unicodedata.normalize("NFKC", text).strip(_DRESS))
    return [word for word in _RUN.split(spaced.casefold()) if word]


def _commonest(spellings: Mapping[str, int]) -> str:
    return min(spellings, key=lambda text: (-spellings[text], text))


def _by_label(counts: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """Spellings with their counts, grouped into labels: commonest spelling -> its group."""
    same: defaultdict[str, dict[str, int]] = defaultdict(dict)
    for text, count in counts.items():
        same[_key(text)][text] = count
    totals = {key: sum(group.values()) for key, group in same.items()}
    labels: dict[str, dict[str, int]] = {}
    finder = _Finder()
    # Commonest first: what a rare spelling may be a slip of is there when its turn comes.
    for key in sorted(same, key=lambda key: (-totals[key], key)):
        label = misspelt(key, _commonest(same[key]), totals[key], finder)
        if label is None:
            labels[key] = same[key]
            finder.add(key, _commonest(same[key]), totals[key])
        else:
            labels[label].update(same[key])
    return {_commonest(group): group for group in labels.values()}


class _Finder:
    """Labels taken for real so far, and which of them are within two edits of another spelling."""

    def __init__(self) -> None:
        self.keys: list[str] = []
        self.texts: dict[str, str] = {}
        self.totals: dict[str, int] = {}
        self.words: set[str] = set()
        self._within_two = _near_by_rapidfuzz() or _near_by_difflib

    def add(self, key: str, text: str, total: int) -> None:
        """Takes a label for real where it is repeated."""
        if total >= REPEATED:
            self.keys.append(key)
            self.texts[key] = text
            self.totals[key] = total
            self.words.update(_words(text))

    def near(self, key: str) -> list[tuple[str, int]]:
        """(label's key, edits) of labels within two edits, nearest first."""
        return sorted(self._within_two(key, self.keys), key=lambda item: (item[1], item[0]))

    def edits(self, a: str, b: str) -> int:
        """Edits from one word to another; 3 stands for more than two."""
        return dict(self._within_two(a, [b])).get(b, 3)


def misspelt(key: str, text: str, total: int, real: _Finder) -> str | None:
    """The key of the label that a spelling is a slip of, or None.

    A slip is one or two edits (insertion, deletion, substitution, exchange of neighbours: Damerau 1964 found four fifths of slips
    to be one such edit) from a repeated label, and

    - nearer to it than to any other label, and than that label is to any other: where real labels differ by one letter, one
      letter is no slip;
    - rare: at most a quarter of the label's records, and three or a twentieth of them; if the label is long (several words of
      eleven letters) and every word keeps its first letter, half of the label's records will do;
    - with the same digits and signs, in as many words, each word within one edit (in a long label two; in a short one no other
      first letter), no word turned into its counterpart or into a word that labels use. A plural is always a slip.
    """
    if len(key) == 1:  # a letter in the other case
        other = key.swapcase()
        frequent = real.totals.get(other, 0)
        return other if other != key and frequent >= 4 * total and total <= max(3, frequent / 20) else None
    if len(key) < 3:
        return None
    near = [(label, edits) for label, edits in real.near(key) if label != key]
    if not near:
        return None
    label, edits = near[0]
    frequent = real.totals[label]
    if frequent < 4 * total or total > max(3, frequent / 20):
        # Written wrong in some tool's list of labels, a label is wrong many times over.
        same_letters = [word[0] for word in _words(text)] == [word[0] for word in _words(real.texts[label])]
        if frequent < 2 * total or not same_letters or not _is_long(real.texts[label]):
            return None
    if len(near) > 1 and near[1][1] <= edits:
        return None
    if any(other != label and between <= edits for other, between in real.near(label)):
        return None
    return label if _is_slip(text, real.texts[label], key, label, frequent >= 20 * total, real) else None


def _is_long(label: str) -> bool:
    """Several words of eleven letters or more in all: two such labels are hardly ever within two edits by chance.

    Single words are another matter, however long: names of drugs, species and places crowd together (prednisone, prednisolone).
    """
    words = _words(label)
    return len(words) > 1 and sum(map(len, words)) >= 11


def _is_slip(text: str, real: str, key: str, label: str, dominated: bool, finder: _Finder) -> bool:
    if re.findall(r"\d+|[^\w\s?!]", key) != re.findall(r"\d+|[^\w\s?!]", label):
        return False
    if min(len(key), len(label)) < 5 and not (dominated and _is_gentle(key, label)):
        return False
    ours, theirs = _words(text), _words(real)
    if len(ours) != len(theirs):
        extra, missing = Counter(ours) - Counter(theirs), Counter(theirs) - Counter(ours)
        # A word was broken or two run together; a word only added or left out makes another label.
        return bool(extra) and bool(missing) and not _contrast(key, label)
    changed = [n for n in range(len(ours)) if ours[n] != theirs[n]]
    if all(_is_slipped_word(ours[n], theirs[n], _is_long(real), finder) for n in changed):
        return True
    if len(changed) == 2 and changed[1] == changed[0] + 1 and not any(ours[n] in finder.words for n in changed):
        # The mark between two words slipped by a letter: transactio_ncharged.
        together = [words[changed[0]] + words[changed[1]] for words in (ours, theirs)]
        return _is_slipped_word(together[0], together[1], _is_long(real), finder)
    return False


def _is_slipped_word(word: str, real: str, in_long_label: bool, finder: _Finder) -> bool:
    if word + "s" == real or word == real + "s":
        return True
    if word in finder.words or word in _SHORT_WORDS or _contrast(word, real):
        return False
    short = min(len(word), len(real))
    if short < 2 and (not in_long_label or set(word) <= set("ivx") or set(word) == set(real)):  # II and I, AA and A are ranks
        return False
    edits = finder.edits(word, real)
    if not in_long_label:  # Gambia and Zambia, Austria and Australia
        return edits <= 1 and (word[0] == real[0] or sorted(word) == sorted(real) or len(word) != len(real))
    two_letters_replaced = len(word) == len(real) and sorted(word) != sorted(real)  # cash, card
    return edits <= 1 or (edits == 2 and short >= (7 if word[0] != real[0] else 6 if two_letters_replaced else 3))


def _contrast(a: str, b: str) -> bool:
    """One is the other's counterpart: symptomatic and asymptomatic, increase and decrease, payer and payee."""
    shared = 0
    while shared < min(len(a), len(b)) and a[-1 - shared] == b[-1 - shared]:
        shared += 1
    starts = {a[: len(a) - shared], b[: len(b) - shared]}
    if shared >= 3 and (starts <= _PREFIXES | {""} or starts == {"m", "p"}):  # maternity, paternity
        return True
    return any(
        (a.endswith(one) and b.endswith(two) and a[: -len(one)] == b[: -len(two)])
        or (a.endswith(two) and b.endswith(one) and a[: -len(two)] == b[: -len(one)])
        for one, two in _SUFFIXES
    )


def _is_gentle(a: str, b: str) -> bool:
    """Neighbours exchanged, a letter doubled, a plural: what hardly ever makes another label of three or four letters."""
    if len(a) == len(b):
        different = [n for n in range(len(a)) if a[n] != b[n]]
        return len(different) == 2 and different[1] == different[0] + 1 and a[different[0]] == b[different[1]]
    longer, shorter = (a, b) if len(a) > len(b) else (b, a)
    if len(set(longer)) == 1:  # AA and AAA are ranks
        return False
    return longer == shorter + "s" or any(
        longer[n] == longer[n - 1] and longer[:n] + longer[n + 1 :] == shorter for n in range(1, len(longer))
    )


_Near = Callable[[str, Sequence[str]], list[tuple[str, int]]]


def _near_by_rapidfuzz() -> _Near | None:
    """Exact optimal string alignment distances up to two; None without rapidfuzz."""
    try:
        from rapidfuzz import process
        from rapidfuzz.distance import OSA
    except ImportError:
        return None

    def near(text: str, among: Sequence[str]) -> list[tuple[str, int]]:
        found = process.extract(text, among, scorer=OSA.distance, score_cutoff=2, limit=4)
        return [(label, int(edits)) for label, edits, _ in found]

    return near


def _near_by_difflib(text: str, among: Sequence[str]) -> list[tuple[str, int]]:
    """The same from the standard library: distances may come out too large, so slips are missed but none is made up."""
    found = []
    # Two substitutions in five letters leave a ratio of 0.6.
    for label in difflib.get_close_matches(text, among, n=4, cutoff=0.6):
        if abs(len(label) - len(text)) > 2:
            continue
        different = [n for n in range(min(len(text), len(label))) if text[n] != label[n]]
        codes = difflib.SequenceMatcher(None, text, label, autojunk=False).get_opcodes()
        edits = sum(max(i2 - i1, j2 - j1) for tag, i1, i2, j1, j2 in codes if tag != "equal")
        edits = min(edits, len(different)) if len(text) == len(label) else edits
        if len(text) == len(label) and len(different) == 2 and _is_gentle(text, label):
            edits = 1
        if edits <= 2:
            found.append((label, edits))
    return found


# ---- findings -------------------------------------------------------------------------------------------------------


def _spelling(
    groups: Mapping[str, Mapping[str, int]], inside: Mapping[str, str], embedded: _Embedded, splits: Sequence[SplitFacts]
) -> Iterator[Finding]:
    """One finding for each label that is written in several ways; its records are those that do not follow the commonest."""
    odd: defaultdict[str, dict[str, int]] = defaultdict(dict)
    for label, group in groups.items():
        of = inside.get(label)
        odd[of or label].update({text: count for text, count in group.items() if of or text != label})
    wanted = {label_hash(text): label for label, texts in odd.items() for text in texts}
    places: defaultdict[str, list[Place]] = defaultdict(list)
    long: Counter[str] = Counter()
    for split in splits:
        hashes = split.column("label")
        for record, value in _where(hashes, wanted):
            if len(places[wanted[value]]) < _MOST_RECORDS:
                places[wanted[value]].append(split.place(record))
        without = [int(record) for record in np.flatnonzero(hashes == _LONG)[:_MOST_RECORDS]]
        for record, subject in zip(without, split.subjects(without), strict=True):
            found = embedded.find(subject.answer)[0]
            if found is not None:
                long[found] += 1
                if len(places[found]) < _MOST_RECORDS:
                    places[found].append(split.place(record))
    for label in groups:
        spellings = odd.get(label, {})
        count = sum(spellings.values()) + long[label]
        if not count:
            continue
        shown = [_shown(dict(sorted(spellings.items(), key=lambda item: (-item[1], item[0]))))] if spellings else []
        shown += [f"inside a longer answer ({long[label]:,})"] if long[label] else []
        yield Finding(
            kind="label_spelling",
            severity="warning",
            what=f"the label {label!r} ({groups[label][label]:,} records) is also written {', '.join(shown)}",
            records=places[label],
            count=count,
            advice=f"write {label!r} alone in all of them, unless they are labels of their own",
        )


def is_one_of(hashes: np.ndarray, wanted: Iterable[int]) -> np.ndarray:
    """Which of hashes_N are wanted, bool_N; a million at a time, so that a mapped column is never held whole."""
    ordered = np.array(sorted(wanted), dtype=np.uint64)
    found = np.zeros(len(hashes), dtype=bool)
    for start in range(0, len(hashes) if len(ordered) else 0, _BLOCK):
        block = np.asarray(hashes[start : start + _BLOCK])
        slots = np.minimum(np.searchsorted(ordered, block), len(ordered) - 1)
        found[start : start + len(block)] = ordered[slots] == block
    return found


def _where(hashes: np.ndarray, wanted: Iterable[int]) -> Iterator[tuple[int, int]]:
    """(record, hash) of the records whose hash is wanted; hashes_N."""
    return ((int(record), int(hashes[record])) for record in np.flatnonzero(is_one_of(hashes, wanted)))


class _Embedded:
    """Finds answers that are a label and something more: `card_arrival: the card is late`, `Label: card_arrival`."""

    #: Ends a label whatever comes next.
    _STRONG = re.compile(r"\s*[\n()\[\]{}\"`*<>=|–—]+\s*|[.;!?]+\s+|\s+-+\s+|[:,]\s+")
    #: Opens a label at the end of an answer.
    _OPENERS = re.compile(r"(?:[:=>]|\bis\b|\blabel\b|\banswer\b|\n)\s*", re.IGNORECASE)

    def __init__(self, groups: Mapping[str, Mapping[str, int]]) -> None:
        totals = {label: sum(group.values()) for label, group in groups.items()}
        spaced = sum(total for label, total in totals.items() if re.search(r"\w\s+\w", label))
        self.spaced = spaced > sum(totals.values()) / 10
        """Labels have several words with spaces between: a space after a label does not end it."""
        self.totals = {label: total for label, total in totals.items() if total >= REPEATED}
        self.labels = {_key(label): label for label in self.totals}

    def of(self, group: str, total: int) -> str | None:
        """The label inside a short answer that `total` records have; None for labels of their own."""
        label, rest = self.find(group)
        if label is None or label == group:
            return None
        # `positive (strong)` may be a label where it is repeated; what opens with `Label:` or goes on for a clause is not.
        many = max(REPEATED - 1, self.totals[label] // (4 if not rest or len(rest.split()) >= 3 else 20))
        return label if total <= many and 4 * total <= self.totals[label] else None

    def find(self, answer: str) -> tuple[str | None, str]:
        """The one label that an answer begins or ends with, and what follows it; None where there is none, or several."""
        text = answer.strip()
        first, rest = self._first(text)
        last = self._last(text)
        return (None, "") if first and last and first != last else (first or last, rest)

    def _first(self, text: str) -> tuple[str | None, str]:
        head = text[: 2 * LONGEST_LABEL]
        for boundary in self._STRONG.finditer(head):
            label = self.labels.get(_key(head[: boundary.start()])) if boundary.start() else None
            rest = text[boundary.end() :]
            if label is not None and rest:
                # `sports: football` may be a label below `sports`.
                clause = boundary[0][0] not in ":," or len(rest.split()) >= 2
                return (label, rest) if clause and not self._is_labels(rest) else (None, "")
        word, _, rest = head.partition(" ")
        label = None if self.spaced else self.labels.get(_key(word))
        # A space joins words as often as it ends a label: only a clause of its own after it counts.
        if label is not None and len(_key(word)) > 1 and len(rest.split()) >= 3 and not self._is_labels(rest):
            return label, rest
        return None, ""

    def _last(self, text: str) -> str | None:
        for opener in self._OPENERS.finditer(text, max(0, len(text) - 2 * LONGEST_LABEL)):
            label = self.labels.get(_key(text[opener.end() :])) if opener.start() else None
            if label is not None:
                return label if not self._is_labels(text[: opener.start()]) else None
        return None

    def _is_labels(self, text: str) -> bool:
        """Several labels in one answer are an answer of another sort."""
        return any(_key(piece) in self.labels for piece in re.split(r"[,;|\n]|\band\b", text) if piece.strip())


#: Largest over smallest class from which imbalance is worth a word, and a warning: the imbalance ratio of Buda et al. 2018 (A
#: systematic study of the class imbalance problem), whose experiments run from 10 to 100 for most data sets.
_UNEVEN = 10
_VERY_UNEVEN = 100

#: A class of fewer examples than this is fewer than few-shot intent detection starts from (Casanueva et al. 2020, 10 an intent).
_RARE = 10


def _balance(groups: Mapping[str, Mapping[str, int]], splits: Sequence[SplitFacts], train: ShortAnswers) -> Iterator[Finding]:
    counted = train["counts"] or {}
    sizes = {label: sum(counted.get(text, 0) for text in group) for label, group in groups.items()}
    odd = {label: size for label, size in sizes.items() if 0 < size < REPEATED}
    sizes = {label: size for label, size in sizes.items() if size >= REPEATED}
    yield from _odd_answers(odd, groups, splits, len(sizes))
    most, fewest = max(sizes.values(), default=0), min(sizes.values(), default=0)
    if len(sizes) == 1:
        label = next(iter(sizes))
        yield Finding(
            kind="label_balance",
            severity="warning",
            what=f"{sizes[label]:,} of {train['answered']:,} training answers are the same: {label!r}",
            records=[],
            count=sizes[label],
            advice="add records with the other answers: a model that always says the same has nothing to learn",
        )
        return
    rare = sorted(
        (label for label, size in sizes.items() if size < _RARE or size * _UNEVEN <= most), key=lambda label: sizes[label]
    )
    if not rare:
        return
    ratio = most / fewest
    severity: Severity = "warning" if ratio >= _VERY_UNEVEN or sizes[rare[0]] < _RARE else "note"
    share = most / sum(sizes.values())
    yield Finding(
        kind="label_balance",
        severity=severity,
        what=f"{plural(len(sizes), 'label')}, the commonest {ratio:,.0f} times as common as the rarest "
        f"({share:.0%} of the answers); rare: " + _shown({label: sizes[label] for label in rare}),
        records=_places(splits, "train", (text for label in rare for text in groups[label])),
        count=sum(sizes[label] for label in rare),
        advice="collect more records of the rare labels, or leave the labels out; judge by a score that weighs labels equally "
        "(macro F1), not by accuracy",
    )


def _odd_answers(
    odd: Mapping[str, int], groups: Mapping[str, Mapping[str, int]], splits: Sequence[SplitFacts], labels: int
) -> Iterator[Finding]:
    """Answers too rare to be labels and like none."""
    if not odd:
        return
    yield Finding(
        kind="label_rare",
        severity="note",
        what=f"{plural(sum(odd.values()), 'training answer')} seen fewer than {REPEATED} times among {plural(labels, 'label')}: "
        + _shown(odd),
        records=_places(splits, "train", (text for label in odd for text in groups[label])),
        count=sum(odd.values()),
        advice="mend what should be one of the labels; a label this rare is not learned",
    )


def _places(splits: Sequence[SplitFacts], name: str, texts: Iterable[str]) -> list[Place]:
    """Where the records of one split stand that have one of these answers; the first ones where there are many."""
    hashes = [label_hash(text) for text in texts]
    found = ((split, record) for split in splits if split.name == name for record, _ in _where(split.column("label"), hashes))
    return [split.place(record) for split, record in islice(found, _MOST_RECORDS)]


def _shown(counts: Mapping[str, int]) -> str:
    """`'a' (3), 'b' (2) and 5 more`, in the order given."""
    shown = ", ".join(f"{text!r} ({count:,})" for text, count in islice(counts.items(), _MOST_SHOWN))
    return f"{shown} and {len(counts) - _MOST_SHOWN:,} more" if len(counts) > _MOST_SHOWN else shown


def _unseen(
    groups: Mapping[str, Mapping[str, int]], splits: Sequence[SplitFacts], answers: Mapping[str, ShortAnswers]
) -> Iterator[Finding]:
    """One finding for each split with labels that no training record has."""
    trained = answers["train"]["counts"] or {}
    unseen = {label: group for label, group in groups.items() if not any(text in trained for text in group)}
    for split in splits:
        counts = answers[split.name]["counts"] or {}
        here = {label: sum(counts.get(text, 0) for text in group) for label, group in unseen.items()}
        here = {label: count for label, count in here.items() if count}
        if split.name == "train" or not here:
            continue
        yield Finding(
            kind="label_unseen",
            severity="warning",
            what=f"{plural(len(here), 'answer')} in {split.name} that no training record has: {_shown(here)}",
            records=_places(splits, split.name, (text for label in here for text in unseen[label])),
            count=sum(here.values()),
            advice="a label that is never trained is never answered: move such records to training, or mend the label",
        )
