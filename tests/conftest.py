"""What tests share: tiny random models as Hugging Face folders, data rows, and no network.

The builders are in `tiny.py`, which tests and the scripts they start import as `tiny`.
"""

from __future__ import annotations

import os

# Before transformers is imported: a test that would reach for the hub fails at once, here and in the processes it starts.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Tiny models gain nothing from threads, and threads of tests running side by side wait for one another by spinning.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_model_folder(family, **changes)`: a tiny model's folder, written once per session; copy it before changing it.

    Takes the arguments of `tiny.write_model_folder`, such as `seed`, `chat_template`, `dtype` and configuration fields.
    """
    made: dict[str, Path] = {}

    def folder(family: str, **changes: Any) -> Path:
        key = family + repr(sorted(changes.items()))
        if key not in made:
            made[key] = tiny.write_model_folder(tmp_path_factory.mktemp(f"tiny-{family}"), family, **changes)
        return made[key]

    return folder


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """The tokenizer of the tiny models, with their ChatML template; not to be changed."""
    return tiny.tokenizer()


@pytest.fixture
def chat_rows() -> Callable[[int], list[dict[str, Any]]]:
    """`chat_rows(n)`: small conversations, no two alike."""
    return tiny.chat_rows


@pytest.fixture
def write_jsonl() -> Callable[..., Path]:
    """`write_jsonl(path, rows)`: writes rows and returns the path."""
    return tiny.write_jsonl
