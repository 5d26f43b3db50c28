"""Languages: which one each prompt and answer is written in, and records that leave the language of the rest.

A language is told from at most `LONGEST` characters (the end of the prompt, where the question stands, and the beginning of the
answer), and only where there are letters enough and py3langid is sure; everything else stays undetermined and is never counted
as foreign. Labels, numbers, formulas and queries are mostly undetermined, as they should be.

Promises: every record is looked at; English prose in ASCII is known by its function words without asking py3langid. Closely
related languages (Danish and Norwegian, Croatian and Bosnian) are often left undetermined. Code and markup count as the language
of their words.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from fullrank.data.audit.finding import Finding, SplitFacts
from fullrank.data.audit.sightings import MOST_RECORDS
from fullrank.data.subject import Subject
from fullrank.records import Place
from fullrank.units import plural

if TYPE_CHECKING:
    from py3langid.langid import LanguageIdentifier

#: Characters that are looked at. Of 2,211 messages in 70 languages (Django's translations) 77.4 % are told rightly from 100
#: characters, 77.5 % from 150 and no more from 300; 0.2 % wrongly, the rest is left undetermined.
LONGEST = 150

#: Fewer letters are not judged: 1 % of BANKING77's questions with fewer come out as another language than English, none of the
#: 10,000 with more.
FEWEST_LETTERS = 25

#: Ideographs, syllables and other signs from U+2E80 on say as much as three letters, which is also their length in UTF-8.
_DENSE = "\u2e80"
_DENSE_LETTERS = 3

#: py3langid's normalised probability from which a language is believed. Of 30,000 English texts of 25 letters and more (GSM8K,
#: BANKING77, MMLU, PubMedQA, WikiSQL, chats) one is taken for another language at 0.8: a list of Latin names of muscles.
SURE = 0.8

#: The main language is this share of the texts whose language is known, or there is none and nothing is foreign.
MAIN = 0.9

#: Answers in another language than their prompts are a task (translation) from this share on, and stray below.
TASK = 0.1

#: English words that hold sentences together; none that another language written in ASCII has too (Dutch `of`, `is`, `was`,
#: Danish `at`, `for`, `by`, German `will`).
_FUNCTION_WORDS = frozenset(
    (
        "the", "and", "are", "were", "with", "that", "this", "these", "those", "what", "what's", "how", "which", "who", "whose",
        "from", "have", "haven't", "been", "does", "doesn't", "don't", "didn't", "can't", "isn't", "won't", "many", "much", "so",
        "their", "they", "she", "its", "it's", "if", "you", "your", "you're", "would", "should", "could", "because", "there",
        "when", "where", "why", "each", "every", "into", "than", "then", "i'm", "i've", "not", "but", "about", "after", "before",
    )
)  # fmt: skip
#: English is certain when this many of them occur, and they are this share of the words: of 6,378 ASCII messages in other
#: languages (Django's translations) only those are taken for English that were never translated.
_FEWEST_FUNCTION_WORDS = 3
_FUNCTION_SHARE = 0.1


#: Languages of a mix that are named.
_MOST_SHOWN = 12


def left_out() -> dict[str, str]:
    """Kind -> why nothing can be said about languages."""
    if importlib.util.find_spec("py3langid") is not None:
        return {}
    return {"language": "languages were not told: that needs the package 'py3langid' (pip install 'fullrank[data]')"}


def sampled() -> dict[str, str]:
    """Kind -> the part of each record that is looked at."""
    return {"language": f"the last {LONGEST} characters of each prompt and the first {LONGEST} of each answer"}


# ---- codes ----------------------------------------------------------------------------------------------------------

#: Stands for a text whose language is not known.
UNDETERMINED = 0


def code_of(language: str) -> int:
    """An ISO 639 code of two or three letters as a number below 27^3; 0 for none. The same in every version of the library."""
    number = 0
    for letter in language.ljust(3, "`"):
        number = number * 27 + ord(letter) - ord("`")
    return number


def language_of(code: int) -> str:
    """The ISO 639 code back from its number; empty for `UNDETERMINED`."""
    letters = (chr(ord("`") + code // 27**power % 27) for power in (2, 1, 0))
    return "".join(letters).rstrip("`")


_ENGLISH = code_of("en")


# ---- in the worker --------------------------------------------------------------------------------------------------


def facts(subjects: Sequence[Subject]) -> dict[str, np.ndarray]:
    """`prompt_language` and `answer_language`, uint16_N each: `code_of` the language, 0 where it is not known.

    Without py3langid all are 0. The answer of raw text is the text, its prompt is not known.
    """
    columns = {
        "prompt_language": (subject.prompt[-LONGEST:] for subject in subjects),
        "answer_language": (subject.answer[:LONGEST] for subject in subjects),
    }
    if left_out():
        return {name: np.zeros(len(subjects), dtype=np.uint16) for name in columns}
    return {name: np.fromiter(map(_code, texts), dtype=np.uint16, count=len(subjects)) for name, texts in columns.items()}


def _code(text: str) -> int:
    if len(text) < FEWEST_LETTERS // _DENSE_LETTERS:
        return UNDETERMINED
    if text.isascii():
        words = text.lower().split()
        known = len(_FUNCTION_WORDS.intersection(words))
        if known >= _FEWEST_FUNCTION_WORDS and known >= _FUNCTION_SHARE * len(words):
            return _ENGLISH
    letters = sum(map(str.isalpha, text))
    if not text.isascii():
        letters += (_DENSE_LETTERS - 1) * sum(char >= _DENSE for char in text)
    if letters < FEWEST_LETTERS:
        return UNDETERMINED
    language, probability = _identifier().classify(text)
    # `zxx`: no linguistic content; `und`: undetermined.
    return code_of(language) if probability >= SURE and language not in ("zxx", "und") else UNDETERMINED


@cache
def _identifier() -> LanguageIdentifier:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


# ---- in the parent --------------------------------------------------------------------------------------------------


def conclude(splits: Sequence[SplitFacts]) -> list[Finding]:
    """The language mix of each split as a note, records outside the main language and answers outside their prompt's as warnings.

    The main language is that of the training data (of everything where there is none), by the answers, or by the prompts of
    records whose answer says nothing.
    """
    counts = {split.name: np.bincount(_of_records(split), minlength=1) for split in splits}
    findings = [_mix(split.name, counts[split.name]) for split in splits if counts[split.name][1:].any()]
    decisive = [counts[split.name] for split in splits if split.name == "train"] or list(counts.values())
    main = _main(decisive)
    if main is not None:
        findings += _foreign(splits, main)
    return findings + _answered_otherwise(splits)


def _of_records(split: SplitFacts) -> np.ndarray:
    """code_N: the answer's language, the prompt's where the answer's is not known."""
    answers = np.asarray(split.column("answer_language"))
    return np.where(answers == UNDETERMINED, np.asarray(split.column("prompt_language")), answers)


def _mix(name: str, count: np.ndarray) -> Finding:
    common = [int(code) for code in np.argsort(-count, kind="stable") if code != UNDETERMINED and count[code]]
    shares = [f"{language_of(code)} {100 * count[code] / count.sum():.1f} %" for code in common[:_MOST_SHOWN]]
    if count[UNDETERMINED]:
        shares.append(f"not determined {100 * count[UNDETERMINED] / count.sum():.1f} %")
    return Finding(
        kind="language",
        severity="note",
        what=f"languages of {name}: {', '.join(shares)}",
        records=[],
        count=int(count.sum()),
        advice="Nothing to do if these are the languages the model shall answer in.",
    )


def _main(counts: Sequence[np.ndarray]) -> int | None:
    """The code of the language that `MAIN` of the known texts are in."""
    total = np.zeros(max(map(len, counts), default=1), dtype=np.int64)
    for count in counts:
        total[: len(count)] += count
    total[UNDETERMINED] = 0
    main = int(total.argmax())
    return main if total[main] > 0 and total[main] >= MAIN * total.sum() else None


def _foreign(splits: Sequence[SplitFacts], main: int) -> list[Finding]:
    """One finding for each language other than the main one: records that have no text in the main one."""
    places: dict[int, list[Place]] = {}
    total: dict[int, int] = {}
    for split in splits:
        languages = _of_records(split)
        prompts = np.asarray(split.column("prompt_language"))
        foreign = (languages != UNDETERMINED) & (languages != main) & (prompts != main)
        for code in map(int, np.unique(languages[foreign])):
            records = np.flatnonzero(foreign & (languages == code))
            total[code] = total.get(code, 0) + len(records)
            listed = places.setdefault(code, [])
            listed += [split.place(int(record)) for record in records[: MOST_RECORDS - len(listed)]]
    return [
        Finding(
            kind="language",
            severity="warning",
            what=f"{plural(total[code], 'record')} in {language_of(code)!r}, in data that is {language_of(main)!r} otherwise",
            records=places[code],
            count=total[code],
            advice="Remove the records if they got in by mistake; if not, see that the test data hold this language too.",
        )
        for code in sorted(total, key=lambda code: (-total[code], code))
    ]


def _answered_otherwise(splits: Sequence[SplitFacts]) -> list[Finding]:
    """Answers in another language than their prompts."""
    places: list[Place] = []
    count = both = 0
    for split in splits:
        prompts, answers = np.asarray(split.column("prompt_language")), np.asarray(split.column("answer_language"))
        known = (prompts != UNDETERMINED) & (answers != UNDETERMINED)
        different = np.flatnonzero(known & (prompts != answers))
        both += int(known.sum())
        count += len(different)
        places += [split.place(int(record)) for record in different[: MOST_RECORDS - len(places)]]
    if count == 0:
        return []
    return [
        Finding(
            kind="language",
            severity="note" if count >= TASK * both else "warning",
            what=f"{plural(count, 'answer')} in another language than the prompt, of {both:,} where both are known",
            records=places,
            count=count,
            advice="Right for translation and teaching; elsewhere the model learns to change the language.",
        )
    ]
