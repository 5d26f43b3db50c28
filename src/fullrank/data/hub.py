"""Splits of hub datasets, stored by the `datasets` package or streamed over the network as they are read.

Promises: what is streamed is one commit of the dataset, the one its digest names. Streaming stores nothing, so that a second
reading goes over the network again.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fullrank.data.parse import Origin, RawRecord
from fullrank.data.tables import without_nested_nulls
from fullrank.errors import DataError, missing_extra
from fullrank.recipe import Source
from fullrank.run import fingerprint


def name(source: Source) -> str:
    """What messages call the split."""
    return f"{source.hub}[{source.split}]"


def rows(source: Source) -> Iterator[RawRecord]:
    """The rows of the split, in their order.

    Raises:
        DataError: the split cannot be loaded, or the network fails while it is streamed.
        UsageError: the `hub` extra is not installed.
    """
    iterator, number = iter(_load(source)), 0
    while True:
        with _naming_trouble(source, f"cannot be read beyond record {number}"):
            row = next(iterator, None)
        if row is None:
            return
        number += 1
        yield RawRecord(Origin(name(source), number, unit="record"), without_nested_nulls(row))


def digest(source: Source) -> str:
    """SHA-256 over the dataset, its split and the state that `rows` reads.

    The state is the fingerprint that `datasets` gives the stored split; of a streamed one, whose content nobody has seen yet, it
    is the commit.

    Raises:
        DataError: the split cannot be loaded, or its commit cannot be asked for.
        UsageError: the `hub` extra is not installed.
    """
    state = ["commit", commit(source)] if source.streaming else ["stored", _load(source)._fingerprint]
    return fingerprint("hub", source.hub, source.config, source.split, state, source.limit)


def commit(source: Source) -> str:
    """The commit that the source's revision (the main branch by default) names now; a commit names itself.

    Raises:
        DataError: the hub cannot be reached, or knows no such dataset or revision.
    """
    if source.revision and re.fullmatch(r"[0-9a-f]{40}", source.revision):
        return source.revision
    if Path(str(source.hub)).exists():
        raise DataError(f"{source.hub}: is a local folder, which cannot be streamed", hint="name its files with `path`")
    from huggingface_hub import HfApi

    with _naming_trouble(source, "its commit cannot be asked for"):
        found = HfApi().dataset_info(str(source.hub), revision=source.revision).sha
    if not found:
        raise DataError(f"hub dataset {source.hub}: the hub names no commit for it", hint="give its `revision` as a commit")
    return found


def _load(source: Source) -> Any:
    """The split as a `datasets.Dataset`, or `IterableDataset` where it is streamed."""
    try:
        import datasets
    except ImportError:
        raise missing_extra("datasets", "hub", f"the hub dataset {source.hub}") from None
    revision = commit(source) if source.streaming else source.revision
    with _naming_trouble(source, "cannot be loaded"):
        return datasets.load_dataset(source.hub, source.config, split=source.split, revision=revision, streaming=source.streaming)


#: Packages below `datasets` whose errors mean that a dataset is not there or not readable, or that the network failed.
_PACKAGES = ("datasets", "huggingface_hub", "httpx", "httpx2", "aiohttp", "fsspec", "pyarrow")


@contextmanager
def _naming_trouble(source: Source, found: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError | ValueError) and type(error).__module__.split(".")[0] not in _PACKAGES:
            raise
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(
            f"hub dataset {source.hub}, split {source.split}: {found}: {reason[0]}",
            hint="check its id, split and revision, the network, and HF_TOKEN for a gated dataset",
        ) from error
