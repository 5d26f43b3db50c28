"""The update rules, each on one tensor: what a gradient does to a weight, and what is remembered for the next one.

A rule is a pure function of (weight, gradient, slots, step, rate, decay): fp32 in, fp32 out (float64 where the weight is), all
in place, nothing kept in the rule itself. Where torch publishes the same rule, torch computes it, so AdamW here is bit by bit
`torch.optim.AdamW(fused=True)`, Adafactor `torch.optim.Adafactor` and Muon `torch.optim.Muon`. An *elementwise* rule looks at
one element at a time, so it may be given any flat stretch of a tensor; the others must see the tensor whole. (Stretches are
best cut at multiples of 64 elements: at the ragged end of one, torch's CPU kernel leaves its vector code and may round
differently in the last place.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.optim._adafactor import adafactor
from torch.optim._muon import DEFAULT_A, DEFAULT_B, DEFAULT_C, DEFAULT_NS_STEPS, EPS, muon
from torch.optim.adamw import adamw

from fullrank import recipe

Shape = tuple[int, ...]


class Rule(Protocol):
    """How one tensor is updated."""

    @property
    def elementwise(self) -> bool:
        """May be applied to any flat stretch of the tensor."""

    def slots(self, shape: Sequence[int]) -> dict[str, Shape]:
        """What is remembered between updates: name -> shape. Zeros at the start, of the type that is computed in."""

    def update_(
        self,
        weight: Tensor,
        grad: Tensor,
        slots: Mapping[str, Tensor],
        *,
        step: int,
        learning_rate: float,
        weight_decay: float,
    ) -> None:
        """Updates weight and slots in place.

        Args:
            weight: contiguous.
            grad: of the same type and shape; may be overwritten.
            slots: as `slots` says.
            step: how many updates the tensor has had, this one included.
            learning_rate: of this update.
            weight_decay: decoupled, so it is multiplied by the rate.
        """


@dataclass(frozen=True)
class AdamW:
    """Loshchilov & Hutter 2019, algorithm 2, as torch's fused kernel computes it."""

    betas: tuple[float, float]
    eps: float
    elementwise: bool = True

    def slots(self, shape: Sequence[int]) -> dict[str, Shape]:
        return {"exp_avg": tuple(shape), "exp_avg_sq": tuple(shape)}

    def update_(
        self, weight: Tensor, grad: Tensor, slots: Mapping[str, Tensor], *, step: int, learning_rate: float, weight_decay: float
    ) -> None:
        # The kernel wants the count on the weight's device, and counts up itself; filling it there waits for nothing.
        before = torch.full((), float(step - 1), dtype=torch.float32, device=weight.device)
        adamw(
            [weight],
            [grad],
            [slots["exp_avg"]],
            [slots["exp_avg_sq"]],
            [],
            [before],
            lr=learning_rate,
            weight_decay=weight_decay,
            beta1=self.betas[0],
            beta2=self.betas[1],
            eps=self.eps,
            amsgrad=False,
            maximize=False,
            fused=True,
        )


@dataclass(frozen=True)
class Muon:
    """Jordan et al. 2024: momentum, made orthogonal by five Newton-Schulz iterations, as torch computes it.

    The step is scaled to the root mean square that AdamW's steps have (Liu et al. 2025, arXiv 2502.16982, section 2.2), so
    AdamW's learning rates carry over. Of a stack of matrices (the experts of a layer), each is orthogonalised on its own.
    """

    momentum: float
    elementwise: bool = False

    def slots(self, shape: Sequence[int]) -> dict[str, Shape]:
        return {"momentum": tuple(shape)}

    def update_(
        self, weight: Tensor, grad: Tensor, slots: Mapping[str, Tensor], *, step: int, learning_rate: float, weight_decay: float
    ) -> None:
        weights, grads, momenta = (_matrices(stack) for stack in (weight, grad, slots["momentum"]))
        muon(
            weights,
            grads,
            momenta,
            lr=learning_rate,
            weight_decay=weight_decay,
            momentum=self.momentum,
            nesterov=True,
            ns_coefficients=(DEFAULT_A, DEFAULT_B, DEFAULT_C),
            ns_steps=DEFAULT_NS_STEPS,
            eps=EPS,
            adjust_lr_fn="match_rms_adamw",
            has_complex=False,
        )


def _matrices(stack: Tensor) -> list[Tensor]:
    return list(stack.flatten(0, -3)) if stack.ndim > 2 else [stack]


def _factored(shape: Sequence[int], *, keepdim: bool) -> dict[str, Shape]:
    """A second moment by rows and columns of the last two dimensions; whole for vectors (Shazeer & Stern 2018, section 3)."""
    if len(shape) < 2:
        return {"variance": tuple(shape)}
    *stack, rows, columns = shape
    one = (1,) if keepdim else ()
    return {"row": (*stack, rows, *one), "column": (*stack, *one, columns)}


@dataclass(frozen=True)
class Adafactor:
    """Shazeer & Stern 2018 as torch has it: no first moment, the rate relative to the tensor's root mean square."""

    elementwise: bool = False

    def slots(self, shape: Sequence[int]) -> dict[str, Shape]:
        return _factored(shape, keepdim=True)

    def update_(
        self, weight: Tensor, grad: Tensor, slots: Mapping[str, Tensor], *, step: int, learning_rate: float, weight_decay: float
    ) -> None:
        before = torch.tensor(float(step - 1))  # torch counts up, and reads it on the host
        adafactor(
            [weight],
            [grad],
            [slots.get("row")],
            [slots.get("column")],
            [slots.get("variance")],
            [before],
            lr=learning_rate,
            beta2_decay=-0.8,
            weight_decay=weight_decay,
            eps1=torch.finfo(weight.dtype).eps,
            eps2=1e-3,
            d=1.0,
            maximize=False,
        )


@dataclass(frozen=True)
class Lomo:
    """LOMO (Lv et al. 2023, arXiv 2306.09782, algorithm 1): gradient descent; decay as in the authors' `lomo.py`."""

    elementwise: bool = True

    def slots(self, shape: Sequence[int]) -> dict[str, Shape]:
        return {}

    def update_(
        self, weight: Tensor, grad: Tensor, slots: Mapping[str, Tensor], *, step: int, learning_rate: float, weight_decay: float
    ) -> None:
        if weight_decay:
            weight.mul_(1.0 - learning_rate * weight_decay)
        weight.add_(grad, alpha=-learning_rate)


@dataclass(frozen=True)
class AdaLomo:
    """AdaLomo (Lv et al. 2024, arXiv 2310.10195, algorithm 1), with the constants of the authors' `adalomo.py`.

    Adafactor's factored second moment (decay 1 - t^-0.8, 1e-30 added to the squares), then *grouped normalisation*, a group
    being a tensor: the update is divided by its root mean square where that is above 1, and the rate multiplied by the root
    mean square of the weights (at least 1e-3). All of it stays on the device: nothing waits for a number.
    """

    elementwise: bool = False

    def slots(self, shape: Sequence[int]) -> dict[str, Shape]:
        return _factored(shape, keepdim=False)

    def update_(
        self, weight: Tensor, grad: Tensor, slots: Mapping[str, Tensor], *, step: int, learning_rate: float, weight_decay: float
    ) -> None:
        fresh = step**-0.8  # 1 - beta2_t, so the first update forgets the zeros
        if grad.ndim < 2:
            variance = slots["variance"].lerp_(grad.square().add_(1e-30), fresh)
            update = grad.mul_(variance.rsqrt())
        else:
            squares = grad.square()
            row = slots["row"].lerp_(squares.mean(dim=-1).add_(1e-30), fresh)
            column = slots["column"].lerp_(squares.mean(dim=-2).add_(1e-30), fresh)
            del squares
            update = grad.mul_((row / row.mean(dim=-1, keepdim=True)).rsqrt_().unsqueeze(-1)).mul_(column.rsqrt().unsqueeze(-2))
        rate = learning_rate * _root_mean_square(weight).clamp_(min=1e-3)
        update.mul_(rate / _root_mean_square(update).clamp_(min=1.0))
        if weight_decay:
            weight.mul_(1.0 - rate * weight_decay)
        weight.sub_(update)


def _root_mean_square(tensor: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(tensor)
    return norm.div_(tensor.numel() ** 0.5)


def rule_for(optimizer: recipe.Optimizer, shape: Sequence[int], *, hidden: bool) -> Rule:
    """The rule of one tensor.

    Args:
        optimizer: the recipe's.
        shape: of the tensor.
        hidden: it belongs to a block; only Muon asks, whose matrices it names.
    """
    if isinstance(optimizer, recipe.Muon) and hidden and len(shape) >= 2:
        return Muon(optimizer.momentum)
    if isinstance(optimizer, recipe.AdamW | recipe.Muon):
        return AdamW(optimizer.betas, optimizer.eps)
    if isinstance(optimizer, recipe.Adafactor):
        return Adafactor()
    return Lomo() if isinstance(optimizer, recipe.Lomo) else AdaLomo()


def is_elementwise(optimizer: recipe.Optimizer) -> bool:
    """Whether its rule may be applied to any flat stretch of any tensor."""
    return all(rule_for(optimizer, shape, hidden=True).elementwise for shape in ((2, 2), (2,)))
