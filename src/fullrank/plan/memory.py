"""The memory ledger: what a training step holds at its peak, part by part, each with its formula.

Letters: N parameters, T tokens of the largest row, C predictions whose logits exist at once, L layers, h hidden size, q = heads x
head size, k = key-value heads x head size, i intermediate size, V vocabulary, b bytes of a number (4 in fp32). The activation
formula counts the tensors that autograd keeps for a block of a present-day decoder (two norms, attention, a gated MLP); other
blocks keep about as much. It is an estimate, and the report sets it against the measured peak.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fullrank.records import LedgerLine, ModelFacts
from fullrank.sequences.head import chunk_size
from fullrank.units import format_bytes

Recompute = Literal["none", "selective", "block", "offload"]

# Floats kept per token and block, as multiples of h, q, k and i.
#: By `fullrank.models.ops`. Norms: input and output, twice: 4h. Attention: query and output: 2q; key and value: 2k. Gated MLP:
#: gate, up and product: 3i.
_TUNED = (4, 2, 2, 3)
#: By the model's own modules. Norms: input, normalised and scaled, twice: 6h. Attention: query, key and value after expansion,
#: output, and the output once more as the projection's input: 5q. Gated MLP: gate, its activation, up and product: 4i.
_PLAIN = (6, 5, 0, 4)
#: With selective recomputation: the block's input and the outputs of both projections back to its width: 3h. Attention: query and
#: output: 2q; key and value: 2k. Gated MLP: gate and up: 2i.
_SELECTIVE = (3, 2, 2, 2)

#: What a CPU's heap holds beyond the tensors, of the activations: a freed array is too small, by the bytes that align it, for the
#: next one of its size, so that rows leave holes (glibc's memalign before 2.38). Peaks: benchmarks/results/speed-cpu.json.
_HEAP_RATIO = 0.35


@dataclass(frozen=True)
class Row:
    """The largest micro-batch."""

    tokens: int
    predictions: int
    """Distinct ones that carry loss."""


def block_activation_bytes(model: ModelFacts, tokens: int, number_bytes: int, *, tuned: bool, selective: bool = False) -> int:
    """Bytes autograd keeps for one block."""
    widths = (model.hidden_size, model.heads * model.head_dim, model.key_value_heads * model.head_dim, model.intermediate_size)
    kept = _kept(tuned, selective)
    return number_bytes * tokens * sum(times * width for times, width in zip(kept, widths, strict=True))


def _kept(tuned: bool, selective: bool) -> tuple[int, int, int, int]:
    return _SELECTIVE if selective else _TUNED if tuned else _PLAIN


def _letters(kept: tuple[int, int, int, int]) -> str:
    return " + ".join(f"{times}{letter}" for times, letter in zip(kept, "hqki", strict=True) if times)


def ledger(
    model: ModelFacts, row: Row, *, precision: str, recompute: Recompute, process_bytes: int, eager: bool, device: str
) -> list[LedgerLine]:
    """The parts of the peak.

    Args:
        model: sizes of the base model.
        row: the largest micro-batch of the run.
        precision: fp32, or bf16-mixed (fp32 weights, gradients and moments; bf16 activations).
        recompute: what of a block is made again in the backward pass (`fullrank.parallel.recompute`).
        process_bytes: what the process holds before the model (interpreter and libraries), measured.
        eager: attention that materialises its scores (heads x T x T).
        device: on a CPU modules are tuned (`fullrank.models.tuned`) and attention goes block by block.
    """
    tuned = device == "cpu" and precision == "fp32"
    kept = _letters(_kept(tuned, selective=False))
    n, tokens = model.parameters, row.tokens
    number = 2 if precision == "bf16-mixed" else 4
    b = f"{number} B"
    block = block_activation_bytes(model, tokens, number, tuned=tuned)
    scores = 3 * number * model.heads * tokens * tokens if eager else 0  # scores, their softmax, and it in the compute type
    match recompute:
        case "none":
            activations = model.layers * (block + scores)
            how = f"L x T x ({kept}) x {b}"
        case "selective":
            lasting = block_activation_bytes(model, tokens, number, tuned=tuned, selective=True)
            activations = model.layers * (lasting + scores) + block
            how = f"(L x T x ({_letters(_SELECTIVE)}) + T x ({kept})) x {b}"
        case "block":
            activations = model.layers * number * tokens * model.hidden_size + block + scores
            how = f"(L x T x h + T x ({kept})) x {b}"
        case "offload":  # two blocks' inputs are on the device while they come and go
            activations = 2 * number * tokens * model.hidden_size + block + scores
            how = f"(2 x T x h + T x ({kept})) x {b}"
    casts = 2 * n if precision == "bf16-mixed" else 0  # autocast keeps a bf16 copy of every matrix through the step
    chunk = min(row.predictions, chunk_size(model.vocabulary))
    logits = chunk * model.vocabulary * (8 if number == 4 else 10)
    lines = [
        LedgerLine(part="process", bytes=process_bytes, formula="measured before the model is loaded"),
        LedgerLine(part="weights", bytes=4 * n + casts, formula="N x 4 B" + (" + N x 2 B of bf16 casts" if casts else "")),
        LedgerLine(part="gradients", bytes=4 * n, formula="N x 4 B"),
        LedgerLine(part="optimizer", bytes=8 * n, formula="N x 8 B (two fp32 moments)"),
        LedgerLine(part="activations", bytes=activations, formula=how + (f" + 3 x heads x T^2 x {b} of scores" if eager else "")),
        LedgerLine(part="logits", bytes=logits, formula=f"C x V x {8 if number == 4 else 10} B (logits, then their gradient)"),
    ]
    if device == "cpu":
        heap = f"{_HEAP_RATIO} x activations (holes that rows leave in the heap, as measured)"
        lines.append(LedgerLine(part="heap", bytes=int(_HEAP_RATIO * activations), formula=heap))
    if not tuned:
        head = 4 * model.vocabulary * model.hidden_size
        lines.append(LedgerLine(part="head", bytes=head, formula="V x h x 4 B (a row's gradient, before it is added)"))
    if eager or device != "cpu":
        lines.append(LedgerLine(part="mask", bytes=tokens * tokens, formula="T x T x 1 B"))
    return lines


def total(lines: list[LedgerLine]) -> int:
    """The peak: all parts are alive together at the start of the last row's backward pass."""
    return sum(line.bytes for line in lines)


def table(lines: list[LedgerLine]) -> str:
    """The ledger as text."""
    return "\n".join(f"  {line.part:<12}{format_bytes(line.bytes):>10}  {line.formula}" for line in lines)
