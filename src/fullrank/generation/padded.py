"""Greedy decoding by transformers' `generate`, a padded batch at a time: for models whose memory is not keys and values.

Padding is masked by position. What all prompts begin with is computed once, where every layer remembers all of it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
from transformers import DynamicCache, PreTrainedModel


class Padded:
    """Batches of one model.

    Args:
        model: in evaluation mode.
        beginning: what all prompts begin with; at least one token of each is left.
    """

    def __init__(self, model: PreTrainedModel, beginning: Sequence[int]) -> None:
        self._model = model
        self._beginning: list[int] = []
        self._cache: DynamicCache | None = None
        if beginning and _remembers_everything(model):
            self._beginning = list(beginning)
            self._cache = DynamicCache(config=model.config)
            ids_1P = torch.tensor([self._beginning], device=model.device)
            model(input_ids=ids_1P, past_key_values=self._cache, use_cache=True, logits_to_keep=1)

    def written(self, prompts: Sequence[Sequence[int]], arguments: dict[str, Any]) -> list[list[int]]:
        """New tokens of each prompt: the shared beginning, then padding, then the rest of the prompt, then what is generated.

        Args:
            prompts: ids of each, the beginning included.
            arguments: of `generate`.
        """
        skip = len(self._beginning)
        width = max(len(prompt) for prompt in prompts)
        ids_BT = torch.full((len(prompts), width), int(arguments["pad_token_id"]))
        mask_BT = torch.zeros_like(ids_BT)
        for row, prompt in enumerate(prompts):
            rest = len(prompt) - skip
            ids_BT[row, :skip], mask_BT[row, :skip] = torch.tensor(self._beginning, dtype=torch.long), 1
            ids_BT[row, width - rest :], mask_BT[row, width - rest :] = torch.tensor(prompt[skip:]), 1
        if self._cache is not None:
            cache = copy.deepcopy(self._cache)
            cache.batch_repeat_interleave(len(prompts))
            arguments = arguments | {"past_key_values": cache}
        model = self._model
        written_BN = cast(Any, model).generate(
            input_ids=ids_BT.to(model.device), attention_mask=mask_BT.to(model.device), **arguments
        )
        rows: list[list[int]] = cast(torch.Tensor, written_BN)[:, width:].tolist()
        return rows


def _remembers_everything(model: PreTrainedModel) -> bool:
    """True when every layer attends to all keys: padding between the shared beginning and the rest would fill a window."""
    config = model.config.get_text_config()
    if not hasattr(config, "num_attention_heads"):  # a state in place of keys
        return False
    layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
    return layer_types == {"full_attention"} and not getattr(config, "sliding_window", None)
