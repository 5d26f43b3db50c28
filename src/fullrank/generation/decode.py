"""Greedy decoding in batches: prompts sorted by length, ended by any stop token, what all prompts begin with computed once.

Padding is masked by position. Answers come back with the number of their prompt, and say whether they ended by themselves.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import DynamicCache, PreTrainedModel

from fullrank.errors import DataError

#: A common beginning shorter than this is not worth a forward pass of its own.
_SHORTEST_SHARED = 16

#: Settings of a generation configuration that would make the likeliest token another one, or look for it another way.
_BENDING = (
    "temperature",
    "top_p",
    "top_k",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "bad_words_ids",
    "sequence_bias",
    "guidance_scale",
    "min_length",
    "min_new_tokens",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "suppress_tokens",
    "begin_suppress_tokens",
    "exponential_decay_length_penalty",
    "prompt_lookup_num_tokens",
)


@dataclass(frozen=True)
class Answer:
    """What the model wrote after one prompt."""

    prompt: int
    """Number of the prompt."""
    ids: list[int]
    """Without the stop token."""
    stopped: bool
    """A stop token came before the limit."""


def greedy_arguments(stop_ids: Sequence[int], max_new_tokens: int) -> dict[str, Any]:
    """What makes transformers' `generate` greedy, whatever the model's own generation configuration says."""
    return dict.fromkeys(_BENDING) | {
        "do_sample": False,
        "num_beams": 1,
        "max_new_tokens": max_new_tokens,
        "eos_token_id": list(stop_ids),
        "pad_token_id": stop_ids[0],
    }


def room_for_answer(model: PreTrainedModel, prompt_tokens: int, wanted: int) -> int:
    """New tokens that fit behind a prompt: those wanted, or what is left of the model's context.

    Raises:
        DataError: nothing is left.
    """
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    room = wanted if context is None else min(wanted, context - prompt_tokens)
    if room < 1:
        raise DataError(
            f"a prompt of {prompt_tokens} tokens fills the model's context of {context}",
            hint="shorten the prompt (or evaluate.base_instructions)",
        )
    return room


@torch.no_grad()
def greedy(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    stop_ids: Sequence[int],
    max_new_tokens: int,
    batch_size: int = 32,
) -> Iterator[Answer]:
    """Answers to prompts, batch by batch (longest prompts first, so that memory trouble shows at once).

    Args:
        model: in any mode; it is used in evaluation mode.
        prompts: prompt ids, at least one each.
        stop_ids: ids that end an answer.
        max_new_tokens: longest answer; less where the model's context leaves less room.
        batch_size: prompts decoded together.

    Raises:
        DataError: a prompt fills the model's context.
    """
    was_training = model.training
    model.eval()
    order = sorted(range(len(prompts)), key=lambda n: (-len(prompts[n]), n))
    try:
        shared = _shared_beginning(model, prompts)
        for start in range(0, len(order), batch_size):
            numbers = order[start : start + batch_size]
            room = room_for_answer(model, max(len(prompts[n]) for n in numbers), max_new_tokens)
            written = _decode(model, [prompts[n] for n in numbers], shared, greedy_arguments(stop_ids, room))
            for n, row in zip(numbers, written, strict=True):
                end = next((position for position, token in enumerate(row) if token in stop_ids), None)
                yield Answer(n, row[:end], stopped=end is not None)
    finally:
        model.train(was_training)


@dataclass(frozen=True)
class _Shared:
    """What all prompts begin with: its ids and the keys and values of one row."""

    ids: list[int]
    cache: DynamicCache | None


def _shared_beginning(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> _Shared:
    nothing = _Shared([], None)
    if len(prompts) < 2:
        return nothing
    first, *others = (prompt[:-1] for prompt in prompts)
    length = min(_common(first, other) for other in others)
    ids = list(first[:length])
    if len(ids) < _SHORTEST_SHARED or not _remembers_everything(model):
        return nothing
    cache = DynamicCache(config=model.config)
    model(input_ids=torch.tensor([ids], device=model.device), past_key_values=cache, use_cache=True, logits_to_keep=1)
    return _Shared(ids, cache)


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many ids two prompts begin with in common."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(first), len(second)))


def _remembers_everything(model: PreTrainedModel) -> bool:
    """True when every layer attends to all keys: padding between the shared beginning and the rest would fill a window."""
    config = model.config.get_text_config()
    layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
    return layer_types == {"full_attention"} and not getattr(config, "sliding_window", None)


def _decode(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], shared: _Shared, arguments: dict[str, Any]
) -> list[list[int]]:
    """New tokens of each prompt: the shared beginning, then padding, then the rest of the prompt, then what is generated."""
    skip = len(shared.ids)
    width = max(len(prompt) for prompt in prompts)
    ids_BT = torch.full((len(prompts), width), int(arguments["pad_token_id"]))
    mask_BT = torch.zeros_like(ids_BT)
    for row, prompt in enumerate(prompts):
        rest = len(prompt) - skip
        ids_BT[row, :skip], mask_BT[row, :skip] = torch.tensor(shared.ids, dtype=torch.long), 1
        ids_BT[row, width - rest :], mask_BT[row, width - rest :] = torch.tensor(prompt[skip:]), 1
    if shared.cache is not None:
        cache = copy.deepcopy(shared.cache)
        cache.batch_repeat_interleave(len(prompts))
        arguments = arguments | {"past_key_values": cache}
    written_BN = cast(Any, model).generate(
        input_ids=ids_BT.to(model.device), attention_mask=mask_BT.to(model.device), **arguments
    )
    rows: list[list[int]] = cast(torch.Tensor, written_BN)[:, width:].tolist()
    return rows
