"""The prepared records of a split, one fact at a time: what the audit's conclusions are drawn from.

Columns are read from the shards as they are asked for, so that what is held is a few bytes a record, however long the records
are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from fullrank.data import convert, sources
from fullrank.data.audit.observe import Observer
from fullrank.data.sources import RawRecord
from fullrank.data.subject import Subject, subject_of
from fullrank.errors import DataError
from fullrank.recipe import Source
from fullrank.records import Place
from fullrank.sequences.store import Shard, ShardPlace

#: Shards are read under the names of their contents, so one that is open is never another.
_opened = lru_cache(maxsize=64)(Shard)


class PreparedSource:
    """A source and its shards.

    Args:
        source: as the recipe has it.
        shards: (place, file) in the order of the records.
    """

    def __init__(self, source: Source, shards: Sequence[tuple[ShardPlace, Path]]) -> None:
        self.source = source
        self.shards = list(shards)
        self.starts = np.zeros(len(self.shards) + 1, np.int64)
        """Position, among the source's records, of each shard's first record; and their number."""
        np.cumsum([_opened(path).records for _, path in self.shards], out=self.starts[1:])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def opened(self) -> Iterator[tuple[ShardPlace, Shard]]:
        """The shards, one at a time."""
        for place, path in self.shards:
            yield place, _opened(path)


class Facts:
    """The records of one split; see `fullrank.data.audit.finding.SplitFacts`.

    Args:
        name: of the split.
        is_test: whether it is only evaluated on.
        prepared: its sources.
        chosen: which records of the sources, all of them counted together, belong to the split; None for all.
        observer: knows what is masked.
        masked: kinds of sightings that are replaced before anything is trained.
    """

    def __init__(
        self,
        name: str,
        *,
        is_test: bool,
        prepared: Sequence[PreparedSource],
        chosen: np.ndarray | None,
        observer: Observer,
        masked: Sequence[str],
    ) -> None:
        self.name = name
        self.is_test = is_test
        self.prepared = prepared
        self._observer = observer
        self._masked = masked
        total = sum(len(source) for source in prepared)
        self._chosen = np.arange(total) if chosen is None else chosen
        self._source_starts = np.cumsum([0, *(len(source) for source in prepared)])

    def __len__(self) -> int:
        return len(self._chosen)

    def column(self, name: str) -> np.ndarray:
        """One fact of every record: column_N."""
        return self._gathered([np.array(shard[name]) for _, shard in self._shards()])  # copies: a view would hold its file open

    def row(self, name: str, number: int) -> np.ndarray:
        """One line of a fact stored as (K, N): column_N."""
        return self._gathered([np.array(shard[name][number]) for _, shard in self._shards()])

    def forms(self) -> dict[str, int]:
        """Records by the form they came in."""
        counts = np.bincount(self.column("form").astype(np.int64), minlength=len(convert.FORMS))
        return {form: int(count) for form, count in zip(convert.FORMS, counts, strict=True) if count}

    def used(self) -> list[int]:
        """Records of the split from each source."""
        return [int(count) for count in np.diff(np.searchsorted(self._chosen, self._source_starts))]

    def of(self, prepared: Sequence[PreparedSource]) -> bool:
        """Whether these are the sources."""
        return self.prepared is prepared

    def shares(self, other: Facts) -> bool:
        """Whether a record stands in both: a document in pieces, of which some are held out."""
        return self.prepared is other.prepared and bool(np.isin(self._chosen, other._chosen).any())

    def has(self, name: str) -> bool:
        """Whether the fact was kept."""
        return all(name in shard for _, shard in self._shards())

    def _shards(self) -> Iterator[tuple[ShardPlace, Shard]]:
        for source in self.prepared:
            yield from source.opened()

    def _gathered(self, parts: list[np.ndarray]) -> np.ndarray:
        whole = np.concatenate(parts) if parts else np.empty(0)
        return whole if len(whole) == len(self._chosen) else whole[self._chosen]

    # ---- single records ---------------------------------------------------------------------------------------------

    def _where(self, record: int) -> tuple[PreparedSource, int, int]:
        """Source, shard and record within the shard."""
        number = int(self._chosen[record])
        source = int(np.searchsorted(self._source_starts, number, side="right")) - 1
        within = number - int(self._source_starts[source])
        prepared = self.prepared[source]
        shard = int(np.searchsorted(prepared.starts, within, side="right")) - 1
        return prepared, shard, within - int(prepared.starts[shard])

    def place(self, record: int) -> Place:
        """Where a record stands."""
        prepared, number, within = self._where(record)
        place, path = prepared.shards[number]
        return Place(path=place.path, line=place.first + int(_opened(path)["line"][within]), split=self.name)

    def numbers(self) -> Iterator[tuple[ShardPlace, Shard, np.ndarray]]:
        """Every shard with the split's number of each of its records; -1 for records of another split."""
        total = int(self._source_starts[-1])
        position = np.full(total, -1, np.int64)
        position[self._chosen] = np.arange(len(self._chosen))
        start = 0
        for place, shard in self._shards():
            yield place, shard, position[start : start + shard.records]
            start += shard.records

    def raw(self, records: Sequence[int]) -> Iterator[RawRecord]:
        """Records as their source has them, read again; ascending numbers are read in one pass.

        Raises:
            DataError: a source has changed since.
        """
        passes: dict[int, Iterator[RawRecord]] = {}
        for record in records:
            prepared, number, within = self._where(record)
            place, path = prepared.shards[number]
            shard = _opened(path)
            byte, line = int(shard["byte"][within]), place.first + int(shard["line"][within])
            offset = None if place.byte is None or byte < 0 else place.byte + byte
            if offset is not None and sources.is_seekable(place.path):
                yield sources.read_at(place.path, offset, line)
                continue
            where = place.path, line, offset  # one line of an array may hold several records
            key = id(prepared)
            for again in (False, True):
                if key not in passes or again:
                    passes[key] = (item for item in sources.read(prepared.source) if isinstance(item, RawRecord))
                found = next((r for r in passes[key] if (r.origin.path, r.origin.line, r.origin.offset) == where), None)
                if found is not None:
                    yield found
                    break
            else:
                raise DataError(f"{place.origin(int(shard['line'][within]))}: the record is no longer there")

    def subjects(self, records: Sequence[int]) -> Iterator[Subject]:
        """The records as the audit sees them; what is masked in training is masked here."""
        for raw in self.raw(records):
            yield subject_of(self.example(raw))

    def example(self, raw: RawRecord) -> convert.Conversation | convert.Pair | convert.Document:
        """A record as it is trained on, before it is tokens."""
        _, example = convert.normalise(raw)
        if self._masked:
            found = [s for s in self._observer.look(subject_of(example)) if s.kind in self._masked]
            example = self._observer.masked(example, found) if found else example
        return example
