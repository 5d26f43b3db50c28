"""What checks hand over: sightings in one record, facts about many, findings for the user."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fullrank.data.subject import Subject
from fullrank.records import Finding, Place

__all__ = ["Finding", "Place", "Sighting", "SplitFacts"]


@dataclass(frozen=True)
class Sighting:
    """Something seen in one text of one record."""

    kind: str
    """The finding's kind: mojibake, hidden_unicode, secret, personal_data, control_token_text."""
    what: str
    """The sort of thing, the same words for every sighting of its sort: `AWS access key`, `zero-width space U+200B`."""
    place: str
    """The part of the record, as `fullrank.data.subject.Part.place` has it."""
    start: int
    end: int
    """Characters of the part's text, end exclusive."""


class SplitFacts(Protocol):
    """The facts that checks left about the records of one split, read from its shards one column at a time."""

    name: str
    """train, validation, or the name of a test set (`test` where there is one)."""
    is_test: bool

    def __len__(self) -> int:
        """Number of records used."""
        ...

    def column(self, name: str) -> np.ndarray:
        """One fact of every record, column_N: (N records)."""
        ...

    def row(self, name: str, number: int) -> np.ndarray:
        """One line of a two-dimensional fact stored as (K, N): column_N."""
        ...

    def place(self, record: int) -> Place:
        """Where a record stands."""
        ...

    def subjects(self, records: Sequence[int]) -> Iterator[Subject]:
        """The records themselves, read again from their source; keep `records` ascending, it reads forward."""
        ...
