"""The memory ledger: what a training step holds at its peak, part by part, each with its formula.

Letters: N parameters, T tokens of the largest row, S its supervised tokens, L layers, h hidden size, q = heads x head size,
i intermediate size, V vocabulary, b bytes of a number (4 in fp32). The activation formula counts the tensors that autograd keeps
for a block of a present-day decoder (two norms, attention with expanded keys and values, a gated MLP); other blocks keep about as
much. It is an estimate, and the report sets it against the measured peak.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fullrank.records import LedgerLine, ModelFacts
from fullrank.units import format_bytes

Recompute = Literal["none", "block"]

# Floats kept per token and block. Norms: input, normalised and scaled hidden state, twice: 6h. Attention: query, key and value
# after expansion, output, and the output once more as the projection's input: 5q. Gated MLP: gate, its activation, up and
# product: 4i.
_HIDDEN, _ATTENTION, _MLP = 6, 5, 4


@dataclass(frozen=True)
class Row:
    """The largest micro-batch."""

    tokens: int
    supervised_tokens: int


def block_activation_bytes(model: ModelFacts, tokens: int, number_bytes: int) -> int:
    """Bytes autograd keeps for one block."""
    floats = _HIDDEN * model.hidden_size + _ATTENTION * model.heads * model.head_dim + _MLP * model.intermediate_size
    return number_bytes * tokens * floats


def ledger(
    model: ModelFacts, row: Row, *, precision: str, recompute: Recompute, process_bytes: int, eager: bool
) -> list[LedgerLine]:
    """The parts of the peak.

    Args:
        model: sizes of the base model.
        row: the largest micro-batch of the run.
        precision: fp32, or bf16-mixed (fp32 weights, gradients and moments; bf16 activations).
        recompute: whether blocks are recomputed in the backward pass.
        process_bytes: what the process holds before the model (interpreter and libraries), measured.
        eager: attention that materialises its scores (heads x T x T).
    """
    n, tokens = model.parameters, row.tokens
    number = 2 if precision == "bf16-mixed" else 4
    b = f"{number} B"
    block = block_activation_bytes(model, tokens, number)
    scores = 3 * number * model.heads * tokens * tokens if eager else 0  # scores, their softmax, and it in the compute type
    if recompute == "none":
        activations = model.layers * (block + scores)
        how = f"L x T x ({_HIDDEN}h + {_ATTENTION}q + {_MLP}i) x {b}"
    else:
        activations = model.layers * number * tokens * model.hidden_size + block + scores
        how = f"(L x T x h + T x ({_HIDDEN}h + {_ATTENTION}q + {_MLP}i)) x {b}"
    casts = 2 * n if precision == "bf16-mixed" else 0  # autocast keeps a bf16 copy of every matrix through the step
    logits = row.supervised_tokens * model.vocabulary * (12 if number == 4 else 14)
    return [
        LedgerLine(part="process", bytes=process_bytes, formula="measured before the model is loaded"),
        LedgerLine(part="weights", bytes=4 * n + casts, formula="N x 4 B" + (" + N x 2 B of bf16 casts" if casts else "")),
        LedgerLine(part="gradients", bytes=4 * n, formula="N x 4 B"),
        LedgerLine(part="optimizer", bytes=8 * n, formula="N x 8 B (two fp32 moments)"),
        LedgerLine(part="activations", bytes=activations, formula=how + (f" + 3 x heads x T^2 x {b} of scores" if eager else "")),
        LedgerLine(part="logits", bytes=logits, formula=f"S x V x {12 if number == 4 else 14} B (logits, log-softmax, gradient)"),
        LedgerLine(part="mask", bytes=tokens * tokens, formula="T x T x 1 B"),
    ]


def total(lines: list[LedgerLine]) -> int:
    """The peak: all parts are alive together at the start of the last row's backward pass."""
    return sum(line.bytes for line in lines)


def table(lines: list[LedgerLine]) -> str:
    """The ledger as text."""
    return "\n".join(f"  {line.part:<12}{format_bytes(line.bytes):>10}  {line.formula}" for line in lines)
