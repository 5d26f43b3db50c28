"""Does this model keep packed examples apart? Asked once, of the model itself, before training relies on it.

transformers derives the mask of a packed row from positions that restart. Models whose layers carry state along the row (state
spaces, linear attention) or that ignore those positions would let one example leak into the next; for them the layout puts one
example into a row.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

#: Largest difference of a logit, relative to the largest logit, that rounding may explain (fp32; bf16 compute is not used here).
TOLERANCE = 1e-4


def keeps_apart(model: PreTrainedModel) -> bool:
    """True when the logits of two examples in one row equal their logits alone.

    The tokens are random and the same for every model, so anything that reaches across the border moves the logits.
    """
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    first, second = (torch.randint(vocabulary, (1, length), generator=generator).to(model.device) for length in (9, 7))
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            positions = torch.cat([torch.arange(9), torch.arange(7)])[None].to(model.device)
            together = model(input_ids=torch.cat([first, second], 1), position_ids=positions, use_cache=False).logits[0].float()
            alone = torch.cat([_logits(model, first), _logits(model, second)])
    finally:
        model.train(was_training)
    return bool((together - alone).abs().max() <= TOLERANCE * alone.abs().max())


def _logits(model: PreTrainedModel, ids_1T: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(ids_1T.shape[1], device=ids_1T.device)[None]
    logits: torch.Tensor = model(input_ids=ids_1T, position_ids=positions, use_cache=False).logits
    return logits[0].float()
