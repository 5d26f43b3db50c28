"""Seconds of the parts of a step: its phases, and its modules forward and backward.

On an accelerator the clock is read after everything asked for has been done, so that a part's seconds are its own.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fullrank.parallel import device as devices


@dataclass
class _Running:
    """A module under way."""

    name: str
    total: dict[str, float]
    """Where its seconds go."""
    began: float
    inside: float = 0.0
    """Seconds of modules inside it."""


class Stopwatch:
    """Times phases (`phase`, as `fullrank.sequences.loss.Watch` has it) and modules (`watching`).

    Args:
        device: whose work is timed.
        repeats_products: whether modules called again in the backward pass compute their products again.
    """

    def __init__(self, device: torch.device, *, repeats_products: bool = True) -> None:
        self._device, self._repeated = device, int(repeats_products)
        self.phases: dict[str, float] = {}
        self.forward: dict[str, float] = {}
        """Seconds by module, without the modules inside it."""
        self.backward: dict[str, float] = {}
        self.calls: dict[str, int] = {}
        self.products: dict[str, int] = {}
        """Operations of linear modules, forward and backward."""
        self._phase = ""
        self._running: list[_Running] = []

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts what is inside to a phase."""
        started, self._phase = self._now(), name
        try:
            yield
        finally:
            while self._running:  # a module whose input needs no gradient ends with its phase
                self._end(self._running[-1].name)
            self.phases[name] = self.phases.get(name, 0.0) + self._now() - started

    @contextlib.contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Inside, the modules of a model are timed."""
        with contextlib.ExitStack() as stack:
            for path, module in model.named_modules():
                if path and not isinstance(module, nn.ModuleList):
                    name = re.sub(r"\.\d+(?=\.|$)", ".*", path)
                    before = module.register_forward_pre_hook(self._before(name), with_kwargs=True)
                    after = module.register_forward_hook(self._after(name), always_call=True)
                    for hook in (before, after):
                        stack.callback(hook.remove)
            yield

    def _now(self) -> float:
        devices.synchronize(self._device)
        return time.perf_counter()

    def _begin(self, name: str, total: dict[str, float]) -> None:
        self._running.append(_Running(name, total, self._now()))

    def _end(self, name: str) -> None:
        now = self._now()
        if not any(running.name == name for running in self._running):
            return
        while self._running:  # what is still running inside ends with it
            ended = self._running.pop()
            ended.total[ended.name] = ended.total.get(ended.name, 0.0) + now - ended.began - ended.inside
            if self._running:
                self._running[-1].inside += now - ended.began
            if ended.name == name:
                return

    def _before(self, name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
            self.calls[name] = self.calls.get(name, 0) + 1
            self._begin(name, self.forward)
            # The gradient of its input is the last thing that its backward pass makes.
            given = tuple(self._stamped(value, lambda: self._end(name)) for value in given[:1]) + given[1:]
            if "hidden_states" in named:
                named = {**named, "hidden_states": self._stamped(named["hidden_states"], lambda: self._end(name))}
            return given, named

        return hook

    def _after(self, name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, given: Any, out: Any) -> Any:
            self._end(name)
            if isinstance(module, nn.Linear):
                forward = 2 * module.in_features * module.out_features * (out.numel() // module.out_features)
                times = self._repeated if self._phase == "backward" else 3  # once, and twice as much on the way back
                self.products[name] = self.products.get(name, 0) + times * forward
            if isinstance(out, tuple):
                return (self._stamped(out[0], lambda: self._begin(name, self.backward)), *out[1:])
            return self._stamped(out, lambda: self._begin(name, self.backward))

        return hook

    def _stamped(self, value: Any, reached: Callable[[], None]) -> Any:
        """The same values, whose gradient, on its way back, calls `reached`."""
        if isinstance(value, torch.Tensor) and value.requires_grad:
            return _Stamp.apply(value, reached)  # type: ignore[no-untyped-call]
        return value


class _Stamp(torch.autograd.Function):
    """The identity, which tells when the backward pass comes by."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, reached: Callable[[], None]) -> torch.Tensor:
        ctx.reached = reached
        return value.detach()  # no view, so that a model may go on to change it in place

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.reached()
        return grad, None
