"""Generated text in quantity: JSON Lines of chats or of raw documents, as large as asked for, the same for the same seed.

    python benchmarks/corpus.py OUT.jsonl --megabytes 200 [--form text] [--text FOLDER]

Words come with the frequencies they have in real text: that of the `.jsonl` files below a folder, or of the Python manual that
every interpreter carries. Text of known words alone would be too easy on a tokenizer, which remembers how it split a word: one
word in 25 is a number or a name made up of syllables, most of which occur once, as in real text. Word order is random, which no
tokenizer notices.

With `planted`, a small share of the records has defects for an audit to find; how many is returned. What is planted here is only
work for the audit: how well it finds defects is measured elsewhere, in real data.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

Form = Literal["messages", "text"]

#: Words drawn at a time: large enough that NumPy does the work, a few megabytes.
_DRAWN = 1 << 16
#: Share of words that no vocabulary holds.
_NEW_SHARE = 0.04
_WORDS_A_SENTENCE = (6, 24)

_ONSETS = [
    "b",
    "br",
    "c",
    "ch",
    "cl",
    "d",
    "dr",
    "f",
    "fl",
    "g",
    "gr",
    "h",
    "j",
    "k",
    "kl",
    "l",
    "m",
    "n",
    "p",
    "pl",
    "qu",
    "r",
    "s",
    "sh",
    "sk",
    "st",
    "t",
    "th",
    "tr",
    "v",
    "w",
    "z",
]
_RHYMES = [
    "a",
    "an",
    "ar",
    "ath",
    "e",
    "el",
    "en",
    "er",
    "ess",
    "i",
    "il",
    "in",
    "ith",
    "o",
    "ol",
    "on",
    "or",
    "os",
    "u",
    "um",
    "un",
    "us",
    "y",
]
_OPENINGS = (
    "Explain in your own words:",
    "What follows from this?",
    "Summarize the following.",
    "Please rewrite this so that it is easier to read:",
    "I have a question about this:",
    "Is this right?",
    "Give three reasons for or against it.",
    "Translate it into plain English.",
    "Continue this text:",
    "What would you reply?",
    "Compare the two:",
    "",
)

#: Shares of records that are planted.
SHARES = {"exact_duplicate": 0.002, "near_duplicate": 0.002, "secret": 0.0002, "personal_data": 0.0005, "mojibake": 0.0005}
#: Records of a test set that training repeats, and those of which it holds a passage.
LEAKED, QUOTED = 20, 20


class Prose:
    """Sentences without end.

    Args:
        seed: chooses them.
        text: a folder whose `.jsonl` files lend their words; the manual of Python where there is none.
    """

    def __init__(self, seed: int, text: Path | None = None) -> None:
        self._draw = np.random.default_rng(seed)
        self._random = random.Random(seed)
        self._words = np.array(re.findall(r"[A-Za-z][A-Za-z'-]*[,;]?", _some_text(text)), dtype=object)

    def sentences(self) -> Iterator[str]:
        """Sentences of 6 to 24 words."""
        low, high = _WORDS_A_SENTENCE
        while True:
            words = self._words[self._draw.integers(0, len(self._words), _DRAWN)].tolist()
            for at in np.flatnonzero(self._draw.random(_DRAWN) < _NEW_SHARE).tolist():
                words[at] = self._new_word()
            ends = np.cumsum(self._draw.integers(low, high + 1, _DRAWN // low))
            start = 0
            for end in ends[ends <= _DRAWN].tolist():
                words[start] = words[start].capitalize()
                yield " ".join(words[start:end]).rstrip(",;") + "."
                start = end

    def _new_word(self) -> str:
        chosen = self._random.random()
        if chosen < 0.5:
            return str(int(10 ** (6 * self._random.random())))
        syllables = (self._random.choice(_ONSETS) + self._random.choice(_RHYMES) for _ in range(self._random.randint(2, 3)))
        name = "".join(syllables)
        return name.capitalize() if chosen < 0.8 else name


def _some_text(folder: Path | None) -> str:
    if folder is None:
        from pydoc_data.topics import topics

        return "\n".join(topics.values())
    pieces: list[str] = []
    for path in sorted(folder.glob("**/*.jsonl")):
        with path.open(encoding="utf-8") as file:
            for line in file:
                pieces += _strings(json.loads(line))
    return "\n".join(pieces).replace("<unk>", "")  # how WikiText writes a rare word


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for below in value.values() if isinstance(value, dict) else value:
            yield from _strings(below)


@dataclass
class Written:
    """What a file holds."""

    records: int = 0
    bytes: int = 0
    text_bytes: int = 0
    """Bytes of the texts alone, UTF-8."""
    planted: Counter[str] = field(default_factory=Counter)


def chats(prose: Prose, seed: int) -> Iterator[dict[str, Any]]:
    """Conversations of one to three exchanges, 300 to 2,000 characters."""
    choose, sentences = random.Random(seed), prose.sentences()
    while True:
        messages = []
        for _ in range(choose.choices((1, 2, 3), (75, 18, 7))[0]):
            asked = [choose.choice(_OPENINGS), *(next(sentences) for _ in range(choose.randint(1, 2)))]
            answered = [next(sentences) for _ in range(choose.randint(3, 5))]
            joint = choose.choice((" ", " ", " ", "\n", "\n\n", "\n- "))
            messages.append({"role": "user", "content": " ".join(filter(None, asked))})
            messages.append({"role": "assistant", "content": joint.join(answered)})
        yield {"messages": messages}


def documents(prose: Prose, seed: int) -> Iterator[dict[str, Any]]:
    """Raw texts of one to eight paragraphs, 300 to 3,000 characters."""
    choose, sentences = random.Random(seed), prose.sentences()
    while True:
        paragraphs = [" ".join(next(sentences) for _ in range(choose.randint(4, 6))) for _ in range(choose.randint(1, 8))]
        yield {"text": "\n\n".join(paragraphs)}


def write(
    path: Path,
    size_bytes: int,
    *,
    form: Form = "messages",
    seed: int = 1,
    text: Path | None = None,
    planted: bool = False,
    test: Path | None = None,
    test_records: int = 200,
) -> Written:
    """Writes a file of `size_bytes` or a little more.

    Args:
        path: the file.
        size_bytes: how large.
        form: chats or raw documents.
        seed: chooses everything.
        text: a folder to take words from.
        planted: whether to plant defects, in `SHARES` of the records (chats only).
        test: a file for a test set of `test_records` chats: training repeats `LEAKED` of them and holds a passage each of
            `QUOTED` others, evenly over the file.
    """
    prose = Prose(seed, text)
    records = chats(prose, seed) if form == "messages" else documents(prose, seed)
    spread = list(_test_records(test, test_records, seed, text)) if test else []
    done = Written()
    choose = random.Random(seed + 1)
    last: dict[str, Any] | None = None
    with path.open("w", encoding="utf-8", buffering=1 << 20) as file:
        while done.bytes < size_bytes:
            record, kind = next(records), None
            if spread and done.bytes * (LEAKED + QUOTED) >= size_bytes * (LEAKED + QUOTED - len(spread)):
                kind, record = spread.pop(0)(record)
            elif planted and last is not None:
                kind = _drawn(choose.random())
                record = _with_defect(kind, record, last, choose) if kind else record
            if kind:
                done.planted[kind] += 1
            else:
                last = record
            line = json.dumps(record, ensure_ascii=False) + "\n"
            file.write(line)
            done.records += 1
            done.bytes += len(line) if line.isascii() else len(line.encode())
            done.text_bytes += sum(len(part.encode()) for part in _texts(record))
    return done


def _texts(record: dict[str, Any]) -> Iterator[str]:
    if "text" in record:
        yield record["text"]
    for message in record.get("messages", ()):
        yield message["content"]


# ---- defects --------------------------------------------------------------------------------------------------------


def _drawn(chance: float) -> str | None:
    for kind, share in SHARES.items():
        chance -= share
        if chance < 0:
            return kind
    return None


def _with_defect(kind: str, record: dict[str, Any], last: dict[str, Any], choose: random.Random) -> dict[str, Any]:
    if kind == "exact_duplicate":
        return last
    if kind == "near_duplicate":
        return _with_answer(last, lambda answer: answer.replace(" the ", " that ", 1) + " Indeed.")
    characters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"
    addition = {
        "secret": f" The key is AKIA{''.join(choose.choices(characters, k=16))}, keep it.",
        "personal_data": f" Write to {choose.choice(_ONSETS)}{choose.randrange(10**6)}@mail-host.org for more.",
        "mojibake": " The caf\u00e9 of M\u00fcller\u2019s sister was cheap.".encode().decode("cp1252"),
    }[kind]
    return _with_answer(record, lambda answer: answer + addition)


def _with_answer(record: dict[str, Any], change: Any) -> dict[str, Any]:
    *before, answer = record["messages"]
    return {"messages": [*before, {**answer, "content": change(answer["content"])}]}


def _test_records(path: Path, count: int, seed: int, text: Path | None) -> Iterator[Any]:
    """Writes a test set; yields functions from a training record to (what is planted, the record that takes its place)."""
    records = chats(Prose(seed + 2, text), seed + 2)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            record = next(records)
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            if number < LEAKED:
                yield lambda _, same=record: ("leak", same)
            elif number < LEAKED + QUOTED:
                passage = record["messages"][-1]["content"]
                yield lambda other, quoted=passage: ("contamination", _with_answer(other, lambda answer: f"{answer} {quoted}"))


def main() -> None:
    """Writes a file and says what is in it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--megabytes", type=float, default=200)
    parser.add_argument("--form", choices=("messages", "text"), default="messages")
    parser.add_argument("--text", type=Path, help="a folder whose .jsonl files lend their words")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--planted", action="store_true", help="plant defects")
    parser.add_argument("--test", type=Path, help="a file to write a test set to")
    options = parser.parse_args()
    size = round(options.megabytes * 1e6)
    print(
        write(
            options.out,
            size,
            form=options.form,
            seed=options.seed,
            text=options.text,
            planted=options.planted,
            test=options.test,
        )
    )


if __name__ == "__main__":
    main()
