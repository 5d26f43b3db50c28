"""Batched greedy decoding: the answers of each prompt alone, whatever it shares a batch with."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch

from fullrank.generation.decode import Answer, greedy

VOCABULARY, STOP = 300, 7


def alone(model: Any, prompt: list[int], stop_ids: list[int], most: int) -> Answer:
    """The plainest decoding there is: the whole text through the model for every token, its likeliest next token taken."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(most):
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
            if ids[-1] in stop_ids:
                return Answer(0, ids[len(prompt) : -1], stopped=True)
    return Answer(0, ids[len(prompt) :], stopped=False)


def prompts(shared: int) -> list[list[int]]:
    """Prompts of 1 to 30 tokens behind a common beginning, in no order of length, one of them twice."""
    draw = torch.Generator().manual_seed(1)
    beginning = torch.randint(VOCABULARY, (shared,), generator=draw).tolist()
    lengths = [5, 30, 1, 12, 12, 2, 21]
    rests = [torch.randint(VOCABULARY, (length,), generator=draw).tolist() for length in lengths]
    return [beginning + rest for rest in [*rests, rests[3]]]


@pytest.mark.parametrize("shared", [0, 40], ids=["nothing shared", "a shared beginning"])
@pytest.mark.parametrize("batch_size", [1, 3, 32])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_batch_answers_as_each_prompt_alone(family: str, batch_size: int, shared: int) -> None:
    model = tiny.model(family, vocabulary=VOCABULARY)
    asked = prompts(shared)
    # A stop token that some of the answers come to and others do not.
    written = [alone(model, prompt, [], 12).ids for prompt in asked]
    ends = [set(ids) for ids in written]
    stop = next(token for ids in written for token in ids[3:] if not all(token in end for end in ends))
    stop_ids = [stop, next(token for token in range(VOCABULARY) if not any(token in end for end in ends))]
    wanted = [alone(model, prompt, stop_ids, 12) for prompt in asked]
    assert {answer.stopped for answer in wanted} == {True, False}
    found = list(greedy(model, asked, stop_ids=stop_ids, max_new_tokens=12, batch_size=batch_size))
    assert sorted(answer.prompt for answer in found) == list(range(len(asked)))
    for answer in found:
        assert (answer.ids, answer.stopped) == (wanted[answer.prompt].ids, wanted[answer.prompt].stopped)


def test_answers_equal_those_of_transformers_generate() -> None:
    model = tiny.model("llama", vocabulary=VOCABULARY)
    for answer in greedy(model, prompts(20), stop_ids=[STOP], max_new_tokens=8):
        prompt_1T = torch.tensor([prompts(20)[answer.prompt]])
        theirs = model.generate(
            input_ids=prompt_1T,
            attention_mask=torch.ones_like(prompt_1T),
            do_sample=False,
            max_new_tokens=8,
            eos_token_id=STOP,
            pad_token_id=STOP,
        )[0, prompt_1T.shape[1] :].tolist()
        assert answer.ids == theirs[: theirs.index(STOP)] if STOP in theirs else answer.ids == theirs


def test_the_longest_prompts_come_first() -> None:
    model = tiny.model("llama", vocabulary=VOCABULARY)
    asked = prompts(0)
    first = [answer.prompt for answer in greedy(model, asked, stop_ids=[STOP], max_new_tokens=1, batch_size=2)]
    assert [len(asked[n]) for n in first] == sorted((len(prompt) for prompt in asked), reverse=True)


def test_prompts_that_hold_the_stop_token_are_not_cut() -> None:
    model = tiny.model("llama", vocabulary=VOCABULARY)
    asked = [[5, STOP, 9, STOP], [STOP, 4]]
    found = {a.prompt: a.ids for a in greedy(model, asked, stop_ids=[STOP], max_new_tokens=5)}
    assert found == {n: alone(model, prompt, [STOP], 5).ids for n, prompt in enumerate(asked)}


@pytest.mark.parametrize(
    "setting",
    [
        {"do_sample": True, "temperature": 5.0, "top_k": 3, "top_p": 0.5},
        {"repetition_penalty": 5.0},
        {"no_repeat_ngram_size": 1},
        {"num_beams": 3},
        {"min_new_tokens": 8},
        {"suppress_tokens": list(range(0, VOCABULARY, 2))},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_the_models_own_generation_settings_do_not_bend_what_is_measured(setting: dict[str, Any]) -> None:
    model = tiny.model("llama", vocabulary=VOCABULARY)
    asked = prompts(0)[:3]
    stop_ids = [alone(model, asked[0], [], 8).ids[3]]
    wanted = [alone(model, prompt, stop_ids, 8) for prompt in asked]
    for name, value in setting.items():
        setattr(model.generation_config, name, value)
    for answer in greedy(model, asked, stop_ids=stop_ids, max_new_tokens=8):
        assert (answer.ids, answer.stopped) == (wanted[answer.prompt].ids, wanted[answer.prompt].stopped)


@pytest.mark.parametrize("training", [True, False])
def test_the_models_mode_is_as_it_was(training: bool) -> None:
    model = tiny.model("gpt2", vocabulary=VOCABULARY, resid_pdrop=0.5).train(training)
    once, again = (list(greedy(model, prompts(0)[:2], stop_ids=[STOP], max_new_tokens=6)) for _ in range(2))
    assert once == again, "dropout is off while answers are written"
    assert model.training is training


def test_no_prompts_no_answers() -> None:
    assert list(greedy(tiny.model("llama", vocabulary=VOCABULARY), [], stop_ids=[STOP], max_new_tokens=3)) == []
