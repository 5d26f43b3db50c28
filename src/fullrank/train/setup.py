"""What a step needs, put together as a plan says: the model in its engine, the layout of rows, examples and their order."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from fullrank.errors import UsageError
from fullrank.models.load import load_model
from fullrank.models.resolved import ResolvedModel
from fullrank.models.rows import RowModel
from fullrank.models.widened import Widened
from fullrank.optim.shelf import InHost, OnDisk, Shelf
from fullrank.parallel import device as devices
from fullrank.parallel.blockwise import Blockwise, is_blockwise
from fullrank.parallel.fsdp2 import Fsdp2, Sync
from fullrank.parallel.groups import freeze
from fullrank.parallel.ring import ContextRing, ring_of
from fullrank.parallel.sharded import computing_device, load_sharded
from fullrank.parallel.single import SingleDevice
from fullrank.parallel.world import ALONE, World
from fullrank.parallel.zero import Zero
from fullrank.parallel.zero_settings import settings_of
from fullrank.parallel.zeroed import Zeroed, load_zeroed
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
    world: World
    mesh: DeviceMesh | None
    """That the model is divided on; None where it is not."""
    zeroed: Zeroed | None
    """The model in DeepSpeed's hands; None where it is not."""

    def amended(self, budget_tokens: int, recompute: str, sync: Sync) -> Setup:
        """The same with other rows, another recomputation, or gradients summed at other times; the engine is as new."""
        self.engine.close()
        engine = engine_for(self.recipe, self.rows, recompute, self.waiting, self.world, self.mesh, sync, self.zeroed)
        return replace(self, layout=replace(self.layout, budget_tokens=budget_tokens), engine=engine)


def set_up(recipe: Recipe, run: Run, base: ResolvedModel, plan: Plan, world: World = ALONE) -> Setup:
    """Loads the model, or this rank's part of it, and asks it what it can do; what it cannot is told to the run.

    Raises:
        UsageError: a pattern of `train.frozen` matches nothing, or the plan is for another number of ranks.
        ModelError: the model's gradients cannot be released block by block, as the recipe wants, or its rows not be divided.
    """
    if plan.ranks != world.size:
        raise UsageError(
            f"{run.plan_path}: a plan for {plan.ranks} ranks, of which {world.size} are here",
            hint="`fullrank plan` under the same launcher makes one for them",
        )
    device = devices.choose(plan.machine.device)
    devices.reset_peak(device)
    store = TokenStore(run.data / "train")
    mesh = mesh_of(world, plan.replicas, device.type) if plan.engine == "fsdp2" else None
    zeroed = load_in_zero(recipe, base.folder, world, device) if plan.engine == "deepspeed" else None
    if zeroed is not None:
        rows = RowModel(zeroed.model, entry=zeroed.engine)
    elif mesh is not None:
        rows = load_divided(recipe, base.folder, mesh, ring_of(world, plan.context, device.type))
    else:
        rows = load_rows(recipe, base.folder, device)
    if rows.why:
        run.tell("note", stage="train", words=rows.why)
    waiting = run.train / "waiting" / str(world.rank)
    return Setup(
        recipe=recipe,
        device=device,
        rows=rows,
        engine=engine_for(recipe, rows, plan.recompute, waiting, world, mesh, plan.sync, zeroed),
        layout=Layout(plan.micro_batch_tokens, rows.packs, rows.shares, world.size, plan.context),
        store=store,
        order=Order(len(store), recipe.train.global_batch_size, recipe.train.epochs, recipe.train.seed),
        waiting=waiting,
        world=world,
        mesh=mesh,
        zeroed=zeroed,
    )


def mesh_of(world: World, replicas: int, device_type: str) -> DeviceMesh:
    """All ranks, as a line that divides a model, or as rows that repeat it."""
    if replicas == 1:
        return init_device_mesh(device_type, (world.size,), mesh_dim_names=("shard",))
    return init_device_mesh(device_type, (replicas, world.size // replicas), mesh_dim_names=("replicate", "shard"))


def load_divided(recipe: Recipe, folder: Path, mesh: DeviceMesh, ring: ContextRing | None) -> RowModel:
    """As `load_rows`, of which each rank holds its part.

    Args:
        ring: of the ranks that share rows, where they do.

    Raises:
        UsageError: a pattern of `train.frozen` matches nothing.
        ModelError: rows are to be shared, and this model's cannot be.
    """
    of_16_bits = recipe.train.rounding != "none"
    compute_type = None
    if of_16_bits and mesh.device_type == "cpu":
        compute_type = torch.float32
    elif recipe.train.precision == "bf16-mixed":
        compute_type = torch.bfloat16
    dtype = torch.bfloat16 if of_16_bits else torch.float32
    model = load_sharded(
        folder,
        mesh,
        dtype=dtype,
        compute_type=compute_type,
        frozen=recipe.train.frozen,
        offload=recipe.parallel.offload_parameters,
    )
    return RowModel(model, ring=ring, device=computing_device(mesh))


def load_in_zero(recipe: Recipe, folder: Path, world: World, device: torch.device) -> Zeroed:
    """The base model in DeepSpeed's hands.

    Raises:
        UsageError: a pattern of `train.frozen` matches nothing, DeepSpeed is not installed, or its configuration is refused.
    """
    settings = settings_of(recipe, world.size)
    return load_zeroed(folder, world, settings, device=device, dtype=torch.float32, frozen=recipe.train.frozen)


def load_rows(recipe: Recipe, folder: Path, device: torch.device) -> RowModel:
    """The base model, its weights in the type that they are stored in while training, as it takes rows.

    Raises:
        UsageError: a pattern of `train.frozen` matches nothing.
    """
    of_16_bits = recipe.train.rounding != "none"
    model = load_model(folder, device=device, dtype=torch.bfloat16 if of_16_bits else torch.float32)
    freeze(model, recipe.train.frozen)
    return RowModel(model, adds_gradients=True, widened=Widened(model) if of_16_bits and device.type == "cpu" else None)


def engine_for(
    recipe: Recipe,
    rows: RowModel,
    recompute: str,
    waiting: Path,
    world: World = ALONE,
    mesh: DeviceMesh | None = None,
    sync: Sync = "step",
    zeroed: Zeroed | None = None,
) -> SingleDevice:
    """The engine that a recipe asks for.

    Args:
        recipe: `auto` resolved.
        rows: see `load_rows` and `load_divided`.
        recompute: see `fullrank.parallel.recompute`.
        waiting: folder of what waits in files; emptied.
        world: the ranks.
        mesh: that the model is divided on, if it is.
        sync: see `fullrank.parallel.fsdp2`.
        zeroed: the model in DeepSpeed's hands, if it is.

    Raises:
        ModelError: the model's gradients cannot be released block by block, as the recipe wants.
    """
    shutil.rmtree(waiting, ignore_errors=True)

    def elsewhere(name: str, *, on_disk: bool) -> Shelf:
        device = rows.model.device  # where the weights are, and so what is done to them
        return OnDisk(waiting / name, device=device, waiting_bytes=_WAITING_BYTES) if on_disk else InHost(device)

    is_cuda = rows.device.type == "cuda"
    states = recipe.machine.optimizer_states
    # What waits in host memory is updated there, where DeepSpeed keeps the master copy then, and FSDP2 offloaded weights.
    lie_with_weights = states == "host" and (zeroed is not None or recipe.parallel.offload_parameters)
    shelf = None if states == "device" or lie_with_weights else elsewhere("states", on_disk=states == "disk")
    if zeroed is not None:
        return Zero(rows, recipe.train, zeroed=zeroed, recompute=recompute, states=shelf)
    if mesh is not None:
        return Fsdp2(rows, recipe.train, world=world, mesh=mesh, recompute=recompute, sync=sync, states=shelf)
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
