"""Shards by what they were made from, kept beside the runs of one folder: `runs/.shards`.

A shard's name is the SHA-256 of the block's bytes and the settings it was made with, so a shard that is there is the right one:
no date, path or run name can make it stale, and another run on the same data, a longer file or another mix takes what is there.
A run holds its shards by links of its own; what no run has held for a week is removed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from pathlib import Path

from fullrank.data.sources import Block
from fullrank.run import naming_disk_trouble

#: A stopped preparation is continued within days; what is older and in no run is a leftover.
_UNUSED_SECONDS = 7 * 24 * 3600.0


class ShardCache:
    """The shards of a folder of runs.

    Args:
        folder: made if need be; on the same file system as the runs, so that links cost nothing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with naming_disk_trouble(folder):
            folder.mkdir(parents=True, exist_ok=True)

    def path(self, block: Block, settings: str) -> Path:
        """Where the shard of a block made with these settings (their fingerprint) is, or will be."""
        digest = hashlib.sha256(f"{settings}\n{block.kind}\n".encode())
        digest.update(block.payload)
        return self.folder / f"{digest.hexdigest()}.safetensors"

    @property
    def digests(self) -> Path:
        """Where the digests of files are remembered."""
        return self.folder / "digests.json"

    def give(self, shard: Path, to: Path) -> None:
        """Puts a shard under a name in a run: a link, or a copy where the file system has none."""
        with naming_disk_trouble(to):
            try:
                os.link(shard, to)
            except OSError:
                shutil.copyfile(shard, to)
        os.utime(shard)

    def prune(self) -> None:
        """Removes shards that no run holds and nobody has used for a week, and what a killed process left half-written."""
        oldest = time.time() - _UNUSED_SECONDS
        for path in [*self.folder.glob("*.safetensors"), *self.folder.glob(".*.partial")]:
            try:
                facts = path.stat()
                if facts.st_nlink == 1 and facts.st_mtime < oldest:
                    path.unlink()
            except FileNotFoundError:  # another process prunes as well
                continue
