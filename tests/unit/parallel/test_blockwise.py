"""The block-by-block engine: the weights of the plain step, whatever waits where."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from fullrank.errors import ModelError
from fullrank.models.rows import RowModel
from fullrank.models.widened import Widened
from fullrank.optim.shelf import InHost, OnDisk
from fullrank.parallel.blockwise import Blockwise
from fullrank.parallel.single import SingleDevice
from fullrank.recipe import AdamW, Train
from fullrank.sequences.layout import MicroBatch, micro_batches
from fullrank.sequences.store import TokenStore


@pytest.fixture
def store(tmp_path: Path) -> TokenStore:
    opened: TokenStore = tiny.write_store(tmp_path / "store", tiny.random_tokens(24))
    return opened


def settings(**train: Any) -> Train:
    return Train(**({"precision": "fp32", "optimizer": AdamW(weight_decay=0.1)} | train))


def plain(family: str = "llama", *, model: Any = None, **train: Any) -> SingleDevice:
    return SingleDevice(RowModel(model or tiny.model(family), adds_gradients=True), settings(**train), recompute="block")


def blockwise(family: str = "llama", gradients: str = "release", *, folder: Path, model: Any = None, **options: Any) -> Blockwise:
    model = model or tiny.model(family)
    train = {name: options.pop(name) for name in list(options) if name in Train.model_fields}
    shelves = {name: OnDisk(folder / name) for name in ("inputs", "states") if options.pop(name, False)}
    spilled = OnDisk(folder / "gradients") if gradients == "spill" else None
    precision = train.get("precision", "fp32")
    widened = Widened(model.to(torch.bfloat16)) if precision != "fp32" else None
    rows = RowModel(model, adds_gradients=True, widened=widened)
    return Blockwise(rows, settings(**train), gradients=gradients, spilled=spilled, **shelves, **options)


def rows_of(store: TokenStore, step: int, budget: int = 40) -> list[MicroBatch]:
    return micro_batches(store, [(6 * step + n) % len(store) for n in range(6)], budget, packed=True)


def run(engine: SingleDevice, store: TokenStore, steps: int = 4, rate: float = 1e-2) -> list[float]:
    """Norms of some steps of several rows."""
    norms = []
    for step in range(steps):
        rows = rows_of(store, step)
        assert len(rows) > 1
        supervised = sum(row.supervised_tokens for row in rows)
        outcome = engine.step(rows, supervised, learning_rate=rate, seed=step)
        assert outcome.updated and outcome.changed_ratio > 0
        norms.append(outcome.grad_norm)
    return norms


def assert_bitwise(one: SingleDevice, other: SingleDevice) -> None:
    states = one.state(), other.state()
    assert states[0].facts == states[1].facts
    assert states[0].tensors.keys() == states[1].tensors.keys()
    for kind, tensors in states[0].tensors.items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, states[1].tensors[kind][name]), (kind, name)


@pytest.mark.parametrize("gradients", ["release", "spill", "keep"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_weights_are_bitwise_those_of_the_plain_step(family: str, gradients: str, store: TokenStore, tmp_path: Path) -> None:
    one, other = plain(family, max_grad_norm=0.1), blockwise(family, gradients, folder=tmp_path, max_grad_norm=0.1)
    norms = run(one, store)
    assert run(other, store) == norms and min(norms) > 0.1  # clipping is due
    assert_bitwise(one, other)


@pytest.mark.parametrize("limit", [None, 1e6])
def test_without_clipping_due_it_is_the_same(limit: float | None, store: TokenStore, tmp_path: Path) -> None:
    one, other = plain(max_grad_norm=limit), blockwise(folder=tmp_path, max_grad_norm=limit)
    assert run(one, store) == run(other, store)
    assert_bitwise(one, other)


def test_dropout_draws_what_the_plain_step_draws(store: TokenStore, tmp_path: Path) -> None:
    models = [tiny.model("gpt2", attn_pdrop=0.0, resid_pdrop=0.3, embd_pdrop=0.3) for _ in range(2)]
    one, other = plain(model=models[0]), blockwise(model=models[1], folder=tmp_path)
    assert run(one, store) == run(other, store)
    assert_bitwise(one, other)


def test_inputs_and_states_in_files_change_nothing(store: TokenStore, tmp_path: Path) -> None:
    one, other = plain(), blockwise(folder=tmp_path, gradients="spill", inputs=True, states=True)
    assert run(one, store) == run(other, store)
    assert_bitwise(one, other)


#: Parts of names: what is below all that is trained, what is between, all that is outside the blocks.
FROZEN = [("layers.0.", "embed"), ("layers.1.",), ("embed", "norm.weight", "lm_head"), ("layers.",)]


@pytest.mark.parametrize("gradients", ["release", "spill", "keep"])
@pytest.mark.parametrize("limit", [0.1, None])
@pytest.mark.parametrize("parts", FROZEN)
@pytest.mark.parametrize("tied", [True, False])
def test_a_frozen_part_is_not_reached(
    tied: bool, parts: tuple[str, ...], limit: float | None, gradients: str, store: TokenStore, tmp_path: Path
) -> None:
    def frozen() -> Any:
        model = tiny.model("llama", tie_word_embeddings=tied, num_hidden_layers=3)
        for name, p in model.named_parameters():
            p.requires_grad_(not any(part in name for part in parts))
        return model

    base = {name: p.clone() for name, p in frozen().named_parameters()}
    one = plain(model=frozen(), max_grad_norm=limit)
    other = blockwise(model=frozen(), gradients=gradients, folder=tmp_path, max_grad_norm=limit)
    assert run(one, store) == run(other, store)
    assert_bitwise(one, other)
    for name, p in other.model.named_parameters():
        assert torch.equal(p, base[name]) != p.requires_grad


def test_one_block_at_a_time_has_a_gradient(store: TokenStore, tmp_path: Path) -> None:
    engine = blockwise(folder=tmp_path, max_grad_norm=None, model=tiny.model("llama", num_hidden_layers=5))
    alive: list[set[str]] = []
    update = engine._updater.update

    def watched(gradients: Any, **options: Any) -> None:
        alive.append({n.split(".")[2] for n, p in engine.model.named_parameters() if p.grad is not None and "layers" in n})
        assert len({name.split(".")[2] for name in gradients if "layers" in name}) <= 1
        update(gradients, **options)

    engine._updater.update = watched  # type: ignore[method-assign]
    run(engine, store, steps=1)
    assert len(alive) == 6 and not any(alive)  # five blocks and the rest; what is handed over is no parameter's any more


@pytest.mark.parametrize("precision", ["bf16-stochastic", "bf16-kahan"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_weights_of_16_bits_follow_those_of_32(family: str, precision: str, store: TokenStore, tmp_path: Path) -> None:
    start = tiny.model(family).to(torch.bfloat16)
    one = plain(model=tiny.model(family).to(torch.bfloat16).float())
    others = [
        blockwise(model=tiny.model(family), gradients=gradients, folder=tmp_path / gradients, precision=precision)
        for gradients in ("release", "spill", "keep")
    ]
    norms = run(one, store, rate=1e-3)
    found = [run(other, store, rate=1e-3) for other in others]
    assert found[0] == found[1] == found[2]
    # The first step's gradient is that of the same weights, computed in fp32.
    assert found[0][0] == norms[0]
    for other in others[1:]:
        assert_bitwise(others[0], other)
    exact = dict(one.model.named_parameters())
    moved = sum(float((p - dict(start.named_parameters())[n].float()).square().sum()) for n, p in exact.items())
    missed = sum(float((p.float() - exact[n]).square().sum()) for n, p in others[0].model.named_parameters())
    assert all(p.dtype == torch.bfloat16 and p.grad is None for p in others[0].model.parameters())
    # Rounding is an eighth bit's: the path stays near the exact one, compared with how far it went.
    assert missed < 0.3 * moved


@pytest.mark.parametrize("options", [{}, {"precision": "bf16-stochastic"}, {"gradients": "spill", "states": True}])
@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor", "lomo", "adalomo"])
def test_a_state_continues_bit_by_bit(name: str, options: dict[str, Any], store: TokenStore, tmp_path: Path) -> None:
    def engine(part: str) -> Blockwise:
        return blockwise(folder=tmp_path / part, optimizer={"name": name}, **options)

    whole, first, second = engine("whole"), engine("first"), engine("second")
    run(whole, store, steps=4)
    run(first, store, steps=2)
    state = first.state()
    second.load_state(state)
    for step in (2, 3):
        rows = rows_of(store, step)
        second.step(rows, sum(row.supervised_tokens for row in rows), learning_rate=1e-2, seed=step)
    assert_bitwise(whole, second)


@pytest.mark.parametrize("limit", [None, 1.0])
def test_numbers_that_are_not_finite_are_not_an_update(limit: float | None, store: TokenStore, tmp_path: Path) -> None:
    engine = blockwise(folder=tmp_path, max_grad_norm=limit)
    with torch.no_grad():
        dict(engine.model.named_parameters())["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    before = {name: p.clone() for name, p in engine.model.named_parameters()}
    rows = rows_of(store, 0)
    outcome = engine.step(rows, sum(row.supervised_tokens for row in rows), learning_rate=1e-2, seed=0)
    assert not outcome.updated
    for name, p in engine.model.named_parameters():
        assert torch.equal(p, before[name]) or p.isnan().any()


def test_an_interrupted_step_leaves_no_trace(store: TokenStore, tmp_path: Path) -> None:
    engine, other = blockwise(folder=tmp_path), blockwise(folder=tmp_path / "other")

    def cut_off() -> Iterator[MicroBatch]:
        yield rows_of(store, 0)[0]
        raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        engine.step(cut_off(), 10, learning_rate=1.0, seed=0)
    assert all("forward" not in block.__dict__ for block in engine._blocks)
    assert run(engine, store) == run(other, store)
    assert_bitwise(engine, other)


def test_validation_is_the_plain_engines(store: TokenStore, tmp_path: Path) -> None:
    rows = rows_of(store, 0)
    one, other = plain(), blockwise(folder=tmp_path)
    for a, b in zip(one.losses(rows), other.losses(rows), strict=True):
        assert torch.equal(a, b)


def test_a_model_that_does_more_between_blocks_is_refused(store: TokenStore, tmp_path: Path) -> None:
    engine = blockwise(folder=tmp_path)
    block = engine._blocks[1]
    block.register_forward_pre_hook(lambda _, given: (given[0] * 2, *given[1:]))
    with pytest.raises(ModelError, match="more between its blocks"):
        run(engine, store)


def test_shared_blocks_are_refused(tmp_path: Path) -> None:
    model = tiny.model("llama")
    model.model.layers[1].mlp = model.model.layers[0].mlp
    with pytest.raises(ModelError, match="share weights"):
        blockwise(model=model, folder=tmp_path)


def test_native_weights_of_16_bits_sum_gradients_in_32(store: TokenStore, tmp_path: Path) -> None:
    """As on a device that multiplies bf16: nothing is widened. Rows are summed in fp32, so many rows are near one."""
    train = settings(precision="bf16-stochastic", max_grad_norm=None)
    seen: dict[int, dict[str, torch.Tensor]] = {}
    for budget in (1, 10_000):
        engine = Blockwise(RowModel(tiny.model("llama").to(torch.bfloat16), adds_gradients=True), train, gradients="release")
        found = seen.setdefault(budget, {})

        def note(gradients: Any, found: dict[str, torch.Tensor] = found, **_: Any) -> None:
            found.update({name: gradient.clone() for name, gradient in gradients.items()})

        engine._updater.update = note  # type: ignore[method-assign]
        rows = rows_of(store, 0, budget)
        assert engine.step(rows, sum(row.supervised_tokens for row in rows), learning_rate=1e-3, seed=0).updated
    assert all(gradient.dtype == torch.float32 for gradient in seen[1].values())
    for name, gradient in seen[1].items():
        # Products in bf16 keep 8 bits; the sum over rows adds nothing to that.
        assert float((gradient - seen[10_000][name]).norm()) < 0.02 * float(gradient.norm()), name


def test_host_memory_serves_as_a_file_does(store: TokenStore, tmp_path: Path) -> None:
    model = tiny.model("llama")
    rows = RowModel(model, adds_gradients=True)
    shelf = InHost("cpu")
    engine = Blockwise(rows, settings(), gradients="spill", spilled=InHost("cpu"), states=shelf, inputs=InHost("cpu"))
    one = plain()
    assert run(one, store) == run(engine, store)
    assert_bitwise(one, engine)
