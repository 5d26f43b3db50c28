"""The engine of one device: plain accumulation over rows, a global-norm clip, one fused AdamW update."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping

import torch

from fullrank.models.rows import RowModel
from fullrank.optim.adamw import adamw
from fullrank.parallel.engine import EngineState, StepOutcome
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
    """

    def __init__(self, rows: RowModel, train: Train, *, recompute: str) -> None:
        self.rows = rows
        self.model = model = rows.model
        self.device = next(model.parameters()).device
        self._max_grad_norm = train.max_grad_norm
        self._precision = train.precision
        self.recompute = recompute
        self._optimizer = adamw(model, train.optimizer)
        self._named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._reached: dict[str, bool] = dict.fromkeys(self._named, False)
        self.watch: Watch = unwatched
        recompute_blocks(model, recompute)

    def step(
        self, micro_batches: Iterable[MicroBatch], supervised_tokens: int, *, learning_rate: float, seed: int
    ) -> StepOutcome:
        self.model.train()
        torch.manual_seed(seed)  # dropout is a function of the step, so there is no generator state to save
        loss = torch.zeros((), device=self.device)
        try:
            with self.rows.ready():
                for batch in micro_batches:
                    if batch.supervised_tokens:
                        with self.compute_type():
                            loss += add_gradients(self.rows, batch.to(self.device), supervised_tokens, self.watch)
            with self.watch("optimizer"):
                return self._update(loss, learning_rate)
        finally:
            self._optimizer.zero_grad(set_to_none=True)

    def _update(self, loss: torch.Tensor, learning_rate: float) -> StepOutcome:
        gradients = {name: p.grad for name, p in self._named.items() if p.grad is not None}
        norms_P = torch.stack([torch.linalg.vector_norm(g) for g in gradients.values()])
        norm = torch.linalg.vector_norm(norms_P)
        facts = torch.stack([loss, norm]).tolist()  # the step's one wait for the device
        if not all(math.isfinite(fact) for fact in facts):
            return StepOutcome(facts[0], facts[1], updated=False)
        if not all(self._reached.values()):
            for name, nonzero in zip(gradients, (norms_P > 0).tolist(), strict=True):
                self._reached[name] |= nonzero
        if self._max_grad_norm is not None and facts[1] > self._max_grad_norm:
            # As torch.nn.utils.clip_grad_norm_, with its 1e-6.
            torch._foreach_mul_(list(gradients.values()), self._max_grad_norm / (facts[1] + 1e-6))
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        return StepOutcome(facts[0], facts[1], updated=True)

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
        moments: dict[str, dict[str, torch.Tensor]] = {"exp_avg": {}, "exp_avg_sq": {}}
        updates: dict[str, int] = {}  # by tensor: one that got no gradient in a step was not updated in it
        for name, p in self._named.items():
            if p in self._optimizer.state:
                updates[name] = int(self._optimizer.state[p]["step"])
                for kind, tensors in moments.items():
                    tensors[name] = self._optimizer.state[p][kind]
        return EngineState(
            tensors={"weights": self.weights(), **moments},
            facts={"updates": updates, "reached": sorted(name for name, reached in self._reached.items() if reached)},
        )

    def load_state(self, state: EngineState) -> None:
        self.load_weights(state.tensors["weights"])
        for name, p in self._named.items():
            if name in state.facts["updates"]:
                self._optimizer.state[p] = {
                    # fused AdamW wants its step count on the parameters' device
                    "step": torch.tensor(float(state.facts["updates"][name]), dtype=torch.float32, device=p.device),
                    **{kind: state.tensors[kind][name].to(p.device) for kind in ("exp_avg", "exp_avg_sq")},
                }
        self._reached = {name: name in set(state.facts["reached"]) for name in self._named}

    def never_reached(self) -> set[str]:
        return {name for name, reached in self._reached.items() if not reached}
