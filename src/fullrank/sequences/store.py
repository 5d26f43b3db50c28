"""The token store: a folder of memory-mapped arrays that training reads and data preparation writes.

    ids.i32         every example's token ids, one after another
    supervised.u8   1 where predicting the token carries loss
    offsets.i64     start of each example, and the end of the last
    origins.json    the files the records came from, each with what stands before a record's number ("a.jsonl:")
    origin.i32      (number in origins.json, record's number) of each example

An example's id is its position in the store; where it came from is kept to the end, so that a message can name file and line.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fullrank.sequences.chat import Tokens


class Example(NamedTuple):
    """One example of a store: ids_T (int32) and supervised_T (bool)."""

    ids: np.ndarray
    supervised: np.ndarray

    @property
    def supervised_targets(self) -> int:
        """Tokens that carry loss; the first has nothing before it to be predicted from."""
        return int(self.supervised[1:].sum())


class StoreWriter:
    """Appends examples to a new store; `close` makes it readable.

    Args:
        folder: an existing empty folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ids = (folder / "ids.i32").open("wb")
        self._supervised = (folder / "supervised.u8").open("wb")
        self._offsets = [0]
        self._files: dict[str, int] = {}
        self._origin: list[tuple[int, int]] = []

    def append(self, tokens: Tokens, origin: str) -> None:
        """Adds one example and the place its record came from: words that end in the record's number (`file:12`)."""
        place = origin.rstrip("0123456789")
        self._ids.write(np.asarray(tokens.ids, dtype=np.int32).tobytes())
        self._supervised.write(np.asarray(tokens.supervised, dtype=np.uint8).tobytes())
        self._offsets.append(self._offsets[-1] + len(tokens.ids))
        self._origin.append((self._files.setdefault(place, len(self._files)), int(origin[len(place) :])))

    def close(self) -> None:
        """Writes the index."""
        self._ids.close()
        self._supervised.close()
        # not tofile: its error on a full disk has no number
        (self.folder / "offsets.i64").write_bytes(np.asarray(self._offsets, dtype=np.int64).tobytes())
        (self.folder / "origin.i32").write_bytes(np.asarray(self._origin, dtype=np.int32).tobytes())
        (self.folder / "origins.json").write_text(json.dumps(list(self._files)), encoding="utf-8")


class TokenStore:
    """A store opened for reading; nothing is copied until an example is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._offsets = np.fromfile(folder / "offsets.i64", dtype=np.int64)
        self._ids = _map(folder / "ids.i32", np.dtype(np.int32))
        self._supervised = _map(folder / "supervised.u8", np.dtype(np.uint8))
        self._origin = np.fromfile(folder / "origin.i32", dtype=np.int32).reshape(-1, 2)
        self._files: list[str] = json.loads((folder / "origins.json").read_text(encoding="utf-8"))

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, example: int) -> Example:
        start, end = self._offsets[example], self._offsets[example + 1]
        return Example(self._ids[start:end], self._supervised[start:end].astype(bool))

    def origin(self, example: int) -> str:
        """Where the record behind an example came from, `file:line`."""
        file, line = self._origin[example]
        return f"{self._files[file]}{line}"

    @property
    def lengths(self) -> np.ndarray:
        """lengths_N in tokens."""
        return np.diff(self._offsets)


def _map(path: Path, dtype: np.dtype) -> np.ndarray:
    return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.empty(0, dtype)
