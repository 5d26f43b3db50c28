"""Divergence and losses of two models are those of their whole distributions, computed one text at a time in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from fullrank.errors import ModelError
from fullrank.generation.divergence import Remembered
from fullrank.sequences.chat import Tokens


def moved(model: Any, by: float) -> Any:
    """The model with noise on every matrix, of `by` times its size."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.add_(torch.randn_like(p) * p.std() * by)
    return model


def texts() -> list[Tokens]:
    examples = tiny.random_tokens(7)
    return examples + [Tokens(examples[n].ids[:9] + [n] * 3, [False] * 8 + [True] * 4) for n in (0, 0, 0)]  # these begin alike


@torch.no_grad()
def by_hand(first: Any, second: Any, tokens: Tokens) -> tuple[float, float, float]:
    ids = torch.tensor([tokens.ids])
    p, q = (model.eval()(input_ids=ids).logits[0, :-1].double().log_softmax(-1) for model in (first, second))
    counted = torch.tensor(tokens.supervised[1:])
    targets = ids[0, 1:, None]
    kl = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    losses = (-some.gather(1, targets)[:, 0][counted].sum().item() for some in (p, q))
    return (kl[counted].sum().item(), *losses)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_sums_are_those_of_whole_distributions(tmp_path: Path, family: str) -> None:
    examples = texts()
    store = tiny.write_store(tmp_path, examples)
    first, second = tiny.model(family).train(), moved(tiny.model(family), 0.3)
    found = {one.example: one for one in Remembered(first, store, 70).against(second)}
    assert first.training and sorted(found) == list(range(len(examples)))
    for number, tokens in enumerate(examples):
        one = found[number]
        assert one.tokens == tokens.supervised_targets()
        wanted = by_hand(first, second, tokens)
        assert (one.kl, one.loss_before, one.loss_after) == pytest.approx(wanted, rel=1e-4, abs=1e-5)  # fp32
        assert one.kl > 0


def test_a_model_is_not_apart_from_itself(tmp_path: Path) -> None:
    store = tiny.write_store(tmp_path, texts())
    for one in Remembered(tiny.model("llama"), store, 70).against(tiny.model("llama")):
        assert one.kl == 0.0 and one.loss_before == one.loss_after


def test_the_first_model_may_change_or_go_meanwhile(tmp_path: Path) -> None:
    store, model = tiny.write_store(tmp_path, texts()), tiny.model("llama")
    remembered = Remembered(model, store, 70)
    wanted = list(remembered.against(moved(tiny.model("llama"), 0.3)))
    assert list(remembered.against(moved(model, 0.3))) == wanted


def test_further_tokens_of_the_second_model_take_weight_from_the_first(tmp_path: Path) -> None:
    store = tiny.write_store(tmp_path, texts())
    first, second = tiny.model("llama"), tiny.model("llama")
    vocabulary = first.config.vocab_size
    second.resize_token_embeddings(vocabulary + 8)
    for one, tokens in zip(sorted(Remembered(first, store, 70).against(second), key=lambda m: m.example), texts(), strict=True):
        ids = torch.tensor([tokens.ids])
        with torch.no_grad():
            q = second(input_ids=ids).logits[0, :-1].double()
        # The same logits, and some more: the divergence is the log of what the others take.
        taken = (q.logsumexp(-1) - q[:, :vocabulary].logsumexp(-1))[torch.tensor(tokens.supervised[1:])]
        assert one.kl == pytest.approx(taken.sum().item(), rel=1e-4)
    with pytest.raises(ModelError, match="tokens, and the one it is compared with"):
        list(Remembered(second, store, 70).against(first))
