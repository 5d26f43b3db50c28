"""The token store: shards that data preparation writes, and an index that says which examples a split holds, in which order.

A shard is one safetensors file, memory-mapped when read, whose content depends on nothing but records and settings:

    ids         (T,)    every example's token ids, one after another: uint16 where the vocabulary fits, else int32
    supervised  (T,)    1 where predicting the token carries loss
    offsets     (E+1,)  start of each example, and the end of the last
    record      (E,)    the record, counted within the shard, that each example was made from
    line        (R,)    line of each record, counted from the shard's first
    byte        (R,)    byte where each record begins, counted from the shard's first; -1 where its file has no such place
    ...                 one array a fact that was kept about the records

A split is a folder with `shards.json` (where the shards are, and where their records stood) and `examples.npy` (N, 2): shard and
example of each of its examples. Splits share shards; an example may stand in a split more than once. An example's id is its
position in the split, and where it came from is kept to the end, so that a message can name file and line.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from fullrank.sequences.chat import Tokens

#: Shards that a split holds open at a time: several splits are open at once, and a process may open about a thousand files.
#: Opening one again takes a millisecond.
_OPEN_SHARDS = 64

_DTYPES = {
    "U8": np.uint8,
    "U16": np.uint16,
    "U32": np.uint32,
    "U64": np.uint64,
    "I32": np.int32,
    "I64": np.int64,
    "BOOL": np.bool_,
}


class Example(NamedTuple):
    """One example of a store: ids_T (integers) and supervised_T (bool)."""

    ids: np.ndarray
    supervised: np.ndarray

    @property
    def supervised_targets(self) -> int:
        """Tokens that carry loss; the first has nothing before it to be predicted from."""
        return int(self.supervised[1:].sum())


class Examples(Protocol):
    """Examples by their number."""

    def __len__(self) -> int: ...

    def __getitem__(self, example: int, /) -> Example: ...


# ---- shards ---------------------------------------------------------------------------------------------------------


def write_shard(
    path: Path,
    examples: Sequence[Tokens | Example],
    records: Sequence[int],
    places: Sequence[tuple[int, int]],
    facts: Mapping[str, np.ndarray] | None = None,
    notes: Any = None,
) -> None:
    """Writes a shard.

    Args:
        path: the file.
        examples: E examples.
        records: the record of each example, E numbers.
        places: (line, byte) of each record, counted from the shard's first; byte -1 where there is none.
        facts: arrays about the R records, by name.
        notes: anything JSON can hold.
    """
    lengths = [len(tokens.ids) for tokens in examples]
    offsets = np.zeros(len(examples) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    largest = max((int(np.max(tokens.ids)) for tokens in examples if len(tokens.ids)), default=0)
    ids = np.empty(offsets[-1], np.uint16 if largest < 2**16 else np.int32)
    supervised = np.empty(offsets[-1], np.uint8)
    for tokens, start, end in zip(examples, offsets[:-1], offsets[1:], strict=True):
        ids[start:end] = tokens.ids
        supervised[start:end] = tokens.supervised
    at = np.asarray(places, np.int64).reshape(-1, 2)
    arrays = {
        "ids": ids,
        "supervised": supervised,
        "offsets": offsets,
        "record": np.asarray(records, np.int32),
        "line": np.ascontiguousarray(at[:, 0]),
        "byte": np.ascontiguousarray(at[:, 1]),
        **{name: np.ascontiguousarray(fact) for name, fact in (facts or {}).items()},
    }
    save_file(arrays, path, metadata={"notes": json.dumps(notes, ensure_ascii=False)})


def is_whole(path: Path) -> bool:
    """Whether a shard is there from its first byte to its last: a machine that loses power may leave less under a final name."""
    try:
        with safe_open(path, framework="numpy"):  # compares the header with the file's size
            return True
    except (OSError, SafetensorError):
        return False


class Shard:
    """A shard opened for reading; nothing is copied until it is asked for."""

    def __init__(self, path: Path) -> None:
        self._map = np.memmap(path, np.uint8, mode="r")
        header = int(self._map[:8].view(np.uint64)[0])
        self._entries: dict[str, Any] = json.loads(bytes(self._map[8 : 8 + header]))
        self._notes: str = self._entries.pop("__metadata__")["notes"]
        self._start = 8 + header

    def __getitem__(self, name: str) -> np.ndarray:
        """An array by its name."""
        entry = self._entries[name]
        start, end = entry["data_offsets"]
        array: np.ndarray = self._map[self._start + start : self._start + end].view(_DTYPES[entry["dtype"]])
        return array.reshape(entry["shape"])

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    @property
    def records(self) -> int:
        return int(self._entries["line"]["shape"][0])

    @property
    def notes(self) -> Any:
        """What was noted when the shard was written."""
        return json.loads(self._notes)


@dataclass(frozen=True)
class ShardPlace:
    """A shard of a run, and where its records stood."""

    file: str
    """The shard's file name."""
    path: str
    """The records' file, as messages name it."""
    first: int
    """Line (or number) of the shard's first record."""
    byte: int | None
    """Byte of the shard's first record; None where its file has no such place."""
    unit: Literal["line", "record"]

    def origin(self, line: int) -> str:
        """`file:line` of a record, its line counted from the shard's first."""
        return f"{self.path}:{self.first + line}" if self.unit == "line" else f"{self.path}:record {self.first + line}"


# ---- splits ---------------------------------------------------------------------------------------------------------


def write_index(folder: Path, places: Sequence[ShardPlace], examples: np.ndarray) -> None:
    """Writes a split's folder.

    Args:
        folder: an existing empty folder; the shards lie in `shards` beside it.
        places: the shards it draws from.
        examples: (N, 2) shard, as a position in `places`, and example of each of the split's examples.
    """
    with (folder / "examples.npy").open("wb") as file:
        np.lib.format.write_array(file, np.ascontiguousarray(examples, np.int32).reshape(-1, 2))
    text = json.dumps([asdict(place) for place in places], ensure_ascii=False)
    (folder / "shards.json").write_text(text, encoding="utf-8")


class TokenStore:
    """A split opened for reading."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        places = json.loads((folder / "shards.json").read_text(encoding="utf-8"))
        self.places = [ShardPlace(**place) for place in places]
        self._shards = folder.parent / "shards"
        self.shard = lru_cache(maxsize=_OPEN_SHARDS)(self._open)
        """One of the shards, by its position in `places`."""
        self.examples: np.ndarray = np.load(folder / "examples.npy", mmap_mode="r")
        """(N, 2): shard and example of each of the split's examples."""
        self.lengths = self._lengths()
        """lengths_N in tokens."""

    def _lengths(self) -> np.ndarray:
        lengths = np.zeros(len(self.examples), np.int64)
        order = np.argsort(self.examples[:, 0], kind="stable")
        ends = np.searchsorted(self.examples[order, 0], np.arange(len(self.places) + 1))
        for number in range(len(self.places)):
            mine = order[ends[number] : ends[number + 1]]
            if len(mine):
                lengths[mine] = np.diff(self.shard(number)["offsets"])[self.examples[mine, 1]]
        return lengths

    def _open(self, number: int) -> Shard:
        return Shard(self._shards / self.places[number].file)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, example: int) -> Example:
        number, within = self.examples[example]
        shard = self.shard(number)
        start, end = shard["offsets"][within : within + 2]
        return Example(shard["ids"][start:end], shard["supervised"][start:end].astype(bool))

    def origin(self, example: int) -> str:
        """Where the record behind an example came from, `file:line`."""
        number, within = self.examples[example]
        shard = self.shard(number)
        place: ShardPlace = self.places[number]
        return place.origin(int(shard["line"][shard["record"][within]]))
