"""Attention over a forest of segments, for any transformers model: exact, and no score computed that a mask would throw away.

A token attends to its segment up to itself and to all of its segment's ancestors. What continues a segment stands right behind
it, so both are plain blocks of the score matrix: a causal one on the diagonal for each segment, and one full block for each
segment that has others below it. Each block is one call of the library's kernel, which also returns the log-sum-exp of its
scores; the blocks of a query are put together by those (Milakov & Gimelshein 2018; Dao et al. 2022, section 3.1):

    lse = log(sum_b exp(lse_b)),    out = sum_b exp(lse_b - lse) out_b

and the gradient of each block is the kernel's own, given the out and lse of the whole, since a block's probabilities are
exp(scores - lse) whatever the other blocks hold. That is how a CPU does it. An accelerator has flex attention, where a trial
shows it to be right; what neither can do (dropout, attention sinks) is done with every score of the row and a mask. Where ranks
share a row, each with a part of its tokens, their ring attends (`fullrank.parallel.ring`).

Shape legend: H heads, K key-value heads, T tokens of the row, D size of a head.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

from fullrank.sequences.forest import Segment
from fullrank.sequences.layout import MicroBatch, Part

#: The name of this attention in transformers.
NAME = "fullrank"


#: The same with flex attention where it can be.
FLEX_NAME = "fullrank_flex"


class Ring(Protocol):
    """The ranks that share a row, as one of them sees them (`fullrank.parallel.ring.ContextRing`)."""

    rank: int
    size: int

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        row: MicroBatch,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        """query_1HTD, key_1KTD, value_1KTD of this rank's part of a row -> out_1HTD, all keys of the row seen."""

    def whole(self, values_S: torch.Tensor, part: Part) -> torch.Tensor:
        """A number for each prediction of the row, of those for each prediction of every part."""

    def agreed(self, said: bool, device: torch.device) -> bool:
        """Whether all of these ranks say so."""


@contextlib.contextmanager
def attending_to_rows(model: PreTrainedModel, *, flex: bool = False) -> Iterator[None]:
    """Inside, the model attends over the segments of the row that its forward pass is given (`row=`), and to nothing else."""
    usual = model.config._attn_implementation
    model.set_attn_implementation(FLEX_NAME if flex else NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(usual)


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    row: MicroBatch | None = None,
    ring: Ring | None = None,
    flex: bool = False,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function: query_1HTD, key_1KTD, value_1KTD -> out_1THD.

    Raises:
        ValueError: there is no row, or ranks share it and the attention has what their ring cannot do.
    """
    if row is None:
        raise ValueError("the model attends to rows of segments, and its forward pass was given none")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if ring is not None:
        if dropout or s_aux is not None:
            raise ValueError(f"ring attention has no {'dropout' if dropout else 'attention sinks'}")
        out = ring.attend(query, key, value, row, scale=scale, window=sliding_window, softcap=softcap)
    elif query.device.type == "cpu" and not dropout and softcap is None and s_aux is None:
        blocks = _remembered(row, ("blocks", sliding_window, query.dtype), _row_blocks)
        out = _Blockwise.apply(query, key, value, blocks, scale)  # type: ignore[no-untyped-call]
    elif flex and not dropout and s_aux is None:
        if torch.is_autocast_enabled(query.device.type):
            dtype = torch.get_autocast_dtype(query.device.type)
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        block_mask = _remembered(row, ("flex", sliding_window, query.device), _row_block_mask)
        out = _compiled_flex()(
            query,
            key,
            value,
            score_mod=None if softcap is None else _capped(softcap),
            block_mask=block_mask,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
    else:
        mask_TT = _remembered(row, ("mask", sliding_window, query.device), row_mask)
        out = dense(query, key, value, mask_TT, scale, dropout, softcap, s_aux)
    return out.transpose(1, 2), None


# transformers makes no mask for an attention whose name it knows no masks for.
AttentionInterface.register(NAME, attend)
AttentionInterface.register(FLEX_NAME, functools.partial(attend, flex=True))


def windows_of(config: PreTrainedConfig) -> list[int | None]:
    """The window of each layer as a configuration has it: a token attends to itself and the window - 1 before it; None: all."""
    text: Any = config.get_text_config()
    window: int | None = getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None) or [None if window is None else "sliding_attention"] * text.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]


def windows_met(row: MicroBatch) -> set[int | None]:
    """The windows with which layers have attended to a row."""
    return {key[1] for key in row.memo if key[0] in ("blocks", "mask", "flex")}


def _remembered(row: MicroBatch, key: tuple[Any, ...], make: Any) -> Any:
    """What all layers of a kind share, made once a row."""
    if key not in row.memo:
        row.memo[key] = make(row, *key[1:])
    return row.memo[key]


# ---- every score, masked --------------------------------------------------------------------------------------------


def _below(row: MicroBatch, device: torch.device) -> torch.Tensor:
    """below_T: where the tokens end that continue a token."""
    below_T = torch.empty(row.tokens, dtype=torch.int64)
    for segment in row.segments:
        below_T[segment.start : segment.end] = segment.below
    return below_T.to(device)


def row_mask(row: MicroBatch, window: int | None, device: torch.device) -> torch.Tensor:
    """mask_TT: whether a query attends to a key."""
    below_T = _below(row, device)
    at_T, positions_T = torch.arange(row.tokens, device=device), row.position_ids_1T[0].to(device)
    mask_TT = (at_T[None, :] <= at_T[:, None]) & (at_T[:, None] < below_T[None, :])
    if window is not None:
        mask_TT &= positions_T[:, None] - positions_T[None, :] < window
    return mask_TT


def dense(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask_TT: torch.Tensor,
    scale: float,
    dropout: float,
    softcap: float | None,
    s_aux: torch.Tensor | None,
) -> torch.Tensor:
    key, value = (for_every_head(some, query.shape[1]) for some in (key, value))
    if softcap is None and s_aux is None:
        return nn.functional.scaled_dot_product_attention(query, key, value, mask_TT, dropout_p=dropout, scale=scale)
    scores_1HTT = query @ key.transpose(2, 3) * scale
    if softcap is not None:
        scores_1HTT = torch.tanh(scores_1HTT / softcap) * softcap
    scores_1HTT = scores_1HTT.masked_fill(~mask_TT, torch.finfo(scores_1HTT.dtype).min)
    if s_aux is not None:  # a score of its own for each head, which takes probability and gives nothing
        sinks = s_aux.reshape(1, -1, 1, 1).expand(*scores_1HTT.shape[:3], 1)
        scores_1HTT = torch.cat([scores_1HTT, sinks.to(scores_1HTT.dtype)], dim=-1)
    shares = nn.functional.softmax(scores_1HTT, dim=-1, dtype=torch.float32).to(query.dtype)[..., : key.shape[2]]
    return nn.functional.dropout(shares, p=dropout, training=dropout > 0) @ value


def for_every_head(some_1KTD: torch.Tensor, heads: int) -> torch.Tensor:
    groups = heads // some_1KTD.shape[1]
    return some_1KTD if groups == 1 else some_1KTD.repeat_interleave(groups, dim=1)


# ---- flex attention -------------------------------------------------------------------------------------------------

# torch's compiled kernel, which skips the blocks of scores that a mask leaves empty (He et al. 2024, Flex Attention). Whether it
# can be compiled, and is right, is tried on the device at hand (`flex_is_right`) before it is used.


def _row_block_mask(row: MicroBatch, window: int | None, device: torch.device) -> BlockMask:
    below_T, positions_T = _below(row, device), row.position_ids_1T[0].to(device)

    def attends(_: torch.Tensor, __: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        seen = (key <= query) & (query < below_T[key])
        return seen if window is None else seen & (positions_T[query] - positions_T[key] < window)

    make = create_block_mask if device.type == "cpu" else _compiled_block_mask()
    return make(attends, None, None, row.tokens, row.tokens, device=device)


@functools.cache
def _compiled_block_mask() -> Callable[..., BlockMask]:
    """Without the T x T arrays that making it otherwise takes."""
    compiled: Callable[..., BlockMask] = torch.compile(create_block_mask, dynamic=True)
    return compiled


@functools.cache
def _capped(cap: float) -> Callable[..., torch.Tensor]:
    def capped(score: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return cap * torch.tanh(score / cap)

    return capped


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    compiled: Callable[..., Any] = torch.compile(flex_attention, dynamic=True)
    return compiled


def flex_is_right(config: PreTrainedConfig, device: torch.device, dtype: torch.dtype, row: MicroBatch) -> bool:
    """Whether flex attention compiles here and gives the outputs and gradients of the masked softmax.

    Args:
        config: of the model whose heads and windows are tried.
        device: an accelerator.
        dtype: that attention computes in.
        row: with shared beginnings.
    """
    text: Any = config.get_text_config()
    heads, key_heads = text.num_attention_heads, getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    cap = getattr(text, "attn_logit_softcapping", None)
    generator = torch.Generator().manual_seed(0)

    def drawn(count: int) -> torch.Tensor:
        values = torch.randn(1, count, row.tokens, size, generator=generator)
        return values.to(device, dtype).requires_grad_()

    query, key, value = drawn(heads), drawn(key_heads), drawn(key_heads)
    slope = drawn(heads).detach().transpose(1, 2)
    # Windows narrow enough to cut into the row.
    windows = {None if window is None else min(window, row.tokens // 4) for window in windows_of(config)}
    try:
        with torch.enable_grad():
            for window in windows:
                found = []
                for flex in (False, True):
                    out, _ = attend(nn.Module(), query, key, value, None, sliding_window=window, softcap=cap, row=row, flex=flex)
                    found.append([out.detach(), *torch.autograd.grad((out * slope).sum(), [query, key, value])])
                for plain, own in zip(*found, strict=True):
                    if (plain - own).abs().max() > _ROUNDING[dtype] * plain.abs().max():
                        return False
    except Exception:  # whatever a compiler says
        return False
    return True


#: Largest difference, relative to the largest number, between two ways to add up some dozens of products.
_ROUNDING = {torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float32: 1e-4}


# ---- block by block -------------------------------------------------------------------------------------------------


class Block(NamedTuple):
    """Queries [low, high) against keys [start, end) of the row."""

    low: int
    high: int
    start: int
    end: int
    causal: bool
    mask: torch.Tensor | None
    """Added to the scores where a sliding window cuts into the block."""


def blocks_of(segments: Sequence[Segment], positions_T: torch.Tensor, window: int | None, dtype: torch.dtype) -> list[Block]:
    """The blocks of the score matrix that hold anything.

    Args:
        segments: of the row.
        positions_T: depth of each token.
        window: a token attends to itself and the window - 1 positions before it; None for all.
        dtype: of the scores.
    """
    blocks: list[Block] = []
    for segment in segments:
        start, end, below = segment.start, segment.end, segment.below
        if start < end:
            is_near = window is None or end - start <= window
            mask = None if is_near or window is None else _windowed(positions_T, start, end, start, end, window, dtype)
            blocks.append(Block(start, end, start, end, mask is None, mask))
        if end < below and start < end:
            deepest = int(positions_T[end:below].max())
            if window is None or deepest - segment.depth < window:
                blocks.append(Block(end, below, start, end, False, None))
            else:
                mask = _windowed(positions_T, end, below, start, end, window, dtype)
                near = positions_T[end:below] - (segment.depth + end - start - 1) < window  # those that see anything of it
                if near.any():
                    blocks.append(Block(end, below, start, end, False, mask))
    return blocks


def _windowed(
    positions_T: torch.Tensor, low: int, high: int, start: int, end: int, window: int, dtype: torch.dtype
) -> torch.Tensor:
    distance = positions_T[low:high, None] - positions_T[None, start:end]
    seen = (distance >= 0) & (distance < window)
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))


def _row_blocks(row: MicroBatch, window: int | None, dtype: torch.dtype) -> list[Block]:
    return blocks_of(row.segments, row.position_ids_1T[0], window, dtype)


def over_blocks(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, blocks: Sequence[Block], scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """out_1HTD and lse_1HT of query_1HTD, key_1KTD and value_1KTD over blocks; see the head of this module."""
    keys, values = (for_every_head(some, query.shape[1]) for some in (key, value))
    # Tokens before heads in memory, as the projection that follows reads it.
    out = query.new_empty(1, query.shape[2], query.shape[1], value.shape[3]).transpose(1, 2)
    lse = torch.empty(query.shape[:3], dtype=torch.float64 if query.dtype == torch.float64 else torch.float32)
    for block in sorted(blocks, key=lambda b: b.low != b.start):  # the diagonal first: every query has something there
        low, high, start, end, causal, mask = block
        part, lse_part = flash(
            query[:, :, low:high], keys[:, :, start:end], values[:, :, start:end], mask, scale=scale, causal=causal
        )
        if low == start:
            out[:, :, low:high], lse[:, :, low:high] = part, lse_part
        else:
            merge(out[:, :, low:high], lse[:, :, low:high], part, lse_part)
    return out, lse


def flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    scale: float,
    causal: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The CPU's kernel: out and lse of queries against keys of as many heads.

    Args:
        query: (batch, heads, queries, size).
        key: (batch, heads, keys, size).
        value: (batch, heads, keys, size).
        mask: added to the scores, (..., queries, keys); a query that sees nothing comes back with lse -inf and out 0.
        scale: on the scores.
        causal: query n sees the keys up to n.
    """
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, causal, attn_mask=mask, scale=scale
    )
    if mask is not None:
        blind = (mask == float("-inf")).all(dim=-1)
        if blind.any():
            lse = lse.masked_fill(blind, float("-inf"))
            out = out.masked_fill(blind[..., None], 0.0)
    return out, lse


def merge(out: torch.Tensor, lse: torch.Tensor, part: torch.Tensor, lse_part: torch.Tensor) -> None:
    """Puts another part of what queries see into `out` and `lse`, in place."""
    both = torch.logaddexp(lse, lse_part)
    out.mul_((lse - both).exp_()[..., None]).addcmul_(part, (lse_part - both).exp_()[..., None])
    lse.copy_(both)


class _Blockwise(torch.autograd.Function):
    """out_1HTD of query_1HTD, key_1KTD and value_1KTD over blocks; see the head of this module."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, blocks: list[Block], scale: float
    ) -> torch.Tensor:
        out, lse = over_blocks(query, key, value, blocks, scale)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.blocks, ctx.scale = blocks, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        heads = query.shape[1]
        keys, values = (for_every_head(some, heads) for some in (key, value))
        grad_query, grad_keys, grad_values = (torch.zeros_like(some) for some in (query, keys, values))
        for low, high, start, end, causal, mask in ctx.blocks:
            parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad_out[:, :, low:high],
                query[:, :, low:high],
                keys[:, :, start:end],
                values[:, :, start:end],
                out[:, :, low:high],
                lse[:, :, low:high],
                0.0,
                causal,
                attn_mask=mask,
                scale=ctx.scale,
            )
            grad_query[:, :, low:high] += parts[0]
            grad_keys[:, :, start:end] += parts[1]
            grad_values[:, :, start:end] += parts[2]
        groups = heads // key.shape[1]
        grads = (some if groups == 1 else some.unflatten(1, (-1, groups)).sum(2) for some in (grad_keys, grad_values))
        return grad_query, *grads, None, None
