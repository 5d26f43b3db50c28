"""The seam to engines: what the training loop may ask, and nothing about how it is done.

The loop never learns the engine's name. An engine executes one optimizer step over the step's micro-batches in whatever order
it needs, and hands out resumable state and whole weights in Hugging Face names.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from fullrank.sequences.layout import MicroBatch
from fullrank.sequences.loss import Watch


@dataclass(frozen=True)
class StepOutcome:
    """What an optimizer step came to."""

    loss: float
    """Mean over the step's supervised tokens, nats."""
    grad_norm: float
    """Global 2-norm of the gradient before clipping."""
    updated: bool
    """False when loss or gradient was not finite: then weights and optimizer state are as they were; but where gradients are used
    block by block without clipping some blocks may have moved, so that nothing of the step is to be kept."""
    changed_ratio: float = 0.0
    """Share of the trained weights that the update changed, in a sample of every tensor."""


@dataclass(frozen=True)
class EngineState:
    """Everything a step depends on besides the recipe, the data and the step's number."""

    tensors: Mapping[str, Mapping[str, torch.Tensor]]
    """File stem (`weights`, `exp_avg`, ...) -> Hugging Face parameter name -> tensor."""
    facts: Mapping[str, Any]
    """What JSON can hold: counters and flags."""


class Engine(Protocol):
    """Executes optimizer steps."""

    watch: Watch
    """Is entered around the parts of a step."""

    def step(
        self, micro_batches: Iterable[MicroBatch], supervised_tokens: int, *, learning_rate: float, seed: int
    ) -> StepOutcome:
        """One update over the rows of a step.

        Args:
            micro_batches: the rows; an exception raised by the iterator leaves weights and optimizer state untouched.
            supervised_tokens: of the whole step, over all ranks.
            learning_rate: of this step.
            seed: of dropout in this step.
        """

    def losses(self, micro_batches: Iterable[MicroBatch]) -> Iterator[torch.Tensor]:
        """Token losses losses_S (nats) of each row, without gradients or dropout."""

    def state(self) -> EngineState:
        """State to resume from: references, not copies."""

    def load_state(self, state: EngineState) -> None:
        """Continues from a state, bit by bit."""

    def forget(self) -> None:
        """Drops optimizer state, as if no step had been taken; the weights stay."""

    def close(self) -> None:
        """Gives back what waits elsewhere; the engine takes no more steps."""

    def weights(self) -> Mapping[str, torch.Tensor]:
        """Whole weights in Hugging Face names, tied ones once: references, not copies."""

    def load_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Replaces the weights; the optimizer state stays."""

    def never_reached(self) -> set[str]:
        """Trainable tensors whose gradient has been zero in every step so far."""
