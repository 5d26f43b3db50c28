"""What ranks are asked in tests: functions that a process of its own imports."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from double import everything_double

from fullrank.models.load import load_model
from fullrank.models.rows import RowModel
from fullrank.parallel.engine import Engine
from fullrank.parallel.fsdp2 import Fsdp2
from fullrank.parallel.groups import freeze
from fullrank.parallel.sharded import load_sharded
from fullrank.parallel.single import SingleDevice
from fullrank.parallel.world import World
from fullrank.parallel.zero import Zero
from fullrank.parallel.zero_settings import settings_of
from fullrank.parallel.zeroed import deepspeed_for, load_zeroed
from fullrank.recipe import Recipe, Train
from fullrank.sequences.layout import dealt, micro_batches
from fullrank.sequences.loss import row_loss
from fullrank.train import checkpoint
from fullrank.train.setup import mesh_of

#: Examples of a step.
STEP = 6


@dataclass(frozen=True)
class Asked:
    """Some steps of a tiny model."""

    folder: str
    train: dict[str, Any] = field(default_factory=dict)
    """Of the recipe's section, over AdamW with a rate of 1e-2 and clipping by 1. Its eps is above what rounding leaves of
    gradients that are zero (biases of keys), which it would otherwise blow up to whole updates."""
    dtype: torch.dtype = torch.float64
    compute_type: torch.dtype | None = None
    recompute: str = "none"
    sync: str = "step"
    replicas: int = 1
    zero: dict[str, Any] = field(default_factory=dict)
    """DeepSpeed's `zero_optimization`; the engine is FSDP2 where it is empty."""
    steps: int = 4
    first: int = 0
    """Step to begin with, from a checkpoint if it is not 0."""
    examples: int = STEP
    """Of a step; the last step has one example only."""
    checkpoints: str = ""
    """Where a checkpoint is written after the last step, and read from before the first."""
    budget: int = 64


def engine_of(world: World, asked: Asked, *, divided: bool = True) -> Engine:
    """An engine on this rank's part of the model, or one that holds it whole."""
    given = {"precision": "fp32", "max_grad_norm": 1.0, "optimizer": {"learning_rate": 1e-2, "eps": 1e-6}, **asked.train}
    train, folder = Train.model_validate(given), Path(asked.folder)
    if not divided:
        model = load_model(folder, device=torch.device("cpu"), dtype=asked.dtype)
        freeze(model, train.frozen)
        return SingleDevice(RowModel(model), train, recompute=asked.recompute)
    if asked.zero:
        settings = zero_settings(asked.zero, world.size)
        zeroed = load_zeroed(folder, world, settings, device=torch.device("cpu"), dtype=asked.dtype, frozen=train.frozen)
        return Zero(RowModel(zeroed.model, entry=zeroed.engine), train, zeroed=zeroed, recompute=asked.recompute)
    mesh = mesh_of(world, asked.replicas, "cpu")
    model = load_sharded(folder, mesh, dtype=asked.dtype, compute_type=asked.compute_type, frozen=train.frozen)
    return Fsdp2(RowModel(model), train, world=world, mesh=mesh, recompute=asked.recompute, sync=asked.sync)  # type: ignore[arg-type]


def zero_settings(zero: dict[str, Any], ranks: int) -> dict[str, Any]:
    """DeepSpeed's configuration of a recipe that says nothing else, with buckets and thresholds that a tiny model fills."""
    section = {"engine": "deepspeed", "zero_stage": zero["stage"]}
    recipe = Recipe.model_validate({"name": "t", "model": {"source": "m"}, "data": {"train": "t.jsonl"}, "parallel": section})
    settings = settings_of(recipe, ranks)
    settings["zero_optimization"] |= {"reduce_bucket_size": 20_000, **zero}
    if zero["stage"] == 3:
        settings["zero_optimization"].setdefault("stage3_prefetch_bucket_size", 20_000)
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = zero.get("stage3_param_persistence_threshold", 0)
    return settings


def examples() -> Any:
    """A store of random examples."""
    return tiny.write_store(Path(tempfile.mkdtemp()), tiny.random_tokens(60, vocabulary=300))


def stepped(world: World, asked: Asked, divided: bool = True) -> dict[str, Any]:
    """Losses, norms and whole weights after the steps; of one rank for `divided` False."""
    if not divided:
        world = World()
    if asked.zero:
        deepspeed_for("cpu", world)  # before types change their names
    with everything_double() if asked.dtype == torch.float64 else contextlib.nullcontext():
        return _stepped(world, asked, divided)


def _stepped(world: World, asked: Asked, divided: bool) -> dict[str, Any]:
    engine, store = engine_of(world, asked, divided=divided), examples()
    losses, norms, orders = [], [], []
    if asked.first:
        folder = checkpoint.newest(Path(asked.checkpoints), print)
        assert folder is not None
        step, state, _ = checkpoint.load(folder)
        assert step == asked.first
        engine.load_state(state)
    for step in range(asked.first, asked.first + asked.steps):
        chosen = range(
            asked.examples * step, asked.examples * step + (1 if step == asked.first + asked.steps - 1 else asked.examples)
        )
        rows = micro_batches(store, [n % len(store) for n in chosen], asked.budget, packed=True, ranks=world.size)
        own = dealt(rows, world.size)[world.rank]
        supervised = sum(row.supervised_tokens for row in rows)
        outcome = engine.step(own, supervised, learning_rate=1e-2, seed=step)
        assert outcome.updated
        losses.append(outcome.loss)
        norms.append(outcome.grad_norm)
        orders.append([row.examples for row in own])
    if asked.checkpoints and not asked.first:
        checkpoint.save(Path(asked.checkpoints), asked.steps, engine.state(), {}, world)
    found = whole(engine)
    engine.close()
    return {"losses": losses, "norms": norms, "orders": orders, "weights": found, "never_reached": engine.never_reached()}


def whole(engine: Engine) -> dict[str, Any]:
    """An engine's whole weights, as numbers that travel between processes."""
    pairs = engine.whole_weights() if isinstance(engine, Fsdp2 | Zero) else engine.weights().items()
    return {
        name: tensor.detach().clone().float().numpy() if tensor.dtype == torch.bfloat16 else tensor.detach().clone().numpy()
        for name, tensor in pairs
    }


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """Largest relative difference of a tensor, by 2-norms."""
    import numpy as np

    assert one.keys() == other.keys()
    return max(float(np.linalg.norm(one[n] - other[n]) / max(np.linalg.norm(other[n]), 1e-30)) for n in one)


def not_finite(world: World, asked: Asked) -> tuple[bool, float, bool]:
    """(updated, how far the weights moved, whether the next step was taken) of a step whose loss is not a number."""
    deepspeed_for("cpu", world)
    engine, store = engine_of(world, replace(asked, dtype=torch.float32)), examples()
    rows = micro_batches(store, list(range(STEP)), asked.budget, packed=True, ranks=world.size)
    own = dealt(rows, world.size)[world.rank]
    before = whole(engine)
    with pytest.MonkeyPatch.context() as patch:
        if world.rank == 0:
            patch.setattr("fullrank.parallel.zero.row_loss", lambda *given: row_loss(*given) * float("nan"))
        outcome = engine.step(own, 10, learning_rate=1e-2, seed=0)
    moved = differences(whole(engine), before)
    return outcome.updated, moved, engine.step(own, 10, learning_rate=1e-2, seed=1).updated


def read_and_saved(world: World, asked: Asked) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """(weights when they were saved, when a new engine has read them, files of the checkpoint)."""
    deepspeed_for("cpu", world)
    engine, store = engine_of(world, asked), examples()
    rows = dealt(micro_batches(store, list(range(STEP)), asked.budget, packed=True, ranks=world.size), world.size)
    engine.step(rows[world.rank], 10, learning_rate=1e-2, seed=0)
    saved = whole(engine)
    folder = checkpoint.save(Path(asked.checkpoints), 1, engine.state(), {}, world)
    engine.step(rows[world.rank], 10, learning_rate=1e-2, seed=1)
    engine.load_state(checkpoint.load(folder)[1])
    return saved, whole(engine), sorted(path.name for path in folder.iterdir())
