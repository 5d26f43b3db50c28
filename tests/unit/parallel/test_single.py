"""The engine of one device: clipping, refusal of numbers that are not finite, state that continues bit by bit."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from fullrank.models.rows import RowModel
from fullrank.parallel.engine import StepOutcome
from fullrank.parallel.single import SingleDevice
from fullrank.recipe import AdamW, Train
from fullrank.sequences.layout import MicroBatch, micro_batches
from fullrank.sequences.store import TokenStore


@pytest.fixture
def store(tmp_path: Path) -> TokenStore:
    opened: TokenStore = tiny.write_store(tmp_path / "store", tiny.random_tokens(12))
    return opened


def engine_of(family: str = "llama", *, recompute: str = "none", **train: Any) -> SingleDevice:
    settings = {"precision": "fp32", "optimizer": AdamW(weight_decay=0.1)} | train
    return SingleDevice(RowModel(tiny.model(family), adds_gradients=True), Train(**settings), recompute=recompute)


def rows_of(store: TokenStore, step: int = 0, budget: int = 40) -> list[MicroBatch]:
    return micro_batches(store, [(4 * step + n) % len(store) for n in range(4)], budget, packed=True)


def advance(engine: SingleDevice, rows: list[MicroBatch], rate: float = 1e-2, seed: int = 0) -> StepOutcome:
    return engine.step(rows, sum(row.supervised_tokens for row in rows), learning_rate=rate, seed=seed)


def snapshot(engine: SingleDevice) -> dict[str, torch.Tensor]:
    """Every tensor and counter of the state, copied."""
    state = engine.state()
    copied = {f"{kind}.{name}": t.clone() for kind, tensors in state.tensors.items() for name, t in tensors.items()}
    return copied | {f"updates.{name}": torch.tensor(n) for name, n in state.facts["updates"].items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def gradients_seen(engine: SingleDevice, rows: list[MicroBatch]) -> tuple[StepOutcome, dict[str, torch.Tensor]]:
    """A step, and the gradients as its optimizer was handed them."""
    seen: dict[str, torch.Tensor] = {}
    update = engine._updater.update

    def read(gradients: Mapping[str, torch.Tensor], **options: Any) -> None:
        seen.update({name: gradient.clone() for name, gradient in gradients.items()})
        update(gradients, **options)

    engine._updater.update = read  # type: ignore[method-assign]
    return advance(engine, rows), seen


# ---- clipping ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [0.01, 0.5, 1e6])
def test_clipping_is_that_of_torch(store: TokenStore, limit: float) -> None:
    rows = rows_of(store)
    outcome, clipped = gradients_seen(engine_of(max_grad_norm=limit), rows)
    unclipped_outcome, raw = gradients_seen(engine_of(max_grad_norm=None), rows)
    parameters = [torch.nn.Parameter(torch.empty_like(g)) for g in raw.values()]
    for parameter, gradient in zip(parameters, raw.values(), strict=True):
        parameter.grad = gradient.clone()
    norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
    # The same sums of squares in another order: fp32 rounding of a norm over some 40,000 numbers.
    assert outcome.grad_norm == unclipped_outcome.grad_norm == pytest.approx(float(norm), rel=1e-6)
    for parameter, name in zip(parameters, raw, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(clipped[name], parameter.grad, rtol=2e-6, atol=0)


def test_without_a_limit_gradients_are_untouched_and_a_generous_limit_changes_nothing(store: TokenStore) -> None:
    _, free = gradients_seen(engine_of(max_grad_norm=None), rows_of(store))
    _, generous = gradients_seen(engine_of(max_grad_norm=1e6), rows_of(store))
    assert all(torch.equal(free[name], generous[name]) for name in free)


# ---- accumulation -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recompute", ["none", "block"])
def test_rows_accumulate_into_one_update(store: TokenStore, recompute: str) -> None:
    together, apart = engine_of(), engine_of(recompute=recompute)
    advance(together, rows_of(store, budget=1000))
    many = rows_of(store, budget=1)
    assert len(many) == 4
    advance(apart, many)
    assert {n for name, n in apart.state().facts["updates"].items()} == {1}
    gradients = [gradients_seen(engine_of(recompute=recompute), rows)[1] for rows in (rows_of(store, budget=1000), many)]
    for name, gradient in gradients[0].items():
        # Sums in another order; the laws compare with transformers.
        assert float((gradient - gradients[1][name]).norm()) <= 1e-5 * float(gradient.norm()) + 1e-9, name


def test_a_row_without_supervised_tokens_adds_nothing(tmp_path: Path) -> None:
    from fullrank.sequences.chat import Tokens

    store = tiny.write_store(tmp_path, [Tokens([5, 6, 7], [False, True, True]), Tokens([8, 9], [True, False])])
    with_it, without = engine_of(), engine_of()
    both = micro_batches(store, [0, 1], 100, packed=False)
    assert advance(with_it, both) == advance(without, both[:1])
    assert same(snapshot(with_it), snapshot(without))


def test_gradients_do_not_outlive_a_step(store: TokenStore) -> None:
    engine = engine_of()
    advance(engine, rows_of(store))
    assert all(p.grad is None for p in engine.model.parameters())


def test_the_learning_rate_is_the_steps(store: TokenStore) -> None:
    engine = engine_of()
    before = snapshot(engine)
    advance(engine, rows_of(store), rate=0.0)
    after = snapshot(engine)
    assert all(torch.equal(before[name], after[name]) for name in before), "a rate of 0 moves no weight, decay included"


# ---- numbers that are not finite --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_number_that_is_not_finite_leaves_weights_and_moments_bit_by_bit(store: TokenStore, poison: float) -> None:
    engine = engine_of()
    advance(engine, rows_of(store))
    before = snapshot(engine)
    parameter = engine.model.get_output_embeddings().weight
    sound = parameter.detach()[3, 3].clone()
    with torch.no_grad():
        parameter[3, 3] = poison
    outcome = advance(engine, rows_of(store, 1))
    assert not outcome.updated
    assert not (math.isfinite(outcome.loss) and math.isfinite(outcome.grad_norm))
    with torch.no_grad():
        parameter[3, 3] = sound
    assert same(snapshot(engine), before)
    assert all(p.grad is None for p in engine.model.parameters())
    assert advance(engine, rows_of(store, 1)).updated, "and the engine still works"


def test_a_gradient_that_is_not_finite_under_a_finite_loss_is_no_update(store: TokenStore) -> None:
    engine = engine_of()
    before = snapshot(engine)
    weight = engine.model.base_model.norm.weight
    handle = weight.register_hook(lambda gradient: gradient * math.nan)
    outcome = advance(engine, rows_of(store))
    handle.remove()
    assert math.isfinite(outcome.loss)
    assert not outcome.updated
    assert same(snapshot(engine), before)


def test_an_exception_between_rows_leaves_the_state_untouched(store: TokenStore) -> None:
    engine = engine_of()
    advance(engine, rows_of(store))
    before = snapshot(engine)

    def interrupted() -> Iterator[MicroBatch]:
        yield rows_of(store, 1, budget=1)[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.step(interrupted(), 10, learning_rate=1e-2, seed=0)
    assert same(snapshot(engine), before)
    untouched = engine_of()
    advance(untouched, rows_of(store))
    assert advance(engine, rows_of(store, 1)) == advance(untouched, rows_of(store, 1)), "nothing half-accumulated is left"
    assert same(snapshot(engine), snapshot(untouched))


# ---- state ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_a_state_continues_bit_by_bit(store: TokenStore, family: str) -> None:
    straight, first = engine_of(family), engine_of(family)
    for step in range(4):
        advance(straight, rows_of(store, step), seed=step)
    for step in range(2):
        advance(first, rows_of(store, step), seed=step)
    saved = first.state()
    kept = {kind: {name: t.clone() for name, t in tensors.items()} for kind, tensors in saved.tensors.items()}
    rows = RowModel(tiny.model(family, seed=99), adds_gradients=True)
    second = SingleDevice(rows, Train(precision="fp32", optimizer=AdamW(weight_decay=0.1)), recompute="none")
    second.load_state(type(saved)(tensors=kept, facts=saved.facts))
    for step in range(2, 4):
        advance(second, rows_of(store, step), seed=step)
    assert same(snapshot(second), snapshot(straight))
    assert second.never_reached() == straight.never_reached()


def test_dropout_is_a_function_of_the_steps_seed(store: TokenStore) -> None:
    def losses(seed: int, disturb: int) -> StepOutcome:
        model = tiny.model("gpt2", resid_pdrop=0.3, embd_pdrop=0.3)
        engine = SingleDevice(RowModel(model, adds_gradients=True), Train(precision="fp32"), recompute="none")
        torch.manual_seed(disturb)
        return advance(engine, rows_of(store), seed=seed)

    assert losses(5, 0) == losses(5, 1)
    assert losses(5, 0) != losses(6, 0)


def test_losses_are_without_dropout_and_without_gradients(store: TokenStore) -> None:
    model = tiny.model("gpt2", resid_pdrop=0.3)
    engine = SingleDevice(RowModel(model, adds_gradients=True), Train(precision="fp32"), recompute="none")
    once, again = (torch.cat(list(engine.losses(rows_of(store)))) for _ in range(2))
    assert torch.equal(once, again)
    assert not once.requires_grad


def test_weights_are_named_as_in_the_file_and_tied_ones_once(store: TokenStore) -> None:
    engine = engine_of("gpt2")
    assert set(engine.weights()) == {name for name, _ in engine.model.named_parameters()}
    assert "lm_head.weight" not in engine.weights()
    other = tiny.model("gpt2", seed=7)
    engine.load_weights({name: p.detach() for name, p in other.named_parameters()})
    assert all(torch.equal(p, engine.weights()[name]) for name, p in other.named_parameters())


# ---- what a gradient never reached ------------------------------------------------------------------------------------------


def test_tensors_never_reached_are_those_whose_gradient_stayed_zero(store: TokenStore) -> None:
    engine = engine_of(max_grad_norm=None)
    everything = {name for name, _ in engine.model.named_parameters()}
    assert engine.never_reached() == everything
    layer = engine.model.model.layers[0]
    with torch.no_grad():
        layer.mlp.down_proj.weight.zero_()
        layer.mlp.gate_proj.weight.zero_()  # silu(0) = 0: nothing flows forward, and nothing back
    advance(engine, rows_of(store), rate=0.0)
    gate, up, down = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down"))
    norm = "model.layers.0.post_attention_layernorm.weight"
    assert engine.never_reached() == {gate, up, down, norm}
    with torch.no_grad():
        layer.mlp.gate_proj.weight.normal_()
    advance(engine, rows_of(store), rate=0.0)
    assert engine.never_reached() == {gate, up, norm}, "a gradient reaches the last matrix once what enters it is not zero"
