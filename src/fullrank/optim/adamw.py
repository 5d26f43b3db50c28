"""AdamW from a recipe: parameter groups and torch's fused update.

Matrices decay, vectors (norms, biases) do not: decay of a norm's gain changes the scale of activations and regularises
nothing (Brown et al. 2020, appendix B, is the usual reference for the practice).
"""

from __future__ import annotations

from torch import nn
from torch.optim import AdamW

from fullrank.recipe import Optimizer


def adamw(model: nn.Module, recipe: Optimizer) -> AdamW:
    """AdamW over every trainable parameter; fp32 moments, 8 bytes a parameter."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return AdamW([g for g in groups if g["params"]], lr=recipe.learning_rate, betas=recipe.betas, eps=recipe.eps, fused=True)
