"""A model whose parameters are divided among ranks (PyTorch FSDP2), and never whole on any of them but a block at a time.

The model is made without numbers, divided block by block, and each rank reads its part from the files. FSDP2 divides every
parameter along its first dimension, as `torch.chunk` does; a rank's part of a parameter is therefore one stretch of its flat
elements, which is all that updates, checkpoints and exports need to know of it (`Piece`). On a mesh of two dimensions parameters
are divided along the second and repeated along the first, whose ranks are of different machines (hybrid sharding, Zhao et al.
2023, section 3.2.2).

Parts may wait in host memory beside the device (`CPUOffloadPolicy`): a block's are copied over when it is gathered, its gradients
are copied back once they are summed, and parts are updated where they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from fullrank.models.blocks import blocks_of
from fullrank.models.load import blank_model, load_model
from fullrank.models.stored import StoredTensor, StoredTensors, weight_files
from fullrank.optim.pieces import Piece
from fullrank.parallel.groups import freeze


def piece_of(p: torch.Tensor) -> Piece:
    """The piece that this rank has of a parameter; all of one that is not divided."""
    if not isinstance(p, DTensor):
        return Piece(0, p.numel(), tuple(p.shape))
    mesh, rows = p.device_mesh, p.shape[0]
    ranks, rank = mesh.size(mesh.ndim - 1), mesh.get_local_rank(mesh.ndim - 1)
    of_a_row = math.prod(p.shape[1:])
    first = min(rows, rank * -(-rows // ranks))
    return Piece(first * of_a_row, p.to_local().numel(), tuple(p.shape))


def computing_device(mesh: DeviceMesh) -> torch.device:
    """Where this rank computes, wherever its parts wait."""
    if mesh.device_type == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(mesh.device_type)


def divide(model: PreTrainedModel, mesh: DeviceMesh, *, compute_type: torch.dtype | None, offload: bool = False) -> None:
    """Has FSDP2 divide a model, by blocks and what is outside of them.

    Args:
        model: whole, or without numbers (`fullrank.models.load.blank_model`).
        mesh: of one dimension, or of two: the first repeats, the second divides.
        compute_type: of the blocks' parameters while they compute, where it is not their own; gradients are summed in fp32.
        offload: whether parts wait in host memory; page-locked, where that makes copies faster.
    """
    place = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if offload else OffloadPolicy()
    policy = MixedPrecisionPolicy(param_dtype=compute_type, reduce_dtype=torch.float32, cast_forward_inputs=False)
    outside = MixedPrecisionPolicy(
        # Embeddings and head begin and end the sums between blocks, which stay in fp32.
        param_dtype=torch.float32 if compute_type is not None and model.dtype != torch.float32 else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    if compute_type is None and model.dtype == torch.float64:
        policy = outside = MixedPrecisionPolicy(cast_forward_inputs=False)
    for block in blocks_of(model) or ():
        fully_shard(block, mesh=mesh, mp_policy=policy, offload_policy=place)
    fully_shard(model, mesh=mesh, mp_policy=outside, offload_policy=place)
    for module in sharded_modules(model):
        # Shares of the loss add up to it: gradients are summed over ranks, not averaged.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
        if hasattr(module, "set_reduce_scatter_unused_params"):  # torch 2.13; a parameter may meet no gradient on one rank
            module.set_reduce_scatter_unused_params(True, recurse=False)


def sharded_modules(model: nn.Module) -> Iterator[Any]:
    """The modules that FSDP2 gathers and divides as one."""
    return (module for module in model.modules() if isinstance(module, FSDPModule))


def load_sharded(
    folder: Path,
    mesh: DeviceMesh,
    *,
    dtype: torch.dtype,
    compute_type: torch.dtype | None,
    frozen: Sequence[str] = (),
    offload: bool = False,
) -> PreTrainedModel:
    """The base model, divided: every rank reads what it will hold.

    Where a model's tensors are stored under other names or put together otherwise than it has them (experts one by one), the
    first rank reads it whole, and hands the others theirs, parameter by parameter.

    Args:
        folder: of the weights.
        mesh: see `divide`.
        dtype: of the parameters as they are stored while training.
        compute_type: see `divide`.
        frozen: patterns of what is not trained.
        offload: see `divide`.

    Raises:
        ModelError: weights are missing.
        UsageError: a pattern of `frozen` matches nothing.
    """
    device = torch.device("cpu") if offload else computing_device(mesh)
    model = blank_model(folder, dtype=dtype)
    freeze(model, frozen)
    divide(model, mesh, compute_type=compute_type, offload=offload)
    stored = stored_as_is(folder, model)
    whole: Mapping[str, torch.Tensor] = {}
    if stored is None and distributed.get_rank() == 0:
        whole = dict(load_model(folder, device=torch.device("cpu"), dtype=dtype).named_parameters())
    made: dict[int, nn.Parameter] = {}
    named: list[tuple[str, Any]] = list(model.named_parameters())
    for name, p in named:
        piece = piece_of(p)
        kept: Any = torch.empty_like(p, device=device)  # `DTensor.from_local` would take it to the mesh's device
        local = kept.to_local()
        if stored is not None:
            stored[name].part(piece.start, piece.count).read_into(local)
        else:
            local.view(-1).copy_(_handed_out(whole.get(name), piece, dtype)[piece.start : piece.start + piece.count])
        made[id(p)] = nn.Parameter(kept, requires_grad=p.requires_grad)
    for module in model.modules():
        for own, blank in module._parameters.items():
            if id(blank) in made:  # a tied parameter stays one
                module._parameters[own] = made[id(blank)]
    # FSDP2 looks at parameters again whenever a state was loaded, and then pads and page-locks them, if need be in other memory:
    # now, so that nobody comes to hold what is replaced at the first forward pass.
    model.load_state_dict({}, strict=False)
    return model


def _handed_out(tensor: torch.Tensor | None, piece: Piece, dtype: torch.dtype) -> torch.Tensor:
    """The first rank's tensor on every rank, flat."""
    flat = torch.empty(piece.numel, dtype=dtype) if tensor is None else tensor.detach().reshape(-1).contiguous()
    distributed.broadcast(flat, 0)
    return flat


def stored_as_is(folder: Path, model: PreTrainedModel) -> dict[str, StoredTensor] | None:
    """Parameter name -> stored tensor; None where some are not stored under a name of theirs with their shape."""
    stored = StoredTensors(*weight_files(folder)).index
    names: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    found = {}
    for name, p in model.named_parameters():
        own = (stored.get(other) for other in names[id(p)])
        fitting = next((tensor for tensor in own if tensor is not None and tensor.shape == tuple(p.shape)), None)
        if fitting is None:
            return None
        found[name] = fitting
    return found
