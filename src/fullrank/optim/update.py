"""The optimizer as engines use it: gradients by name in, weights updated, state to save and to load.

An `Updater` takes the gradients of any subset of the parameters: all of them, one block's, one tensor's. Tensors do not know of
one another, so the weights that follow are the same, bit by bit, however the calls are divided. State is made at a tensor's
first update, may be kept on a shelf (`fullrank.optim.shelf`) between calls, and for AdamW may be coded in 8 bits
(`fullrank.optim.eightbit`).

Rules compute in fp32 (float64 for float64 parameters, whose moments are never coded). An fp32 parameter is updated in place. A
bf16 parameter is taken to fp32, updated and rounded back (`fullrank.optim.rounding`): stretch by stretch where the rule is
elementwise, so that no temporary has the tensor's size. Matrices decay and vectors (norms, biases) do not: decay of a norm's
gain changes the scale of activations and regularises nothing (Brown et al. 2020, appendix B, is the usual reference).
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from torch import Tensor, nn

from fullrank.optim.eightbit import BLOCK, CODES, SMALLEST, blocks
from fullrank.optim.pieces import Gather, Piece, Pieces, assembled, parts_of
from fullrank.optim.rounding import chunk_elements, kahan_, stochastic_, tensor_key
from fullrank.optim.rules import Rule, Shape, rule_for
from fullrank.optim.shelf import Shelf
from fullrank.recipe import AdamW, Optimizer

Rounding = Literal["none", "stochastic", "kahan", "nearest"]

#: Elements of a tensor that are looked at to say which share of the weights an update changed.
SAMPLE = 1024


@dataclass(frozen=True)
class _Plan:
    """How one tensor is updated and what is stored for it."""

    rule: Rule
    coded: frozenset[str]
    """Slots stored in 8 bits."""
    stored: Mapping[str, tuple[Shape, torch.dtype]]
    """Kind -> shape and type of what is stored: slots, scales of the coded ones, the compensation."""
    divided: frozenset[str]
    """Kinds of which a rank stores its piece: what has a number for each of the tensor's, and scales."""

    @classmethod
    def of(cls, optimizer: Optimizer, piece: Piece, dtype: torch.dtype, *, rounding: str, hidden: bool) -> _Plan:
        shape = piece.shape
        rule = rule_for(optimizer, shape, hidden=hidden)
        compute = _compute_type(dtype)
        codes = isinstance(optimizer, AdamW) and optimizer.moments == "int8"
        coded = codes and prod(shape) >= SMALLEST and compute == torch.float32
        own = shape if piece.is_whole else (piece.count,)
        stored: dict[str, tuple[Shape, torch.dtype]] = {}
        for slot, slot_shape in rule.slots(shape).items():
            stored[slot] = (own if slot_shape == shape else slot_shape, CODES[slot].dtype if coded else compute)
            if coded:
                stored[f"{slot}.scale"] = ((blocks(piece.count),), torch.float32)
        if rounding == "kahan" and dtype == torch.bfloat16:
            stored["compensation"] = (own, torch.bfloat16)
        divided = () if piece.is_whole else (k for k in stored if rule.slots(shape).get(k, shape) == shape)
        return cls(rule, frozenset(rule.slots(shape)) if coded else frozenset(), stored, frozenset(divided))

    def start(self, device: torch.device) -> dict[str, Tensor]:
        """State before the first update."""
        return {kind: torch.zeros(shape, dtype=dtype, device=device) for kind, (shape, dtype) in self.stored.items()}


def state_bytes(
    optimizer: Optimizer,
    shapes: Mapping[str, Sequence[int]],
    *,
    rounding: Rounding,
    hidden: Collection[str] = (),
    ranks: int = 1,
) -> int:
    """Bytes of the state of parameters of these shapes once each was updated; without weights and gradients.

    Args:
        optimizer: the recipe's.
        shapes: by parameter name; fp32 where the rounding is none, else bf16.
        rounding: as for `Updater`.
        hidden: as for `Updater`.
        ranks: among which parameters are divided, along their first dimension; of the rank that has most.
    """
    dtype = torch.float32 if rounding == "none" else torch.bfloat16
    hidden = frozenset(hidden)
    return sum(
        prod(stored_shape) * stored_dtype.itemsize
        for name, shape in shapes.items()
        for stored_shape, stored_dtype in _Plan.of(
            optimizer, _largest_piece(shape, ranks), dtype, rounding=rounding, hidden=name in hidden
        ).stored.values()
    )


def _largest_piece(shape: Sequence[int], ranks: int) -> Piece:
    whole = tuple(shape)
    return Piece(0, -(-whole[0] // ranks) * prod(whole[1:]) if whole else 1, whole)


class Updater:
    """Updates parameters by a recipe's rule.

    Args:
        parameters: by name; contiguous; fp32, float64, or bf16 where the rounding is not none.
        optimizer: the recipe's; its learning rate and `layer_decay` are the caller's to apply (`learning_rate`, `rates`).
        rounding: how bf16 parameters are rounded; plays no part for others.
        hidden: names of matrices of blocks, which Muon orthogonalises.
        rates: factors on the learning rate by name; 1 where there is none.
        shelf: where state waits between updates; None keeps it on the parameters' device.
        pieces: of the parameters that are pieces of larger tensors; all others are whole.
        gather: puts pieces together, for rules that need whole tensors.
    """

    updates: dict[str, int]
    """Updates that each tensor has had; tensors without one are not in it."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        optimizer: Optimizer,
        *,
        rounding: Rounding,
        hidden: Collection[str] = (),
        rates: Mapping[str, float] = {},
        shelf: Shelf | None = None,
        pieces: Mapping[str, Piece] = {},
        gather: Gather | None = None,
    ) -> None:
        taken = {torch.float32, torch.float64} | ({torch.bfloat16} if rounding != "none" else set())
        if wrong := [name for name, p in parameters.items() if p.dtype not in taken]:
            raise ValueError(f"{wrong[0]} is {parameters[wrong[0]].dtype}, which rounding {rounding!r} does not serve")
        hidden = frozenset(hidden)
        self._parameters = dict(parameters)
        self._rounding = rounding
        self._weight_decay = optimizer.weight_decay
        self._rates = dict(rates)
        self._shelf = shelf
        self._pieces = {n: pieces.get(n, Piece(0, p.numel(), tuple(p.shape))) for n, p in self._parameters.items()}
        self._gather = gather
        self._plans = {
            name: _Plan.of(optimizer, self._pieces[name], p.dtype, rounding=rounding, hidden=name in hidden)
            for name, p in self._parameters.items()
        }
        self._states: dict[str, dict[str, Tensor]] = {}
        self.updates = {}
        self.reset_changed()

    @torch.no_grad()
    def update(self, gradients: Mapping[str, Tensor], *, learning_rate: float, key: int) -> None:
        """Updates the parameters that the gradients are of.

        Args:
            gradients: by parameter name, any subset; fp32 (float64 for float64 parameters); may be overwritten.
            learning_rate: of this step.
            key: chance in stochastic rounding: another one for each step, the same one for all calls of a step.
        """
        names = list(gradients)
        self._fetch(names[:1])
        for number, name in enumerate(names):
            following = names[number + 1 : number + 2]
            state = self._take(name)
            self._fetch(following)
            step = self.updates.get(name, 0) + 1
            sample = _sample(self._parameters[name])
            before = sample.clone()
            self._update(name, gradients[name], state, step, learning_rate * self._rates.get(name, 1.0), key)
            self._count_changed(before, sample)
            self._keep(name, state)
            self.updates[name] = step

    def _update(self, name: str, gradient: Tensor, state: dict[str, Tensor], step: int, rate: float, key: int) -> None:
        p, plan, piece = self._parameters[name], self._plans[name], self._pieces[name]
        compute = _compute_type(p.dtype)
        gradients = gradient.to(compute).reshape(-1)
        decay = self._weight_decay if len(piece.shape) >= 2 else 0.0
        chance = tensor_key(key, name)
        if not plan.rule.elementwise:
            weight, grad, slots = self._whole(name, gradients, state)
            plan.rule.update_(weight, grad, slots, step=step, learning_rate=rate, weight_decay=decay)
            self._put_back(name, weight, slots, state, chance)
            return
        weights, elements = p.data.view(-1), p.numel()
        flat = {kind: tensor.view(-1) for kind, tensor in state.items()}
        rounded = p.dtype != compute
        for part in _stretches(elements, chunk_elements(p.device) if rounded or plan.coded else elements):
            scales = slice(part.start // BLOCK, blocks(part.stop))
            weight = self._exact(weights[part], flat, part)
            slots = {}
            for slot in plan.rule.slots(piece.shape):
                if slot in plan.coded:
                    slots[slot] = CODES[slot].decode(flat[slot][part], flat[f"{slot}.scale"][scales])
                else:
                    slots[slot] = flat[slot][part]
            plan.rule.update_(weight, gradients[part], slots, step=step, learning_rate=rate, weight_decay=decay)
            for slot in plan.coded:
                CODES[slot].encode(slots[slot], flat[slot][part], flat[f"{slot}.scale"][scales])
            if rounded:
                self._round(weights[part], weight, flat, part, chance, piece.start)

    def _exact(self, weights: Tensor, flat: Mapping[str, Tensor], part: slice) -> Tensor:
        """A stretch of weights in the type that is computed in, with what rounding left over; no copy where that is theirs."""
        weight = weights.to(_compute_type(weights.dtype))
        return weight.add_(flat["compensation"][part]) if "compensation" in flat else weight

    def _whole(self, name: str, gradients: Tensor, state: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Weight, gradient and slots of the whole tensor, for a rule that looks at all of it."""
        p, plan, piece = self._parameters[name], self._plans[name], self._pieces[name]
        flat = {kind: tensor.view(-1) for kind, tensor in state.items()}
        weight = self._exact(p.data.view(-1), flat, slice(None))
        slots = {
            slot: self._gathered(piece, flat[slot]) if slot in plan.divided else state[slot]
            for slot in plan.rule.slots(piece.shape)
        }
        return self._gathered(piece, weight), self._gathered(piece, gradients), slots

    def _gathered(self, piece: Piece, elements: Tensor) -> Tensor:
        if not piece.is_whole:
            assert self._gather is not None, "rules that need whole tensors need a way to put pieces together"
            elements = self._gather(piece, elements)
        return elements.view(piece.shape)

    def _put_back(self, name: str, weight: Tensor, slots: Mapping[str, Tensor], state: Mapping[str, Tensor], chance: int) -> None:
        """What the rule made of the whole tensor, to where this rank keeps its part."""
        p, piece = self._parameters[name], self._pieces[name]
        for slot in slots.keys() & self._plans[name].divided:
            state[slot].copy_(slots[slot].view(-1)[piece.stretch])
        own = weight.view(-1)[piece.stretch]
        if p.dtype != own.dtype:
            flat = {kind: tensor.view(-1) for kind, tensor in state.items()}
            self._round(p.data.view(-1), own, flat, slice(None), chance, piece.start)
        elif not piece.is_whole:  # else the rule has worked on the weights themselves
            p.data.view(-1).copy_(own)

    def _round(self, target: Tensor, values: Tensor, flat: Mapping[str, Tensor], part: slice, chance: int, first: int) -> None:
        """Rounds a stretch of a piece whose own first element is the `first` of the whole tensor."""
        if self._rounding == "stochastic":
            stochastic_(target, values, key=chance, start=first + (part.start or 0))
        elif self._rounding == "kahan":
            kahan_(target, flat["compensation"][part], values)
        else:
            target.copy_(values)

    def _take(self, name: str) -> dict[str, Tensor]:
        plan = self._plans[name]
        if name not in self.updates:
            return plan.start(self._parameters[name].device)
        if self._shelf is None:
            return self._states[name]
        return {kind: self._shelf.get(_label(kind, name)) for kind in plan.stored}

    def _keep(self, name: str, state: dict[str, Tensor]) -> None:
        if self._shelf is None:
            self._states[name] = state
        else:
            for kind, tensor in state.items():
                self._shelf.put(_label(kind, name), tensor)

    def _fetch(self, names: Iterable[str]) -> None:
        if self._shelf is not None:
            self._shelf.fetch(_label(kind, name) for name in names if name in self.updates for kind in self._plans[name].stored)

    def tensors(self) -> Mapping[str, Mapping[str, Tensor]]:
        """The state: kind (`exp_avg`, `exp_avg.scale`, `row`, `compensation`, ...) -> parameter name -> tensor.

        References, not copies; from a shelf, each tensor is read when it is asked for, so walk them one at a time.
        """
        names: dict[str, list[str]] = {}
        for name in self.updates:
            for kind in self._plans[name].stored:
                names.setdefault(kind, []).append(name)
        return {kind: Pieces(self._of_kind(kind, of), self._divided(kind, of)) for kind, of in names.items()}

    def _of_kind(self, kind: str, names: Sequence[str]) -> Mapping[str, Tensor]:
        if self._shelf is not None:
            return _Shelved(self._shelf, kind, names)
        return {name: self._states[name][kind] for name in names}

    def _divided(self, kind: str, names: Sequence[str]) -> dict[str, Piece]:
        return {name: self._pieces[name] for name in names if kind in self._plans[name].divided}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Mapping[str, Tensor]], updates: Mapping[str, int]) -> None:
        """Continues from a state, bit by bit: `tensors()` and `updates` as they were. Copies, one tensor at a time.

        What was saved in pieces (`fullrank.optim.pieces.Parts`) may have been divided otherwise: then moments of 8 bits are coded
        anew where blocks begin elsewhere; all else is the same.

        Raises:
            KeyError: a tensor is missing or belongs to no parameter.
            ValueError: a tensor is not what the rule stores.
        """
        self.updates, self._states = {}, {}
        for name, count in updates.items():
            state: dict[str, Tensor] = {}
            for kind, (shape, dtype) in self._plans[name].stored.items():
                found = self._found(tensors, kind, name)
                if tuple(found.shape) != shape or found.dtype != dtype:
                    raise ValueError(f"{kind} of {name} is {found.dtype} {tuple(found.shape)}, not {dtype} {shape}")
                if self._shelf is None:
                    state[kind] = found.to(self._parameters[name].device, copy=True)
                else:
                    self._shelf.put(_label(kind, name), found)
            if self._shelf is None:
                self._states[name] = state
            self.updates[name] = count

    def _found(self, tensors: Mapping[str, Mapping[str, Tensor]], kind: str, name: str) -> Tensor:
        """A saved tensor, of which this rank's piece where it is divided."""
        plan, own = self._plans[name], self._pieces[name]
        slot = kind.removesuffix(".scale")
        there = parts_of(tensors[kind], name)
        of_all_elements = plan.rule.slots(own.shape).get(slot, own.shape) == own.shape
        if there is None or not of_all_elements or (own.is_whole and len(there) == 1):
            return tensors[kind][name]
        shape, dtype = plan.stored[kind]
        for piece, read in there:
            if piece == own:
                return read(0, prod(shape)).view(shape)
        if slot not in plan.coded:
            return assembled(there, own, dtype).view(shape)
        made = self._coded_anew(slot, tensors, name)
        return made[kind]

    def _coded_anew(self, slot: str, tensors: Mapping[str, Mapping[str, Tensor]], name: str) -> dict[str, Tensor]:
        """Codes and scales of this rank's piece out of those of pieces that were divided otherwise."""
        own = self._pieces[name]
        codes, scales = (parts_of(tensors[kind], name) or [] for kind in (slot, f"{slot}.scale"))
        overlap = [
            (piece, CODES[slot].decode(read(0, piece.count), read_scales(0, blocks(piece.count))))
            for (piece, read), (_, read_scales) in zip(codes, scales, strict=True)
            if piece.start < own.start + own.count and own.start < piece.start + piece.count
        ]
        parts = [(piece, functools.partial(_stretch, values)) for piece, values in overlap]
        made = {
            slot: torch.empty(own.count, dtype=CODES[slot].dtype),
            f"{slot}.scale": torch.empty(blocks(own.count), dtype=torch.float32),
        }
        CODES[slot].encode(assembled(parts, own, torch.float32), made[slot], made[f"{slot}.scale"])
        return {kind: tensor.view(self._plans[name].stored[kind][0]) for kind, tensor in made.items()}

    @property
    def changed(self) -> tuple[int, int]:
        """(looked at, changed) since `reset_changed`: elements of a fixed sample, and how many of them an update changed.

        The sample is at most 1,024 elements of a tensor, evenly spread, looked at in every update of it, so large and small
        tensors weigh alike. It shows updates lost in rounding; an element whose update is zero counts as unchanged too. Reading
        it waits for the device.
        """
        return self._looked_at, sum(int(count) for count in self._changed.values())

    def reset_changed(self) -> None:
        """Counts `changed` anew."""
        self._looked_at = 0
        self._changed: dict[torch.device, Tensor] = {}

    def _count_changed(self, before: Tensor, after: Tensor) -> None:
        changed = (before != after).sum()
        self._looked_at += before.numel()
        self._changed[before.device] = self._changed.get(before.device, torch.zeros_like(changed)) + changed


class _Shelved(Mapping[str, Tensor]):
    """Tensors of one kind on a shelf, read one at a time."""

    def __init__(self, shelf: Shelf, kind: str, names: Sequence[str]) -> None:
        self._shelf, self._kind, self._names = shelf, kind, dict.fromkeys(names)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._shelf.get(_label(self._kind, name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _stretch(values: Tensor, start: int, count: int) -> Tensor:
    return values[start : start + count]


def _label(kind: str, name: str) -> str:
    """The name of a state tensor on a shelf."""
    return f"{kind}/{name}"


def _sample(p: nn.Parameter) -> Tensor:
    """At most 1,024 elements, evenly spread; an odd stride, so that rows of even length are not met in the same columns."""
    return p.data.view(-1)[:: -(-p.numel() // SAMPLE) | 1]


def _compute_type(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _stretches(elements: int, length: int) -> Iterator[slice]:
    return (slice(start, min(start + length, elements)) for start in range(0, elements, max(1, length)))
