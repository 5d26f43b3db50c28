"""The engine of several ranks on DeepSpeed ZeRO: stage 1 divides optimizer states, 2 gradients too, 3 weights as well.

Every rank computes the rows it was dealt (`fullrank.sequences.layout.dealt`), as many as every other, since DeepSpeed sums
gradients (stage 1 after a step's last row, 2 and 3 after every row) and gathers weights (stage 3) with all ranks at once. It
averages gradients over ranks where the loss law adds shares of them up, so a row's share is multiplied by the number of ranks
first. DeepSpeed takes the norm; clipping and the update are ours, on this rank's part of the master copy
(`fullrank.parallel.zeroed`).

Only elementwise rules are served, since a rank's part begins and ends where it falls; weights of 16 bits are not, since the
master copy is of 32.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import nn

from fullrank.errors import UsageError
from fullrank.models.rows import RowModel
from fullrank.optim.pieces import Piece, Pieces, own_elements
from fullrank.optim.rules import is_elementwise
from fullrank.optim.shelf import Shelf
from fullrank.optim.update import Updater
from fullrank.parallel.engine import EngineState, StepOutcome
from fullrank.parallel.groups import rates
from fullrank.parallel.single import SingleDevice
from fullrank.parallel.world import own_seed
from fullrank.parallel.zeroed import Zeroed
from fullrank.recipe import Train
from fullrank.sequences.layout import MicroBatch
from fullrank.sequences.loss import row_loss


def refused_by_zero(train: Train) -> list[str]:
    """What of a recipe's training section ZeRO does not serve, each with what to use instead."""
    problems = []
    if not is_elementwise(train.optimizer):
        problems.append(
            f"train.optimizer.name: {train.optimizer.name} looks at whole tensors, and ZeRO gives a rank stretches of them; "
            "use parallel.engine: fsdp2, or adamw or lomo"
        )
    if train.rounding != "none":
        problems.append(
            f"train.precision: {train.precision} saves the fp32 master copy, which ZeRO always keeps; use "
            "parallel.engine: fsdp2, or precision fp32 or bf16-mixed"
        )
    return problems


class Zero(SingleDevice):
    """See `fullrank.parallel.engine.Engine` for what is promised; all ranks call every method together.

    Args:
        rows: the model in DeepSpeed's hands, as it takes rows; its `entry` is DeepSpeed's engine.
        train: the recipe's training section, `precision` resolved.
        zeroed: the same model.
        recompute: see `fullrank.parallel.recompute`.
        states: where optimizer states wait between updates; None for where the master copy is.

    Raises:
        UsageError: the rule looks at whole tensors, or weights are of 16 bits.
    """

    def __init__(self, rows: RowModel, train: Train, *, zeroed: Zeroed, recompute: str, states: Shelf | None = None) -> None:
        if problems := refused_by_zero(train):
            raise UsageError("\n".join(problems))
        self._zeroed, self._world = zeroed, zeroed.world
        super().__init__(rows, train, recompute=recompute, states=states)

    def _prepare(self, rows: RowModel, train: Train, states: Shelf | None) -> None:
        self._pieces = {name: part.piece for name, part in self._zeroed.parts.items()}
        trained = [name for name, p in rows.model.named_parameters() if p.requires_grad]
        self._named = {name: nn.Parameter(self._zeroed.parts[name].weights) for name in trained}
        self._updater = Updater(
            self._named,
            train.optimizer,
            rounding="none",
            rates=rates(rows.model, train.optimizer.layer_decay),
            shelf=states,
            pieces={name: self._pieces[name] for name in trained},
        )

    # ---- the step -----------------------------------------------------------------------------------------------------

    def step(
        self, micro_batches: Iterable[MicroBatch], supervised_tokens: int, *, learning_rate: float, seed: int
    ) -> StepOutcome:
        deepspeed, ranks = self._zeroed.engine, self._world.size
        self.model.train()
        torch.manual_seed(own_seed(seed, self._world) if self.rows.drops else seed)
        self._updater.reset_changed()
        rows = list(micro_batches)
        loss = torch.zeros((), device=self.device)
        with self.rows.ready():
            for number, batch in enumerate(rows):
                deepspeed.set_gradient_accumulation_boundary(number == len(rows) - 1)
                with self.watch("forward"), self.compute_type():
                    share = row_loss(self.rows, batch.to(self.device), supervised_tokens)
                with self.watch("backward"):
                    deepspeed.backward(share * ranks, scale_wrt_gas=False)
                loss += share.detach()
        (total,) = self._world.summed(float(loss))
        with self.watch("optimizer"):
            norm = self._updated(math.isfinite(total), learning_rate, seed)
        if not (math.isfinite(norm) and math.isfinite(total)):
            return StepOutcome(total, norm, updated=False)
        return StepOutcome(total, norm, updated=True, changed_ratio=self._changed_ratio())

    def _updated(self, is_finite: bool, learning_rate: float, key: int) -> float:
        """Has DeepSpeed end the step, with an update where the loss is finite and the norm too; returns the norm."""
        norm = math.inf
        nonzero = dict.fromkeys(self._named, False)

        def update(flat: torch.Tensor) -> None:
            nonlocal norm
            norm = self._zeroed.norm()
            if not (is_finite and math.isfinite(norm)):
                return
            gradients = {name: part.gradient for name, part in self._zeroed.parts.items() if part.flat is flat}
            if not all(self._reached.values()):
                nonzero.update({name: bool(gradient.any()) for name, gradient in gradients.items()})
            self._update(gradients, learning_rate, key, norm)

        self._zeroed.end_step(update)
        if is_finite and math.isfinite(norm):
            self._note_reached(nonzero)
        return norm

    def _note_reached(self, nonzero: Mapping[str, bool]) -> None:
        if not all(self._reached.values()):
            for name, found in zip(nonzero, self._world.summed(*map(float, nonzero.values())), strict=True):
                self._reached[name] |= found > 0

    def _changed_ratio(self) -> float:
        looked_at, changed = self._world.summed(*map(float, self._updater.changed))
        return changed / looked_at if looked_at else 0.0

    # ---- weights and state ----------------------------------------------------------------------------------------------

    def state(self) -> EngineState:
        """In pieces (`fullrank.optim.pieces.Pieces`)."""
        state = super().state()
        # A tensor may be whole on one rank, any one, and absent on the others: it is a piece all the same.
        kinds = {
            kind: tensors if kind == "weights" else Pieces(tensors, self._of(tensors)) for kind, tensors in state.tensors.items()
        }
        return replace(state, tensors=kinds)

    def weights(self) -> Mapping[str, torch.Tensor]:
        """This rank's parts (`fullrank.optim.pieces.Pieces`)."""
        parts = self._zeroed.parts
        divided = [name for name in parts if name in self._named or self._zeroed.stage == 3]
        whole = {name: part.weights.view(part.piece.shape) for name, part in parts.items() if name not in divided}
        return Pieces({name: part.weights for name, part in parts.items()} | whole, self._of(divided))

    def _of(self, names: Iterable[str]) -> dict[str, Piece]:
        return {name: self._pieces[name] for name in names}

    def whole_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, whole tensor), one after the other, on every rank: all ranks take them together."""
        return self._zeroed.whole()

    def load_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        self._zeroed.put(lambda name: own_elements(weights, name, self._pieces[name], self._zeroed.parts[name].weights.dtype))
