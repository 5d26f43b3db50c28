"""Text that a model draws from its own distribution."""

from __future__ import annotations

from collections import Counter

import pytest
import tiny
import torch

from fullrank.generation.samples import neutral_prompts, sampled

STOP = 5


def test_draws_follow_the_models_distribution() -> None:
    """The first token after one prompt, drawn often, beside its probabilities: chi-square over the likelier tokens."""
    model = tiny.model("llama", vocabulary=12)
    prompt = [3, 7, 1]
    draws = sampled(model, [prompt] * 4000, stop_ids=[STOP], max_new_tokens=1, seed=0, batch_size=4000)
    counts = Counter(text.ids[len(prompt)] for text in draws)
    with torch.no_grad():
        wanted = model(input_ids=torch.tensor([prompt])).logits[0, -1].double().softmax(-1)
    chi = sum((counts[token] - 4000 * p) ** 2 / (4000 * p) for token, p in enumerate(wanted.tolist()))
    assert chi < 31.3  # 11 degrees of freedom, 0.001
    assert len(counts) == 12  # nothing is cut off


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_prompt_then_what_is_drawn_up_to_a_stop(family: str) -> None:
    model = tiny.model(family, vocabulary=12).train()
    prompts = [[1, 2, 3], [4], [6, 7], [8, 9, 10, 11]]
    texts = sampled(model, prompts, stop_ids=[STOP], max_new_tokens=30, seed=3, batch_size=3)
    assert model.training
    for prompt, text in zip(prompts, texts, strict=True):
        assert list(text.ids[: len(prompt)]) == prompt
        drawn = list(text.ids[len(prompt) :])
        assert list(text.supervised) == [False] * len(prompt) + [True] * len(drawn)
        assert STOP not in drawn[:-1] and (drawn[-1] == STOP or len(drawn) == 30)
    assert any(text.ids[-1] == STOP for text in texts)
    again = sampled(model, prompts, stop_ids=[STOP], max_new_tokens=30, seed=3, batch_size=3)
    assert [text.ids for text in again] == [text.ids for text in texts]
    other = sampled(model, prompts, stop_ids=[STOP], max_new_tokens=30, seed=4, batch_size=3)
    assert [text.ids for text in other] != [text.ids for text in texts]


def test_draws_leave_the_process_randomness_alone() -> None:
    model = tiny.model("llama")
    torch.manual_seed(7)
    wanted = torch.cat([torch.rand(1), torch.rand(2)])
    torch.manual_seed(7)
    first = torch.rand(1)
    sampled(model, [[1, 2]], stop_ids=[STOP], max_new_tokens=3, seed=0)
    assert torch.equal(torch.cat([first, torch.rand(2)]), wanted)


def test_prompts_are_there_and_differ() -> None:
    assert len(neutral_prompts()) == len(set(neutral_prompts())) == 64
    assert all(prompt.strip() == prompt and prompt for prompt in neutral_prompts())
