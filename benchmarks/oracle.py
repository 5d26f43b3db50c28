"""What is wrong with data, found by looking at everything: the labels against which an audit's findings are held.

An audit that must be fast compares sketches; this compares every record with every other one, letter by letter, and takes
minutes. It shares no code and no definition with what it judges. Its verdicts have three values: a defect surely, surely none,
and a grey zone in which people would differ; what lies there counts neither for nor against an audit, and is published.

Two prompts, or two answers, are compared by

    s    100 x normalised Indel similarity of the folded words (NFKC, case, punctuation and apostrophes gone), the higher of as
         written and in alphabetical order, so that a moved clause costs nothing
    c    share of content words without a counterpart; function words and courtesies are no content, endings (-s, -ed, -ing) do
         not count, and a word with a slip of the finger (one letter; two in words of eight or more) is its counterpart
    n    whether the numbers are the same

    identical   the same letters, digits and symbols; case, spaces and punctuation may differ
    same        s >= 88, c <= 0.10, n, and neither denies what the other says
    variant     as `same`, but for the numbers: "Convert 3 kilometers" and "Convert 9 kilometers"
    close       s >= 82, and c <= 0.25 or at most one content word exchanged; answers also n
    other       all else

and two records are

    exact duplicates    prompts and answers identical
    near duplicates     prompts and answers identical or same
    in conflict         prompts identical, answers other
    grey                prompts variant; prompts close and answers at least close; prompts identical or same and answers not
    different           all else: prompts close and answers other are two questions that resemble one another

A record is leaked when it is an exact or near duplicate of one in another split, or has an identical prompt there. Questions
about two different SQL tables are other, however they are worded. Labels (one word that many records share) are identical or
other.

    python benchmarks/oracle.py        what the oracle finds in the published data sets as they are
"""

from __future__ import annotations

import difflib
import itertools
import json
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Literal

import numpy as np
from rapidfuzz import fuzz, process
from rapidfuzz.distance import OSA

SAME_SIMILARITY, CLOSE_SIMILARITY = 88, 82
SAME_CONTENT, CLOSE_CONTENT = 0.10, 0.25
#: A passage of a test item is surely recognised from 20 words on, and from 8 words on it may be chance: GPT-2's authors looked
#: for 8-grams (Radford et al. 2019, section 4), GPT-3's for 13-grams (Brown et al. 2020, appendix C).
SURE_PASSAGE_WORDS, GREY_PASSAGE_WORDS = 20, 8
#: An answer is surely too long at ten times the median, and perhaps at three.
SURE_LONG, GREY_LONG = 10, 3

Verdict = Literal["defect", "grey", "clean"]


@dataclass(frozen=True)
class Seen:
    """A record as the oracle reads it."""

    file: str
    line: int
    asked: str
    """Everything before the last answer; the whole of raw text."""
    answered: str
    """The last answer; empty for raw text."""
    texts: tuple[str, ...]
    context: str
    """What two questions must share to be the same: the SQL table they are about."""
    labelled: bool
    """The answer is a label."""


def see(file: str, line: int, record: dict[str, Any], *, labelled: bool) -> Seen:
    """Reads a record of any of the benchmark's forms."""
    if "text" in record:
        return Seen(file, line, record["text"], "", (record["text"],), "", labelled)
    if "instruction" in record:
        asked, answered = f"{record['instruction']}\n{record['input']}", record["output"]
        return Seen(file, line, asked, answered, (record["instruction"], record["input"], answered), "", labelled)
    if "prompt" in record:
        context, separator, question = record["prompt"].rpartition("\nQ: ")
        asked = question.removesuffix("\nA:") if separator else record["prompt"]
        return Seen(file, line, asked, record["completion"], (record["prompt"], record["completion"]), context, labelled)
    turns = record.get("messages") or record["conversations"]
    texts = tuple(turn.get("content") or turn["value"] for turn in turns)
    return Seen(file, line, "\n".join(texts[:-1]), texts[-1], texts, "", labelled)


# ---- two texts ------------------------------------------------------------------------------------------------------


class Likeness(IntEnum):
    """How two prompts, or two answers, resemble one another."""

    OTHER = 0
    CLOSE = 1
    VARIANT = 2
    SAME = 3
    IDENTICAL = 4


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


_COURTESIES = "please hi hello hey thanks thank just really also actually quickly kindly well ok okay so now then yet still ever"
_FUNCTION_WORDS = _set(
    f"""a an the this that these those my your his her its our their i you he she it we they me him them us who whom what which
    where when why how is are was were be been being am do does did done doing have has had having will would shall should can
    could may might must of in on at to from by with for about into as and or but if than there here s t m re ve ll d im ive id
    youre hes shes its were theyre thats whats wheres hows whos isnt arent wasnt dont doesnt didnt hasnt havent hadnt wont wouldnt
    cant couldnt shouldnt cannot not no up out any some all each every per altogether total get gets got getting need needs want
    wants like go going make makes {_COURTESIES}"""
)
_DENIALS = _set(
    "not no never none cannot cant wont dont doesnt didnt isnt arent wasnt hasnt havent hadnt wouldnt couldnt shouldnt"
)
_NUMBER_WORDS = _set(
    """one two three four five six seven eight nine ten eleven twelve twenty thirty forty fifty hundred thousand half third
    quarter twice thrice double triple"""
)


@dataclass(frozen=True)
class Folded:
    """A text without what does not count."""

    exact: str
    """Letters, digits and symbols."""
    words: str
    sorted_words: str
    content: Counter[str]
    """Content words by their stems."""
    vocabulary: frozenset[str]
    """All words, as they stand and by their stems."""
    numbers: Counter[str]
    denies: bool


def fold(text: str) -> Folded:
    """A text as it is compared."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    plain = plain.replace("'", "").replace("’", "").replace("_", " ")
    exact = "".join(c for c in plain if unicodedata.category(c)[0] in "LNSM" or c in "/*%#&@")
    words = re.findall(r"[^\W_]+", plain)
    numbers = Counter(word for word in words if word in _NUMBER_WORDS or any(c.isdigit() for c in word))
    content = Counter(_stem(word) for word in words if word not in _FUNCTION_WORDS and word not in numbers)
    vocabulary = frozenset(words) | frozenset(content)
    denies = any(word in _DENIALS for word in words)
    return Folded(exact, " ".join(words), " ".join(sorted(words)), content, vocabulary, numbers, denies)


def _stem(word: str) -> str:
    for ending in ("ies", "ing", "ed", "es", "s", "y", "e"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            return word[: -len(ending)]
    return word


def similarity(a: Folded, b: Folded) -> float:
    """`s` of the definition."""
    return max(fuzz.ratio(a.words, b.words), fuzz.ratio(a.sorted_words, b.sorted_words))


def likeness(a: Folded, b: Folded, s: float) -> Likeness:
    """How two texts of similarity `s` resemble one another."""
    if a.exact == b.exact:
        return Likeness.IDENTICAL
    if s < CLOSE_SIMILARITY:
        return Likeness.OTHER
    only_a = [word for word in (a.content - b.content).elements() if not any(_slip(word, other) for other in b.vocabulary)]
    only_b = [word for word in (b.content - a.content).elements() if not any(_slip(word, other) for other in a.vocabulary)]
    share = (len(only_a) + len(only_b)) / max(1, a.content.total() + b.content.total())
    if s >= SAME_SIMILARITY and share <= SAME_CONTENT and a.denies == b.denies:
        return Likeness.SAME if a.numbers == b.numbers else Likeness.VARIANT
    exchanged = max(len(only_a), len(only_b))
    return Likeness.CLOSE if share <= CLOSE_CONTENT or exchanged <= 1 else Likeness.OTHER


def _slip(a: str, b: str) -> bool:
    """Whether one word is the other with a slip of the finger."""
    shorter = min(len(a), len(b))
    allowed = 2 if shorter >= 8 else 1 if shorter >= 4 else 0
    return allowed > 0 and OSA.distance(a, b, score_cutoff=allowed) <= allowed


# ---- all pairs ------------------------------------------------------------------------------------------------------


@dataclass
class Partners:
    """For each record, those it stands in a relation with, by kind."""

    defect: dict[str, dict[int, set[int]]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(set)))
    grey: dict[str, dict[int, set[int]]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(set)))

    def add(self, kind: str, a: int, b: int, *, grey: bool = False) -> None:
        """Relates two records."""
        side = self.grey if grey else self.defect
        side[kind][a].add(b)
        side[kind][b].add(a)

    def pairs(self, kind: str, among: set[int] | None = None) -> tuple[int, int]:
        """Number of pairs surely so and grey, among some records."""
        sides = []
        for side in (self.defect, self.grey):
            related = side[kind].items()
            sides.append(
                sum(
                    a < b
                    for a, partners in related
                    if among is None or a in among
                    for b in partners
                    if among is None or b in among
                )
            )
        return sides[0], sides[1]


def relate(records: Sequence[Seen]) -> Partners:
    """Compares every record with every other one.

    Kinds: `exact_duplicate`, `near_duplicate`, `leak`, `label_conflict`.
    """
    asked = [fold(record.asked) for record in records]
    answered = [fold(record.answered) for record in records]
    found = Partners()
    for a, b, s in _resembling(asked):
        if records[a].context != records[b].context:
            continue
        prompts = likeness(asked[a], asked[b], s)
        if prompts == Likeness.OTHER:
            continue
        if records[a].labelled:
            is_equal = records[a].answered == records[b].answered
            answers = Likeness.IDENTICAL if is_equal else Likeness.OTHER
        else:
            answers = likeness(answered[a], answered[b], similarity(answered[a], answered[b]))
            if answers == Likeness.CLOSE and answered[a].numbers != answered[b].numbers:
                answers = Likeness.OTHER
        across = records[a].file != records[b].file
        _judge(found, a, b, prompts, answers, across=across)
    return found


def relate_spellings(records: Sequence[Seen], partners: Partners, known: Mapping[str, str]) -> None:
    """Enters `label_spelling`: the same label written differently, grey where short answers (four words at most) are prose.

    Args:
        records: All of them.
        partners: To be added to.
        known: Spelling -> label, for those that differ in more than case, spaces and punctuation.
    """
    groups: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for n, record in enumerate(records):
        if record.answered and (record.labelled or len(record.answered.split()) <= 4):
            groups[fold(known.get(record.answered, record.answered)).exact][record.answered].append(n)
    for spellings in groups.values():
        for one, other in itertools.combinations(spellings.values(), 2):
            for a, b in itertools.product(one, other):
                partners.add("label_spelling", a, b, grey=not records[a].labelled)


def _judge(found: Partners, a: int, b: int, prompts: Likeness, answers: Likeness, *, across: bool) -> None:
    """Enters what a pair is; the table at the head of this file."""
    is_same = prompts >= Likeness.SAME and answers >= Likeness.SAME
    is_variant = prompts == Likeness.VARIANT
    is_close = prompts == Likeness.CLOSE and answers >= Likeness.CLOSE
    grey_near = not is_same and (is_variant or is_close or prompts >= Likeness.SAME)
    if prompts == answers == Likeness.IDENTICAL:
        found.add("exact_duplicate", a, b)
    if is_same:
        found.add("near_duplicate", a, b)
    elif grey_near:
        found.add("near_duplicate", a, b, grey=True)
    if across and (is_same or prompts == Likeness.IDENTICAL):
        found.add("leak", a, b)
    elif across and grey_near:
        found.add("leak", a, b, grey=True)
    if prompts == Likeness.IDENTICAL and answers in (Likeness.OTHER, Likeness.VARIANT):
        found.add("label_conflict", a, b)
    elif prompts >= Likeness.SAME and answers != Likeness.IDENTICAL:
        found.add("label_conflict", a, b, grey=True)


def _resembling(texts: Sequence[Folded]) -> Iterator[tuple[int, int, float]]:
    """Every pair with `s` of at least `CLOSE_SIMILARITY`, or with the same letters, each once, with its `s`."""
    best: dict[tuple[int, int], float] = {}
    for view in ([text.words for text in texts], [text.sorted_words for text in texts]):
        rows = 256  # of the matrix held at once
        for first in range(0, len(view), rows):
            scores = process.cdist(
                view[first : first + rows],
                view[first:],
                scorer=fuzz.ratio,
                score_cutoff=CLOSE_SIMILARITY,
                dtype=np.float32,
                workers=1,
            )
            below, right = np.nonzero(scores)
            for row, column in zip(below[right > below].tolist(), right[right > below].tolist(), strict=True):
                pair = (first + row, first + column)
                best[pair] = max(best.get(pair, 0.0), float(scores[row, column]))
    alike: dict[str, list[int]] = defaultdict(list)
    for number, text in enumerate(texts):
        for other in alike[text.exact]:
            best.setdefault((other, number), 100.0)
        alike[text.exact].append(number)
    for (a, b), s in best.items():
        yield a, b, s


# ---- passages of test items -----------------------------------------------------------------------------------------


def passages(records: Sequence[Seen]) -> list[int]:
    """For each record the longest run of its words that stands in records of the other side, training against test.

    A run is a stretch of consecutive words every `GREY_PASSAGE_WORDS` of which stand on the other side. Validation records are
    compared with training as if they were test items, but stay within the grey zone.
    """
    words = [[fold(text).words.split() for text in record.texts] for record in records]
    sides: dict[bool, set[int]] = {True: set(), False: set()}  # the n-grams of training records, and of all others
    for record, texts in zip(records, words, strict=True):
        for text in texts:
            sides[record.file == "train"].update(_grams(text))
    longest = []
    for record, texts in zip(records, words, strict=True):
        across = sides[record.file != "train"]
        run = max((_longest_run(text, across) for text in texts), default=0)
        longest.append(min(run, SURE_PASSAGE_WORDS - 1) if record.file == "validation" else run)
    return longest


def _grams(words: list[str]) -> list[int]:
    n = GREY_PASSAGE_WORDS
    return [hash(tuple(words[i : i + n])) for i in range(len(words) - n + 1)]


def _longest_run(words: list[str], known: set[int]) -> int:
    longest = run = 0
    for gram in _grams(words):
        run = run + 1 if gram in known else 0
        longest = max(longest, run)
    return longest + GREY_PASSAGE_WORDS - 1 if longest else 0


# ---- one record -----------------------------------------------------------------------------------------------------


def mojibake(record: Seen) -> Verdict:
    """By code points: replacement characters, C1 controls, and runs of non-ASCII characters that are UTF-8 misread."""
    for text in record.texts:
        if "\ufffd" in text or re.search("[\x80-\x9f]", text):
            return "defect"
        for run in re.findall(r"[^\x00-\x7f]{2,}", text):
            for encoding in ("cp1252", "latin-1", "mac_roman"):
                try:
                    run.encode(encoding).decode("utf-8")
                except UnicodeError:
                    continue
                return "defect"
    return "clean"


def hidden_unicode(record: Seen) -> Verdict:
    """By code points: whatever takes no space or reorders what is seen, outside the scripts and emoji that need it."""
    verdict: Verdict = "clean"
    for text in record.texts:
        for n, c in enumerate(text):
            around = (text[n - 1] if n else " ") + (text[n + 1] if n + 1 < len(text) else " ")
            if c in "\u115f\u1160\u3164\uffa0\u2800\u034f" or "\ufe00" <= c <= "\ufe0e" or "\U000e0100" <= c <= "\U000e01ef":
                return "defect"
            if c == "\ufe0f" and unicodedata.category(around[0])[0] not in "SN" and around[0] not in "#*‼⁉":
                return "defect"
            if unicodedata.category(c) == "Cf" and not _joins(c, text, n, around):
                return "defect"
            is_control = unicodedata.category(c) == "Cc" and c not in "\t\n\r"
            is_lookalike = c.isalpha() and around.strip().isascii() and unicodedata.name(c).startswith("CYRILLIC")
            if is_control or is_lookalike or unicodedata.category(c) in ("Zl", "Zp"):
                verdict = "grey"
    return verdict


def _joins(c: str, text: str, n: int, around: str) -> bool:
    """Whether a format character has work to do where it stands."""
    if c in "\u200c\u200d":
        return not all(neighbour.isascii() or unicodedata.name(neighbour, "").startswith("LATIN") for neighbour in around)
    if "\U000e0020" <= c <= "\U000e007f":  # the tags of a flag follow a black flag
        return "\U0001f3f4" in text[max(0, n - 7) : n]
    return False


#: What chat templates and tokenizers of current families use as control tokens or role markers, as plain fragments.
_CONTROL_FRAGMENTS = (
    "<|", "<｜", "[inst]", "[/inst]", "<<sys>>", "<s>", "</s>", "<bos>", "<eos>", "<unk>", "<pad>", "[cls]", "[sep]", "[mask]",
    "<start_of_turn>", "<end_of_turn>", "[available_tools]", "[tool_calls]", "[system_prompt]", "<tool_call>", "<tool_response>",
    "### instruction:", "### response:", "### input:", "<|im_", "<think>", "</think>", "<mask>", "<image>",
)  # fmt: skip
_SPEAKERS = ("human", "assistant", "user", "system", "ai", "bot", "gpt")


def control_token_text(record: Seen) -> Verdict:
    """By the fragments that control tokens are written with; a line that opens with a speaker's name and a colon is grey."""
    verdict: Verdict = "clean"
    for text in record.texts:
        folded = text.casefold()
        if any(fragment in folded for fragment in _CONTROL_FRAGMENTS):
            return "defect"
        if any(line.strip().startswith(tuple(f"{name}:" for name in _SPEAKERS)) for line in folded.split("\n")):
            verdict = "grey"
    return verdict


_ENGLISH = _set("the of and to in is that it for was on are with as at be this have from or by not but what how i you he she")
#: Function words of ten languages that are no words of English.
_FOREIGN = _set(
    """der das und ist nicht ein eine ich wir sie für von zu dem le la les une un dans pour que qui je nous vous avec el los
    las en del por una es se yo mi il lo gli di che non è sono het een van ik niet zijn os um uma não em com eu я не и в на
    что с по"""
)
_TONGUES = "french|spanish|german|italian|japanese|russian|chinese|korean|latin|portuguese|dutch"


def language(record: Seen) -> Verdict:
    """By function words and scripts: English, surely something else, or mixed."""
    text = "\n".join(record.texts)
    letters = [c for c in text if c.isalpha()]
    strange = sum(not unicodedata.name(c, "").startswith("LATIN") for c in letters)
    words = re.findall(r"[^\W\d_]+", text.casefold())
    english, foreign = sum(word in _ENGLISH for word in words), sum(word in _FOREIGN for word in words)
    if strange > len(letters) / 2 or (foreign >= 3 and english == 0):
        return "defect"
    answer = re.findall(r"[^\W\d_]+", record.answered.casefold())
    asks_for_another = re.search(rf"\btranslat|\b(in|into|the) ({_TONGUES})\b", text, re.I)
    spoken = sum(word in _FOREIGN for word in answer) > 1 + sum(word in _ENGLISH for word in answer)
    return "grey" if asks_for_another or spoken or strange >= 2 else "clean"


def lengths(records: Sequence[Seen]) -> list[Verdict]:
    """By letters: answers of at most one letter or digit, or of ten times the median and more.

    Grey: up to three letters or digits, a tenth of the median, three times the median; the median is that of the file.
    """
    sizes = [len(record.answered or record.asked) for record in records]
    by_file: dict[str, list[int]] = defaultdict(list)
    for record, size in zip(records, sizes, strict=True):
        by_file[record.file].append(size)
    medians = {file: float(np.median(found)) for file, found in by_file.items()}
    verdicts: list[Verdict] = []
    for record, size in zip(records, sizes, strict=True):
        median = medians[record.file]
        solid = sum(c.isalnum() for c in record.answered or record.asked)
        if solid <= 1 or size >= SURE_LONG * median:
            verdicts.append("defect")
        else:
            verdicts.append("grey" if solid <= 3 or size >= GREY_LONG * median or size <= median / 10 else "clean")
    return verdicts


# ---- for a person's eyes --------------------------------------------------------------------------------------------


def confidential(records: Sequence[Seen]) -> list[str]:
    """Every string that could be a secret or personal, for a person to read: the published sets hold none.

    That is: each @ with letters on both sides, each run of nine or more digits (dots, dashes, brackets, spaces between), each
    token of eighteen or more characters that mixes letters and digits, each dotted quad, each private key, each `password`. Table
    names of WikiSQL (1-10015132-16) and calculator annotations (<<48/2=24>>) are left out, as are labels.
    """
    found = []
    for record in records:
        for text in record.texts[: 1 if record.labelled else None]:
            rest = re.sub(r"<<[^>]*>>|\b\d-\d+-\d+\b", " ", text)
            for pattern in (
                r"\S*\w@\w\S*",
                r"\d(?:[ .()/-]{0,2}\d){8,}",
                r"\b(?=\S*\d)(?=\S*[A-Za-z])[\w+/-]{18,}",
                r"\b\d+\.\d+\.\d+\.\d+\b",
                r"PRIVATE KEY",
                r"(?i)pass(?:word|code|phrase)\s*[:=]\s*\S+",
                r"://\S+",
            ):
                found += [f"{record.file}:{record.line}: {match}" for match in re.findall(pattern, rest)]
    return found


def near_labels(records: Sequence[Seen]) -> list[tuple[str, str]]:
    """Labels that resemble one another, for a person to read: in BANKING77 they are all different intents."""
    labels = sorted({record.answered for record in records if record.labelled})
    return [(a, b) for n, a in enumerate(labels) for b in difflib.get_close_matches(a, labels[n + 1 :], n=5, cutoff=0.8)]


def main() -> None:
    """Prints, for each published data set as it is, what the oracle finds in it."""
    import time

    from planting import sets

    for name in sets.NAMES:
        started = time.monotonic()
        data = sets.load(name)
        records = [
            see(file, number, json.loads(line), labelled=data.answers_are_labels)
            for file, lines in data.files.items()
            for number, line in enumerate(lines, start=1)
        ]
        print(f"\n{name}: {len(records)} records")
        partners = relate(records)
        relate_spellings(records, partners, {})
        for kind in ("exact_duplicate", "near_duplicate", "leak", "label_conflict", "label_spelling"):
            print(f"  {kind}: pairs surely {partners.pairs(kind)[0]}, grey {partners.pairs(kind)[1]}; ", end="")
            print(
                f"records surely {len(partners.defect[kind])}, grey {len(set(partners.grey[kind]) - set(partners.defect[kind]))}"
            )
        runs = passages(records)
        print(
            f"  contamination: {sum(r >= SURE_PASSAGE_WORDS for r in runs)}, grey {sum(0 < r < SURE_PASSAGE_WORDS for r in runs)}"
        )
        for check in (mojibake, hidden_unicode, control_token_text, language):
            print(f"  {check.__name__}: {dict(Counter(check(record) for record in records))}")
        print(f"  length: {dict(Counter(lengths(records)))}")
        print(f"  labels alike: {near_labels(records)}")
        print(f"  to read: {confidential(records)}")
        print(f"  {time.monotonic() - started:.1f} s")


if __name__ == "__main__":
    main()
