"""What a step needs, put together as a plan says: the model in its engine, the layout of rows, examples and their order."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fullrank.models.load import load_model
from fullrank.models.resolved import ResolvedModel
from fullrank.models.rows import RowModel
from fullrank.models.widened import Widened
from fullrank.optim.shelf import InHost, OnDisk, Shelf
from fullrank.parallel import device as devices
from fullrank.parallel.blockwise import Blockwise, is_blockwise
from fullrank.parallel.groups import freeze
from fullrank.parallel.single import SingleDevice
from fullrank.recipe import Recipe
from fullrank.records import Plan
from fullrank.run import Run
from fullrank.sequences.order import Order
from fullrank.sequences.store import TokenStore
from fullrank.train.loop import Layout

#: Most bytes in memory on their way to a file, and as many on their way back.
_WAITING_BYTES = 64 << 20


@dataclass(frozen=True)
class Setup:
    """All of it."""

    recipe: Recipe
    device: torch.device
    rows: RowModel
    engine: SingleDevice
    layout: Layout
    store: TokenStore
    """Training examples."""
    order: Order
    waiting: Path
    """Folder of what waits in files."""

    def amended(self, budget_tokens: int, recompute: str) -> Setup:
        """The same with other rows, or another recomputation; the engine is as new."""
        self.engine.close()
        engine = engine_for(self.recipe, self.rows, recompute, self.waiting)
        return replace(self, layout=replace(self.layout, budget_tokens=budget_tokens), engine=engine)


def set_up(recipe: Recipe, run: Run, base: ResolvedModel, plan: Plan) -> Setup:
    """Loads the model and asks it what it can do; what it cannot is told to the run.

    Raises:
        UsageError: a pattern of `train.frozen` matches nothing.
        ModelError: the model's gradients cannot be released block by block, as the recipe wants.
    """
    device = devices.choose(plan.machine.device)
    devices.reset_peak(device)
    store = TokenStore(run.data / "train")
    rows = load_rows(recipe, base.folder, device)
    if rows.why:
        run.tell("note", stage="train", words=rows.why)
    waiting = run.train / "waiting"
    return Setup(
        recipe=recipe,
        device=device,
        rows=rows,
        engine=engine_for(recipe, rows, plan.recompute, waiting),
        layout=Layout(plan.micro_batch_tokens, rows.packs, rows.shares),
        store=store,
        order=Order(len(store), recipe.train.global_batch_size, recipe.train.epochs, recipe.train.seed),
        waiting=waiting,
    )


def load_rows(recipe: Recipe, folder: Path, device: torch.device) -> RowModel:
    """The base model, its weights in the type that they are stored in while training, as it takes rows.

    Raises:
        UsageError: a pattern of `train.frozen` matches nothing.
    """
    of_16_bits = recipe.train.rounding != "none"
    model = load_model(folder, device=device, dtype=torch.bfloat16 if of_16_bits else torch.float32)
    freeze(model, recipe.train.frozen)
    return RowModel(model, adds_gradients=True, widened=Widened(model) if of_16_bits and device.type == "cpu" else None)


def engine_for(recipe: Recipe, rows: RowModel, recompute: str, waiting: Path) -> SingleDevice:
    """The engine that a recipe asks for.

    Args:
        recipe: `auto` resolved.
        rows: see `load_rows`.
        recompute: see `fullrank.parallel.recompute`.
        waiting: folder of what waits in files; emptied.

    Raises:
        ModelError: the model's gradients cannot be released block by block, as the recipe wants.
    """
    shutil.rmtree(waiting, ignore_errors=True)

    def elsewhere(name: str, *, on_disk: bool) -> Shelf:
        device = rows.model.device
        return OnDisk(waiting / name, device=device, waiting_bytes=_WAITING_BYTES) if on_disk else InHost(device)

    is_cuda = rows.model.device.type == "cuda"
    states = recipe.machine.optimizer_states
    shelf = None if states == "device" else elsewhere("states", on_disk=states == "disk")
    if not is_blockwise(recipe):
        return SingleDevice(rows, recipe.train, recompute=recompute, states=shelf)
    return Blockwise(
        rows,
        recipe.train,
        gradients=recipe.gradients,
        states=shelf,
        spilled=elsewhere("gradients", on_disk=not is_cuda) if recipe.gradients == "spill" else None,
        inputs=elsewhere("inputs", on_disk=not is_cuda) if recompute == "offload" else None,
    )
