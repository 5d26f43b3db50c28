"""A model whose weights, gradients and optimizer states DeepSpeed ZeRO divides among ranks (Rajbhandari et al. 2020).

ZeRO lays all trained parameters one after the other and cuts that line into as many parts as there are ranks (stages 1 and 2), or
cuts every parameter so (stage 3). Either way a rank's part of a parameter is one stretch of its flat elements, which is all that
updates, checkpoints and exports need to know of it (`fullrank.optim.pieces.Piece`). The part is of DeepSpeed's fp32 master copy;
what DeepSpeed computes with is made from it.

DeepSpeed is asked to divide, gather, sum and to call an optimizer. The optimizer is ours (`FlatOptimizer`), and DeepSpeed's own
checkpoints, which are pickles, are never written. Where its public interface does not tell what a rank holds, attributes of its
optimizers are read, and only here.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn
from transformers import PreTrainedModel

from fullrank.errors import missing_extra
from fullrank.models.load import blank_model, load_model
from fullrank.optim.pieces import Piece
from fullrank.parallel.groups import freeze
from fullrank.parallel.sharded import stored_as_is
from fullrank.parallel.world import World


def deepspeed_for(device_type: str, world: World) -> Any:
    """The module `deepspeed`, set up for devices of that type.

    Raises:
        UsageError: it is not installed.
    """
    os.environ.setdefault("DS_ACCELERATOR", device_type)
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))  # a single process has no launcher that says so
    try:
        module = importlib.import_module("deepspeed")
    except ImportError as error:
        raise missing_extra(str(error.name), "deepspeed", "parallel.engine: deepspeed") from error
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # of what it was told it tells dozens of lines
    module.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled here and now; gloo does without
    return module


def forget_groups() -> None:
    """Has DeepSpeed, if it was used, let go of the ranks' groups, which it keeps for the life of the process."""
    if (deepspeed := sys.modules.get("deepspeed")) is None or deepspeed.comm.comm.cdb is None:
        return
    deepspeed.utils.groups._release_process_group_references(group=None)
    deepspeed.runtime.zero.parameter_offload.FWD_MODULE_STACK.clear()
    deepspeed.comm.comm.cdb = None


class FlatOptimizer(torch.optim.Optimizer):
    """What DeepSpeed takes for the optimizer: hands each flat part that has a gradient to whoever updates it.

    Args:
        parameters: trained ones; DeepSpeed puts flat parts in their place.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__(list(parameters), {"lr": 0.0})
        self.update: Callable[[torch.Tensor], None] = _nothing
        """Is given a flat part, whose `grad` is the gradient; called within `step`, for one part after the other."""

    def step(self, closure: None = None) -> None:  # type: ignore[override] # nobody hands it a closure
        """Updates the parts that DeepSpeed has put in."""
        for group in self.param_groups:
            for flat in group["params"]:
                if flat.grad is not None:
                    self.update(flat)


def _nothing(flat: torch.Tensor) -> None:
    """Leaves a part as it is."""


@dataclass(frozen=True)
class Part:
    """What this rank holds of a parameter."""

    piece: Piece
    weights: torch.Tensor
    """Its elements, flat: a view of the master copy, or of what a frozen parameter is kept in."""
    flat: torch.Tensor | None = None
    """The flat part that holds it, also where it holds nothing of it; None for a frozen parameter."""
    start: int = 0
    """Where in `flat`."""

    @property
    def gradient(self) -> torch.Tensor:
        """Of these elements, flat; while `FlatOptimizer.update` has the flat part."""
        assert self.flat is not None and self.flat.grad is not None
        return self.flat.grad[self.start : self.start + self.piece.count]


class Zeroed:
    """A model in DeepSpeed's hands; all ranks make and use it together.

    Args:
        model: whole on every rank, or, for stage 3, divided by `load_zeroed`.
        engine: DeepSpeed's, around the model.
        optimizer: that the engine calls.
        stage: 1, 2 or 3.
        world: the ranks.
    """

    def __init__(self, model: PreTrainedModel, engine: Any, optimizer: FlatOptimizer, stage: int, world: World) -> None:
        self.model, self.engine, self.optimizer, self.stage, self.world = model, engine, optimizer, stage, world
        self._zero: Any = engine.optimizer
        self._named: dict[str, Any] = dict(model.named_parameters())
        held = self._parts_of_parameters() if stage == 3 else self._parts_of_the_line()
        self.parts: dict[str, Part] = {name: held[name] for name in self._named}
        """By parameter name; of every parameter, also where this rank holds nothing of it."""
        if stage == 3:
            self._keep_whole(model.get_output_embeddings())

    def _parts_of_the_line(self) -> dict[str, Part]:
        """Stages 1 and 2: the flat parts, of which DeepSpeed tells each parameter's fragment."""
        (flat,) = self._zero.single_partition_of_fp32_groups
        parts = {}
        for name, p in self._named.items():
            fragment = getattr(p, "_hp_mapping", None)
            shape = tuple(p.shape)
            if not p.requires_grad:
                parts[name] = Part(Piece(0, p.numel(), shape), p.detach().view(-1))
            elif fragment is None:  # all of it is another rank's
                parts[name] = Part(Piece(0, 0, shape), flat.detach()[:0], flat)
            else:
                at, start = fragment.lp_fragment_address, fragment.hp_fragment_address.start
                parts[name] = Part(Piece(at.start, at.numel, shape), flat.detach()[start : start + at.numel], flat, start)
        return parts

    def _parts_of_parameters(self) -> dict[str, Part]:
        """Stage 3: each parameter is cut into equal parts, the last one padded; they lie in the flat parts in order."""
        names = {id(p): name for name, p in self._named.items()}
        parts = {}
        for group, flat in zip(self._zero.fp16_groups, self._zero.fp32_partitioned_groups_flat, strict=True):
            start = 0
            for p in group:
                piece = self._piece(p)
                part = flat.detach()[start : start + piece.count]
                parts[names[id(p)]] = Part(piece, part, flat, start)
                start += p.partition_numel()
        for name, p in self._named.items():
            if not p.requires_grad:
                piece = self._piece(p)
                parts[name] = Part(piece, p.ds_tensor.detach()[: piece.count])
        return parts

    def _piece(self, p: Any) -> Piece:
        each = p.partition_numel()
        start = min(self.world.rank * each, p.ds_numel)
        return Piece(start, min(each, p.ds_numel - start), tuple(p.ds_shape))

    def _keep_whole(self, module: nn.Module | None) -> None:
        """Has a module's parameters stay whole between steps: those of the head, which is used outside of any module's forward
        pass (`fullrank.models.rows`). DeepSpeed does so with small parameters, and with those that other modules use as well."""
        persistent: list[Any] = self._zero.persistent_parameters
        for p in () if module is None else module.parameters():
            kept: Any = p
            kept.ds_persist = kept.is_external_param = True
            if all(kept is not other for other in persistent):
                persistent.append(kept)
            kept.all_gather()

    # ---- weights ----------------------------------------------------------------------------------------------------------

    def norm(self) -> float:
        """Global 2-norm of the gradient, which DeepSpeed takes before it calls the optimizer."""
        return float(self._zero._global_grad_norm)

    def end_step(self, update: Callable[[torch.Tensor], None]) -> None:
        """Has DeepSpeed end a step: the norm, the updates, and the new weights on every rank.

        Args:
            update: see `FlatOptimizer`; not called where the norm is not finite.
        """
        self.optimizer.update = update
        try:
            self.engine.step()
        finally:
            self.optimizer.update = _nothing
        if self.stage == 3 and self._zero.overflow:  # then DeepSpeed has left parts of what is whole between steps
            self._gather_persistent()

    def _gather_persistent(self) -> None:
        if persistent := self._zero.persistent_parameters:
            persistent[0].all_gather(persistent)

    @torch.no_grad()
    def put(self, part: Callable[[str], torch.Tensor]) -> None:
        """Replaces the weights.

        Args:
            part: this rank's elements of a parameter, flat.
        """
        if self.stage == 3:
            self._zero.parameter_offload.partition_all_parameters()
        for name, held in self.parts.items():
            held.weights.copy_(part(name))
        if self.stage != 3:
            self._zero.update_lp_params()
            return
        for group, flat in zip(self._zero.fp16_partitioned_groups_flat, self._zero.fp32_partitioned_groups_flat, strict=True):
            group.copy_(flat)
        self._gather_persistent()

    def whole(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, whole tensor), one after the other, on every rank: all ranks take them together."""
        for name, p in self._named.items():
            if self.stage != 3:
                yield name, p.detach()
                continue
            each = p.partition_numel()
            padded = torch.zeros(each, dtype=self.parts[name].weights.dtype, device=p.device)
            padded[: self.parts[name].piece.count].copy_(self.parts[name].weights)
            found = torch.empty(self.world.size * each, dtype=padded.dtype, device=p.device)
            distributed.all_gather(list(found.chunk(self.world.size)), padded)
            yield name, found[: p.ds_numel].view(p.ds_shape)


def load_zeroed(
    folder: Path,
    world: World,
    settings: Mapping[str, Any],
    *,
    device: torch.device,
    dtype: torch.dtype,
    frozen: Sequence[str] = (),
) -> Zeroed:
    """The base model in DeepSpeed's hands.

    Stages 1 and 2 hold the model whole on every rank, so every rank reads it. For stage 3 the first rank reads it parameter by
    parameter, and the others are given theirs; no rank ever holds more of it than its parts and one whole parameter, but the
    first one holds all of it where tensors are stored under other names than the model's, or in parts.

    Args:
        folder: of the weights.
        world: the ranks.
        settings: DeepSpeed's, complete (`fullrank.parallel.zero_settings`).
        device: of the ranks.
        dtype: of the parameters.
        frozen: patterns of what is not trained.

    Raises:
        ModelError: weights are missing.
        UsageError: DeepSpeed is not installed, or a pattern of `frozen` matches nothing.
    """
    deepspeed = deepspeed_for(device.type, world)
    deepspeed.init_distributed(dist_init_required=False)  # the ranks' groups are there; DeepSpeed is told so
    stage = settings["zero_optimization"]["stage"]
    if stage == 3:
        model = blank_model(folder, dtype=dtype)
        freeze(model, frozen)
        _read_in_parts(deepspeed, model, folder, world, settings, dtype)
    else:
        model = load_model(folder, device=device, dtype=dtype)
        freeze(model, frozen)
    optimizer = FlatOptimizer(p for p in model.parameters() if p.requires_grad)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=dict(settings), dist_init_required=False)
    return Zeroed(model, engine, optimizer, stage, world)


def _read_in_parts(
    deepspeed: Any, model: PreTrainedModel, folder: Path, world: World, settings: Mapping[str, Any], dtype: torch.dtype
) -> None:
    """Gives a blank model its numbers, each parameter divided as soon as it is there."""
    stored = stored_as_is(folder, model)
    whole: Mapping[str, torch.Tensor] = {}
    if stored is None and world.is_first:
        whole = dict(load_model(folder, device=torch.device("cpu"), dtype=dtype).named_parameters())
    made: dict[int, Any] = {}
    for name, blank in list(model.named_parameters()):
        numbers = torch.empty(blank.shape, dtype=dtype)
        if world.is_first:  # DeepSpeed hands the first rank's numbers to the others
            if stored is not None:
                stored[name].read_into(numbers)
            else:
                numbers.copy_(whole[name])
        p = nn.Parameter(numbers, requires_grad=blank.requires_grad)
        del numbers
        if not made:
            deepspeed.zero.Init(module=nn.ParameterList([p]), config_dict_or_path=dict(settings))
        else:
            next(iter(made.values())).convert_to_zero_parameters(param_list=[p])
        made[id(blank)] = p
    for module in model.modules():
        for own, blank_or_none in module._parameters.items():
            if id(blank_or_none) in made:  # a tied parameter stays one
                module._parameters[own] = made[id(blank_or_none)]
