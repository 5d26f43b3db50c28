"""Some optimizer steps in a process of their own, as `fullrank train` takes them: seconds, peak memory, and what was learned.

    python benchmarks/memory_step.py REQUEST        (JSON, see `Request`)

Prints one line of JSON. The peak is the system's own count of resident pages (VmHWM), of the whole process.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig

from fullrank.parallel.quiet import are_long, between_steps, quiet
from fullrank.recipe import Recipe
from fullrank.sequences.layout import MicroBatch, row_of
from fullrank.sequences.store import Example
from fullrank.train.setup import engine_for, load_rows


@dataclass(frozen=True)
class Request:
    """What is asked of the process."""

    model: str
    """A Hugging Face folder."""
    train: dict[str, Any]
    """The recipe's section of that name."""
    machine: dict[str, Any] = field(default_factory=dict)
    """The recipe's section of that name."""
    recompute: str = "block"
    rows: int = 4
    """Rows of a step."""
    row_tokens: int = 64
    steps: int = 2
    digest: bool = False
    """Whether to tell the SHA-256 of the weights after the last step."""


def main() -> None:
    """Answers the request."""
    request = Request(**json.loads(sys.argv[1]))
    print(json.dumps(answer(request)))


def answer(request: Request) -> dict[str, Any]:
    """Takes the steps."""
    tree = {"name": "memory", "model": {"source": request.model}, "data": {"train": "none"}}
    recipe = Recipe.model_validate(tree | {"train": {"precision": "fp32"} | request.train, "machine": request.machine})
    waiting = Path(tempfile.mkdtemp())
    seconds, norms, losses, changed = [], [], [], []
    hidden = AutoConfig.from_pretrained(request.model).get_text_config().hidden_size
    with quiet(large_apart=are_long(request.row_tokens, hidden)):
        rows = load_rows(recipe, Path(request.model), torch.device("cpu"))
        engine = engine_for(recipe, rows, request.recompute, waiting)
        vocabulary = rows.model.config.get_text_config().vocab_size
        loaded = peak_bytes()
        for step in range(request.steps):
            laid_out = _rows(request, step, vocabulary)
            supervised = sum(row.supervised_tokens for row in laid_out)
            started = time.perf_counter()
            outcome = engine.step(laid_out, supervised, learning_rate=recipe.train.optimizer.learning_rate, seed=step)
            seconds.append(time.perf_counter() - started)
            norms.append(outcome.grad_norm)
            losses.append(outcome.loss)
            changed.append(outcome.changed_ratio)
            between_steps()
        peak = peak_bytes()
    shutil.rmtree(waiting, ignore_errors=True)
    return {
        "parameters": sum(p.numel() for p in rows.model.parameters()),
        "outside_parameters": rows.model.get_input_embeddings().weight.numel(),
        "seconds": seconds,
        "grad_norms": norms,
        "losses": losses,
        "changed_ratios": changed,
        "loaded_bytes": loaded,
        "peak_bytes": peak,
        "digest": _digest(rows.model) if request.digest else None,
    }


def _rows(request: Request, step: int, vocabulary: int) -> list[MicroBatch]:
    """Rows of random tokens, one example each, the second half of which carries loss."""
    draw = np.random.default_rng(step)

    def example() -> Example:
        supervised = np.arange(request.row_tokens + 1) > request.row_tokens // 2
        return Example(draw.integers(vocabulary, size=request.row_tokens + 1), supervised)

    return [row_of([(n, example())], shared=False) for n in range(request.rows)]


def peak_bytes() -> int:
    """Most resident memory this process ever had."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise OSError("the system does not tell the peak of a process")


def _digest(model: Any) -> str:
    found = hashlib.sha256()
    for name, p in sorted(model.named_parameters()):
        found.update(name.encode())
        found.update(_bytes(p.detach()))
    return found.hexdigest()


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


if __name__ == "__main__":
    main()
