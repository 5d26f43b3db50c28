"""Parameter groups by place in the model: what is frozen, whose learning rate is lower, what is a hidden matrix; and their sizes.

That vectors are not decayed is the update's own affair (`fullrank.optim.update`).
"""

from __future__ import annotations

import difflib
import fnmatch
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from fullrank.errors import UsageError
from fullrank.models.blocks import blocks_of


def freeze(model: PreTrainedModel, patterns: Sequence[str]) -> None:
    """Has the parameters that match a pattern, or stand below a module that does, not trained.

    Raises:
        UsageError: naming every pattern that matches nothing, or that nothing is left to train.
    """
    parameters = dict(model.named_parameters())
    problems = []
    for pattern in patterns:
        found = [name for name in parameters if fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"{pattern}.*")]
        for name in found:
            parameters[name].requires_grad_(False)
        if not found:
            near = difflib.get_close_matches(pattern, parameters, 3, cutoff=0.4) or list(parameters)[:3]
            problems.append(f"train.frozen: {pattern!r} matches no parameter; the model has, for example, {', '.join(near)}")
    if not problems and not any(p.requires_grad for p in parameters.values()):
        problems.append("train.frozen: nothing is left to train")
    if problems:
        raise UsageError("\n".join(problems), hint="* stands for anything, [0-3] for one of these characters")


def rates(model: PreTrainedModel, layer_decay: float) -> dict[str, float]:
    """Factor on the learning rate by parameter: layer_decay^(L - l) for block l of 1..L, the same for what comes before block 1
    with l = 0, and 1 for what comes after the last (Howard & Ruder 2018, section 3.1, with a factor for their 1 / 2.6).

    Raises:
        UsageError: the model has no list of blocks, and layer_decay is not 1.
    """
    if layer_decay == 1.0:
        return {}
    blocks = blocks_of(model)
    if blocks is None:
        raise UsageError(
            "train.optimizer.layer_decay: this model's blocks are not a list, so it cannot be said which is below which"
        )
    depth = {id(p): level for level, block in enumerate(blocks, 1) for p in block.parameters()}
    before = {id(p) for p in model.get_input_embeddings().parameters()}
    after = len(blocks)
    levels = {n: depth.get(id(p), 0 if id(p) in before or _is_position(n) else after) for n, p in model.named_parameters()}
    return {name: layer_decay ** (after - level) for name, level in levels.items()}


def _is_stack(p: torch.Tensor) -> bool:
    return p.ndim == 3 and p.shape[1] > 1  # a convolution by channel has 1


def _is_position(name: str) -> bool:
    return "wpe" in name or "position" in name


def hidden_matrices(model: PreTrainedModel) -> frozenset[str]:
    """Names of the matrices of blocks, stacks of experts' among them: what Muon is meant for (Jordan et al. 2024: hidden layers,
    not embeddings or head)."""
    blocks = blocks_of(model)
    inside = {id(p) for block in blocks or () for p in block.parameters()}
    return frozenset(name for name, p in model.named_parameters() if id(p) in inside and (p.ndim == 2 or _is_stack(p)))


@dataclass(frozen=True)
class Shapes:
    """A model's parameters in numbers, tied ones once."""

    trained: dict[str, tuple[int, ...]]
    """Shape by name."""
    hidden: frozenset[str]
    """See `hidden_matrices`."""
    parameters: int
    outside: int
    """Of the embeddings, the last norm and the head: what no block has; all of them where blocks are not a list."""
    outside_trained: int
    block: int
    """Of the largest block."""
    block_trained: int
    largest_tensor: int
    frozen: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """As `trained`, of those that are not."""

    @property
    def trained_parameters(self) -> int:
        """Number of parameters that are trained."""
        return sum(map(math.prod, self.trained.values()))


def shapes_of(config: PreTrainedConfig, frozen: Sequence[str]) -> Shapes:
    """The shapes of a model of this configuration, of which nothing is made.

    Raises:
        UsageError: a pattern of `frozen` matches nothing.
    """
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    freeze(model, frozen)
    blocks = [{id(p) for p in block.parameters()} for block in blocks_of(model) or ()]
    inside = set().union(*blocks)
    named = list(model.named_parameters())

    def count(within: set[int] | None, *, trained: bool) -> int:
        chosen = (p for _, p in named if (id(p) not in inside if within is None else id(p) in within))
        return sum(p.numel() for p in chosen if p.requires_grad or not trained)

    return Shapes(
        trained={name: tuple(p.shape) for name, p in named if p.requires_grad},
        hidden=hidden_matrices(model),
        parameters=sum(p.numel() for _, p in named),
        outside=count(None, trained=False),
        outside_trained=count(None, trained=True),
        block=max((count(own, trained=False) for own in blocks), default=0),
        block_trained=max((count(own, trained=True) for own in blocks), default=0),
        largest_tensor=max(p.numel() for _, p in named),
        frozen={name: tuple(p.shape) for name, p in named if not p.requires_grad},
    )
