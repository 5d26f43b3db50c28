"""Some optimizer steps on the ranks that torchrun starts, or the same in one process: what was learned, and each rank's memory.

    torchrun --nproc-per-node N benchmarks/distributed_rank.py REQUEST        (JSON, see `Request`)
    python benchmarks/distributed_rank.py REQUEST

The first rank prints one line of JSON. The peak is the system's own count of resident pages (VmHWM), of the whole process.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from memory_step import peak_bytes
from safetensors.torch import save_file

from fullrank.meter import resident_bytes
from fullrank.models import export
from fullrank.models.load import load_model, load_tokenizer
from fullrank.models.rows import RowModel
from fullrank.models.source import resolve
from fullrank.parallel.fsdp2 import Fsdp2
from fullrank.parallel.quiet import between_steps, quiet
from fullrank.parallel.ring import ring_of
from fullrank.parallel.sharded import load_sharded
from fullrank.parallel.single import SingleDevice
from fullrank.parallel.world import ALONE, World, joined, told
from fullrank.parallel.zero import Zero
from fullrank.parallel.zero_settings import settings_of
from fullrank.parallel.zeroed import deepspeed_for, load_zeroed
from fullrank.recipe import Model, Recipe
from fullrank.sequences.layout import MicroBatch, dealt, row_of
from fullrank.sequences.store import Example
from fullrank.train import proof
from fullrank.train.setup import mesh_of


@dataclass(frozen=True)
class Request:
    """What is asked of the ranks."""

    model: str
    """A Hugging Face folder."""
    recipe: dict[str, Any] = field(default_factory=dict)
    """Sections `train` and `parallel` of a recipe."""
    dtype: str = "float32"
    steps: int = 2
    rows: int = 4
    """Of a step, over all ranks."""
    row_tokens: int = 64
    sync: str = "step"
    recompute: str = "block"
    weights: str = ""
    """File that the first rank writes the whole weights to."""
    exported: str = ""
    """Folder that the model is exported to, tensor by tensor."""


def main() -> None:
    """Answers the request."""
    request = Request(**json.loads(sys.argv[1]))
    world = told()
    with contextlib.ExitStack() as stack:
        if world is not None:
            stack.enter_context(joined(world, "cpu", patience_seconds=3600))
        if world is not None and request.recipe.get("parallel", {}).get("engine") == "deepspeed":
            deepspeed_for("cpu", world)  # before types change their names
        if request.dtype == "float64":
            stack.enter_context(_everything_double())
        found = answer(request, world)
        gc.collect()
    if found is not None:
        print(json.dumps(found), flush=True)
    sys.stdout.flush()
    os._exit(0)


@contextlib.contextmanager
def _everything_double() -> Iterator[None]:
    """transformers' and fullrank's norms, rotary angles and losses ask for fp32 by name: here they get float64."""
    kept = torch.float32, torch.float, torch.Tensor.float
    torch.float32 = torch.float = torch.float64  # type: ignore[misc]
    torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign, assignment]
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.float32, torch.float, torch.Tensor.float = kept  # type: ignore[misc, method-assign]
        torch.set_default_dtype(kept[0])


def answer(request: Request, ranks: World | None) -> dict[str, Any] | None:
    """Takes the steps; None on ranks other than the first."""
    world = ranks or ALONE
    tree = {"name": "distributed", "model": {"source": request.model}, "data": {"train": "none"}}
    recipe = Recipe.model_validate({"train": {"precision": "fp32"}} | tree | request.recipe)
    folder, dtype = Path(request.model), getattr(torch, request.dtype)
    started_with = resident_bytes()
    engine: SingleDevice
    losses, norms, seconds = [], [], []
    with quiet(large_apart=world.size > 1):
        if ranks is None:
            model = load_model(folder, device=torch.device("cpu"), dtype=dtype)
            engine = SingleDevice(RowModel(model), recipe.train, recompute=request.recompute)
        elif recipe.parallel.engine == "deepspeed":
            zeroed = load_zeroed(folder, world, settings_of(recipe, world.size), device=torch.device("cpu"), dtype=dtype)
            model = zeroed.model
            rows = RowModel(model, entry=zeroed.engine)
            engine = Zero(rows, recipe.train, zeroed=zeroed, recompute=request.recompute)
        else:
            mesh = mesh_of(world, recipe.parallel.replicas, "cpu")
            model = load_sharded(folder, mesh, dtype=dtype, compute_type=None)
            rows, sync = RowModel(model, ring=ring_of(world, recipe.parallel.context, "cpu")), request.sync
            engine = Fsdp2(rows, recipe.train, world=world, mesh=mesh, recompute=request.recompute, sync=sync)  # type: ignore[arg-type]
        vocabulary = model.config.get_text_config().vocab_size
        context = recipe.parallel.context
        for step in range(request.steps):
            laid_out = _rows(request, step, vocabulary)
            own = dealt(laid_out, world.size // context)[world.rank // context]
            started = time.perf_counter()
            supervised = sum(row.supervised_tokens for row in laid_out)
            outcome = engine.step(own, supervised, learning_rate=recipe.train.optimizer.learning_rate, seed=step)
            seconds.append(time.perf_counter() - started)
            losses.append(outcome.loss)
            norms.append(outcome.grad_norm)
            between_steps()
        trained = peak_bytes()
        resident = resident_bytes()
        if request.weights:
            _write(engine, Path(request.weights), world)
        if request.exported:
            _export(engine, request, world)
    told_by_all = world.gathered({"process": started_with, "trained": trained, "resident": resident, "ended": peak_bytes()})
    engine.close()
    if not world.is_first:
        return None
    return {
        "largest_tensor_bytes": max(p.numel() for p in model.parameters()) * dtype.itemsize,
        "losses": losses,
        "grad_norms": norms,
        "seconds": seconds,
        "ranks": told_by_all,
    }


def _rows(request: Request, step: int, vocabulary: int) -> list[MicroBatch]:
    draw = np.random.default_rng(step)

    def example() -> Example:
        supervised = np.arange(request.row_tokens + 1) > request.row_tokens // 2
        return Example(draw.integers(vocabulary, size=request.row_tokens + 1), supervised)

    return [row_of([(n, example())], shared=False) for n in range(request.rows)]


def _write(engine: SingleDevice, path: Path, world: World) -> None:
    pairs = engine.whole_weights() if isinstance(engine, Fsdp2 | Zero) else engine.weights().items()
    kept = {name: tensor.detach().clone() for name, tensor in pairs if world.is_first}
    if world.is_first:
        save_file(kept, path)


def _export(engine: SingleDevice, request: Request, world: World) -> None:
    folder = Path(request.exported)
    if not isinstance(engine, Fsdp2):
        folder.mkdir(parents=True)
        export.write_model(engine.model, load_tokenizer(Path(request.model)), [2], folder)
        return
    engine.forget()
    if not world.is_first:
        for _ in engine.whole_weights():
            pass
        return
    folder.mkdir(parents=True)
    base, tokenizer = resolve(Model(source=request.model)), load_tokenizer(Path(request.model))
    weights = engine.whole_weights()
    proof.export_divided(engine.model, weights, tokenizer, base, dtype=torch.float32, stop_ids=[2], folder=folder)


if __name__ == "__main__":
    main()
