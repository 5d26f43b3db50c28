"""Seconds before the run: a short measurement of this model's own blocks on this machine.

Two random models of the base's configuration, with one and with two blocks, are timed forward and backward on a row like the
run's. Their difference is a block, the rest is embedding, head and loss; the whole model is the rest plus all its blocks. The
optimizer is timed on a slice of parameters. No weights are loaded.
"""

from __future__ import annotations

import copy
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from fullrank.models.load import attention_for
from fullrank.models.rows import RowModel
from fullrank.optim.update import Updater
from fullrank.parallel import device as devices
from fullrank.parallel.recompute import recompute_blocks
from fullrank.recipe import Train
from fullrank.records import ModelFacts
from fullrank.sequences.layout import MicroBatch
from fullrank.sequences.loss import add_gradients, token_losses

#: The measurement may take at most this share of the memory a plan may use.
_MEMORY_SHARE = 0.5
_OPTIMIZER_SLICE = 4_000_000
_SLICE_SIDE = 2_000
_PIECES = 64


@dataclass(frozen=True)
class Speed:
    """Measured seconds."""

    forward_per_token: float
    forward_backward_per_token: float
    optimizer_step: float
    basis: str
    """How it was measured, in words."""


def measure(
    config: PreTrainedConfig,
    model: ModelFacts,
    row: MicroBatch,
    *,
    device: torch.device,
    train: Train,
    trained_parameters: int,
    recompute: str,
    available_bytes: int,
    tuned: bool = True,
) -> Speed | None:
    """Times one and two blocks on a row; None where even two blocks would take too much memory.

    `tuned` says whether modules may add their gradients themselves (`fullrank.models.rows.RowModel`): not under FSDP2.
    """
    block = (model.parameters - model.vocabulary * model.hidden_size) // model.layers
    slice_bytes = 16 * (2 * block + 2 * model.vocabulary * model.hidden_size) + row.supervised_tokens * model.vocabulary * 12
    if slice_bytes > _MEMORY_SHARE * available_bytes:
        return None
    one, two = (_time_blocks(config, blocks, row, device, train, recompute, tuned) for blocks in (1, 2))
    tokens = row.tokens

    def whole(first: float, second: float) -> float:
        per_block = max(0.0, second - first)
        return (max(0.0, first - per_block) + per_block * model.layers) / tokens

    return Speed(
        forward_per_token=whole(one[0], two[0]),
        forward_backward_per_token=whole(one[1], two[1]),
        optimizer_step=_time_optimizer(device, train) * trained_parameters / _OPTIMIZER_SLICE,
        basis=f"one and two blocks of this model, timed on a row of {tokens} tokens, extended to {model.layers}",
    )


def _time_blocks(
    config: PreTrainedConfig, blocks: int, row: MicroBatch, device: torch.device, train: Train, recompute: str, tuned: bool
) -> tuple[float, float]:
    """(forward, forward and backward) seconds of a random model with that many blocks: the faster of two after a warm-up."""
    small = copy.deepcopy(config)
    text = small.get_text_config()
    text.num_hidden_layers = blocks
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:blocks]
    native = train.rounding != "none" and device.type == "cuda"  # elsewhere weights of 16 bits are widened to compute
    dtype = torch.bfloat16 if native else torch.float32
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(small, dtype=dtype, attn_implementation=attention_for(small))
    model.train()
    rows, row = RowModel(model, adds_gradients=tuned), row.to(device)
    recompute_blocks(model, recompute)

    def forward_only() -> None:
        with rows.ready(), torch.autocast(device.type, dtype=torch.bfloat16, enabled=train.precision == "bf16-mixed"):
            token_losses(rows, row)

    def forward_backward() -> None:
        with rows.ready(), torch.autocast(device.type, dtype=torch.bfloat16, enabled=train.precision == "bf16-mixed"):
            add_gradients(rows, row, row.supervised_tokens)
        model.zero_grad(set_to_none=True)

    return _fastest(forward_only, device), _fastest(forward_backward, device)


def _time_optimizer(device: torch.device, train: Train) -> float:
    rounds = train.rounding
    sides = [_SLICE_SIDE, _OPTIMIZER_SLICE // _SLICE_SIDE]
    parameter = torch.nn.Parameter(torch.zeros(sides, device=device, dtype=torch.float32 if rounds == "none" else torch.bfloat16))
    updater = Updater({"slice": parameter}, train.optimizer, rounding=rounds, hidden=["slice"])
    gradient = torch.ones(sides, device=device)
    return _fastest(lambda: updater.update({"slice": gradient}, learning_rate=train.optimizer.learning_rate, key=0), device)


def file_bytes_per_second(folder: Path) -> float:
    """Bytes that go to a file of this folder, or come from it, in a second: written and read once, through the system's cache."""
    piece = os.urandom(1 << 20)
    while not folder.exists():
        folder = folder.parent
    with tempfile.TemporaryFile(dir=folder) as file:
        started = time.perf_counter()
        for _ in range(_PIECES):
            file.write(piece)
        file.flush()
        file.seek(0)
        while file.read(len(piece)):
            pass
        return 2 * _PIECES * len(piece) / (time.perf_counter() - started)


def host_bytes_per_second(device: torch.device) -> float:
    """Bytes that go from page-locked host memory to an accelerator in a second."""
    host = torch.empty(_PIECES << 20, dtype=torch.uint8, pin_memory=True)
    return host.nbytes / _fastest(lambda: host.to(device, non_blocking=True), device)


def _fastest(work: Callable[[], object], device: torch.device, times: int = 2) -> float:
    seconds = []
    for _ in range(times + 1):
        devices.synchronize(device)
        started = time.perf_counter()
        work()
        devices.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:])
