"""What a step needs, put together as a plan says: the model in its engine, the layout of rows, examples and their order."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fullrank.models.load import load_model
from fullrank.models.resolved import ResolvedModel
from fullrank.models.rows import RowModel
from fullrank.parallel import device as devices
from fullrank.parallel.single import SingleDevice
from fullrank.recipe import Recipe
from fullrank.records import Plan
from fullrank.run import Run
from fullrank.sequences.order import Order
from fullrank.sequences.store import TokenStore
from fullrank.train.loop import Layout


@dataclass(frozen=True)
class Setup:
    """All of it."""

    device: torch.device
    rows: RowModel
    engine: SingleDevice
    layout: Layout
    store: TokenStore
    """Training examples."""
    order: Order


def set_up(recipe: Recipe, run: Run, base: ResolvedModel, plan: Plan) -> Setup:
    """Loads the model and asks it what it can do; what it cannot is told to the run."""
    device = devices.choose(plan.machine.device)
    devices.reset_peak(device)
    store = TokenStore(run.data / "train")
    rows = RowModel(load_model(base.folder, device=device), adds_gradients=True)
    if rows.why:
        run.tell("note", stage="train", words=rows.why)
    return Setup(
        device=device,
        rows=rows,
        engine=SingleDevice(rows, recipe.train, recompute=plan.recompute),
        layout=Layout(plan.micro_batch_tokens, rows.packs, rows.shares),
        store=store,
        order=Order(len(store), recipe.train.global_batch_size, recipe.train.epochs, recipe.train.seed),
    )
