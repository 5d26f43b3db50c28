"""The loss of a row: a cross-entropy of every supervised token, in fp32, whatever the model returns (the law is in laws/)."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch

from fullrank.sequences.chat import Tokens
from fullrank.sequences.layout import micro_batches
from fullrank.sequences.loss import row_loss, token_losses


class Table(torch.nn.Module):
    """Predicts from the last token alone: row t of a table are the logits after token t."""

    def __init__(self, table_VV: torch.Tensor, *, keeps: bool) -> None:
        super().__init__()
        self.table_VV, self.keeps = table_VV, keeps
        self.calls: list[dict[str, Any]] = []

    def forward(self, input_ids: torch.Tensor, **others: Any) -> SimpleNamespace:
        self.calls.append(others)
        logits_1TV = self.table_VV[input_ids]
        return SimpleNamespace(logits=logits_1TV[:, others["logits_to_keep"]] if self.keeps else logits_1TV)


@pytest.mark.parametrize("keeps", [True, False], ids=["logits at supervised positions", "all logits"])
def test_token_losses_by_hand(tmp_path: Path, keeps: bool) -> None:
    # After token 0 the model gives token 1 odds of 3 to 1 to 1; after token 1 all three are as likely.
    table = torch.tensor([[0.0, math.log(3.0), 0.0], [5.0, 5.0, 5.0], [0.0, 0.0, 0.0]])
    store = tiny.write_store(tmp_path, [Tokens([0, 1, 2], [False, True, True]), Tokens([2, 0, 0], [False, False, True])])
    (row,) = micro_batches(store, [0, 1], 10, packed=True)
    model = Table(table, keeps=keeps)
    assert token_losses(model, row).tolist() == pytest.approx([-math.log(3 / 5), math.log(3), -math.log(1 / 5)], rel=1e-6)
    assert float(row_loss(model, row, 6)) == pytest.approx((math.log(5 / 3) + math.log(3) + math.log(5)) / 6, rel=1e-6)
    assert model.calls[0]["use_cache"] is False, "a cache would switch packing by positions off"
    assert "attention_mask" not in model.calls[0]


def test_losses_are_fp32_even_where_the_model_computes_in_bf16(tmp_path: Path) -> None:
    store = tiny.write_store(tmp_path, [Tokens([0, 1], [False, True])])
    (row,) = micro_batches(store, [0], 10, packed=True)
    logits = torch.tensor([[0.0, 1.0, 2.0]] * 3, dtype=torch.bfloat16)
    losses = token_losses(Table(logits, keeps=True), row)
    assert losses.dtype == torch.float32
    by_hand = math.log(1 + math.e + math.e**2) - 1.0
    assert float(losses) == pytest.approx(by_hand, rel=1e-6), "bf16 would be off by about 4e-3"


def test_a_row_without_supervised_tokens_is_not_computed(tmp_path: Path) -> None:
    store = tiny.write_store(tmp_path, [Tokens([0, 1], [True, False])])
    (row,) = micro_batches(store, [0], 10, packed=True)
    model = Table(torch.zeros(3, 3), keeps=True)
    assert token_losses(model, row).shape == (0,)
    assert model.calls == []
