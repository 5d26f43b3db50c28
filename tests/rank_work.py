"""What ranks are asked in tests: functions that a process of its own imports."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from double import everything_double
from torch.distributed.fsdp import CPUOffloadPolicy
from transformers import PreTrainedModel

from fullrank.errors import ModelError
from fullrank.models.attention import attend
from fullrank.models.load import load_model, load_tokenizer
from fullrank.models.rows import RowModel
from fullrank.models.source import resolve
from fullrank.optim.shelf import OnDisk
from fullrank.parallel import ring, traffic
from fullrank.parallel.engine import Engine
from fullrank.parallel.fsdp2 import Fsdp2
from fullrank.parallel.groups import freeze
from fullrank.parallel.sharded import computing_device, load_sharded, sharded_modules
from fullrank.parallel.single import SingleDevice
from fullrank.parallel.world import World
from fullrank.parallel.zero import Zero
from fullrank.parallel.zero_settings import settings_of
from fullrank.parallel.zeroed import deepspeed_for, load_zeroed
from fullrank.recipe import Model, Recipe, Train
from fullrank.sequences.layout import MicroBatch, dealt, micro_batches, row_of
from fullrank.sequences.loss import row_loss
from fullrank.sequences.parts import part_of
from fullrank.sequences.store import Example
from fullrank.train import checkpoint, proof
from fullrank.train.loop import Layout, validation_loss
from fullrank.train.setup import engine_for, load_divided, mesh_of

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
    context: int = 1
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
    offload: bool = False
    """Whether parts wait in host memory (`astray`)."""
    on_disk: bool = False
    """Whether optimizer states wait in a file."""
    alike: bool = False
    """Whether examples begin alike, and some are there twice."""


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
    model = load_sharded(
        folder, mesh, dtype=asked.dtype, compute_type=asked.compute_type, frozen=train.frozen, offload=asked.offload
    )
    rows = RowModel(model, ring=ring.ring_of(world, asked.context, "cpu"), device=computing_device(mesh))
    states = OnDisk(Path(tempfile.mkdtemp())) if asked.on_disk else None
    return Fsdp2(rows, train, world=world, mesh=mesh, recompute=asked.recompute, sync=asked.sync, states=states)  # type: ignore[arg-type]


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


def examples(alike: bool = False) -> Any:
    """A store of random examples; see `Asked.alike`."""
    tokens = tiny.random_tokens(60, vocabulary=300)
    if alike:
        for number, each in enumerate(tokens):
            if number % 3 == 2:
                tokens[number] = tokens[number - 1]
            else:
                tokens[number] = type(each)([5, 6, 7, 8, 9 + number % 2, *each.ids], [False] * 5 + list(each.supervised))
    return tiny.write_store(Path(tempfile.mkdtemp()), tokens)


def stepped(world: World, asked: Asked, divided: bool = True) -> dict[str, Any]:
    """Losses, norms and whole weights after the steps; of one rank for `divided` False."""
    if not divided:
        world = World()
    if asked.zero:
        deepspeed_for("cpu", world)  # before types change their names
    with contextlib.ExitStack() as stack:
        if asked.dtype == torch.float64:
            stack.enter_context(everything_double())
        if asked.offload and divided:
            stack.enter_context(astray())
        return _stepped(world, asked, divided)


@contextlib.contextmanager
def astray() -> Iterator[None]:
    """A model tells where its parameters are, which is not where it computes if they wait in host memory. On a CPU both are one
    place: here models name another, so that whoever asks them fails as it would beside an accelerator."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PreTrainedModel, "device", property(lambda model: torch.device("meta")))
        yield


def _stepped(world: World, asked: Asked, divided: bool) -> dict[str, Any]:
    engine, store = engine_of(world, asked, divided=divided), examples(asked.alike)
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
        layout = Layout(asked.budget, True, True, world.size, asked.context if divided else 1)
        rows = layout.rows(store, np.asarray(chosen) % len(store))
        own = layout.own(rows, world)
        supervised = sum(row.supervised_tokens for row in rows)
        outcome = engine.step(own, supervised, learning_rate=1e-2, seed=step)
        assert outcome.updated
        losses.append(outcome.loss)
        norms.append(outcome.grad_norm)
        orders.append([row.examples for row in own])
    if asked.checkpoints and not asked.first:
        checkpoint.save(Path(asked.checkpoints), asked.steps, engine.state(), {}, world)
    found = whole(engine)
    validation = validation_loss(engine, store, layout, world)
    engine.close()
    return {
        "validation": validation,
        "losses": losses,
        "norms": norms,
        "orders": orders,
        "weights": found,
        "never_reached": engine.never_reached(),
    }


def whole(engine: Engine) -> dict[str, Any]:
    """An engine's whole weights, as numbers that travel between processes."""
    pairs = engine.whole_weights() if isinstance(engine, Fsdp2 | Zero) else engine.weights().items()
    return {
        name: tensor.detach().clone().float().numpy() if tensor.dtype == torch.bfloat16 else tensor.detach().clone().numpy()
        for name, tensor in pairs
    }


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """Largest relative difference of a tensor, by 2-norms."""
    assert one.keys() == other.keys()
    return max(float(np.linalg.norm(one[n] - other[n]) / max(np.linalg.norm(other[n]), 1e-30)) for n in one)


def exported(world: World, asked: Asked, folder: str, base: str) -> dict[str, Any]:
    """Writes the model as ranks write it; what the first one found."""
    with astray() if asked.offload else contextlib.nullcontext():
        engine = engine_of(world, asked)
    assert isinstance(engine, Fsdp2)
    if not world.is_first:
        return {"names": [name for name, _ in engine.whole_weights()]}
    resolved = resolve(Model(source=base))
    unchanged, digests = proof.export_divided(
        engine.model,
        engine.whole_weights(),
        load_tokenizer(Path(base)),
        resolved,
        dtype=torch.bfloat16,
        stop_ids=[3],
        folder=Path(folder),
    )
    return {"unchanged": unchanged, "digests": digests}


def moved_parts(world: World, asked: Asked) -> list[str]:
    """Parameters whose part lies elsewhere after a step than when it was loaded, or than where the engine updates it."""
    model = load_sharded(
        Path(asked.folder), mesh_of(world, 1, "cpu"), dtype=asked.dtype, compute_type=asked.compute_type, offload=asked.offload
    )
    loaded = {name: _address(p) for name, p in model.named_parameters()}
    rows, train = RowModel(model), Train(precision="fp32")
    engine = Fsdp2(rows, train, world=world, mesh=mesh_of(world, 1, "cpu"), recompute="none", sync="row")
    step = dealt(micro_batches(examples(), list(range(STEP)), asked.budget, packed=True, ranks=world.size), world.size)[
        world.rank
    ]
    assert engine.step(step, 10, learning_rate=1e-2, seed=0).updated
    updated = {name: piece.data_ptr() for name, piece in engine.weights().items()}
    engine.close()
    found = {name: _address(p) for name, p in model.named_parameters()}
    return [name for name in found if not found[name] == loaded[name] == updated[name]]


def _address(p: Any) -> int:
    return int(p.to_local().data_ptr())


def offloaded_as_written(world: World, folder: str, states: str, parallel: dict[str, Any]) -> tuple[bool, str | None]:
    """(whether FSDP2 was told to offload, where states wait) with what a recipe says."""
    sections = {
        "machine": {"optimizer_states": states},
        "parallel": {"engine": "fsdp2", **parallel},
        "train": {"precision": "fp32"},
    }
    recipe = Recipe.model_validate({"name": "t", "model": {"source": "m"}, "data": {"train": "t.jsonl"}, **sections})
    mesh = mesh_of(world, 1, "cpu")
    rows = load_divided(recipe, Path(folder), mesh, None)
    engine = engine_for(recipe, rows, "none", Path(tempfile.mkdtemp()) / "waiting", world, mesh)
    (place,) = {type(group.offload_policy) for state in sharded_modules(rows.model) for group in _groups(state)}
    shelves = [type(shelf).__name__ for shelf in engine._shelves]
    engine.close()
    return place is CPUOffloadPolicy, shelves[0] if shelves else None


def _groups(module: Any) -> list[Any]:
    """What FSDP2 keeps of a module, by the names that its releases have for it."""
    state = module._get_fsdp_state()
    return list(getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group])


def watched_sum(world: World, seconds: float) -> dict[str, float]:
    """Seconds of a sum over ranks, before which all but the first compute."""

    def work() -> None:
        numbers, started = torch.ones(300, 300), time.monotonic()
        while world.rank and time.monotonic() - started < seconds:
            numbers = (numbers @ numbers).tanh()
        world.wait()

    world.wait()
    return asdict(traffic.watched(torch.device("cpu"), work))


# ---- ring attention ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RingAsked:
    """Attention over a row."""

    examples: list[list[int]]
    """Tokens of each stretch of each example; stretches of the same number and length that begin alike are the same tokens."""
    heads: int = 4
    key_heads: int = 2
    window: int | None = None
    softcap: float | None = None
    tile: int = ring.TILE


def ringed(world: World, asked: RingAsked) -> dict[str, float]:
    """Largest differences of a rank's outputs and gradients from those of masked attention over the whole row, relative to the
    largest number where that is above 1."""
    row = _row(asked)
    positions = row.position_ids_1T[0]
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(1, heads, row.tokens, 8, generator=generator, dtype=torch.float64)
        for heads in (asked.heads, asked.key_heads, asked.key_heads, asked.heads)
    ]
    query, key, value, slope = tensors
    wanted = _masked(row, positions, asked, [some.clone().requires_grad_() for some in (query, key, value)], slope)
    part = part_of(row, world.size, world.rank)
    assert part.part is not None
    own = torch.cat([torch.arange(*stretch) for stretch in part.part.stretches[world.rank]])
    real = own < row.tokens  # tokens that fill the row up are random ones
    filled = [torch.cat([some, torch.randn(1, some.shape[1], 2 * world.size, 8, dtype=torch.float64)], 2) for some in tensors]
    given = [some[:, :, own].clone().requires_grad_() for some in filled[:3]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ring, "TILE", asked.tile)
        out, _ = attend(
            torch.nn.Module(),
            *given,
            None,
            row=part,
            ring=ring.ContextRing(),
            scaling=0.3,
            sliding_window=asked.window,
            softcap=asked.softcap,
        )
        slope = filled[3][:, :, own] * real[:, None]
        grads = torch.autograd.grad((out.transpose(1, 2) * slope).sum(), given)
    found = dict(zip(("out", "query", "key", "value"), (out.transpose(1, 2), *grads), strict=True))
    differences = {}
    for name, whole in wanted.items():
        apart = (found[name].detach()[:, :, real] - whole[:, :, own[real]]).abs()
        differences[name] = float(torch.cat([apart.flatten(), apart.new_zeros(1)]).max()) / max(1.0, float(whole.abs().max()))
    return differences


def _row(asked: RingAsked) -> MicroBatch:
    """The examples as a row that shares what they begin with."""
    draws: dict[tuple[int, ...], np.ndarray] = {}
    examples = []
    for number, lengths in enumerate(asked.examples):
        parts = []
        for depth in range(len(lengths)):
            path = (*lengths[: depth + 1], *(() if len(lengths) > 1 else (-number,)))
            parts.append(draws.setdefault(path, np.random.default_rng(len(draws)).integers(0, 300, lengths[depth])))
        ids = np.concatenate([*parts, [0]])
        examples.append((number, Example(ids, np.ones(len(ids), np.bool_))))
    return row_of(examples, shared=True)


def _masked(
    row: MicroBatch, positions: torch.Tensor, asked: RingAsked, given: list[torch.Tensor], slope: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Attention with every score of the row, token by token as the examples have them."""
    mask = torch.zeros(row.tokens, row.tokens, dtype=torch.bool)
    for segment in row.segments:
        for query in range(segment.start, segment.end):
            above = segment
            mask[query, segment.start : query + 1] = True
            while above.parent >= 0:
                above = row.segments[above.parent]
                mask[query, above.start : above.end] = True
    if asked.window is not None:
        mask &= positions[:, None] - positions[None, :] < asked.window
    query, key, value = given
    keys, values = (some.repeat_interleave(asked.heads // asked.key_heads, 1) for some in (key, value))
    scores = query @ keys.mT * 0.3
    if asked.softcap is not None:
        scores = asked.softcap * torch.tanh(scores / asked.softcap)
    out = scores.masked_fill(~mask, float("-inf")).softmax(-1) @ values
    grads = torch.autograd.grad((out * slope).sum(), given)
    return dict(zip(("out", "query", "key", "value"), (out.detach(), *grads), strict=True))


def refused(world: World, family: str, changes: dict[str, Any], blind: bool = False) -> str:
    """What is said of a model that is to take rows in parts; empty where it can.

    Args:
        family: of `tiny`, or one that it does not have.
        blind: the last rank of the ring sees nothing of what visits.
    """
    own = ring.ContextRing()
    if blind and world.rank == world.size - 1:
        pass_on = own.passed_on

        def passed_on(flat: torch.Tensor, coming: int, tag: int) -> Any:
            wait = pass_on(flat, coming, tag)
            return lambda: torch.zeros_like(wait())

        own.passed_on = passed_on  # type: ignore[method-assign]
    model = _others(family) if family not in tiny.FAMILIES else tiny.model(family, **changes)
    try:
        RowModel(model, ring=own)
    except ModelError as error:
        return error.message
    return ""


def _others(family: str) -> Any:
    """Small models of families with attention sinks, or without attention."""
    import transformers

    sizes = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2}
    attention = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48}
    config: Any = {
        "gpt_oss": lambda: transformers.GptOssConfig(
            **sizes, **attention, num_local_experts=4, num_experts_per_tok=2, layer_types=["full_attention"] * 2
        ),
        "mamba": lambda: transformers.MambaConfig(**sizes, state_size=8),
    }[family]()
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


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


def best_read(world: World, asked: Asked) -> tuple[dict[str, Any], dict[str, Any]]:
    """(weights when they were saved as the best so far, when the same engine has read them after another step)."""
    engine, store = engine_of(world, asked), examples()
    rows = dealt(micro_batches(store, list(range(STEP)), asked.budget, packed=True, ranks=world.size), world.size)
    saved = whole(engine)
    checkpoint.save_weights(Path(asked.checkpoints), 1, engine.weights(), world)
    engine.step(rows[world.rank], 10, learning_rate=1e-2, seed=0)
    engine.load_weights(checkpoint.load_weights(Path(asked.checkpoints), 1))
    return saved, whole(engine)
