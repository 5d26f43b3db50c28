"""Writes the golden loss curve (`PYTHONPATH=tests python tests/golden/make.py`): only when a step is meant to change."""

from __future__ import annotations

import datetime
import tempfile
from pathlib import Path

import tiny
import torch

CURVE = Path(__file__).with_name("llama-20-steps.txt")


def curve(folder: Path) -> list[tuple[float, float]]:
    """(loss, gradient norm) of 20 steps of a tiny llama on tiny conversations; everything is fixed by seeds."""
    from fullrank.models.rows import RowModel
    from fullrank.parallel.single import SingleDevice
    from fullrank.recipe import Train
    from fullrank.sequences.chat import ChatRenderer
    from fullrank.sequences.order import Order
    from fullrank.train.loop import Layout, steps

    torch.set_num_threads(1)
    renderer = ChatRenderer(tiny.tokenizer(), datetime.date(2026, 1, 1), "tiny")
    store = tiny.write_store(folder, [renderer.examples(row["messages"])[0] for row in tiny.chat_rows(40)])
    train = Train.model_validate({"epochs": 4, "global_batch_size": 8, "precision": "fp32", "optimizer": {"learning_rate": 1e-3}})
    order = Order(len(store), train.global_batch_size, train.epochs, train.seed)
    engine = SingleDevice(RowModel(tiny.model("llama"), adds_gradients=True), train, recompute="none")
    done = steps(engine, store, order, train, Layout(200, packed=True, shared=True), first=1)
    return [(step.row.loss, step.row.grad_norm) for step in done]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        lines = [f"{step} {loss!r} {norm!r}\n" for step, (loss, norm) in enumerate(curve(Path(scratch)), start=1)]
    CURVE.write_text("# step loss grad_norm\n" + "".join(lines), encoding="utf-8")
