"""Keys and values of texts that are being written side by side, and the attention over them.

A forward pass is one flat row without padding: first the newest token of every running text, then the prompts that arrive, laid
out as a forest (`fullrank.sequences.forest`). Each running text has a slot, room for its keys and values in arrays that all texts
share; slots are filled from the first on, so that one call of the kernel serves all of them. What all prompts begin with is kept
once, beside the slots: all queries see it in one product, and the two parts are put together by their log-sum-exp, as blocks of a
row are (`fullrank.models.attention`). A text that has ended gives its slot to the last one.

Windows are kept by position: every key stays, and those that a window hides are not read or are masked.

Shape legend: R running texts, T tokens of the row, H heads, K key-value heads, G heads that share one, D size of a head, S slots,
C tokens of a slot, P tokens of the common beginning.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel

from fullrank.models.attention import blocks_of, dense, flash, for_every_head, merge, over_blocks, row_mask
from fullrank.sequences.forest import Segment, grow
from fullrank.sequences.layout import MicroBatch

#: The name of this attention in transformers.
NAME = "fullrank_slots"

#: Slots grow by so many tokens at least.
_GROWTH = 64


class _Pair(NamedTuple):
    """Keys and values of a layer: (S, K, C, D) for slots, (1, K, P, D) for the beginning."""

    keys: torch.Tensor
    values: torch.Tensor

    @property
    def bytes_per_token(self) -> int:
        heads = self.keys.shape[1]
        return heads * (self.keys.shape[3] + self.values.shape[3]) * self.keys.element_size()


@dataclass(frozen=True, kw_only=True)
class SlotRow(MicroBatch):
    """A row of running texts' tokens and arriving prompts."""

    slots: Slots
    running: int
    seen_R: torch.Tensor
    """Tokens in the slot of each running text, the one of this row included."""
    longest: int
    shortest: int
    """Most and least of these."""
    paths: tuple[torch.Tensor, ...]
    """Where in the row the tokens of each arriving prompt are."""
    begins: bool
    """The one that arrives is what all others begin with."""


class Slots:
    """Texts by number, from 0 on without a gap.

    Args:
        device: of the model.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.lengths: list[int] = []
        """Tokens of each text, behind the common beginning."""
        self.beginning_tokens = 0
        self.beginning: dict[int, _Pair] = {}
        self._layers: dict[int, _Pair] = {}
        self._slots = self._capacity = 0

    @property
    def bytes(self) -> int:
        """Of all keys and values, the beginning's included."""
        pairs = [*self._layers.values(), *self.beginning.values()]
        return sum(some.numel() * some.element_size() for pair in pairs for some in pair)

    @property
    def bytes_per_token(self) -> int:
        """Of all layers; 0 before the first forward pass."""
        return sum(pair.bytes_per_token for pair in (self._layers or self.beginning).values())

    def row(self, newest: Sequence[int], arriving: Sequence[Sequence[int]], *, begins: bool = False) -> SlotRow:
        """What the model is given next.

        Args:
            newest: the token of each running text that the model has not seen.
            arriving: ids of new texts, behind the common beginning, none of them empty.
            begins: what arrives is that beginning.
        """
        running, skip = len(newest), self.beginning_tokens
        forest = grow([np.asarray(ids, dtype=np.int64) for ids in arriving])
        seen = [length + 1 for length in self.lengths]
        positions = [skip + length for length in self.lengths]
        paths = tuple(torch.from_numpy(path_T + running).to(self.device) for path_T in forest.paths)

        def tensor(values: Sequence[int] | np.ndarray) -> torch.Tensor:
            return torch.as_tensor(values, dtype=torch.int64).to(self.device)

        none = tensor([])
        return SlotRow(
            input_ids_1T=tensor(np.concatenate([np.asarray(newest, np.int64), forest.ids_T]))[None],
            position_ids_1T=tensor(np.concatenate([np.asarray(positions, np.int64), forest.positions_T + skip]))[None],
            segments=tuple(
                Segment(s.start + running, s.end + running, s.below + running, s.depth + skip, s.parent) for s in forest.segments
            ),
            predicting_S=tensor([*range(running), *(int(path_T[-1]) + running for path_T in forest.paths)]),
            targets_S=none,
            times_S=none,
            entry_P=none,
            owner_P=none,
            examples=(),
            separate_tokens=0,
            slots=self,
            running=running,
            seen_R=tensor(seen),
            longest=max(seen, default=0),
            shortest=min(seen, default=0),
            paths=paths,
            begins=begins,
        )

    def reserve(self, slots: int, tokens: int, most_tokens: int) -> None:
        """Makes room for so many texts of so many tokens, where there is less; what the slots hold stays.

        Args:
            slots: texts.
            tokens: of the longest, behind the common beginning.
            most_tokens: that one may come to have: room to grow is made up to that.
        """
        if slots <= self._slots and tokens <= self._capacity:
            return
        self._slots, self._capacity = slots, max(tokens, min(most_tokens, tokens + max(_GROWTH, tokens // 4)))
        live, used = len(self.lengths), max(self.lengths, default=0)
        for layer, old in self._layers.items():  # one layer at a time: never twice the memory of all
            new = self._blank(old.keys, old.values)
            for to, what in zip(new, old, strict=True):
                to[:live, :, :used] = what[:live, :, :used]
            self._layers[layer] = new

    def _blank(self, key: torch.Tensor, value: torch.Tensor) -> _Pair:
        # zeros: a masked score of a number that is none would be none
        return _Pair(*(some.new_zeros(self._slots, some.shape[1], self._capacity, some.shape[3]) for some in (key, value)))

    def keep(self, row: SlotRow, layer: int, key: torch.Tensor, value: torch.Tensor) -> _Pair:
        """Puts key_1KTD and value_1KTD of a row where they belong; the slots of the layer."""
        if row.begins:
            self.beginning[layer] = pair = _Pair(key.clone(), value.clone())
            return pair
        if layer not in self._layers:
            self._layers[layer] = self._blank(key, value)
        pair = self._layers[layer]
        running = row.running
        at_R, last_R = _remembered(row, ("at",), lambda: (torch.arange(running, device=self.device), row.seen_R - 1))
        for to, what in zip(pair, (key, value), strict=True):
            if running:
                to[at_R, :, last_R] = what[0, :, :running].transpose(0, 1)
            for number, path_N in enumerate(row.paths, start=running):
                to[number, :, : len(path_N)] = what[0][:, path_N]
        return pair

    def advance(self, row: SlotRow) -> None:
        """The row was computed: its tokens belong to their texts from now on."""
        if row.begins:
            self.beginning_tokens = len(row.paths[0])
            return
        self.lengths = [length + 1 for length in self.lengths] + [len(path_N) for path_N in row.paths]

    def drop(self, number: int) -> None:
        """Ends a text; the last one takes its number."""
        last = len(self.lengths) - 1
        if number != last:
            for pair in self._layers.values():
                for some in pair:
                    some[number, :, : self.lengths[last]] = some[last, :, : self.lengths[last]]
            self.lengths[number] = self.lengths[last]
        self.lengths.pop()

    def clear(self) -> None:
        """Ends all texts and gives their memory back; the beginning stays."""
        self.lengths = []
        self._layers = {}
        self._slots = self._capacity = 0


@contextlib.contextmanager
def attending_to_slots(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the model attends over the slots of the row that its forward pass is given (`row=`), and to nothing else."""
    usual = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(usual)


# ---- attention ------------------------------------------------------------------------------------------------------


class _How(NamedTuple):
    scale: float
    window: int | None
    softcap: float | None
    sinks: torch.Tensor | None


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    row: SlotRow,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function: query_1HTD, key_1KTD, value_1KTD -> out_1THD."""
    layer: int = module.layer_idx  # type: ignore[assignment]
    how = _How(query.shape[-1] ** -0.5 if scaling is None else scaling, sliding_window, softcap, s_aux)
    own = row.slots.keep(row, layer, key, value)
    beginning = row.slots.beginning.get(layer) if row.slots.beginning_tokens else None
    running = row.running
    has_kernel = query.device.type == "cpu" and softcap is None and s_aux is None
    parts = []
    if running:
        query_RKGD = query[0, :, :running].transpose(0, 1).unflatten(1, (key.shape[1], -1))
        compute = _running_by_parts if has_kernel else _running_densely
        parts.append(compute(row, query_RKGD, own, beginning, how).flatten(1, 2)[None])
    if running < row.tokens:
        arrive = _arriving_by_parts if has_kernel else _arriving_densely
        parts.append(arrive(row, query, key, value, beginning, how).transpose(1, 2))
    return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)), None


# transformers makes no mask for an attention whose name it knows no masks for.
AttentionInterface.register(NAME, attend)


def _remembered(row: SlotRow, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
    """What all layers of a kind share, made once a row."""
    if key not in row.memo:
        row.memo[key] = make()
    return row.memo[key]


def _hidden(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    """What is added to scores; None where everything is seen."""
    if bool(seen.all()):
        return None
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))


def _first_key(row: SlotRow, window: int | None) -> int:
    """The first token of the slots that a window leaves in sight of any running text."""
    return 0 if window is None else max(0, row.shortest - window)


def _own_seen(row: SlotRow, window: int | None) -> torch.Tensor:
    """seen_RC: whether a running text's newest token sees the tokens of its slot, from `_first_key` on."""
    at_C = torch.arange(_first_key(row, window), row.longest, device=row.seen_R.device)
    seen_RC = at_C < row.seen_R[:, None]
    return seen_RC if window is None else seen_RC & (at_C >= row.seen_R[:, None] - window)


def _beginning_seen(row: SlotRow, window: int | None) -> torch.Tensor:
    """seen_TP: whether the tokens of the row see those of the common beginning."""
    at_P = torch.arange(row.slots.beginning_tokens, device=row.seen_R.device)
    positions_T1 = row.position_ids_1T[0][:, None]
    return (
        (positions_T1 - at_P < window) if window is not None else torch.ones_like(at_P, dtype=torch.bool).expand(row.tokens, -1)
    )


def _running_by_parts(row: SlotRow, query: torch.Tensor, own: _Pair, beginning: _Pair | None, how: _How) -> torch.Tensor:
    """out_RKGD of query_RKGD by the CPU's kernel."""
    window, running = how.window, row.running
    low, high = _first_key(row, window), row.longest
    mask = _remembered(row, ("own", window), lambda: _hidden(_own_seen(row, window)[:, None, None], query.dtype))
    out, lse = flash(query, own.keys[:running, :, low:high], own.values[:running, :, low:high], mask, scale=how.scale)
    if beginning is None:
        return out
    seen, mask_RP = _remembered(row, ("beginning", window), lambda: _sight(_beginning_seen(row, window)[:running], query.dtype))
    if seen:
        groups = query.shape[2]
        together = query.transpose(0, 1).flatten(1, 2)[None]  # the queries of all texts, as one text's
        mask = None if mask_RP is None else mask_RP.repeat_interleave(groups, dim=0)
        part, lse_part = flash(together, *beginning, mask, scale=how.scale)
        merge(out, lse, *(some[0].unflatten(1, (running, groups)).transpose(0, 1) for some in (part, lse_part)))
    return out


def _sight(seen: torch.Tensor, dtype: torch.dtype) -> tuple[bool, torch.Tensor | None]:
    """Whether anything is seen, and what is added to the scores."""
    return bool(seen.any()), _hidden(seen, dtype)


def _arriving_by_parts(
    row: SlotRow, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, beginning: _Pair | None, how: _How
) -> torch.Tensor:
    """out_1HAD of the A tokens of the row that arrive."""
    window, running = how.window, row.running
    blocks = _remembered(row, ("blocks", window), lambda: blocks_of(row.segments, row.position_ids_1T[0], window, query.dtype))
    out, lse = (some[:, :, running:] for some in over_blocks(query, key, value, blocks, how.scale))
    if beginning is None:
        return out
    seen, mask = _remembered(row, ("arriving", window), lambda: _sight(_beginning_seen(row, window)[running:], query.dtype))
    if seen:
        keys, values = (for_every_head(some, query.shape[1]) for some in beginning)
        merge(out, lse, *flash(query[:, :, running:], keys, values, mask, scale=how.scale))
    return out


def _running_densely(row: SlotRow, query: torch.Tensor, own: _Pair, beginning: _Pair | None, how: _How) -> torch.Tensor:
    """out_RKGD of query_RKGD with every score at once."""
    running, low, high = row.running, _first_key(row, how.window), row.longest
    keys, values = (some[:running, :, low:high] for some in own)
    scores, seen = query @ keys.transpose(2, 3), _remembered(row, ("own seen", how.window), lambda: _own_seen(row, how.window))
    skip = 0
    if beginning is not None:
        skip, groups = beginning.keys.shape[2], query.shape[2]
        together_KQD = query.transpose(0, 1).flatten(1, 2)
        first = (together_KQD @ beginning.keys[0].transpose(1, 2)).unflatten(1, (running, groups)).transpose(0, 1)
        scores = torch.cat([first, scores], dim=-1)
        seen = torch.cat([_beginning_seen(row, how.window)[:running], seen], dim=-1)
    scores = scores * how.scale
    if how.softcap is not None:
        scores = torch.tanh(scores / how.softcap) * how.softcap
    scores = scores.masked_fill(~seen[:, None, None], torch.finfo(scores.dtype).min)
    if how.sinks is not None:  # a score of its own for each head, which takes probability and gives nothing
        sinks = how.sinks.reshape(1, *query.shape[1:3], 1).expand(running, -1, -1, -1)
        scores = torch.cat([scores, sinks.to(scores.dtype)], dim=-1)
    shares = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    out = shares[..., skip : skip + high - low] @ values
    if beginning is not None:
        first_KQP = shares[..., :skip].transpose(0, 1).flatten(1, 2)
        out = out + (first_KQP @ beginning.values[0]).unflatten(1, (running, -1)).transpose(0, 1)
    return out


def _arriving_densely(
    row: SlotRow, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, beginning: _Pair | None, how: _How
) -> torch.Tensor:
    """out_1HAD of the A tokens of the row that arrive, with every score at once."""
    window, running = how.window, row.running
    seen = _remembered(row, ("mask", window), lambda: row_mask(row, window, query.device)[running:, running:])
    keys, values = (some[:, :, running:] for some in (key, value))
    if beginning is not None:
        keys, values = (torch.cat(pair, dim=2) for pair in zip(beginning, (keys, values), strict=True))
        seen = torch.cat([_beginning_seen(row, window)[running:], seen], dim=1)
    return dense(query[:, :, running:], keys, values, seen, how.scale, 0.0, how.softcap, how.sinks)
