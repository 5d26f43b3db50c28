"""What recomputation keeps and what it computes again; that gradients stay what they are is the laws' (`tests/laws`)."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fullrank.models.rows import RowModel
from fullrank.parallel.recompute import recompute_blocks
from fullrank.sequences.layout import MicroBatch, micro_batches
from fullrank.sequences.loss import add_gradients

PRODUCTS = ("aten.mm.default", "aten.addmm.default", "aten._scaled_dot_product_flash_attention_for_cpu.default")


class Counting(TorchDispatchMode):
    """Counts the operations that are executed."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, operation: Any, types: Any, given: Any = (), named: Any = None) -> Any:
        self.found[str(operation)] += 1
        return operation(*given, **(named or {}))


def row(folder: Path) -> MicroBatch:
    examples = tiny.random_tokens(3, vocabulary=300, seed=3, longest=20)
    return micro_batches(tiny.write_store(folder, examples), range(3), 1000, packed=True)[0]


def counted(how: str, batch: MicroBatch) -> Counter[str]:
    model = tiny.model("llama").train()
    rows = RowModel(model, adds_gradients=True)
    recompute_blocks(model, how)
    with rows.ready(), Counting() as counting:
        add_gradients(rows, batch, batch.supervised_tokens)
    return counting.found


def test_only_whole_blocks_repeat_products(tmp_path: Path) -> None:
    batch = row(tmp_path)
    usual, selective, block, offload = (counted(how, batch) for how in ("none", "selective", "block", "offload"))
    for product in PRODUCTS:
        assert selective[product] == usual[product], product
    assert block["aten.mm.default"] == offload["aten.mm.default"] > usual["aten.mm.default"]
    assert selective["aten.silu.default"] > usual["aten.silu.default"]  # it does recompute


@pytest.mark.parametrize("how", ["selective", "block", "offload"])
def test_dropout_is_drawn_as_it_was(tmp_path: Path, how: str) -> None:
    batch = row(tmp_path)
    gradients = []
    for each in ("none", how):
        model = tiny.model("gpt2", resid_pdrop=0.3, attn_pdrop=0.0, embd_pdrop=0.0).train()
        rows = RowModel(model, adds_gradients=True)
        recompute_blocks(model, each)
        torch.manual_seed(7)
        with rows.ready():
            add_gradients(rows, batch, batch.supervised_tokens)
        gradients.append([p.grad for p in model.parameters()])
        assert torch.rand(()).item() == pytest.approx(_next_draw(batch, model, rows))
    for found, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(found, wanted)


def _next_draw(batch: MicroBatch, model: Any, rows: RowModel) -> float:
    """What the generator gives after a forward pass alone: recomputing draws nothing of its own."""
    torch.manual_seed(7)
    with rows.ready(), torch.no_grad():
        rows.predictions(batch)
    return float(torch.rand(()))


def test_an_offloaded_block_leaves_its_graph_without_activations(tmp_path: Path) -> None:
    batch = row(tmp_path)
    kept = {}
    for how in ("none", "offload"):
        model = tiny.model("llama", num_hidden_layers=4).train()
        rows = RowModel(model, adds_gradients=True)
        recompute_blocks(model, how)
        sizes: list[int] = []

        def keep(tensor: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(tensor.numel())
            return tensor

        with rows.ready(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            rows.predictions(batch)
        kept[how] = sum(sizes)
    assert kept["offload"] < kept["none"] / 3
