"""Ranks that tests share, and tiny models on the disk that every rank reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from ranks import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], Ranks]]:
    """A world of so many ranks, started when it is first asked for."""
    worlds: dict[int, Ranks] = {}

    def world(size: int) -> Ranks:
        return worlds.setdefault(size, Ranks(size))

    yield world
    for one in worlds.values():
        one.close()
