"""The loss law: however a step is laid out, its loss and every gradient are those of its examples one at a time.

    loss(step) = sum of token losses over the step's examples / number of supervised tokens in the step

The reference is transformers itself: each example alone, unpadded, with labels of -100 where nothing is supervised, its mean loss
times its number of supervised tokens, all in float64. It shares no code with the layout, the loss or the engine.

Tolerances. In fp32 a gradient is a sum of up to some hundred products whose order differs between layouts: relative rounding of
about sqrt(n) * 6e-8, below 1e-5 of the tensor's norm; tensors whose gradient nearly cancels are held to 1e-5 of a thousandth of
the global norm instead. The loss is a mean of positive numbers: 1e-6. In float64 the same sums round 5e8 times finer: 1e-12
leaves room for deep cancellation, and nothing that is mathematically another step could hide in it.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from double import everything_double

from fullrank.generation.likelihood import example_losses
from fullrank.models.rows import RowModel
from fullrank.optim.shelf import InHost
from fullrank.parallel.blockwise import Blockwise
from fullrank.parallel.single import SingleDevice
from fullrank.recipe import Train
from fullrank.sequences import head
from fullrank.sequences.chat import Tokens
from fullrank.sequences.layout import micro_batches
from fullrank.sequences.store import TokenStore
from fullrank.train.loop import Layout, validation_loss

VOCABULARY = 300
_PROMPT = [int(n) for n in np.random.default_rng(4).integers(VOCABULARY, size=2 * tiny.WINDOW)]
#: Longer and shorter than the sliding window, one without a prompt, one without a supervised token that has a predecessor; and a
#: family that begins alike: one prompt with answers of which two begin alike, an answer that another goes on from, one there
#: twice, and one whose supervised tokens are another's context.
EXAMPLES = [
    *tiny.random_tokens(7, vocabulary=VOCABULARY, seed=3, longest=4 * tiny.WINDOW),
    Tokens(list(range(40, 40 + 3 * tiny.WINDOW)), [True] * 3 * tiny.WINDOW),
    Tokens([7, 8, 9], [True, False, False]),
    Tokens([5, VOCABULARY - 1, 6, VOCABULARY - 1], [False, True, True, True]),  # a token that is the padding's as well
    *(
        Tokens(_PROMPT + answer, [False] * len(_PROMPT) + [True] * len(answer))
        for answer in ([11, 12, 13, 14, 15, 16, 17], [11, 12, 13, 14, 18], [21, 22], [21, 22, 23, 24], [21, 22], [31])
    ),
    Tokens([*_PROMPT, 11, 12, 13, 14, 15, 19], [True] * 5 + [False] * (len(_PROMPT) - 5) + [False] * 5 + [True]),
]
BUDGETS = (1, 24, 50, 10_000)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny products are faster on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass
class Reference:
    """What a step over all examples comes to."""

    loss: float
    gradients: dict[str, torch.Tensor]


def model_of(family: str) -> Any:
    return tiny.model(family, vocabulary=VOCABULARY)


def doubled(model: Any) -> Any:
    """The same weights, drawn in fp32, as float64."""
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # grouped products have no float64
    return model.double()


@functools.cache
def reference(family: str) -> Reference:
    """One example at a time through transformers' own loss, in float64."""
    model = doubled(model_of(family)).train()
    with everything_double():
        counts = [tokens.supervised_targets() for tokens in EXAMPLES]
        total = torch.zeros(())
        for tokens, count in zip(EXAMPLES, counts, strict=True):
            if count:
                labels = [token if inside else -100 for token, inside in zip(tokens.ids, tokens.supervised, strict=True)]
                ids_1T = torch.tensor([tokens.ids])
                mean = model(input_ids=ids_1T, labels=torch.tensor([labels]), use_cache=False).loss
                (mean * count / sum(counts)).backward()
                total += mean.detach() * count / sum(counts)
        return Reference(float(total), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


def engine_of(model: Any, recompute: str) -> SingleDevice:
    """The engine of one device that recomputes so; released: block by block; spilled: with all elsewhere that can wait."""
    rows = RowModel(model, adds_gradients=True)
    train = Train(max_grad_norm=None, precision="fp32")
    if recompute == "released":
        return Blockwise(rows, train, gradients="release")
    if recompute == "spilled":
        train = Train(max_grad_norm=1e9, precision="fp32")
        return Blockwise(rows, train, gradients="spill", spilled=InHost("cpu"), states=InHost("cpu"), inputs=InHost("cpu"))
    return SingleDevice(rows, train, recompute=recompute)


def step_of(model: Any, store: TokenStore, budget: int, *, layout: str, recompute: str) -> Reference:
    """Loss and gradients of one step of the engine, read as the optimizer sees them."""
    engine = engine_of(model, recompute)
    assert engine.rows.packs and engine.rows.shares, engine.rows.why
    rows = micro_batches(store, range(len(store)), budget, packed=layout != "alone", shared=layout == "shared")
    assert (sum(row.tokens for row in rows) < sum(row.separate_tokens for row in rows)) == (layout == "shared" and budget > 1)
    gradients: dict[str, torch.Tensor] = {}

    update = engine._updater.update

    def read(given: Mapping[str, torch.Tensor], **options: Any) -> None:
        gradients.update({name: gradient.clone() for name, gradient in given.items()})
        update(given, **options)

    engine._updater.update = read  # type: ignore[method-assign]
    outcome = engine.step(rows, sum(row.supervised_tokens for row in rows), learning_rate=1e-3, seed=0)
    assert outcome.updated
    return Reference(outcome.loss, gradients)


def check(found: Reference, wanted: Reference, *, loss: float, gradient: float) -> None:
    assert found.loss == pytest.approx(wanted.loss, rel=loss, abs=0)
    assert found.gradients.keys() == wanted.gradients.keys()
    everything = float(torch.stack([g.double().norm() for g in wanted.gradients.values()]).norm())
    for name, theirs in wanted.gradients.items():
        distance = float((found.gradients[name].double() - theirs.double()).norm())
        assert distance <= gradient * max(float(theirs.double().norm()), 1e-3 * everything), name


def grid(cases: Sequence[tuple[int, str, str, int]], *, slow: bool) -> list[Any]:
    marks = [pytest.mark.slow] if slow else []
    return [pytest.param(*case, marks=marks, id="budget {}-{}-recompute {}-chunk {}".format(*case)) for case in cases]


_LAYOUTS = ("shared", "packed", "alone")
_RECOMPUTE = ("none", "selective", "block", "offload", "released", "spilled")
_CHUNKS = (1, 1 << 26)  # bytes of logits at once: of 16 predictions, the fewest, or of all
_FULL = list(itertools.product(BUDGETS, _LAYOUTS, _RECOMPUTE, _CHUNKS))
_QUICK = [
    (50, "shared", "none", 1),
    (10_000, "shared", "block", 1 << 26),
    (50, "packed", "selective", 1 << 26),
    (24, "shared", "offload", 1 << 26),
    (50, "shared", "released", 1 << 26),
    (24, "packed", "spilled", 1),
    (10_000, "alone", "none", 1 << 26),
]
CASES = grid(_QUICK, slow=False) + grid([case for case in _FULL if case not in _QUICK], slow=True)


@pytest.mark.parametrize(("budget", "layout", "recompute", "chunk"), CASES)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_step_in_fp32_is_its_examples_one_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, budget: int, layout: str, recompute: str, chunk: int
) -> None:
    monkeypatch.setattr(head, "_CHUNK_BYTES", chunk)
    store = tiny.write_store(tmp_path, EXAMPLES)
    found = step_of(model_of(family), store, budget, layout=layout, recompute=recompute)
    check(found, reference(family), loss=1e-6, gradient=1e-5)


@pytest.mark.parametrize(("budget", "layout", "recompute", "chunk"), CASES)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_step_in_float64_is_its_examples_one_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, budget: int, layout: str, recompute: str, chunk: int
) -> None:
    monkeypatch.setattr(head, "_CHUNK_BYTES", chunk)
    store = tiny.write_store(tmp_path, EXAMPLES)
    model = doubled(model_of(family))
    with everything_double():
        found = step_of(model, store, budget, layout=layout, recompute=recompute)
    check(found, reference(family), loss=1e-12, gradient=1e-12)


@pytest.mark.parametrize("family", [f for f in tiny.FAMILIES if f in ("mistral", "gemma2", "gemma3")])
def test_the_examples_reach_beyond_the_sliding_window(family: str) -> None:
    # Without a window the same weights come to another loss, so a window lost in packing could not pass above.
    ids_1T = torch.tensor([EXAMPLES[7].ids])
    narrow, wide = (tiny.model(family, vocabulary=VOCABULARY, sliding_window=window) for window in (tiny.WINDOW, 512))
    wide.load_state_dict(narrow.state_dict())
    losses = [model(input_ids=ids_1T, labels=ids_1T).loss.item() for model in (narrow, wide)]
    assert abs(losses[0] - losses[1]) > 1e-4


def test_a_step_does_not_weigh_examples_alike_but_tokens() -> None:
    # The mean of the examples' means, which averaging over rows would give, is another number on these examples.
    counts = [tokens.supervised_targets() for tokens in EXAMPLES]
    assert len(set(counts)) > 3


@pytest.mark.parametrize("layout", _LAYOUTS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_validation_loss_is_the_same_law_whatever_the_budget(tmp_path: Path, family: str, layout: str) -> None:
    store = tiny.write_store(tmp_path, EXAMPLES)
    engine = SingleDevice(RowModel(model_of(family), adds_gradients=True), Train(precision="fp32"), recompute="none")
    for budget in BUDGETS:
        found = validation_loss(engine, store, Layout(budget, layout != "alone", layout == "shared"))
        assert found == pytest.approx(reference(family).loss, rel=1e-6, abs=0)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_likelihoods_of_examples_add_up_to_the_law(tmp_path: Path, family: str) -> None:
    store = tiny.write_store(tmp_path, EXAMPLES)
    found = list(example_losses(model_of(family), store, 50))
    assert sorted(example for example, _, _ in found) == list(range(len(EXAMPLES)))
    total = sum(loss for _, loss, _ in found) / sum(count for _, _, count in found)
    assert total == pytest.approx(reference(family).loss, rel=1e-6, abs=0)
