"""Ring attention: exact attention over a row whose tokens are divided among the ranks of a context group.

Each rank has queries, keys and values of its own tokens (`fullrank.sequences.parts`). Keys and values travel from rank to rank,
all the way round; a rank computes its queries against whatever visits, and puts the parts together by their log-sum-exp (Liu et
al. 2023, Ring Attention with Blockwise Transformers; Milakov & Gimelshein 2018):

    lse = log(sum_b exp(lse_b)),    out = sum_b exp(lse_b - lse) out_b

The backward pass sends keys and values round once more, and behind them the sums of their gradients, which come home last. With
s = scale q k^T, z = c tanh(s / c) where scores are capped and s where they are not, p = exp(z - lse) and d = sum(dout * out),

    dv = p^T dout,    ds = p (dout v^T - d) (1 - (z / c)^2),    dq = scale ds k,    dk = scale ds^T q

What sees what is worked out from the row's segments and token positions, as everywhere (`fullrank.models.attention`). Scores are
made a tile at a time; tiles of which nothing is seen are not computed. This is written in plain tensors and point-to-point
messages, so that it is the same on gloo and NCCL; it has no dropout and no attention sinks.

Shape legend: H heads, K key-value heads, G heads that share one, T tokens of the part, D size of a head, C queries and B keys of
a tile, S distinct predictions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import distributed
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import init_device_mesh

from fullrank.parallel.world import World
from fullrank.sequences.layout import MicroBatch, Part, Stretch

#: Queries, and keys, of a tile of scores: 32 heads' are 32 MB in fp32.
TILE = 512


class ContextRing:
    """The ranks that share each row, as one of them sees them; `fullrank.models.attention.Ring` says what models ask of it.

    Args:
        group: of these ranks; None for the whole world.
    """

    def __init__(self, group: distributed.ProcessGroup | None = None) -> None:
        self._group = group or distributed.group.WORLD
        self.rank, self.size = distributed.get_rank(self._group), distributed.get_world_size(self._group)

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
        """query_1HTD, key_1KTD, value_1KTD of this rank's part of a row -> out_1HTD; all ranks of the group together.

        Args:
            row: this rank's part.
            scale: of the scores.
            window: a token attends to itself and the window - 1 positions before it; None for all.
            softcap: scores are bent to stay below it in size; None for not.
        """
        kind = query.device.type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        assert row.part is not None
        memory = ("ring", window, query.device)
        if memory not in row.memo:
            row.memo[memory] = [tiles(row.part, owner, window, query.device) for owner in range(self.size)]
        with torch.autocast(kind, enabled=False):
            out: torch.Tensor = _RingAttention.apply(  # type: ignore[no-untyped-call]
                query, key, value, self, row.part, row.memo[memory], scale, softcap
            )
        return out

    def whole(self, values_S: torch.Tensor, part: Part) -> torch.Tensor:
        """A number for each prediction of the row, of those for each prediction of every part."""
        everyone = values_S.new_zeros(part.predictions)
        numbers_S = part.numbers_S.to(values_S.device)
        everyone[numbers_S] = values_S[: len(numbers_S)]
        if part.predictions:
            distributed.all_reduce(everyone, group=self._group)
        return everyone

    def agreed(self, said: bool, device: torch.device) -> bool:
        """Whether all ranks of the group say so."""
        against = torch.tensor(float(not said), device=device)
        distributed.all_reduce(against, group=self._group)
        return not against.item()

    def passed_on(self, flat: torch.Tensor, coming: int, tag: int) -> Callable[[], torch.Tensor]:
        """Begins to send a flat tensor to the next rank and to receive one of `coming` elements from the one before.

        Returns:
            What waits for it.
        """
        if self.size == 1:
            return lambda: flat
        received = flat.new_empty(coming)
        works = distributed.batch_isend_irecv(
            [
                distributed.P2POp(distributed.isend, flat, group=self._group, tag=tag, group_peer=(self.rank + 1) % self.size),
                distributed.P2POp(
                    distributed.irecv, received, group=self._group, tag=tag, group_peer=(self.rank - 1) % self.size
                ),
            ]
        )

        def wait(_: torch.Tensor = flat) -> torch.Tensor:  # what is sent stays until it is gone
            for work in works:
                work.wait()
            return received

        return wait


def ring_of(world: World, context: int, device_type: str) -> ContextRing | None:
    """The ring that a rank is in, where groups of `context` neighbouring ranks share rows; None where each computes its own."""
    if context == 1:
        return None
    mesh = init_device_mesh(device_type, (world.size // context, context), mesh_dim_names=("rows", "context"))
    return ContextRing(mesh.get_group("context"))


# ---- what sees what ---------------------------------------------------------------------------------------------------------


class Tile(NamedTuple):
    """Queries [low, high) of this rank against keys [start, end) of a visiting part."""

    low: int
    high: int
    start: int
    end: int
    hidden_CB: torch.Tensor | None
    """Which keys a query does not see; None where it sees all of them."""


def tiles(part: Part, owner: int, window: int | None, device: torch.device) -> list[Tile]:
    """The tiles of scores of this rank's queries against a rank's keys that hold anything."""
    found = []
    for low, queries in _pieces(part.stretches[part.rank]):
        for start, keys in _pieces(part.stretches[owner]):
            seen_CB = _seen(part, queries, keys, window)
            if seen_CB is None or seen_CB.any():
                hidden_CB = None if seen_CB is None or seen_CB.all() else (~seen_CB).to(device)
                found.append(Tile(low, low + queries[1] - queries[0], start, start + keys[1] - keys[0], hidden_CB))
    return found


def _pieces(stretches: Sequence[Stretch]) -> list[tuple[int, Stretch]]:
    """(first token within the part, stretch of the row) of pieces no longer than a tile."""
    found, before = [], 0
    for start, end in stretches:
        found += [(before + low - start, (low, min(low + TILE, end))) for low in range(start, end, TILE)]
        before += end - start
    return found


def _seen(part: Part, queries: Stretch, keys: Stretch, window: int | None) -> torch.Tensor | None:
    """seen_CB: whether a query attends to a key; None where each does, and nothing of this size need be made to tell."""
    low, high = queries
    start, end = keys
    below_B, positions_C, positions_B = part.below_W[start:end], part.positions_W[low:high], part.positions_W[start:end]
    if start >= high or int(below_B.max()) <= low:
        return torch.zeros(1, dtype=torch.bool)
    is_near = window is None or int(positions_C.max() - positions_B.min()) < window
    if is_near and end <= low + 1 and int(below_B.min()) >= high:
        return None
    at_C1 = torch.arange(low, high)[:, None]
    seen_CB = (torch.arange(start, end) <= at_C1) & (at_C1 < below_B)
    if window is not None and not is_near:
        seen_CB &= positions_C[:, None] - positions_B < window
    return seen_CB


# ---- the ring ---------------------------------------------------------------------------------------------------------------


class _Shapes(NamedTuple):
    """How the keys and values of a rank lie in one flat tensor."""

    heads: int
    key_size: int
    value_size: int

    def together(self, key_KTD: torch.Tensor, value_KTD: torch.Tensor) -> torch.Tensor:
        return torch.cat([key_KTD.reshape(-1), value_KTD.reshape(-1)])

    def apart(self, flat: torch.Tensor, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = flat.split([self.heads * tokens * self.key_size, self.heads * tokens * self.value_size])
        return keys.view(self.heads, tokens, self.key_size), values.view(self.heads, tokens, self.value_size)

    def elements(self, tokens: int) -> int:
        return self.heads * tokens * (self.key_size + self.value_size)


class _RingAttention(torch.autograd.Function):
    """See the head of this module."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        ring: ContextRing,
        part: Part,
        tiles_of: list[list[Tile]],
        scale: float,
        softcap: float | None,
    ) -> torch.Tensor:
        shapes = _Shapes(key.shape[1], key.shape[3], value.shape[3])
        query_KGTD = query[0].unflatten(0, (shapes.heads, -1))
        full = torch.float64 if query.dtype == torch.float64 else torch.float32
        out_KGTD = query.new_zeros((*query_KGTD.shape[:3], shapes.value_size), dtype=full)
        lse_KGT = query.new_full(query_KGTD.shape[:3], float("-inf"), dtype=full)
        visiting = shapes.together(key[0], value[0])
        for step in range(ring.size):
            owner = (ring.rank - step) % ring.size
            before = part.tokens_of((owner - 1) % ring.size)
            following = ring.passed_on(visiting, shapes.elements(before), tag=0) if step + 1 < ring.size else None
            keys_KTD, values_KTD = shapes.apart(visiting, part.tokens_of(owner))
            for tile in tiles_of[owner]:
                scores_KGCB = _scores(query_KGTD, keys_KTD, tile, scale, softcap, full)
                _merge(out_KGTD, lse_KGT, tile, scores_KGCB, values_KTD[:, tile.start : tile.end].to(full))
            if following is not None:
                visiting = following()
        out = out_KGTD.flatten(0, 1)[None].to(query.dtype)
        ctx.save_for_backward(query, key, value, out, lse_KGT)
        ctx.given = ring, part, tiles_of, scale, softcap
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, out, lse_KGT = ctx.saved_tensors
        ring, part, tiles_of, scale, softcap = ctx.given
        shapes = _Shapes(key.shape[1], key.shape[3], value.shape[3])
        query_KGTD, out_KGTD, grad_KGTD = (some[0].unflatten(0, (shapes.heads, -1)) for some in (query, out, grad_out))
        full = lse_KGT.dtype
        at_out_KGT = (grad_KGTD.to(full) * out_KGTD.to(full)).sum(-1)
        grad_query_KGTD = torch.zeros_like(query_KGTD, dtype=full)
        visiting = shapes.together(key[0], value[0])
        grads: Callable[[], torch.Tensor] | None = None
        for step in range(ring.size):
            owner = (ring.rank - step) % ring.size
            tokens, before = part.tokens_of(owner), part.tokens_of((owner - 1) % ring.size)
            following = ring.passed_on(visiting, shapes.elements(before), tag=0) if step + 1 < ring.size else None
            keys_KTD, values_KTD = shapes.apart(visiting, tokens)
            own_grads = torch.zeros(shapes.elements(tokens), dtype=full, device=query.device)
            grad_keys_KTD, grad_values_KTD = shapes.apart(own_grads, tokens)
            for tile in tiles_of[owner]:
                low, high, start, end, hidden_CB = tile
                scores_KGCB = _scores(query_KGTD, keys_KTD, tile, scale, softcap, full)
                slope = None if softcap is None else 1 - (scores_KGCB / softcap).square_()
                if slope is not None and hidden_CB is not None:
                    slope.masked_fill_(hidden_CB, 0.0)
                shares_KGCB = scores_KGCB.sub_(lse_KGT[:, :, low:high, None]).exp_()
                grad_KMD = grad_KGTD[:, :, low:high].to(full).flatten(1, 2)  # M: the queries of all heads that share keys
                grad_values_KTD[:, start:end] += shares_KGCB.flatten(1, 2).mT @ grad_KMD
                grad_KGCB = (grad_KMD @ values_KTD[:, start:end].to(full).mT).view_as(shares_KGCB)
                grad_KGCB.sub_(at_out_KGT[:, :, low:high, None]).mul_(shares_KGCB)
                if slope is not None:
                    grad_KGCB.mul_(slope)
                grad_KMB = grad_KGCB.flatten(1, 2).mul_(scale)
                grad_query_KGTD[:, :, low:high] += (grad_KMB @ keys_KTD[:, start:end].to(full)).view_as(
                    grad_query_KGTD[:, :, low:high]
                )
                grad_keys_KTD[:, start:end] += grad_KMB.mT @ query_KGTD[:, :, low:high].to(full).flatten(1, 2)
            if grads is not None:
                own_grads += grads()
            # To the next rank, where their keys and values are already; from the last one they go home.
            grads = ring.passed_on(own_grads, shapes.elements(before), tag=1)
            if following is not None:
                visiting = following()
        assert grads is not None
        grad_key, grad_value = shapes.apart(grads(), key.shape[2])
        grad_query = grad_query_KGTD.flatten(0, 1)[None].to(query.dtype)
        return grad_query, grad_key[None].to(key.dtype), grad_value[None].to(value.dtype), None, None, None, None, None


def _scores(
    query_KGTD: torch.Tensor, keys_KTD: torch.Tensor, tile: Tile, scale: float, softcap: float | None, full: torch.dtype
) -> torch.Tensor:
    """scores_KGCB of a tile; minus infinity where a query does not see a key."""
    query_KGCD = query_KGTD[:, :, tile.low : tile.high].to(full)
    scores_KMB = query_KGCD.flatten(1, 2) @ keys_KTD[:, tile.start : tile.end].to(full).mT
    scores_KGCB: torch.Tensor = scores_KMB.mul_(scale).unflatten(1, query_KGCD.shape[1:3])
    if softcap is not None:
        scores_KGCB.div_(softcap).tanh_().mul_(softcap)
    if tile.hidden_CB is not None:
        scores_KGCB.masked_fill_(tile.hidden_CB, float("-inf"))
    return scores_KGCB


def _merge(
    out_KGTD: torch.Tensor, lse_KGT: torch.Tensor, tile: Tile, scores_KGCB: torch.Tensor, values_KBD: torch.Tensor
) -> None:
    """Puts a tile's part to what its queries have so far."""
    before_KGC, out_KGCD = lse_KGT[:, :, tile.low : tile.high], out_KGTD[:, :, tile.low : tile.high]
    both_KGC = torch.logaddexp(before_KGC, scores_KGCB.logsumexp(-1))
    settled_KGC = both_KGC.masked_fill(both_KGC == float("-inf"), 0.0)  # a query that has seen nothing yet
    shares_KMB = scores_KGCB.sub_(settled_KGC[..., None]).exp_().flatten(1, 2)
    out_KGCD.mul_((before_KGC - settled_KGC).exp_()[..., None]).add_((shares_KMB @ values_KBD).view_as(out_KGCD))
    before_KGC.copy_(both_KGC)
