"""The loss of a row: a cross-entropy of every supervised token, in fp32, whatever the model computes in (the law is in laws/)."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import tiny
import torch

from fullrank.sequences.chat import Tokens
from fullrank.sequences.head import Head
from fullrank.sequences.layout import MicroBatch, micro_batches
from fullrank.sequences.loss import add_gradients, row_loss, token_losses


class Table:
    """Predicts from the last token alone: row t of a table are the logits after token t."""

    def __init__(self, table_VV: torch.Tensor, *, head: bool) -> None:
        self.table_VV, self.calls = table_VV, 0
        one_VV = torch.nn.Parameter(torch.eye(len(table_VV)).to(table_VV.dtype))
        self.head = Head(one_VV, None, 1.0, None) if head else None

    def predictions(self, batch: MicroBatch) -> tuple[torch.Tensor, Head | None]:
        self.calls += 1
        return self.table_VV[batch.input_ids_1T[0, batch.predicting_S]], self.head


@pytest.mark.parametrize("head", [True, False], ids=["hidden states and a head", "logits"])
def test_losses_by_hand(tmp_path: Path, head: bool) -> None:
    # After token 0 the model gives token 1 odds of 3 to 1 to 1; after token 1 all three are as likely.
    table = torch.tensor([[0.0, math.log(3.0), 0.0], [5.0, 5.0, 5.0], [0.0, 0.0, 0.0]], requires_grad=True)
    store = tiny.write_store(tmp_path, [Tokens([0, 1, 2], [False, True, True]), Tokens([2, 0, 0], [False, False, True])])
    (row,) = micro_batches(store, [0, 1], 10, packed=True)
    model = Table(table, head=head)
    assert token_losses(model, row).tolist() == pytest.approx([-math.log(3 / 5), math.log(3), -math.log(1 / 5)], rel=1e-6)
    loss = row_loss(model, row, 6)
    assert float(loss) == pytest.approx((math.log(5 / 3) + math.log(3) + math.log(5)) / 6, rel=1e-6)
    loss.backward()
    # softmax minus one at the target, a sixth of each; token 0 predicts twice
    wanted = [[(0.2 + 0.2 - 1) / 6, (0.6 - 1 + 0.6) / 6, 0.4 / 6], [1 / 18, 1 / 18, 1 / 18 - 1 / 6], [0.0] * 3]
    assert table.grad is not None
    torch.testing.assert_close(table.grad, torch.tensor(wanted))
    table.grad = None
    assert float(add_gradients(model, row, 6)) == pytest.approx(float(loss), rel=1e-6)
    torch.testing.assert_close(table.grad, torch.tensor(wanted))


def test_a_prediction_that_examples_share_counts_for_each(tmp_path: Path) -> None:
    table = torch.tensor([[0.0, math.log(3.0), 0.0], [5.0, 5.0, 5.0], [0.0, 0.0, 0.0]])
    example = Tokens([0, 1, 0, 1, 0, 1], [False] + [True] * 5)
    (row,) = micro_batches(tiny.write_store(tmp_path, [example, example, example]), range(3), 100, packed=True)
    assert row.tokens == 5 and row.supervised_tokens == 15
    once = 3 * math.log(5 / 3) + 2 * math.log(3)
    assert float(row_loss(Table(table, head=True), row, 15)) == pytest.approx(once / 5, rel=1e-6)


@pytest.mark.parametrize("head", [True, False])
def test_losses_are_fp32_even_where_the_model_computes_in_bf16(tmp_path: Path, head: bool) -> None:
    store = tiny.write_store(tmp_path, [Tokens([0, 1], [False, True])])
    (row,) = micro_batches(store, [0], 10, packed=True)
    logits = torch.tensor([[0.0, 1.0, 2.0]] * 3, dtype=torch.bfloat16)
    losses = token_losses(Table(logits, head=head), row)
    assert losses.dtype == torch.float32
    by_hand = math.log(1 + math.e + math.e**2) - 1.0
    assert float(losses) == pytest.approx(by_hand, rel=1e-6), "bf16 would be off by about 4e-3"


def test_a_row_without_supervised_tokens_is_not_computed(tmp_path: Path) -> None:
    store = tiny.write_store(tmp_path, [Tokens([0, 1], [True, False])])
    (row,) = micro_batches(store, [0], 10, packed=True)
    model = Table(torch.zeros(3, 3), head=True)
    assert token_losses(model, row).shape == (0,)
    assert model.calls == 0
