"""The second reading of training data: passages of test records are looked for in every record, in parallel.

Test sets may change without the tokens of training records changing, so what is looked for is no part of a shard, and training
texts are read again for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fullrank.data import convert, sources
from fullrank.data.audit.contamination import Grams
from fullrank.data.facts import Facts
from fullrank.data.pool import Pool
from fullrank.data.sources import Block, RawRecord
from fullrank.data.subject import subject_of
from fullrank.sequences.store import Shard


class Look:
    """The task of looking through a block."""

    def __init__(self, grams: Grams) -> None:
        self.grams = grams

    def warm(self) -> None:
        """There is nothing to load."""

    def run(self, block: Block, shard: Path) -> np.ndarray:
        """(2, hits): record, counted among those of the block's shard, and passage."""
        prepared = Shard(shard)
        used = set(zip(prepared["line"].tolist(), prepared["byte"].tolist(), strict=True))
        subjects = [
            subject_of(convert.normalise(item)[1])
            for item in sources.records(block)
            if isinstance(item, RawRecord) and sources.within(block, item.origin) in used
        ]
        return self.grams.look(subjects)


def find(train: Facts, grams: Grams, pool: Pool) -> np.ndarray:
    """(2, hits): record of the training split, and passage."""
    found = [np.empty((2, 0), np.int64)]
    if not len(grams.hashes):
        return found[0]
    results = pool.each(Look(grams), _jobs(train))
    for (_, _, numbers), hits in zip(train.numbers(), results, strict=True):
        records = numbers[hits[0].astype(np.int64)]
        found.append(np.stack([records, hits[1].astype(np.int64)])[:, records >= 0])
    return np.concatenate(found, axis=1)


def _jobs(train: Facts) -> Iterator[tuple[Any, ...]]:
    for prepared in train.prepared:
        for block, (_, path) in zip(sources.blocks(prepared.source), prepared.shards, strict=True):
            yield block, path
