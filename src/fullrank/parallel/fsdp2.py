"""The engine of several ranks on PyTorch FSDP2: each holds a part of weights, gradients and optimizer states.

Every rank computes the rows it was dealt (`fullrank.sequences.layout.dealt`), as many as every other, since blocks are gathered
and gradients summed by all of them together. A block's weights are whole only while it computes. Gradients are summed over ranks
in fp32, once a step or once a row (`Sync`), each rank keeping the sum of its part; they are shares of the loss law, so the sum is
the gradient of the step. Updates are each rank's own, on its part (`fullrank.optim.pieces`), where that is: parts that wait in
host memory are updated there, with optimizer states that never leave it.

Ranks that share rows (`fullrank.parallel.ring`) are dealt the same ones, and compute their parts of them; shares of the loss and
of gradients add up as those of rows do.

A mesh of one rank is the same engine; nothing then travels.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from fullrank.models.rows import RowModel
from fullrank.optim.pieces import Piece, Pieces, own_elements
from fullrank.optim.shelf import Shelf
from fullrank.optim.update import Updater
from fullrank.parallel.device import synchronize
from fullrank.parallel.engine import EngineState, StepOutcome
from fullrank.parallel.groups import hidden_matrices, rates
from fullrank.parallel.sharded import piece_of, sharded_modules
from fullrank.parallel.single import SingleDevice
from fullrank.parallel.world import World, own_seed
from fullrank.recipe import Train
from fullrank.sequences.layout import MicroBatch
from fullrank.sequences.loss import add_gradients, token_losses

#: Of torch 2.13; before, it has the other name.
_ALL_GATHER = getattr(distributed, "all_gather_single", distributed.all_gather_into_tensor)

Sync = Literal["step", "row"]
"""When gradients are summed over ranks: after a step's last row, until when they are whole on every rank (4 bytes a parameter and
no needless communication), or after every row, so that never more than a part of them and a block's are there."""


class Fsdp2(SingleDevice):
    """See `fullrank.parallel.engine.Engine` for what is promised; all ranks call every method together.

    Args:
        rows: a model that is divided among the ranks (`fullrank.parallel.sharded`), as it takes rows.
        train: the recipe's training section, `precision` resolved.
        world: the ranks.
        mesh: that the model is divided on.
        recompute: see `fullrank.parallel.recompute`.
        sync: see `Sync`.
        states: where optimizer states wait between updates; None for the device.
    """

    def __init__(
        self,
        rows: RowModel,
        train: Train,
        *,
        world: World,
        mesh: DeviceMesh,
        recompute: str,
        sync: Sync,
        states: Shelf | None = None,
    ) -> None:
        self._world, self._sync = world, sync
        self._group = mesh.get_group(mesh.ndim - 1)
        """The ranks among which parameters are divided; with repeated parts there are several such groups, alike."""
        self._is_repeat = mesh.ndim > 1 and mesh.get_local_rank(0) > 0
        super().__init__(rows, train, recompute=recompute, states=states)

    def _prepare(self, rows: RowModel, train: Train, states: Shelf | None) -> None:
        model: Any = rows.model
        model.reshard()  # a forward pass leaves what is outside the blocks whole
        self._divided: dict[str, nn.Parameter] = dict(model.named_parameters())
        self._everything = {name: piece_of(p) for name, p in self._divided.items()}
        self._sums: dict[str, torch.Tensor] = {}
        """This rank's parts of the gradients of a step; of weights of 16 bits those in fp32, as they come."""
        self._arriving = torch.empty(0)
        self._hooks: list[RemovableHandle] = []
        if train.rounding != "none":
            for module in sharded_modules(model):
                module.set_all_reduce_hook(self._begin_sums)
            for name, p in self._divided.items():
                if p.requires_grad:
                    self._hooks.append(p.register_post_accumulate_grad_hook(functools.partial(self._keep_sum, name)))
        self._local = {name: nn.Parameter(_part(p), requires_grad=p.requires_grad) for name, p in self._divided.items()}
        self._named = {name: p for name, p in self._local.items() if p.requires_grad}
        self._updater = Updater(
            self._named,
            train.optimizer,
            rounding=train.rounding,
            hidden=hidden_matrices(model),
            rates=rates(model, train.optimizer.layer_decay),
            shelf=states,
            pieces={name: self._everything[name] for name in self._named},
            gather=self._gathered,
        )

    # ---- the step -----------------------------------------------------------------------------------------------------

    def step(
        self, micro_batches: Iterable[MicroBatch], supervised_tokens: int, *, learning_rate: float, seed: int
    ) -> StepOutcome:
        model: Any = self.model
        model.train()
        torch.manual_seed(own_seed(seed, self._world) if self.rows.drops else seed)
        self._updater.reset_changed()
        rows = list(micro_batches)
        loss = torch.zeros((), device=self.device)
        try:
            with self.rows.ready():
                for number, batch in enumerate(rows):
                    model.set_requires_gradient_sync(self._sync == "row" or number == len(rows) - 1)
                    with self.compute_type():
                        own = self.rows.own(batch).to(self.device)
                        loss += add_gradients(self.rows, own, supervised_tokens, self.watch)
            self._sums |= {name: _part(p.grad) for name, p in self._divided.items() if p.grad is not None}
            gradients = {name: self._sums[name] for name in self._divided if name in self._sums}
            with self.watch("optimizer"):
                (total,) = self._world.summed(float(loss))
                norm = self._norm({name: torch.linalg.vector_norm(gradient) for name, gradient in gradients.items()})
            if not (math.isfinite(norm) and math.isfinite(total)):
                return StepOutcome(total, norm, updated=False)
            self._update(gradients, learning_rate, seed, norm)
            return StepOutcome(total, norm, updated=True, changed_ratio=self._changed_ratio())
        finally:
            self._sums, self._arriving = {}, torch.empty(0)
            for p in self._divided.values():
                p.grad = None

    def _begin_sums(self, sum_of_ranks: torch.Tensor) -> None:
        """FSDP2 hands over the fp32 sum of a module's gradients before it rounds it to the weights' 16 bits, flat."""
        if sum_of_ranks.is_cuda:  # it is of another stream than the one that reads it
            sum_of_ranks.record_stream(torch.cuda.current_stream(sum_of_ranks.device))
        self._arriving = sum_of_ranks

    def _keep_sum(self, name: str, p: torch.Tensor) -> None:
        """Then come the module's parameters with their rounded gradients, one by one, as the exact ones lie in the sum."""
        p.grad = None
        local = self._local[name]
        part, self._arriving = self._arriving[: local.numel()], self._arriving[self._most(self._everything[name]) :]
        part = part.view(local.shape).to(local.device)
        if name in self._sums:
            self._sums[name] += part
        else:
            self._sums[name] = part

    def _norm(self, norms: Mapping[str, torch.Tensor]) -> float:
        """The global norm, from those of the parts."""
        names = [name for name in self._named if name in norms]
        squares_P = torch.stack([norms[name].double().square() for name in names])
        distributed.all_reduce(squares_P, group=self._group)
        norm = float(squares_P.sum().sqrt())
        if math.isfinite(norm) and not all(self._reached.values()):
            for name, nonzero in zip(names, (squares_P > 0).tolist(), strict=True):
                self._reached[name] |= nonzero
        return norm

    def _changed_ratio(self) -> float:
        looked_at, changed = self._world.summed(*map(float, self._updater.changed))
        return changed / looked_at if looked_at else 0.0

    def losses(self, micro_batches: Iterable[MicroBatch]) -> Iterator[torch.Tensor]:
        model: Any = self.model
        model.eval()
        for batch in micro_batches:
            own = self.rows.own(batch).to(self.device)
            with self.rows.ready(), self.compute_type():
                losses_S = token_losses(self.rows, own)
            yield self.rows.whole(losses_S, own)
        model.reshard()

    # ---- weights and state ----------------------------------------------------------------------------------------------

    def state(self) -> EngineState:
        """In pieces (`fullrank.optim.pieces.Pieces`), those that are repeated once."""
        state = super().state()
        return replace(state, tensors={stem: Pieces({}, {}) for stem in state.tensors}) if self._is_repeat else state

    def weights(self) -> Mapping[str, torch.Tensor]:
        """This rank's parts (`fullrank.optim.pieces.Pieces`), those that are repeated once."""
        if self._is_repeat:
            return Pieces({}, {})
        return Pieces({name: p.detach().view(-1) for name, p in self._local.items()}, self._everything)

    def whole_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, whole tensor), one after the other, on every rank: all ranks take them together."""
        for name, p in self._local.items():
            piece = self._everything[name]
            yield name, self._gathered(piece, p.detach().view(-1)).view(piece.shape)

    def load_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        synchronize(self.device)  # the last blocks may still be on their way there, out of the memory that is written to
        with torch.no_grad():
            for name, p in self._local.items():
                p.view(-1).copy_(own_elements(weights, name, self._everything[name], p.dtype))

    def _gathered(self, piece: Piece, elements: torch.Tensor) -> torch.Tensor:
        """See `fullrank.optim.pieces.Gather`: FSDP2 gives every rank ceil(rows / ranks) rows, the last ones what is left."""
        ranks = distributed.get_world_size(self._group)
        if ranks == 1:
            return elements
        most = self._most(piece)
        padded = elements.new_zeros(most)
        padded[: piece.count] = elements
        whole = elements.new_empty(ranks * most)
        _ALL_GATHER(whole, padded, group=self._group)
        return whole[: piece.numel]

    def _most(self, piece: Piece) -> int:
        """Elements of the largest part of a tensor, to which the others are filled up on their way."""
        return -(-piece.shape[0] // distributed.get_world_size(self._group)) * math.prod(piece.shape[1:])

    def close(self) -> None:
        super().close()
        for hook in self._hooks:
            hook.remove()


def _part(p: torch.Tensor) -> torch.Tensor:
    """This rank's part of a divided tensor, the memory itself."""
    part: torch.Tensor = p.to_local() if isinstance(p, DTensor) else p
    return part.detach()
