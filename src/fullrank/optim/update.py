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

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from torch import Tensor, nn

from fullrank.optim.eightbit import BLOCK, CODES, SMALLEST, blocks
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

    @classmethod
    def of(cls, optimizer: Optimizer, shape: Sequence[int], dtype: torch.dtype, *, rounding: str, hidden: bool) -> _Plan:
        rule = rule_for(optimizer, shape, hidden=hidden)
        compute = _compute_type(dtype)
        codes = isinstance(optimizer, AdamW) and optimizer.moments == "int8"
        coded = codes and prod(shape) >= SMALLEST and compute == torch.float32
        stored: dict[str, tuple[Shape, torch.dtype]] = {}
        for slot, slot_shape in rule.slots(shape).items():
            stored[slot] = (slot_shape, CODES[slot].dtype if coded else compute)
            if coded:
                stored[f"{slot}.scale"] = ((blocks(prod(slot_shape)),), torch.float32)
        if rounding == "kahan" and dtype == torch.bfloat16:
            stored["compensation"] = (tuple(shape), torch.bfloat16)
        return cls(rule, frozenset(rule.slots(shape)) if coded else frozenset(), stored)

    def start(self, device: torch.device) -> dict[str, Tensor]:
        """State before the first update."""
        return {kind: torch.zeros(shape, dtype=dtype, device=device) for kind, (shape, dtype) in self.stored.items()}


def state_bytes(
    optimizer: Optimizer, shapes: Mapping[str, Sequence[int]], *, rounding: Rounding, hidden: Collection[str] = ()
) -> int:
    """Bytes of the state of parameters of these shapes once each was updated; without weights and gradients.

    Args:
        optimizer: the recipe's.
        shapes: by parameter name; fp32 where the rounding is none, else bf16.
        rounding: as for `Updater`.
        hidden: as for `Updater`.
    """
    dtype = torch.float32 if rounding == "none" else torch.bfloat16
    hidden = frozenset(hidden)
    return sum(
        prod(stored_shape) * stored_dtype.itemsize
        for name, shape in shapes.items()
        for stored_shape, stored_dtype in _Plan.of(
            optimizer, shape, dtype, rounding=rounding, hidden=name in hidden
        ).stored.values()
    )


class Updater:
    """Updates parameters by a recipe's rule.

    Args:
        parameters: by name; contiguous; fp32, float64, or bf16 where the rounding is not none.
        optimizer: the recipe's; its learning rate and `layer_decay` are the caller's to apply (`learning_rate`, `rates`).
        rounding: how bf16 parameters are rounded; plays no part for others.
        hidden: names of matrices of blocks, which Muon orthogonalises.
        rates: factors on the learning rate by name; 1 where there is none.
        shelf: where state waits between updates; None keeps it on the parameters' device.
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
        self._plans = {
            name: _Plan.of(optimizer, p.shape, p.dtype, rounding=rounding, hidden=name in hidden)
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
        p, plan = self._parameters[name], self._plans[name]
        compute = _compute_type(p.dtype)
        weights, elements = p.data.view(-1), p.numel()
        gradients = gradient.to(compute).reshape(-1)
        flat = {kind: tensor.view(-1) for kind, tensor in state.items()}
        decay = self._weight_decay if p.ndim >= 2 else 0.0
        rounded = p.dtype != compute
        whole = not plan.rule.elementwise or not (rounded or plan.coded)
        for part in _stretches(elements, elements if whole else chunk_elements(p.device)):
            scales = slice(part.start // BLOCK, blocks(part.stop))
            weight = weights[part].to(compute)  # no copy where the type is the same already
            if "compensation" in flat:
                weight.add_(flat["compensation"][part])
            slots: dict[str, Tensor] = {}
            for slot in plan.rule.slots(p.shape):
                if slot in plan.coded:
                    slots[slot] = CODES[slot].decode(flat[slot][part], flat[f"{slot}.scale"][scales])
                else:
                    slots[slot] = flat[slot][part] if plan.rule.elementwise else state[slot]
            grad = gradients[part]
            if not plan.rule.elementwise:
                weight, grad = weight.view(p.shape), grad.view(p.shape)
            plan.rule.update_(weight, grad, slots, step=step, learning_rate=rate, weight_decay=decay)
            for slot in plan.coded:
                CODES[slot].encode(slots[slot], flat[slot][part], flat[f"{slot}.scale"][scales])
            if rounded:
                self._round(weights[part], weight.view(-1), flat, part, tensor_key(key, name))

    def _round(self, target: Tensor, values: Tensor, flat: Mapping[str, Tensor], part: slice, key: int) -> None:
        if self._rounding == "stochastic":
            stochastic_(target, values, key=key, start=part.start)
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
        if self._shelf is not None:
            return {kind: _Shelved(self._shelf, kind, of) for kind, of in names.items()}
        return {kind: {name: self._states[name][kind] for name in of} for kind, of in names.items()}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Mapping[str, Tensor]], updates: Mapping[str, int]) -> None:
        """Continues from a state, bit by bit: `tensors()` and `updates` as they were. Copies, one tensor at a time.

        Raises:
            KeyError: a tensor is missing or belongs to no parameter.
            ValueError: a tensor is not what the rule stores.
        """
        self.updates, self._states = {}, {}
        for name, count in updates.items():
            state: dict[str, Tensor] = {}
            for kind, (shape, dtype) in self._plans[name].stored.items():
                found = tensors[kind][name]
                if tuple(found.shape) != shape or found.dtype != dtype:
                    raise ValueError(f"{kind} of {name} is {found.dtype} {tuple(found.shape)}, not {dtype} {shape}")
                if self._shelf is None:
                    state[kind] = found.to(self._parameters[name].device, copy=True)
                else:
                    self._shelf.put(_label(kind, name), found)
            if self._shelf is None:
                self._states[name] = state
            self.updates[name] = count

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
