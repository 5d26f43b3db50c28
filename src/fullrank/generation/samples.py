"""What a model writes by itself: text drawn from its own distribution after neutral beginnings.

Such text needs no data of anyone's, and is where a model's predictions matter to itself: the mean divergence of another model's
predictions on it, token by token, estimates how far the other's distribution of whole answers is from this one's.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from fullrank.generation.decode import greedy_arguments, room_for_answer
from fullrank.sequences.chat import ChatRenderer, Tokens


@cache
def neutral_prompts() -> tuple[str, ...]:
    """Things to write about that need no special knowledge; they come with the package."""
    return tuple((files("fullrank.generation") / "neutral.txt").read_text(encoding="utf-8").splitlines())


def prompt_ids(renderer: ChatRenderer, prompt: str) -> list[int]:
    """A prompt as a conversation's first turn, or, for models without a chat template, as the beginning of a text."""
    if renderer.has_template:
        return renderer.prompt_ids([{"role": "user", "content": prompt}])
    return renderer.text_ids(prompt)


@torch.no_grad()
def sampled(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    stop_ids: Sequence[int],
    max_new_tokens: int,
    seed: int,
    batch_size: int = 32,
) -> list[Tokens]:
    """A continuation of each prompt, drawn token by token from the model's own distribution (temperature 1, nothing cut off).

    Args:
        model: in any mode; it is used in evaluation mode.
        prompts: prompt ids, at least one each.
        stop_ids: ids that end a continuation; the one that came is part of it.
        max_new_tokens: most that are drawn; fewer where the model's context leaves less room.
        seed: of the draws, which depend on the batches too.
        batch_size: prompts continued together.

    Returns:
        Prompt and continuation, of which the latter is supervised.

    Raises:
        DataError: a prompt fills the model's context.
    """
    was_training = model.training
    model.eval()
    found: dict[int, Tokens] = {}
    order = sorted(range(len(prompts)), key=lambda n: (-len(prompts[n]), n))
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for start in range(0, len(order), batch_size):
                numbers = order[start : start + batch_size]
                room = room_for_answer(model, max(len(prompts[n]) for n in numbers), max_new_tokens)
                arguments = greedy_arguments(stop_ids, room) | {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
                for n, written in zip(numbers, _written(model, [prompts[n] for n in numbers], arguments), strict=True):
                    end = next((place + 1 for place, token in enumerate(written) if token in stop_ids), len(written))
                    ids = [*prompts[n], *written[:end]]
                    found[n] = Tokens(ids, [place >= len(prompts[n]) for place in range(len(ids))])
    finally:
        model.train(was_training)
    return [found[n] for n in range(len(prompts))]


def _written(model: PreTrainedModel, prompts: Sequence[Sequence[int]], arguments: dict[str, Any]) -> list[list[int]]:
    width = max(map(len, prompts))
    ids_BT = torch.full((len(prompts), width), int(arguments["pad_token_id"]))
    mask_BT = torch.zeros_like(ids_BT)
    for row, prompt in enumerate(prompts):
        ids_BT[row, width - len(prompt) :] = torch.tensor(prompt)
        mask_BT[row, width - len(prompt) :] = 1
    written_BN = cast(Any, model).generate(
        input_ids=ids_BT.to(model.device), attention_mask=mask_BT.to(model.device), **arguments
    )
    rows: list[list[int]] = written_BN[:, width:].tolist()
    return rows
