"""Attention over segments, block by block: outputs and gradients are those of a masked softmax written out in float64."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch.nn.attention.flex_attention import create_mask, flex_attention

from fullrank.models import attention
from fullrank.models.attention import attend, attending_to_rows
from fullrank.sequences.layout import MicroBatch, row_of
from fullrank.sequences.store import Example

HEADS, SIZE = 4, 16
MODULE: Any = SimpleNamespace()


def row(seed: int) -> MicroBatch:
    """Examples that begin alike at several depths, some longer than any window here, one there twice."""
    chance = random.Random(seed)
    prompt = [chance.randrange(50) for _ in range(chance.randrange(1, 20))]
    examples = [[chance.randrange(50) for _ in range(chance.randrange(1, 25))] for _ in range(3)]
    for _ in range(5):
        begin = chance.choice([prompt, prompt, *examples])
        examples.append(begin + [chance.randrange(50) for _ in range(chance.randrange(1, 12))])
    examples.append(examples[-1])
    given = [Example(np.asarray([*ids, 1]), np.ones(len(ids) + 1, np.bool_)) for ids in examples]
    return row_of(list(enumerate(given)), shared=True)


def attended(batch: MicroBatch, window: int | None) -> torch.Tensor:
    """mask_TT, token by token: the ancestors of each by walking up the segments."""
    owner = {at: n for n, segment in enumerate(batch.segments) for at in range(segment.start, segment.end)}
    depth = batch.position_ids_1T[0].tolist()
    mask = torch.zeros(batch.tokens, batch.tokens, dtype=torch.bool)
    for at in range(batch.tokens):
        number, end = owner[at], at + 1
        while number >= 0:
            segment = batch.segments[number]
            for other in range(segment.start, min(end, segment.end)):
                mask[at, other] = window is None or depth[at] - depth[other] < window
            number, end = segment.parent, batch.tokens
    return mask


def reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
) -> torch.Tensor:
    groups = query.shape[1] // key.shape[1]
    scores = torch.einsum("bhqd,bhkd->bhqk", query, key.repeat_interleave(groups, 1)) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = torch.where(mask, scores.exp(), 0.0)
    total = weights.sum(-1, keepdim=True)
    if s_aux is not None:
        total = total + s_aux.exp()[None, :, None, None]
    return torch.einsum("bhqk,bhkd->bqhd", weights / total, value.repeat_interleave(groups, 1))


@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 1, 5, 100])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("more", [{}, {"softcap": 2.0}, {"s_aux": True}], ids=["plain", "capped", "sinks"])
@pytest.mark.parametrize("seed", range(3))
def test_outputs_and_gradients(
    seed: int, more: dict[str, Any], dtype: torch.dtype, tolerance: float, window: int | None, key_heads: int
) -> None:
    if more and dtype == torch.float64:
        pytest.skip("the softmax of capped scores is in fp32 whatever the type")
    batch = row(seed)
    generator = torch.Generator().manual_seed(seed)
    if "s_aux" in more:
        more = {"s_aux": torch.randn(HEADS, generator=generator, dtype=dtype)}

    def drawn(heads: int) -> torch.Tensor:
        return torch.randn(1, heads, batch.tokens, SIZE, generator=generator, dtype=dtype)

    inputs = [drawn(HEADS), drawn(key_heads), drawn(key_heads)]
    slope = drawn(HEADS).transpose(1, 2)
    own = [some.clone().requires_grad_() for some in inputs]
    found, _ = attend(MODULE, *own, None, scaling=0.2, sliding_window=window, row=batch, **more)
    found_grads = torch.autograd.grad((found * slope).sum(), own)
    exact = [some.double().requires_grad_() for some in inputs]
    exact_more = {name: some.double() if isinstance(some, torch.Tensor) else some for name, some in more.items()}
    wanted = reference(*exact, attended(batch, window), scaling=0.2, **exact_more)
    wanted_grads = torch.autograd.grad((wanted * slope.double()).sum(), exact)
    for one, other in zip([found, *found_grads], [wanted, *wanted_grads], strict=True):
        # fp32 sums of some dozens of products; gradients that cancel altogether (a window of one) against one of norm 1.
        assert float((one.double() - other).norm()) <= tolerance * max(float(other.norm()), 1.0)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_flex_attention_is_given_the_same_mask(window: int | None, softcap: float | None) -> None:
    """Its forward pass, which torch can run uncompiled on a CPU; a device tries both passes itself (`flex_is_right`)."""
    batch = row(1)
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(1, heads, batch.tokens, SIZE, generator=generator) for heads in (HEADS, 2, 2))
    found = flex_attention(
        query,
        key,
        value,
        score_mod=None if softcap is None else attention._capped(softcap),
        block_mask=attention._row_block_mask(batch, window, torch.device("cpu")),
        scale=0.2,
        enable_gqa=True,
    )
    exact = (some.double() for some in (query, key, value))
    wanted = reference(*exact, attended(batch, window), scaling=0.2, softcap=softcap)
    assert isinstance(found, torch.Tensor)
    torch.testing.assert_close(found.transpose(1, 2).double(), wanted, atol=1e-5, rtol=0)


def test_flex_attention_is_refused_where_it_does_not_run() -> None:
    config = tiny.config("gemma2", 300)  # capped scores: no blocks on a CPU
    # no backward pass on a CPU: asked as if it were an accelerator's, it must say no instead of failing later
    assert not attention.flex_is_right(config, torch.device("cpu"), torch.float32, row(0))


@pytest.mark.parametrize(("factor", "right"), [(1.0, True), (1.01, False)])
def test_flex_attention_is_used_where_it_is_right(monkeypatch: pytest.MonkeyPatch, factor: float, right: bool) -> None:
    def stand_in(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **named: Any) -> torch.Tensor:
        tokens = query.shape[2]
        mask = create_mask(named["block_mask"].mask_mod, None, None, tokens, tokens, device="cpu")[0, 0]
        return factor * attention.dense(query, key, value, mask, named["scale"], 0.0, 2.0, None)

    monkeypatch.setattr(attention, "_compiled_flex", lambda: stand_in)
    config = tiny.config("gemma2", 300)
    assert attention.flex_is_right(config, torch.device("cpu"), torch.float32, row(0)) is right


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: flex attention has no backward pass elsewhere")
@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral"])
def test_flex_attention_on_a_gpu(family: str) -> None:
    config = tiny.config(family, 300, head_dim=64)
    assert attention.flex_is_right(config, torch.device("cuda"), torch.float32, row(0).to(torch.device("cuda")))


def test_without_a_row_it_says_so() -> None:
    model = tiny.model("llama")
    with attending_to_rows(model), pytest.raises(ValueError, match="given none"):
        model(input_ids=torch.tensor([[1, 2, 3]]))
    assert model(input_ids=torch.tensor([[1, 2, 3]])).logits.shape[1] == 3
