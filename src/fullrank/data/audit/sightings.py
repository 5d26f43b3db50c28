"""Sightings of single texts: kept apart while a text is looked at, and turned into findings once all records have been.

Promises: memory for the listed records only, whatever the number of sightings; a finding never repeats what was seen (a secret in
a report would be one more leak). Expects the sightings of a record to follow one another.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from fullrank.data.audit.finding import Finding, Place, Sighting
from fullrank.records import Severity
from fullrank.units import plural

#: Records listed in one finding.
MOST_RECORDS = 10_000

SEVERITY: dict[str, Severity] = {
    "secret": "error",
    "personal_data": "warning",
    "mojibake": "warning",
    "hidden_unicode": "warning",
    "homoglyph": "warning",
    "control_token_text": "warning",
}

ADVICE = {
    "secret": "Revoke what is still valid, then remove the records or have them masked: a model can repeat what it saw once.",
    "personal_data": "Remove the records or have them masked, unless the people concerned agreed to this use.",
    "mojibake": "Decode the source with the encoding it was written in, or repair these texts (ftfy does) and look again.",
    "hidden_unicode": "Remove the characters: nobody sees them, they change the tokens around them and may hide instructions.",
    "homoglyph": "Write each word in one alphabet: a look-alike letter makes other tokens of the same word.",
    "control_token_text": "It is encoded as text, never as a control token; check that it is meant, and no template left over.",
}

Span = tuple[str, int, int]
"""What was seen, first character, end."""


class Spans:
    """Spans of one text, none of which overlaps another: the first to come stays."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._spans: list[Span] = []

    def __iter__(self) -> Iterator[Span]:
        """From the start of the text to its end."""
        return iter(self._spans)

    def add(self, what: str, start: int, end: int) -> None:
        """Keeps the span, unless a part of it is taken."""
        at = bisect_left(self._starts, end)
        if at > 0 and self._spans[at - 1][2] > start:
            return
        self._starts.insert(at, start)
        self._spans.insert(at, (what, start, end))

    def extend(self, spans: Iterable[Span]) -> None:
        for span in spans:
            self.add(*span)


@dataclass
class _Sort:
    """One sort of thing: where it was seen."""

    places: list[Place] = field(default_factory=list)
    count: int = 0
    last: Place | None = None


def conclude_sightings(sightings: Iterable[tuple[Place, Sighting]], records_in_all: int) -> list[Finding]:
    """One finding for each kind and sort of thing, the commonest first within its kind.

    Args:
        sightings: with the record each was made in; those of one record follow one another.
        records_in_all: records that were looked at.
    """
    sorts: dict[tuple[str, str], _Sort] = {}
    for place, sighting in sightings:
        sort = sorts.setdefault((sighting.kind, sighting.what), _Sort())
        if sort.last == place:
            continue
        sort.last = place
        sort.count += 1
        if len(sort.places) < MOST_RECORDS:
            sort.places.append(place)
    order = list(SEVERITY)
    found = sorted(sorts.items(), key=lambda item: (order.index(item[0][0]), -item[1].count, item[0][1]))
    return [
        Finding(
            kind=kind,
            severity=SEVERITY[kind],
            what=f"{what}: in {plural(sort.count, 'record')} of {records_in_all:,}",
            records=sort.places,
            count=sort.count,
            advice=ADVICE[kind],
        )
        for (kind, what), sort in found
    ]
