"""Plants defects in copies of real data sets and says on which line each one is.

A planted record carries one defect of one class. Defects of a record's own (secrets, mojibake, length, ...) replace a record in
place; copies and contradictions are new lines at random places, their originals untouched; every line that carries no defect and
no decoy is byte for byte what was published. Decoys are records that got a sentence which resembles a defect and is none.

The planter knows nothing of the audit it serves to measure: no pattern, threshold or word list is shared.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from planting import edits, sets
from planting.confidential import PERSONAL, SECRET_FRAMES, SECRETS
from planting.decoys import DECOYS, tempt
from planting.letters import ACCENTED, HIDDEN, MOJIBAKE, hide, misread
from planting.markers import MARKERS, mark
from planting.sets import DataSet, Slot
from planting.tongues import SENTENCES, speak

#: How many of each class go into which data set; 200 of each class in all.
QUOTAS: dict[str, dict[str, int]] = {
    kind: dict(zip(sets.NAMES, numbers, strict=True))
    for kind, numbers in {
        #                     banking77 gsm8k wikisql chats instructions documents
        "exact_duplicate": (65, 60, 30, 20, 25, 0),
        "near_duplicate": (65, 65, 30, 15, 25, 0),
        "leak": (60, 60, 40, 15, 25, 0),
        "label_conflict": (90, 50, 30, 0, 30, 0),
        "label_spelling": (200, 0, 0, 0, 0, 0),
        "secret": (60, 60, 30, 20, 30, 0),
        "personal_data": (60, 60, 30, 20, 30, 0),
        "mojibake": (60, 60, 30, 20, 30, 0),
        "hidden_unicode": (60, 60, 30, 20, 30, 0),
        "control_token_text": (60, 60, 30, 20, 30, 0),
        "language": (75, 75, 0, 20, 30, 0),  # none in WikiSQL: table, columns and SQL outweigh the question
        "length": (60, 60, 30, 20, 30, 0),
        "contamination": (20, 60, 0, 0, 0, 120),  # short questions and answers have no passage of twenty words
    }.items()
}
#: Decoys of each tempted class.
_DECOYS = dict(zip(sets.NAMES, (8, 8, 4, 2, 4, 0), strict=True))
#: An answer this many times the median length is too long whatever the rule.
_LONG = 50
_EMPTY_ANSWERS = (".", "-", "?", "…", "--", "...", "x", "A", "0", "7", "k", "N/A", "n/a", "null", "_")


@dataclass(frozen=True)
class Plant:
    """A planted defect."""

    kind: str
    variant: str
    """What was done."""
    file: str
    line: int
    partner: tuple[str, int] | None
    """File and line of the record it copies, contradicts or quotes."""


@dataclass(frozen=True)
class Planted:
    """A data set with its defects."""

    name: str
    files: dict[str, list[str]]
    plants: list[Plant]
    decoys: dict[tuple[str, int], str]
    """File and line -> the class that the sentence tempts to find."""
    spellings: dict[str, str]
    """Misspelt label -> the label."""
    answers_are_labels: bool


@dataclass(eq=False)
class _Row:
    """A line on its way into a file."""

    text: str
    kind: str = ""
    variant: str = ""
    partner: _Row | None = None
    decoy: str = ""

    @property
    def record(self) -> dict[str, Any]:
        record: dict[str, Any] = json.loads(self.text)
        return record


@dataclass
class _Bed:
    """A data set being planted."""

    data: DataSet
    rng: random.Random
    files: dict[str, list[_Row]]
    free: list[_Row]
    """Training rows that nothing was done to or with."""
    spellings: dict[str, str] = field(default_factory=dict)

    def take(self, suits: Callable[[dict[str, Any]], bool] = lambda record: True) -> _Row:
        """A training row for one use."""
        for n, row in enumerate(self.free):
            if suits(row.record):
                return self.free.pop(n)
        raise ValueError(f"{self.data.name}: no record left that suits")

    def slot(self, record: dict[str, Any], role: str) -> Slot:
        """The slot that asks, or the last that answers."""
        slots = [slot for slot in self.data.slots(record) if slot.role == role]
        return slots[-1] if role == "answered" else self.rng.choice(slots)

    def change(self, row: _Row, kind: str, variant: str, record: dict[str, Any], partner: _Row | None = None) -> None:
        """Puts a defect in the place of a record."""
        text = sets.line_of(record)
        assert text != row.text, (kind, variant, text)
        row.text, row.kind, row.variant, row.partner = text, kind, variant, partner

    def insert(self, file: str, row: _Row) -> None:
        """Puts a new record somewhere into a file."""
        rows = self.files[file]
        rows.insert(self.rng.randint(0, len(rows)), row)


def plant(name: str, seed: int) -> Planted:
    """A data set of `sets.NAMES` with its share of the defects; the same for the same seed."""
    rng = random.Random(f"{seed} {name}")
    data = sets.load(name)
    files = {file: [_Row(line) for line in lines] for file, lines in data.files.items()}
    free = list(files["train"])
    rng.shuffle(free)
    bed = _Bed(data, rng, files, free)
    for kind, quota in QUOTAS.items():
        for number in range(quota[name]):
            _PLANTERS[kind](bed, number)
    for kind in DECOYS:
        for _ in range(_DECOYS[name]):
            row = bed.take()
            slot = bed.slot(row.record, "asked")
            row.text = sets.line_of(sets.write(row.record, slot, f"{sets.read(row.record, slot)} {tempt(kind, rng)}"))
            row.decoy = kind
    places = {id(row): (file, line) for file, rows in files.items() for line, row in enumerate(rows, start=1)}
    found = [row for rows in files.values() for row in rows]
    return Planted(
        name,
        {file: [row.text for row in rows] for file, rows in files.items()},
        [
            Plant(row.kind, row.variant, *places[id(row)], places[id(row.partner)] if row.partner else None)
            for row in found
            if row.kind
        ],
        {places[id(row)]: row.decoy for row in found if row.decoy},
        bed.spellings,
        data.answers_are_labels,
    )


# ---- copies ---------------------------------------------------------------------------------------------------------


def _words(text: str) -> set[str]:
    return set(re.findall(r"[^\W_]+", text.lower()))


def _reworded(bed: _Bed, record: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """A near copy: question, answer or both in slightly other words, numbers and labels as they were.

    Raises:
        ValueError: where the texts are too short or too special to be reworded.
    """
    name = bed.data.name
    where = "question" if name in ("banking77", "wikisql") else bed.rng.choice(["question", "question", "answer", "both"])
    done = []
    for role, word in (("asked", "question"), ("answered", "answer")):
        if where not in (word, "both"):
            continue
        slot = bed.slot(record, role)
        text = sets.read(record, slot)
        if len(text.split()) < 4:
            raise ValueError("too short")
        # What the answer repeats are names and values, which a careful second writer copies.
        other = sets.read(record, bed.slot(record, "answered")) if role == "asked" and name in ("wikisql", "instructions") else ""
        edited, variant = edits.reword(text, bed.rng, protected=_words(other), is_question=role == "asked")
        record = sets.write(record, slot, edited)
        done.append(f"{word}: {variant}")
    return record, "; ".join(done)


def _near_copy(bed: _Bed) -> tuple[_Row, dict[str, Any], str]:
    """A source, and its copy in other words."""
    while True:
        source = bed.take()
        try:
            return source, *_reworded(bed, source.record)
        except ValueError:
            continue


def _same_letters(bed: _Bed) -> tuple[_Row, dict[str, Any]]:
    """A source, and its copy in another case or with other spaces."""
    source = bed.take()
    slot = bed.slot(source.record, "asked")
    return source, sets.write(source.record, slot, edits.respace(sets.read(source.record, slot), bed.rng))


def _exact_duplicate(bed: _Bed, number: int) -> None:
    if number % 2:
        source, record = _same_letters(bed)
        bed.insert("train", _Row(sets.line_of(record), "exact_duplicate", "other case or spaces", source))
    else:
        source = bed.take()
        bed.insert("train", _Row(source.text, "exact_duplicate", "byte for byte", source))


def _near_duplicate(bed: _Bed, number: int) -> None:
    source, record, variant = _near_copy(bed)
    bed.insert("train", _Row(sets.line_of(record), "near_duplicate", variant, source))


def _leak(bed: _Bed, number: int) -> None:
    file = ("test", "validation")[number // 2 % 2]
    if number % 2:
        source, record, _ = _near_copy(bed)
        bed.insert(file, _Row(sets.line_of(record), "leak", f"nearly, into {file}", source))
    else:
        source = bed.take()
        bed.insert(file, _Row(source.text, "leak", f"exactly, into {file}", source))


# ---- labels ---------------------------------------------------------------------------------------------------------


def _label_conflict(bed: _Bed, number: int) -> None:
    source = bed.take()
    slot = bed.slot(source.record, "answered")
    answer = sets.read(source.record, slot)
    if bed.data.name == "gsm8k" and number % 2:
        number_at = answer.rindex("#### ") + 5
        other = str(int(answer[number_at:].replace(",", "")) + bed.rng.choice([-2, -1, 1, 2, 5, 10, 100]))
        wrong, variant = answer[:number_at] + other, "other final number"
    elif bed.data.name == "wikisql":
        columns = re.search(r"^columns: (.*)$", source.record["prompt"], re.M)
        assert columns is not None
        selected = next((c for c in columns[1].split(", ") if answer.startswith(f"SELECT {c} FROM ")), None)
        others = [column for column in columns[1].split(", ") if column != selected]
        if selected is None or not others:
            _label_conflict(bed, number)
            return
        wrong, variant = answer.replace(f"SELECT {selected} ", f"SELECT {bed.rng.choice(others)} ", 1), "other column"
    else:
        pool = [sets.read(row.record, bed.slot(row.record, "answered")) for row in bed.rng.sample(bed.files["train"], 20)]
        wrong, variant = next(other for other in pool if other.casefold() != answer.casefold()), "another record's answer"
    bed.insert("train", _Row(sets.line_of(sets.write(source.record, slot, wrong)), "label_conflict", variant, source))


def _label_spelling(bed: _Bed, number: int) -> None:
    labels = {json.loads(line)["completion"] for line in bed.data.files["train"]}
    row = bed.take()
    slot = bed.slot(row.record, "answered")
    label = sets.read(row.record, slot)
    words = label.split("_")
    at = bed.rng.randrange(1, len(label) - 2)
    spellings = {
        "case": [label.upper(), label.title(), label[0].swapcase() + label[1:], "".join(word.capitalize() for word in words)],
        "spaces": [" ".join(words), " ".join(words).capitalize(), f" {label}", f"{label} "],
        "hyphens": ["-".join(words)],
        "typo": [
            label[:at] + label[at + 1] + label[at] + label[at + 2 :],
            label[:at] + label[at + 1 :],
            label[:at] + label[at] + label[at:],
        ],
        "plural": [label[:-1] if label.endswith("s") else label + "s"],
        "full stop": [label + "."],
    }
    variant = list(spellings)[number % len(spellings)]
    wrong = bed.rng.choice(spellings[variant])
    if wrong in labels or wrong.replace("_", "") == label:
        _label_spelling(bed, number)
        return
    bed.spellings[wrong] = label
    bed.change(row, "label_spelling", variant, sets.write(row.record, slot, wrong))


# ---- one record -----------------------------------------------------------------------------------------------------


def _anywhere(bed: _Bed, row: _Row) -> Slot:
    """A text that a defect may stand in: mostly the question; an answer where it is prose."""
    is_prose = bed.data.name in ("gsm8k", "chats", "instructions")
    return bed.slot(row.record, "answered" if is_prose and bed.rng.random() < 0.3 else "asked")


def _put(text: str, piece: str, rng: random.Random) -> str:
    """A text with a sentence put before it, behind it, or between two of its sentences."""
    gaps = [0, len(text), len(text), *(match.end() for match in re.finditer(r"[.?!] ", text))]
    at = rng.choice(gaps)
    return " ".join(part for part in (text[:at].rstrip(" "), piece, text[at:]) if part)


def _edit(bed: _Bed, kind: str, variant: str, edit: Callable[[str], str]) -> None:
    """Replaces a record by itself with an edited text."""
    row = bed.take(lambda record: all(re.search("[A-Za-z]{3}", sets.read(record, slot)) for slot in bed.data.slots(record)))
    slot = _anywhere(bed, row)
    where = "" if slot.role == "asked" else " in the answer"
    bed.change(row, kind, variant + where, sets.write(row.record, slot, edit(sets.read(row.record, slot))))


def _secret(bed: _Bed, number: int) -> None:
    issuer = list(SECRETS)[number % len(SECRETS)]
    key = SECRETS[issuer](bed.rng)
    frame = "\n{}\n" if "\n" in key else bed.rng.choice(SECRET_FRAMES)
    _edit(bed, "secret", issuer, lambda text: _put(text, frame.format(key), bed.rng))


def _personal_data(bed: _Bed, number: int) -> None:
    sort = list(PERSONAL)[number % len(PERSONAL)]
    make, frames = PERSONAL[sort]
    _edit(bed, "personal_data", sort, lambda text: _put(text, bed.rng.choice(frames).format(make(bed.rng)), bed.rng))


def _mojibake(bed: _Bed, number: int) -> None:
    how = MOJIBAKE[number % len(MOJIBAKE)]
    _edit(bed, "mojibake", how, lambda text: misread(_put(text, bed.rng.choice(ACCENTED), bed.rng), how))


def _hidden_unicode(bed: _Bed, number: int) -> None:
    how = HIDDEN[number % len(HIDDEN)]
    _edit(bed, "hidden_unicode", how, lambda text: hide(text, how, bed.rng))


def _control_token_text(bed: _Bed, number: int) -> None:
    family = list(MARKERS)[number % len(MARKERS)]
    _edit(bed, "control_token_text", family, lambda text: mark(text, family, bed.rng))


def _language(bed: _Bed, number: int) -> None:
    tongue = list(SENTENCES)[number % len(SENTENCES)]
    row = bed.take()
    record = row.record
    for slot in bed.data.slots(record):
        if slot.role == "answered" and bed.data.answers_are_labels:
            continue
        text = speak(tongue, bed.rng.randint(2, 4) if slot.role == "asked" else bed.rng.randint(1, 3), bed.rng)
        tail = re.search(r"\n#### .*$", sets.read(record, slot))
        record = sets.write(record, slot, text + (tail[0] if tail else ""))
    bed.change(row, "language", tongue, record)


def _length(bed: _Bed, number: int) -> None:
    row = bed.take()
    slot = bed.slot(row.record, "answered")
    if number % 2:
        answers = sorted(len(sets.read(other.record, bed.slot(other.record, "answered"))) for other in bed.files["train"][:500])
        role = "asked" if bed.data.answers_are_labels else "answered"
        long = ""
        while len(long) < _LONG * answers[len(answers) // 2]:
            other = json.loads(bed.rng.choice(bed.data.files["train"]))
            long += sets.read(other, bed.slot(other, role)) + "\n"
        bed.change(row, "length", f"{_LONG} times the median", sets.write(row.record, slot, long.rstrip()))
    else:
        bed.change(row, "length", "next to nothing", sets.write(row.record, slot, bed.rng.choice(_EMPTY_ANSWERS)))


def _contamination(bed: _Bed, number: int) -> None:
    """Twenty to forty words of a test record, verbatim, inside a longer training record."""
    length = bed.rng.randint(20, 40)
    tests = bed.data.tests
    file = tests[number % len(tests)]
    items = [row for row in bed.files[file] if not row.kind]
    for item in bed.rng.sample(items, len(items)):
        text = " ".join(str(value) for value in _texts(item.record)[:1])
        words = list(re.finditer(r"\S+", text))
        if len(words) >= length:
            break
    else:  # few questions of BANKING77 are that long
        _contamination(bed, number)
        return
    first = bed.rng.randint(0, len(words) - length)
    passage = text[words[first].start() : words[first + length - 1].end()]
    role = "answered" if bed.data.name == "documents" else "asked"
    host = bed.take(
        lambda record: len(sets.read(record, bed.slot(record, role)).split()) >= (15 if bed.data.answers_are_labels else 40)
    )
    slot = bed.slot(host.record, role)
    changed = sets.write(host.record, slot, _put(sets.read(host.record, slot), passage, bed.rng))
    bed.change(host, "contamination", f"{length // 10 * 10} words and more of {file}", changed, item)


def _texts(record: dict[str, Any]) -> list[str]:
    turns = record.get("messages") or record.get("conversations")
    if turns:
        return [turn.get("content") or turn["value"] for turn in turns]
    return [value for value in record.values() if isinstance(value, str)]


_PLANTERS: dict[str, Callable[[_Bed, int], None]] = {
    "exact_duplicate": _exact_duplicate,
    "near_duplicate": _near_duplicate,
    "leak": _leak,
    "label_conflict": _label_conflict,
    "label_spelling": _label_spelling,
    "secret": _secret,
    "personal_data": _personal_data,
    "mojibake": _mojibake,
    "hidden_unicode": _hidden_unicode,
    "control_token_text": _control_token_text,
    "language": _language,
    "length": _length,
    "contamination": _contamination,
}
