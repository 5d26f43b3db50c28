"""The transformer blocks of a model, by the names that families use."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

_NAMES = ("layers", "h")


def blocks_of(model: PreTrainedModel) -> nn.ModuleList | None:
    """The blocks in the order in which a forward pass computes them, or None where they have another name."""
    for name in _NAMES:
        if isinstance(found := getattr(model.base_model, name, None), nn.ModuleList):
            return found
    return None
