"""An epoch of fullrank is an epoch of plain transformers and torch: the loop below is the whole reference.

It takes each example alone through transformers' own loss, sums gradients over the step, clips with torch and updates with
torch's AdamW; it knows nothing of rows, stores or engines. Tolerance, fp32: gradients differ by rounding of sums in another order
(1e-6 of their size). Adam divides by the gradient's own size, so a gradient that is nothing but rounding (a key's bias moves no
softmax) would move its weight as far as any other: `eps` is larger than such gradients here, and weights are compared tensor by
tensor in norm, to a thousandth of how far the tensor moved.
"""

from __future__ import annotations

import datetime
import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from fullrank.models.rows import RowModel
from fullrank.parallel.single import SingleDevice
from fullrank.recipe import Train
from fullrank.sequences.chat import ChatRenderer, Tokens
from fullrank.sequences.order import Order
from fullrank.train.loop import Layout, steps

RATE, DECAY, BETAS, EPS, CLIP, BATCH = 3e-3, 0.1, (0.9, 0.95), 1e-5, 1.0, 4


def plain_epoch(model: Any, examples: list[Tokens], batches: list[list[int]], rates: list[float]) -> list[float]:
    """Losses of the steps; the model is trained in place."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=BETAS, eps=EPS)
    model.train()
    losses = []
    for batch, rate in zip(batches, rates, strict=True):
        counts = [sum(examples[n].supervised[1:]) for n in batch]
        total = 0.0
        for n, count in zip(batch, counts, strict=True):
            pairs = zip(examples[n].ids, examples[n].supervised, strict=True)
            labels = torch.tensor([[token if inside else -100 for token, inside in pairs]])
            share = model(input_ids=torch.tensor([examples[n].ids]), labels=labels).loss * count / sum(counts)
            share.backward()
            total += share.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_epoch_is_that_of_a_plain_loop(tmp_path: Path, family: str) -> None:
    spoken = tiny.tokenizer()
    renderer = ChatRenderer(spoken, datetime.date(2026, 1, 1), "tiny")
    examples = [renderer.examples(row["messages"])[0] for row in tiny.chat_rows(30)]
    store = tiny.write_store(tmp_path, examples)
    ours, theirs, base = (tiny.model(family) for _ in range(3))
    train = Train.model_validate(
        {
            "epochs": 1,
            "global_batch_size": BATCH,
            "optimizer": {"learning_rate": RATE, "weight_decay": DECAY, "betas": BETAS, "eps": EPS},
            "schedule": {"name": "linear", "warmup_ratio": 0.25, "min_lr_ratio": 0.0},
            "max_grad_norm": CLIP,
            "precision": "fp32",
        }
    )
    order = Order(len(store), BATCH, 1, seed=5)
    engine = SingleDevice(RowModel(ours, adds_gradients=True), train, recompute="none")
    found = list(steps(engine, store, order, train, Layout(150, packed=True, shared=True), first=1))

    batches = [order.step(n).tolist() for n in range(1, 9)]
    assert sorted(n for batch in batches for n in batch) == list(range(30))
    rates = [RATE / 2, RATE] + [RATE * (1 - n / 6) for n in range(1, 7)]  # two steps up, six down to 0
    wanted = plain_epoch(theirs, examples, batches, rates)

    assert [step.row.learning_rate for step in found] == pytest.approx(rates, rel=1e-12, abs=1e-18)
    assert [step.row.loss for step in found] == pytest.approx(wanted, rel=1e-5)
    assert wanted[-1] < wanted[0]
    assert all(math.isfinite(step.row.grad_norm) and step.row.grad_norm > CLIP for step in found), "clipping is at work"
    for (name, mine), other, start in zip(ours.named_parameters(), theirs.parameters(), base.parameters(), strict=True):
        moved = (other - start).norm().item()
        assert moved > 0
        assert (mine - other).norm().item() <= 1e-3 * moved, name


@pytest.mark.parametrize("row", tiny.chat_rows(11), ids=lambda row: f"{len(row['messages'])} turns")
def test_rendered_ids_are_those_of_transformers(row: dict[str, Any]) -> None:
    spoken = tiny.tokenizer()
    ours = ChatRenderer(spoken, datetime.date(2026, 1, 1), "tiny").examples(row["messages"])[0]
    assert ours.ids == spoken.apply_chat_template(row["messages"], tokenize=True)["input_ids"]


def test_tools_and_prompts_render_as_transformers_renders_them() -> None:
    spoken = tiny.tokenizer()
    renderer = ChatRenderer(spoken, datetime.date(2026, 1, 1), "tiny")
    messages = tiny.chat_rows(1)[0]["messages"]
    tools = [{"type": "function", "function": {"name": "lookup", "description": "d", "parameters": {"type": "object"}}}]
    assert renderer.text(messages, tools=tools) == spoken.apply_chat_template(messages, tools=tools, tokenize=False)
    assert json.dumps(tools)[:20] in renderer.text(messages, tools=tools)
    prompt = spoken.apply_chat_template(messages[:-1], add_generation_prompt=True, tokenize=True)["input_ids"]
    assert renderer.ids(renderer.prompt(messages[:-1])) == prompt
