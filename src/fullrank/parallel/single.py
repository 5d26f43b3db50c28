"""The engine of one device: plain accumulation over rows, a global-norm clip, one update of every parameter."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping

import torch

from fullrank.models.rows import RowModel
from fullrank.optim.shelf import Shelf
from fullrank.optim.update import Updater
from fullrank.parallel.engine import EngineState, StepOutcome
from fullrank.parallel.groups import hidden_matrices, rates
from fullrank.parallel.recompute import recompute_blocks
from fullrank.recipe import Train
from fullrank.sequences.layout import MicroBatch
from fullrank.sequences.loss import Watch, add_gradients, token_losses, unwatched


class SingleDevice:
    """See `fullrank.parallel.engine.Engine` for what is promised.

    Args:
        rows: the model, fp32 weights on the device, as it takes rows.
        train: the recipe's training section, `precision` resolved.
        recompute: none, selective, block or offload, see `fullrank.parallel.recompute`.
        states: where optimizer states wait between updates; None for the device.
    """

    def __init__(self, rows: RowModel, train: Train, *, recompute: str, states: Shelf | None = None) -> None:
        self.rows = rows
        self.model = model = rows.model
        self.device = rows.device
        self._max_grad_norm = train.clip_norm
        self._precision = train.precision
        self.recompute = recompute
        self._shelves = [states] if states is not None else []
        self._prepare(rows, train, states)
        self._reached: dict[str, bool] = dict.fromkeys(self._named, False)
        self.watch: Watch = unwatched
        recompute_blocks(model, recompute)

    def _prepare(self, rows: RowModel, train: Train, states: Shelf | None) -> None:
        """Names what is trained and makes its optimizer."""
        self._named = {name: p for name, p in rows.model.named_parameters() if p.requires_grad}
        self._updater = Updater(
            self._named,
            train.optimizer,
            rounding=train.rounding,
            hidden=hidden_matrices(rows.model),
            rates=rates(rows.model, train.optimizer.layer_decay),
            shelf=states,
        )

    def step(
        self, micro_batches: Iterable[MicroBatch], supervised_tokens: int, *, learning_rate: float, seed: int
    ) -> StepOutcome:
        self.model.train()
        torch.manual_seed(seed)  # dropout is a function of the step, so there is no generator state to save
        self._updater.reset_changed()
        loss = torch.zeros((), device=self.device)
        try:
            with self.rows.ready():
                for batch in micro_batches:
                    if len(batch.targets_S):
                        with self.compute_type():
                            loss += add_gradients(self.rows, batch.to(self.device), supervised_tokens, self.watch)
            gradients = {name: p.grad for name, p in self._named.items() if p.grad is not None}
            with self.watch("optimizer"):
                norm = self._norm({name: torch.linalg.vector_norm(gradient) for name, gradient in gradients.items()})
            if not (math.isfinite(norm) and math.isfinite(float(loss))):
                return StepOutcome(float(loss), norm, updated=False)
            self._update(gradients, learning_rate, seed, norm)
            return StepOutcome(float(loss), norm, updated=True, changed_ratio=self._changed_ratio())
        finally:
            for p in self._named.values():
                p.grad = None

    def _norm(self, norms: Mapping[str, torch.Tensor]) -> float:
        """The global norm, from that of each gradient; which of them were reached is noted."""
        names = [name for name in self._named if name in norms]  # one order, so that the sum is one
        norms_P = torch.stack([norms[name] for name in names])
        norm = float(torch.linalg.vector_norm(norms_P))
        if math.isfinite(norm) and not all(self._reached.values()):
            for name, nonzero in zip(names, (norms_P > 0).tolist(), strict=True):
                self._reached[name] |= nonzero
        return norm

    def _update(self, gradients: dict[str, torch.Tensor], learning_rate: float, key: int, norm: float | None = None) -> None:
        """Clips by the global norm, where there is one, and updates."""
        with self.watch("optimizer"):
            if norm is not None and self._max_grad_norm is not None and norm > self._max_grad_norm and gradients:
                # As torch.nn.utils.clip_grad_norm_, with its 1e-6.
                torch._foreach_mul_(list(gradients.values()), self._max_grad_norm / (norm + 1e-6))
            self._updater.update(gradients, learning_rate=learning_rate, key=key)

    def _changed_ratio(self) -> float:
        looked_at, changed = self._updater.changed
        return changed / looked_at if looked_at else 0.0

    def losses(self, micro_batches: Iterable[MicroBatch]) -> Iterator[torch.Tensor]:
        self.model.eval()
        for batch in micro_batches:
            with self.rows.ready(), self.compute_type():
                losses_S = token_losses(self.rows, batch.to(self.device))
            yield losses_S

    def compute_type(self) -> contextlib.AbstractContextManager[object]:
        """Autocast, where the precision asks for it."""
        if self._precision == "bf16-mixed":
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return contextlib.nullcontext()

    def weights(self) -> Mapping[str, torch.Tensor]:
        return {name: p.detach() for name, p in self.model.named_parameters()}

    def load_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                p.copy_(weights[name])

    def state(self) -> EngineState:
        return EngineState(
            tensors={"weights": self.weights(), **self._updater.tensors()},
            facts={
                "updates": dict(self._updater.updates),  # by tensor: one that got no gradient in a step was not updated in it
                "reached": sorted(name for name, reached in self._reached.items() if reached),
            },
        )

    def load_state(self, state: EngineState) -> None:
        self.load_weights(state.tensors["weights"])
        self._updater.load(state.tensors, state.facts["updates"])
        self._reached = {name: name in set(state.facts["reached"]) for name in self._named}

    def forget(self) -> None:
        self._updater.load({}, {})
        self._reached = dict.fromkeys(self._named, False)

    def close(self) -> None:
        for shelf in self._shelves:
            shelf.close()

    def never_reached(self) -> set[str]:
        return {name for name, reached in self._reached.items() if not reached}
