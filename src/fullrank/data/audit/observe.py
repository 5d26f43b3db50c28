"""What is found of one record alone, while it is prepared: sightings in its texts, and facts to draw conclusions from."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from fullrank.data.audit import duplicates, labels, languages, lengths, personal, texts
from fullrank.data.audit.finding import Sighting
from fullrank.data.audit.labels import ShortAnswers
from fullrank.data.convert import Conversation, Document, Pair
from fullrank.data.subject import Subject

#: Raised whenever the checks would find something else in the same record.
CHECKS_VERSION = 4

#: Libraries that decide what is found.
LIBRARIES = ("rensa", "rapidfuzz", "ftfy", "datafog", "py3langid")


class Observer:
    """The halves of the checks that look at one record; can be pickled.

    Args:
        control_tokens: of the tokenizer, as text.
        skip: kinds of findings that are not looked for.
    """

    def __init__(self, control_tokens: Sequence[str], skip: frozenset[str]) -> None:
        self._control_tokens, self._skip = tuple(control_tokens), skip

    @cached_property
    def _texts(self) -> texts.TextChecks:
        return texts.TextChecks(self._control_tokens, self._skip)

    @cached_property
    def _personal(self) -> personal.PersonalChecks:
        return personal.PersonalChecks(self._skip)

    def look(self, subject: Subject) -> list[Sighting]:
        """What is seen in the texts of a record."""
        return [*self._texts.look(subject), *self._personal.look(subject)]

    def masked(self, example: Conversation | Pair | Document, sightings: Sequence[Sighting]) -> Conversation | Pair | Document:
        """The record with what was seen replaced by placeholders."""
        return personal.masked_example(example, sightings)

    def facts(self, subjects: Sequence[Subject]) -> dict[str, np.ndarray]:
        """Facts about N records: arrays of (N,) or (K, N)."""
        found = {**lengths.facts(subjects), **labels.facts(subjects)}
        # The hashes are kept whatever is skipped: by them records that ask the same stay on one side of a validation split.
        found |= duplicates.sign(subjects, near=not self._skip >= _RELATIONAL)
        if "language" not in self._skip:
            found |= languages.facts(subjects)
        return found

    def answers(self, subjects: Sequence[Subject]) -> ShortAnswers:
        """The short answers of the records, counted."""
        return labels.short_answers(subjects)


_RELATIONAL = {"exact_duplicate", "near_duplicate", "leak", "label_conflict"}


def version() -> str:
    """What decides what is found: this code, and the libraries there are."""
    found = [f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES if _is_installed(name)]
    return f"{CHECKS_VERSION}; {', '.join(found)}"


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def left_out(skip: frozenset[str]) -> dict[str, str]:
    """Checks that are not made, and why."""
    missing = {**duplicates.left_out(), **texts.left_out(), **personal.left_out(), **languages.left_out()}
    asked = dict.fromkeys(sorted(skip), "the recipe says so: data.audit.skip")
    return {**{kind: why for kind, why in missing.items() if kind not in skip}, **asked}
