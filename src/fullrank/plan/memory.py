"""The memory ledger: what a training step holds at its peak, part by part, each with its formula.

Letters: N parameters (of them N' trained, B in the largest block, O outside the blocks), T tokens of the largest row, S tokens of
the largest step, C predictions whose logits exist at once, L layers, h hidden size, q = heads x head size, k = key-value heads x
head size, i intermediate size, V vocabulary, b bytes of a number (4 in fp32). The activation formula counts the tensors that
autograd keeps for a block of a present-day decoder (two norms, attention, a gated MLP); other blocks keep about as much. It is an
estimate, and the report sets it against the measured peak.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from fullrank.optim.update import state_bytes
from fullrank.parallel.blockwise import is_blockwise
from fullrank.parallel.fsdp2 import Sync
from fullrank.parallel.groups import Shapes
from fullrank.parallel.quiet import are_long
from fullrank.parallel.recompute import Recompute
from fullrank.parallel.ring import TILE
from fullrank.recipe import Recipe
from fullrank.records import LedgerLine, ModelFacts
from fullrank.sequences.head import chunk_size
from fullrank.units import format_bytes

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
#: Where rows are long, large arrays have mappings of their own (`fullrank.parallel.quiet`).
_LONG_HEAP_RATIO = 0.1


@dataclass(frozen=True)
class Row:
    """The largest micro-batch."""

    tokens: int
    predictions: int
    """Distinct ones that carry loss."""
    step_tokens: int
    """Of the largest step, all its rows."""


@dataclass(frozen=True)
class Division:
    """Among how many ranks a model is divided."""

    ranks: int
    """That hold it once together."""
    sync: Sync
    """See `fullrank.parallel.fsdp2`."""
    rows: int
    """That a rank computes in a step, at most."""
    context: int = 1
    """Ranks that share each of them."""
    zero: Mapping[str, Any] | None = None
    """DeepSpeed's section on ZeRO, where it divides."""


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
    model: ModelFacts,
    shapes: Shapes,
    row: Row,
    recipe: Recipe,
    *,
    recompute: Recompute,
    process_bytes: int,
    eager: bool,
    device: str,
    division: Division | None = None,
) -> list[LedgerLine]:
    """The parts of the peak, of one rank.

    Args:
        model: sizes of the base model.
        shapes: its parameters.
        row: the largest micro-batch of the run, whole.
        recipe: precision, optimizer, and where gradients and states wait; `auto` resolved.
        recompute: what of a block is made again in the backward pass (`fullrank.parallel.recompute`).
        process_bytes: what the process holds before the model (interpreter and libraries), measured.
        eager: attention that materialises its scores (heads x T x T).
        device: on a CPU modules are tuned (`fullrank.models.tuned`), attention goes block by block, and weights of 16 bits are
            widened to compute with.
        division: how weights, gradients and states are divided among ranks; None where they are not.
    """
    precision = recipe.train.precision
    lines = [LedgerLine(part="process", bytes=process_bytes, formula="measured before the model is loaded")]
    if division is None:
        lines += _weights(shapes, recipe, device)
        lines += _gradients_and_states(shapes, recipe)
    elif division.zero is not None:
        lines += _zeroed(shapes, recipe, device, division, division.zero)
    else:
        lines += _divided(shapes, recipe, device, division)
    tuned = device == "cpu" and precision != "bf16-mixed" and division is None
    number = 2 if precision == "bf16-mixed" or (recipe.train.rounding != "none" and device != "cpu") else 4
    context = 1 if division is None else division.context
    if context > 1:  # the ring makes scores a tile at a time, whatever the model's own attention does
        row, eager = replace(row, tokens=-(-row.tokens // context)), False
    activations = _activations(model, row, recipe, recompute, tuned=tuned, number=number, eager=eager, context=context)
    logits_number = 8 if number == 4 else 10
    chunk = min(row.predictions, chunk_size(model.vocabulary))
    logits = f"C x V x {logits_number} B (logits, then their gradient)"
    lines += [activations, LedgerLine(part="logits", bytes=chunk * model.vocabulary * logits_number, formula=logits)]
    if device == "cpu":
        ratio = _LONG_HEAP_RATIO if are_long(row.tokens, model.hidden_size) else _HEAP_RATIO
        heap = f"{ratio} x activations (holes that rows leave in the heap, as measured)"
        lines.append(LedgerLine(part="heap", bytes=int(ratio * activations.bytes), formula=heap))
    if not tuned:
        head = 4 * model.vocabulary * model.hidden_size
        lines.append(LedgerLine(part="head", bytes=head, formula="V x h x 4 B (a row's gradient, before it is added)"))
    if context > 1:
        lines.append(_ring(model, row, context))
    elif eager or device != "cpu":
        lines.append(LedgerLine(part="mask", bytes=row.tokens * row.tokens, formula="T x T x 1 B"))
    return lines


def _ring(model: ModelFacts, part: Row, context: int) -> LedgerLine:
    """Of the block whose backward pass is under way: keys and values that are here and that come, their gradients likewise beside
    this rank's part of them; and a tile's scores, shares and gradients."""
    widths, tile = model.key_value_heads * model.head_dim, model.heads * min(TILE, part.tokens) ** 2
    return LedgerLine(
        part="ring",
        bytes=4 * (10 * part.tokens * widths + 4 * tile),
        formula=f"(10 x T / {context} x k + 4 x heads x {TILE}^2) x 4 B (keys and values that travel, a tile of scores)",
    )


def goes_twice(recipe: Recipe) -> bool:
    """Whether blocks are differentiated twice a step: once for the norm of the gradient, once for the update."""
    return recipe.gradients == "release" and recipe.train.clip_norm is not None


@dataclass(frozen=True)
class Elsewhere:
    """Bytes that wait where they are not needed at once."""

    file: int
    host: int
    """Page-locked memory beside an accelerator."""


def elsewhere(model: ModelFacts, shapes: Shapes, recipe: Recipe, *, recompute: Recompute, tokens: int, device: str) -> Elsewhere:
    """Gradients that are spilled, optimizer states that are not on the device, inputs of blocks that are offloaded.

    Args:
        tokens: whose blocks' inputs wait at once.
    """
    in_host = 4 * shapes.trained_parameters if recipe.gradients == "spill" else 0
    if recompute == "offload":
        in_host += 4 * model.layers * tokens * model.hidden_size
    in_file = 0 if device == "cuda" else in_host
    in_host -= in_file
    states = states_bytes(shapes, recipe)
    match recipe.machine.optimizer_states:
        case "disk":
            in_file += states
        case "host":
            in_host += states
    return Elsewhere(in_file, in_host)


def weight_bytes(recipe: Recipe) -> int:
    """Bytes of a weight as it is stored."""
    return 4 if recipe.train.rounding == "none" else 2


def gathered_number_bytes(recipe: Recipe, device: str) -> tuple[int, int]:
    """Bytes of a weight of a block, and of one outside the blocks, while it is whole (`fullrank.parallel.sharded.divide`)."""
    stored_in_two = weight_bytes(recipe) == 2 and device != "cpu"
    return 2 if recipe.train.precision == "bf16-mixed" or stored_in_two else 4, 2 if stored_in_two else 4


def states_bytes(shapes: Shapes, recipe: Recipe, ranks: int = 1) -> int:
    """Of the optimizer's states, wherever they are; of the rank that has most."""
    train = recipe.train
    return state_bytes(train.optimizer, shapes.trained, rounding=train.rounding, hidden=shapes.hidden, ranks=ranks)


def _divided(shapes: Shapes, recipe: Recipe, device: str, division: Division) -> list[LedgerLine]:
    """Weights, gradients and states of a rank, with what is whole for a while: what is outside the blocks through a row, and two
    blocks, of which the next is gathered while one computes. Of offloaded weights the device has no more than that."""
    ranks, weight, away = division.ranks, weight_bytes(recipe), recipe.parallel.offload_parameters
    computes, outside = gathered_number_bytes(recipe, device)
    n, trained = shapes.parameters, shapes.trained_parameters
    gathered = 2 * shapes.block * computes + shapes.outside * outside
    words = f"2 x B x {computes} B + O x {outside} B (whole while they compute)"
    if away:  # of a block that comes, this rank's part lies beside it
        gathered, words = gathered + weight * -(-shapes.block // ranks), f"B / {ranks} x {weight} B + {words}"
        lines = [LedgerLine(part="weights", bytes=0, formula="in host memory")]
    else:
        lines = [LedgerLine(part="weights", bytes=-(-weight * n // ranks), formula=f"N / {ranks} x {weight} B")]
    lines.append(LedgerLine(part="gathered", bytes=gathered, formula=words))
    if division.sync == "step" and division.rows > 1:
        kept, how = 4 * trained, "N' x 4 B (whole until a step's last row)"
    else:
        kept = 4 * (2 * shapes.block_trained + shapes.outside_trained)
        how = "(2 x B' + O') x 4 B (whole until they are summed)"
    if away:
        return [
            *lines,
            LedgerLine(part="gradients", bytes=kept, formula=f"{how}; their sums in host memory"),
            LedgerLine(part="optimizer", bytes=0, formula="in host memory, with the weights"),
        ]
    kept, how = kept + 4 * -(-trained // ranks), f"N' / {ranks} x 4 B + {how}"
    states = states_bytes(shapes, recipe, ranks)
    kind = recipe.train.optimizer.name
    lines += [
        LedgerLine(part="gradients", bytes=kept, formula=how),
        LedgerLine(part="optimizer", bytes=states, formula=f"of {kind}, of the largest part"),
    ]
    if recipe.machine.optimizer_states != "device":
        share = 2 * shapes.largest_tensor / max(1, trained)
        lines[-1] = LedgerLine(part="optimizer", bytes=int(min(1.0, share) * states), formula="those of two tensors' parts")
    if kind in ("adafactor", "adalomo", "muon"):
        lines.append(
            LedgerLine(part="update", bytes=24 * shapes.largest_tensor, formula="largest tensor x 24 B (gathered for its update)")
        )
    return lines


def _zeroed(shapes: Shapes, recipe: Recipe, device: str, division: Division, zero: Mapping[str, Any]) -> list[LedgerLine]:
    """Weights, gradients and states of a rank under ZeRO: what it divides by its stage, and the buffers that it sums and gathers
    in. It computes with fp32 weights of its own and updates a master copy beside them."""
    ranks, stage = division.ranks, zero["stage"]
    n, trained = shapes.parameters, shapes.trained_parameters
    part = 4 * -(-trained // ranks)
    on_device = device != "cuda" or recipe.machine.optimizer_states != "host"
    master = part if on_device else 0
    bucket = 4 * int(zero["reduce_bucket_size"])
    if device != "cuda":  # a buffer is memory once it is written to
        bucket = min(bucket, 4 * trained)
    if stage == 3:
        kept = 0 if recipe.parallel.offload_parameters else 4 * -(-n // ranks)
        ahead = min(int(zero["stage3_prefetch_bucket_size"]), n)
        gathered = 4 * (shapes.block + ahead + shapes.outside)
        lines = [
            LedgerLine(part="weights", bytes=kept + master, formula=f"N / {ranks} x 4 B + N' / {ranks} x 4 B of the master copy"),
            LedgerLine(
                part="gathered", bytes=gathered, formula="(B + prefetched + O) x 4 B (whole while they compute; the head always)"
            ),
        ]
    else:
        words = f"N x 4 B + N' / {ranks} x 4 B of the master copy"
        lines = [LedgerLine(part="weights", bytes=4 * n + master, formula=words)]
    summed = 2 * part if on_device else 0
    if stage == 1:
        gradients, how = 4 * trained + summed, f"N' x 4 B (whole until a step's last row) + 2 x N' / {ranks} x 4 B of their sums"
    else:
        largest = 4 * (shapes.block_trained if stage == 3 else shapes.largest_tensor)
        gradients, how = summed + largest, f"2 x N' / {ranks} x 4 B of their sums + those on their way there"
    states = -(-states_bytes(shapes, recipe) // ranks)
    words = f"of {recipe.train.optimizer.name}, / {ranks}"
    if recipe.machine.optimizer_states == "disk":
        share = 2 * shapes.largest_tensor / max(1, trained)
        states, words = int(min(1.0, share) * states), "those of two tensors' parts"
    elif not on_device:
        states, words = 0, "in host memory, with the master copy and the sums of gradients"
    return [
        *lines,
        LedgerLine(part="gradients", bytes=gradients, formula=how),
        LedgerLine(part="buffers", bytes=2 * bucket, formula="2 x reduce_bucket_size x 4 B"),
        LedgerLine(part="optimizer", bytes=states, formula=words),
    ]


def zero_host_bytes(shapes: Shapes, recipe: Recipe) -> int:
    """What all ranks of a machine keep in its host memory under ZeRO beside a CUDA device, without optimizer states: master copy
    and sums of gradients, where those wait there; weights, where they are offloaded."""
    with_states = 8 * shapes.trained_parameters if recipe.machine.optimizer_states == "host" else 0
    return with_states + (4 * shapes.parameters if recipe.parallel.offload_parameters else 0)


def offloaded_host_bytes(shapes: Shapes, recipe: Recipe, *, ranks: int, here: int) -> int:
    """What a machine's ranks keep in its host memory where FSDP2 offloads weights: these, sums of gradients, optimizer states
    that are not in a file, and what an update needs for a while.

    Weights, and sums that come as they are, lie in page-locked memory, of which torch gives a tensor the next power of two (the
    host allocator of torch 2.13, `CachingHostAllocator.h`). Of weights of 16 bits the sums are kept in fp32, in other memory.

    Args:
        ranks: that hold the model once together.
        here: on this machine.
    """
    weight = weight_bytes(recipe)

    def locked(of: Mapping[str, tuple[int, ...]], number: int) -> int:
        sizes = (number * -(-shape[0] // ranks) * math.prod(shape[1:]) for shape in of.values())
        return sum(1 << (size - 1).bit_length() for size in sizes)

    rank = locked({**shapes.trained, **shapes.frozen}, weight)
    rank += locked(shapes.trained, 4) if weight == 4 else 4 * -(-shapes.trained_parameters // ranks)
    states = states_bytes(shapes, recipe, ranks)
    if recipe.machine.optimizer_states == "disk":
        states = int(min(1.0, 2 * shapes.largest_tensor / max(1, shapes.trained_parameters)) * states)
    if recipe.train.optimizer.name in ("adafactor", "adalomo", "muon"):
        states += 24 * shapes.largest_tensor
    return here * (rank + states)


def _weights(shapes: Shapes, recipe: Recipe, device: str) -> list[LedgerLine]:
    n, precision = shapes.parameters, recipe.train.precision
    if recipe.train.rounding != "none":
        lines = [LedgerLine(part="weights", bytes=2 * n, formula="N x 2 B")]
        if device == "cpu":
            wide = 4 * (shapes.block + shapes.outside)
            lines.append(LedgerLine(part="widened", bytes=wide, formula="(B + O) x 4 B (fp32 copies to compute with)"))
        return lines
    if precision != "bf16-mixed":
        return [LedgerLine(part="weights", bytes=4 * n, formula="N x 4 B")]
    if is_blockwise(recipe):
        casts, how = 2 * (shapes.block + shapes.outside), "(B + O) x 2 B of bf16 casts"
    else:  # autocast keeps a bf16 copy of every matrix through the step
        casts, how = 2 * n, "N x 2 B of bf16 casts"
    return [LedgerLine(part="weights", bytes=4 * n + casts, formula=f"N x 4 B + {how}")]


def _gradients_and_states(shapes: Shapes, recipe: Recipe) -> list[LedgerLine]:
    optimizer = recipe.train.optimizer
    if recipe.gradients == "keep":
        kept, how = shapes.trained_parameters, "N' x 4 B"
    else:
        kept, how = (
            shapes.block_trained + shapes.outside_trained,
            "(B' + O') x 4 B (one block's; the embedding's lives throughout)",
        )
    states = states_bytes(shapes, recipe)
    each = f"{states / max(1, shapes.trained_parameters):.2f} B"
    kind = optimizer.name + (" with moments of 8 bits" if optimizer.name == "adamw" and optimizer.moments == "int8" else "")
    words = f"N' x {each} ({kind})"
    if recipe.machine.optimizer_states != "device":
        share = 2 * shapes.largest_tensor / max(1, shapes.trained_parameters)
        states, words = int(min(1.0, share) * states), f"those of two tensors, N' x {each} wait elsewhere"
    lines = [
        LedgerLine(part="gradients", bytes=4 * kept, formula=how),
        LedgerLine(part="optimizer", bytes=states, formula=words),
    ]
    if optimizer.name in ("adafactor", "adalomo", "muon"):  # these need a whole tensor in fp32, twice or more
        update = 12 * shapes.largest_tensor
        lines.append(LedgerLine(part="update", bytes=update, formula="largest tensor x 12 B (it, its update and its square)"))
    return lines


def _activations(
    model: ModelFacts, row: Row, recipe: Recipe, recompute: Recompute, *, tuned: bool, number: int, eager: bool, context: int
) -> LedgerLine:
    """Of one rank; `row` is what it has of the largest one, where `context` ranks share it."""
    kept, b, tokens = _letters(_kept(tuned, selective=False)), f"{number} B", row.tokens
    block = block_activation_bytes(model, tokens, number, tuned=tuned)
    scores = 3 * number * model.heads * tokens * tokens if eager else 0  # scores, their softmax, and it in the compute type
    blockwise = is_blockwise(recipe)
    wide = 4 if recipe.train.precision == "bf16-mixed" else number  # what passes between blocks: autocast leaves sums in fp32
    inputs = wide * model.hidden_size
    t = "T" if context == 1 else f"T / {context}"
    match recompute:
        case "none":
            held = model.layers * (block + scores)
            how = f"L x {t} x ({kept}) x {b}"
        case "selective":
            lasting = block_activation_bytes(model, tokens, number, tuned=tuned, selective=True)
            held = model.layers * (lasting + scores) + block
            how = f"(L x T x ({_letters(_SELECTIVE)}) + T x ({kept})) x {b}"
        case "block":  # block by block, the inputs of a whole step wait, and what the last block gave, twice its gradient
            held = (model.layers + 3) * row.step_tokens * inputs if blockwise else model.layers * tokens * inputs
            held += block + scores
            how = f"{'(L + 3) x S' if blockwise else f'L x {t}'} x h x {wide} B + {t} x ({kept}) x {b}"
        case "offload":  # two blocks' inputs are here while they come and go
            held = (4 * row.step_tokens if blockwise else 0) * inputs + 2 * tokens * inputs + block + scores
            how = f"({'4 x S x h + ' if blockwise else ''}2 x T x h) x {wide} B + T x ({kept}) x {b}"
    return LedgerLine(part="activations", bytes=held, formula=how + (f" + 3 x heads x T^2 x {b} of scores" if eager else ""))


def total(lines: list[LedgerLine]) -> int:
    """The peak: all parts are alive together at the start of the last row's backward pass."""
    return sum(line.bytes for line in lines)


def table(lines: list[LedgerLine]) -> str:
    """The ledger as text."""
    return "\n".join(f"  {line.part:<12}{format_bytes(line.bytes):>10}  {line.formula}" for line in lines)
