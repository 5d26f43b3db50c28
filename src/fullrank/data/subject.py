"""What the audit sees of a record: every text in it, where it stands, and which of it is asked and which is answered.

The audit looks at what people wrote, never at what a template adds: two records are duplicates whatever model they are rendered
for, and a system prompt that every template repeats makes no two records alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from fullrank.data.convert import Conversation, Document, Pair


class Part(NamedTuple):
    """One text of a record."""

    place: str
    """`messages[1].content`, `prompt`, `completion`, `text`, ..."""
    role: str
    """system, developer, user, assistant, tool; `document` for raw text."""
    text: str


@dataclass(frozen=True)
class Subject:
    """A record as the audit sees it."""

    parts: tuple[Part, ...]
    """Every text, in order, as written."""
    prompt: str
    """What stands before the last answer, roles left out, one text a line; empty for raw text."""
    answer: str
    """The last answer; the whole of raw text."""
    tools: tuple[Part, ...] = ()
    """The texts of the tools' schemas, looked at for secrets, hidden text and the like, and for nothing else."""


def subject_of(example: Conversation | Pair | Document) -> Subject:
    """The subject of a normalised record."""
    match example:
        case Document(text):
            return Subject((Part("text", "document", text),), "", text)
        case Pair(prompt, completion):
            return Subject((Part("prompt", "user", prompt), Part("completion", "assistant", completion)), prompt, completion)
        case Conversation(messages, tools):
            parts = tuple(_parts(messages))
            last = max(n for n, message in enumerate(messages) if message["role"] == "assistant")
            asked = [part.text for part in parts if int(part.place.split("[")[1].split("]")[0]) < last]
            answered = [part.text for part in parts if part.place.startswith(f"messages[{last}]")]
            schemas = tuple(Part(f"tools{below}", "system", text) for below, text in _texts(tools))
            return Subject(parts, "\n".join(asked), "\n".join(answered), schemas)


def _parts(messages: list[dict[str, Any]]) -> Iterator[Part]:
    for number, message in enumerate(messages):
        for key, value in message.items():
            if key == "role":
                continue
            for below, text in _texts(value):
                yield Part(f"messages[{number}].{key}{below}", message["role"], text)


def _texts(value: Any) -> Iterator[tuple[str, str]]:
    """Every string inside a value, with the path to it."""
    if isinstance(value, str):
        yield "", value
    elif isinstance(value, dict):
        for key, below in value.items():
            yield from ((f".{key}{path}", text) for path, text in _texts(below))
    elif isinstance(value, list):
        for index, below in enumerate(value):
            yield from ((f"[{index}]{path}", text) for path, text in _texts(below))
