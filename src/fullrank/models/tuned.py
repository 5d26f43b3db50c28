"""A transformers model whose modules compute as `fullrank.models.ops` does, for as long as a step takes.

Nothing is taken on trust: a module of a model's own code is replaced only after a trial on random numbers has shown that output
and gradients are those of the module itself, up to rounding. What fails the trial, or is unknown, stays as it is.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from fullrank.models import ops

#: Largest difference of outputs and gradients, relative to the largest number, that another order of sums explains in fp32.
_TOLERANCE = 1e-5

Forward = Callable[..., torch.Tensor]


class Tuned:
    """Which modules of a model are replaced, and by what.

    Args:
        model: computes in fp32 on a CPU, where passes over memory are what costs; its weights may be stored in another type
            (`fullrank.models.widened`).
    """

    def __init__(self, model: nn.Module) -> None:
        self._forwards: list[tuple[nn.Module, Forward]] = []
        self.replaced: dict[str, int] = {}
        self._later: list[Callable[[], None]] = []
        trials: dict[Any, Any] = {}
        for module in model.modules():
            kind = _kind(module)
            if isinstance(module, nn.Embedding):
                own: Forward = functools.partial(_embedding, module) if kind == "embedding" else module.forward
                self._forwards.append((module, functools.partial(self._deferred, own)))
                self.replaced["embedding"] = self.replaced.get("embedding", 0) + 1
                continue
            if kind is None:
                continue
            sort = (type(module), kind, *(tuple(p.shape) for p in module.parameters()))
            if sort not in trials:
                trials[sort] = _EXACT[kind] if kind in _EXACT else _tried(module, _CANDIDATES[kind])
            if trials[sort] is not None:
                self._forwards.append((module, functools.partial(trials[sort], module)))
                self.replaced[kind] = self.replaced.get(kind, 0) + 1

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Inside, the modules are replaced; at the end gradients are settled."""
        for module, forward in self._forwards:
            module.forward = forward
        try:
            yield
            self.settle()
        finally:
            self._later.clear()
            for module, _ in self._forwards:
                del module.forward

    def _deferred(self, forward: Forward, ids: torch.Tensor) -> torch.Tensor:
        """An embedding whose weight gets its gradient last of all: so a tied weight's is one sum (the head's rows, then those of
        the embedding), whichever way a step goes through the model."""
        out = forward(ids)
        if not out.requires_grad:
            return out
        leaf = out.detach().requires_grad_()
        self._later.append(lambda: None if leaf.grad is None else out.backward(leaf.grad))
        return leaf

    def settle(self) -> None:
        """Adds what waited for the other parts of its gradient."""
        for add in self._later:
            add()
        self._later.clear()


def _kind(module: nn.Module) -> str | None:
    if type(module) is nn.Linear:
        return "linear"
    if type(module) is nn.Embedding and module.max_norm is None and not module.scale_grad_by_freq and not module.sparse:
        return "embedding"
    if type(module).__name__.endswith("RMSNorm") and len(list(module.parameters())) == 1:
        return "norm"
    if {"gate_proj", "up_proj", "down_proj", "act_fn"} <= set(dict(module.named_children())):
        return "gated"
    return None


# ---- what modules are replaced by ---------------------------------------------------------------------------------------


def _linear(module: Any, x: torch.Tensor) -> torch.Tensor:
    return ops.Linear.apply(x, module.weight, module.bias)  # type: ignore[no-any-return, no-untyped-call]


def _embedding(module: Any, ids: torch.Tensor) -> torch.Tensor:
    return ops.Embedding.apply(ids, module.weight, module.padding_idx)  # type: ignore[no-any-return, no-untyped-call]


def _norm(module: Any, x: torch.Tensor, *, offset: float) -> torch.Tensor:
    eps = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
    return ops.RMSNorm.apply(x, module.weight, eps, offset)  # type: ignore[no-any-return, no-untyped-call]


def _gated(module: Any, x: torch.Tensor, *, act: str) -> torch.Tensor:
    return module.down_proj(ops.Gated.apply(module.gate_proj(x), module.up_proj(x), act))  # type: ignore[no-any-return, no-untyped-call]


#: torch's own modules, which do what they are called, and what replaces them (embeddings apart).
_EXACT: dict[str, Forward] = {"linear": _linear}
#: Modules of transformers' model code, which may do anything, and what may replace them.
_CANDIDATES: dict[str, list[Forward]] = {
    "norm": [functools.partial(_norm, offset=offset) for offset in (0.0, 1.0)],
    "gated": [functools.partial(_gated, act=act) for act in ("silu", "gelu_tanh")],
}


def _tried(module: nn.Module, candidates: list[Forward]) -> Forward | None:
    """The candidate that computes what the module does, forward and backward."""
    own = copy.deepcopy(module).float().requires_grad_(True)
    generator = torch.Generator().manual_seed(0)
    weight = next(own.parameters())
    given = torch.randn(2, 5, weight.shape[-1], generator=generator, dtype=weight.dtype)
    wanted = _outcome(own, own, given)
    for candidate in candidates:
        with contextlib.suppress(AttributeError, TypeError, RuntimeError):
            found = _outcome(functools.partial(candidate, own), own, given)
            if all(
                (a - b).abs().max() <= _TOLERANCE * max(float(b.abs().max()), 1e-6) for a, b in zip(found, wanted, strict=True)
            ):
                return candidate
    return None


def _outcome(forward: Callable[[torch.Tensor], torch.Tensor], module: nn.Module, given: torch.Tensor) -> list[torch.Tensor]:
    module.zero_grad(set_to_none=True)
    given = given.clone().requires_grad_()
    for _ in range(2):  # the second time gradients are added to what is there
        out = forward(given)
        (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    grads = [p.grad for p in [*module.parameters(), given]]
    return [out.detach(), *(grad for grad in grads if grad is not None)]  # the next trial begins with none
