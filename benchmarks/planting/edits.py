"""What people do to a text when they write it down twice: slips, synonyms, courtesies, commas, a clause moved.

None of it changes what is asked: numbers, quoted words, markup and whatever else is protected stay as they are.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Collection

#: Words that may stand for one another, either way round.
_SYNONYMS = """
can't|cannot, i'm|i am, don't|do not, didn't|did not, hasn't|has not, isn't|is not, wasn't|was not, won't|will not, i've|i have,
it's|it is, what's|what is, doesn't|does not, haven't|have not, there's|there is, buy|purchase, buys|purchases, bought|purchased,
begin|start, begins|starts, finish|end, big|large, little|small, altogether|in total, because|since, each|every,
about|approximately, receive|get, received|got, kids|children, mother|mom, father|dad, picture|photo, store|shop, hello|hi,
quickly|fast, difficult|hard, incorrect|wrong, issue|problem, help|assist, find|locate, show|display, want|wish, wants|wishes,
need|require, needs|requires, provide|give, create|generate, currently|now, happened|occurred, sometimes|occasionally,
often|frequently, mistake|error, answer|reply, collect|gather, collects|gathers, entire|whole, remaining|leftover,
developed|built, trained|taught, researchers|scientists, goodbye|bye, sentence|phrase
"""
_OTHER_WORD: dict[str, str] = {}
for _pair in _SYNONYMS.replace("\n", " ").split(","):
    _one, _two = _pair.strip().split("|")
    _OTHER_WORD |= {_one: _two, _two: _one}
#: Opening and closing; the first ones suit a text of any length, the others would be half of a short one.
_COURTESIES = (("Hi, ", ""), ("Hello, ", ""), ("Ok, ", ""), ("So ", ""), ("", " Thanks."))
_LONG_COURTESIES = (("Please help: ", ""), ("Quick question: ", ""), ("", " Please advise."), ("", " Thanks in advance."))
_FILLERS = ("just", "really", "also", "actually", "still")
_DISPENSABLE = ("the", "a", "an", "please", "just", "really", "that", "also", "then", "very", "so")
_NEXT_KEY = dict(zip("qwertyuiopasdfghjklzxcvbnm", "wertyuioiosdfghjklkxcvbnmn", strict=True))
_CONDITION = re.compile(r"(?P<when>(?:If|When|After|Once|Before|Because|Since) [^,.?!]+), (?P<then>[^,.?!]+)(?P<end>[.?!])")


def edits_for(text: str) -> int:
    """How many edits leave a text recognisably the same: one word in twelve, at least one."""
    words = len(text.split())
    return 1 if words < 8 else 2 if words < 24 else round(words / 12)


def reword(text: str, rng: random.Random, *, protected: Collection[str] = (), is_question: bool = True) -> tuple[str, str]:
    """The text after some edits, different in more than case, spaces and punctuation, and the names of the edits.

    Args:
        text: To be edited.
        rng: Where the choices come from.
        protected: Words, in lower case, that stay as they are.
        is_question: Greetings and thanks may be added.
    """
    kinds: list[tuple[str, Callable[[str], str | None], int]] = [
        ("typo", lambda t: _typo(t, rng, protected), 4),
        ("synonym", lambda t: _synonym(t, rng, protected), 4),
        ("insertion", lambda t: _insert(t, rng, protected), 2),
        ("omission", lambda t: _omit(t, rng, protected), 2),
        ("moved clause", lambda t: _move(t), 1),
        ("punctuation", lambda t: _repunctuate(t, rng), 1),
    ]
    if is_question:
        kinds.append(("courtesy", lambda t: _greet(t, rng), 1))
    for _ in range(200):
        wanted, edited, names = edits_for(text), text, []
        for _ in range(20 * wanted):
            name, edit, _ = rng.choices(kinds, [weight for *_, weight in kinds])[0]
            result = None if name in ("moved clause", "courtesy") and name in names else edit(edited)
            if result is not None and result != edited:
                edited = result
                names.append(name)
            if len(names) == wanted:
                break
        if names and _letters(edited) != _letters(text):
            return edited, " + ".join(sorted(set(names)))
    raise ValueError(f"no edit applies to {text!r}")


def respace(text: str, rng: random.Random) -> str:
    """The same letters in another case or with other spaces, as pasting and shouting leave them."""
    kinds: list[Callable[[str], str]] = [
        str.upper,
        str.lower,
        str.title,
        lambda t: t.replace(" ", "  "),
        lambda t: f" {t} ",
        lambda t: t.replace(". ", ".\n"),
        lambda t: t.lower().replace(" ", "  ", 2),
    ]
    rng.shuffle(kinds)
    return next(result for kind in kinds if (result := kind(text)) != text)


def _letters(text: str) -> str:
    return "".join(c for c in text.casefold() if c.isalnum())


# ---- single edits: the text after one, or None where it does not apply ------------------------------------------------


def _free_words(text: str, protected: Collection[str]) -> list[re.Match[str]]:
    """Words that may be touched: letters only, outside quotes and calculator annotations."""
    closed = [match.span() for match in re.finditer(r"<<[^>]*>>|\"[^\"]*\"|(?<!\w)'[^']+'(?!\w)|“[^”]*”", text)]
    return [
        match
        for match in re.finditer(r"(?<![\w$#/=.-])[A-Za-z]+(?:['’][a-z]+)?(?![\w/=-])", text)
        if match[0].lower() not in protected and not any(start <= match.start() < end for start, end in closed)
    ]


def _replace(text: str, match: re.Match[str], by: str) -> str:
    return text[: match.start()] + by + text[match.end() :]


def _greet(text: str, rng: random.Random) -> str:
    opening, closing = rng.choice(_COURTESIES + _LONG_COURTESIES if len(text.split()) >= 12 else _COURTESIES)
    return f"{opening}{text}{closing}"


def _typo(text: str, rng: random.Random, protected: Collection[str]) -> str | None:
    words = [match for match in _free_words(text, protected) if len(match[0]) >= 4 and match[0].isalpha()]
    if not words:
        return None
    match = rng.choice(words)
    word = match[0]
    n = rng.randrange(1, len(word) - 1)  # the first letter stays: slips there are rare
    slips = [
        word[:n] + word[n + 1] + word[n] + word[n + 2 :],
        word[:n] + word[n + 1 :],
        word[:n] + word[n] + word[n:],
        word[:n] + _NEXT_KEY[word[n].lower()] + word[n + 1 :],
    ]
    return _replace(text, match, rng.choice(slips))


def _synonym(text: str, rng: random.Random, protected: Collection[str]) -> str | None:
    known = [match for match in _free_words(text, protected) if match[0].lower().replace("’", "'") in _OTHER_WORD]
    if not known:
        return None
    match = rng.choice(known)
    other = _OTHER_WORD[match[0].lower().replace("’", "'")]
    return _replace(text, match, other[0].upper() + other[1:] if match[0][0].isupper() or other.startswith("i ") else other)


def _insert(text: str, rng: random.Random, protected: Collection[str]) -> str | None:
    words = [match for match in _free_words(text, protected) if match.start() > 0 and text[match.start() - 1] == " "]
    if not words:
        return None
    match = rng.choice(words)
    return text[: match.start()] + rng.choice(_FILLERS) + " " + text[match.start() :]


def _omit(text: str, rng: random.Random, protected: Collection[str]) -> str | None:
    words = [
        match for match in _free_words(text, protected) if match[0].lower() in _DISPENSABLE and text[match.end() :][:1] == " "
    ]
    if not words:
        return None
    match = rng.choice(words)
    return text[: match.start()] + text[match.end() + 1 :]


def _repunctuate(text: str, rng: random.Random) -> str | None:
    changes = [text.replace(", ", " ", 1), text.replace("'", "", 1), text.replace("’", "'", 1)]
    if text.endswith(("?", ".", "!")):
        changes += [text[:-1], text + text[-1]]
    elif text[-1:].isalnum():
        changes.append(text + "?")
    return rng.choice(changes)


def _move(text: str) -> str | None:
    """A condition put behind what it conditions, or else the last sentence put first."""
    if match := _CONDITION.search(text):
        when, then = match["when"], match["then"]
        return _replace(text, match, f"{then[0].upper()}{then[1:]} {when[0].lower()}{when[1:]}{match['end']}")
    sentences = re.split(r"(?<=[.?!])\s+(?=[A-Z])", text)
    return " ".join([sentences[-1], *sentences[:-1]]) if len(sentences) > 1 and text[-1] in ".?!" else None
