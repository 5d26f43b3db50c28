"""Batched greedy decoding: the answers of each prompt alone, whatever it shares a batch with.

The references are transformers' forward pass over the whole text for every token, and its `generate` for one prompt at a time. In
float64 rounding is 1e-16 of a logit; no two logits of these random models come that close, so that tokens must be the same.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import tiny
import torch
from double import everything_double

from fullrank.errors import DataError, FitError
from fullrank.generation import decode, slots
from fullrank.generation.decode import Answer, greedy

VOCABULARY, STOP = 300, 7


@pytest.fixture
def double() -> Iterator[None]:
    with everything_double():
        yield


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


@functools.cache
def reference(family: str, shared: int) -> tuple[list[int], list[Answer]]:
    """Stop ids that some of the answers come to and others do not, and the answers."""
    model = tiny.model(family, vocabulary=VOCABULARY)
    asked = prompts(shared)
    written = [alone(model, prompt, [], 12).ids for prompt in asked]
    ends = [set(ids) for ids in written]
    stop = next(token for ids in written for token in ids[3:] if not all(token in end for end in ends))
    stop_ids = [stop, next(token for token in range(VOCABULARY) if not any(token in end for end in ends))]
    cut = [next((n for n, token in enumerate(ids) if token in stop_ids), None) for ids in written]
    answers = [Answer(0, ids[:end], stopped=end is not None) for ids, end in zip(written, cut, strict=True)]
    assert {answer.stopped for answer in answers} == {True, False}
    return stop_ids, answers


def same(found: list[Answer], wanted: list[Answer]) -> None:
    assert sorted(answer.prompt for answer in found) == list(range(len(wanted)))
    for answer in found:
        assert (answer.ids, answer.stopped) == (wanted[answer.prompt].ids, wanted[answer.prompt].stopped)


@pytest.mark.parametrize("shared", [0, 40], ids=["nothing shared", "a shared beginning"])
@pytest.mark.parametrize("batch_size", [1, 3, 32])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_batch_answers_as_each_prompt_alone(family: str, batch_size: int, shared: int) -> None:
    model = tiny.model(family, vocabulary=VOCABULARY)
    stop_ids, wanted = reference(family, shared)
    told: list[str] = []
    asked = prompts(shared)
    found = greedy(model, asked, stop_ids=stop_ids, max_new_tokens=12, batch_size=batch_size, tell=told.append)
    same(list(found), wanted)
    assert told == [], "every one of these families is written in slots"


def generated(model: Any, prompt: list[int], most: int) -> list[int]:
    """What transformers' `generate` writes behind one prompt, without the stop token."""
    prompt_1T = torch.tensor([prompt])
    arguments = {"do_sample": False, "max_new_tokens": most, "eos_token_id": STOP, "pad_token_id": STOP}
    theirs = model.generate(input_ids=prompt_1T, attention_mask=torch.ones_like(prompt_1T), **arguments)
    ids: list[int] = theirs[0, len(prompt) :].tolist()
    return ids[: ids.index(STOP)] if STOP in ids else ids


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("way", ["by parts", "densely"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_answers_equal_those_of_transformers_generate(family: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if way == "densely":  # as on an accelerator
        monkeypatch.setattr(slots, "_running_by_parts", slots._running_densely)
        monkeypatch.setattr(slots, "_arriving_by_parts", slots._arriving_densely)
    model = tiny.model(family, vocabulary=VOCABULARY).double()
    model.set_experts_implementation("eager")  # grouped products know no float64
    asked = prompts(20)
    found = list(greedy(model, asked, stop_ids=[STOP], max_new_tokens=10, batch_size=4, tell=pytest.fail))
    assert sorted(answer.prompt for answer in found) == list(range(len(asked)))
    for answer in found:
        assert answer.ids == generated(model, asked[answer.prompt], 10)


@pytest.mark.parametrize("window", [3, 8, 25, 45, 4096])
@pytest.mark.parametrize("shared", [0, 40])
def test_windows_shorter_and_longer_than_the_texts(window: int, shared: int) -> None:
    model = tiny.model("mistral", vocabulary=VOCABULARY, sliding_window=window)
    asked = prompts(shared)
    found = list(greedy(model, asked, stop_ids=[STOP], max_new_tokens=9, batch_size=5, tell=pytest.fail))
    same(found, [alone(model, prompt, [STOP], 9) for prompt in asked])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_answers_end_where_the_context_does(family: str) -> None:
    length = {"llama": "max_position_embeddings", "gpt2": "n_positions"}[family]
    model = tiny.model(family, vocabulary=VOCABULARY, **{length: 34})
    asked = prompts(0)
    never = VOCABULARY  # no such token
    found = {answer.prompt: answer.ids for answer in greedy(model, asked, stop_ids=[never], max_new_tokens=12, batch_size=3)}
    for number, prompt in enumerate(asked):
        assert found[number] == alone(model, prompt, [], min(12, 34 - len(prompt))).ids
    with pytest.raises(DataError, match="34"):
        list(greedy(model, [*asked, [1] * 34], stop_ids=[STOP], max_new_tokens=12))


def test_keys_and_values_keep_to_their_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("llama", vocabulary=VOCABULARY)
    stop_ids, wanted = reference("llama", 40)
    token = 2 * 2 * 2 * 8 * 4  # layers, keys and values, key-value heads, their size, bytes
    budget = 4 * 45 * token
    most, together = 0, set()
    row = slots.Slots.advance

    def look(held: slots.Slots, of: slots.SlotRow) -> None:
        nonlocal most
        row(held, of)
        most = max(most, held.bytes)
        together.add(len(held.lengths))

    monkeypatch.setattr(slots.Slots, "advance", look)
    found = list(greedy(model, prompts(40), stop_ids=stop_ids, max_new_tokens=12, cache_bytes=budget, tell=pytest.fail))
    same(found, wanted)
    assert 0.5 * budget < most <= budget
    assert 3 <= max(together) < len(wanted), "texts took turns"


def short_of_memory(monkeypatch: pytest.MonkeyPatch, most: int, error: BaseException) -> None:
    usual = decode._Steps.logits

    def logits(steps: Any, newest: Any, arriving: Any, tokens: int) -> torch.Tensor:
        found = usual(steps, newest, arriving, tokens)
        if len(newest) + len(arriving) > most:
            raise error
        return found

    monkeypatch.setattr(decode._Steps, "logits", logits)


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory"), MemoryError()],
    ids=["an accelerator", "torch on a CPU", "Python"],
)
def test_memory_that_runs_out_halves_the_batch(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("llama", vocabulary=VOCABULARY)
    stop_ids, wanted = reference("llama", 40)
    short_of_memory(monkeypatch, 3, error)
    told: list[str] = []
    same(list(greedy(model, prompts(40), stop_ids=stop_ids, max_new_tokens=12, tell=told.append)), wanted)
    assert told and all("memory ran out" in words for words in told)


def test_memory_that_is_too_small_for_one_text_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("llama", vocabulary=VOCABULARY)
    writes = iter([False] * 4 + [True] * 100)  # the trial comes first
    usual = decode._Steps.logits

    def logits(*arguments: Any) -> torch.Tensor:
        if next(writes):
            raise torch.OutOfMemoryError
        return usual(*arguments)

    monkeypatch.setattr(decode._Steps, "logits", logits)
    with pytest.raises(FitError, match="one text of 30 tokens"):
        list(greedy(model, prompts(0), stop_ids=[STOP], max_new_tokens=3))


def test_other_errors_are_not_taken_for_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    short_of_memory(monkeypatch, 3, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes"):
        list(greedy(tiny.model("llama", vocabulary=VOCABULARY), prompts(0), stop_ids=[STOP], max_new_tokens=3))


@pytest.mark.parametrize("shared", [0, 20])
def test_a_state_space_is_decoded_by_transformers_which_is_said(shared: int) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    config = MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, state_size=4, initializer_range=0.3)
    model = MambaForCausalLM(config).eval()
    asked = [prompt[: shared + 5] for prompt in prompts(shared) if len(prompt) >= shared + 5]  # padding is a state space's, too
    told: list[str] = []
    found = list(greedy(model, asked, stop_ids=[STOP], max_new_tokens=6, batch_size=2, tell=told.append))
    same(found, [alone(model, prompt, [STOP], 6) for prompt in asked])
    assert len(told) == 1 and "by transformers" in told[0]


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_positions_that_depend_on_the_longest_text_are_left_to_transformers(kind: str) -> None:
    model = tiny.model("llama", vocabulary=VOCABULARY)
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_type": kind}
    told: list[str] = []
    same(
        list(greedy(model, prompts(20), stop_ids=[STOP], max_new_tokens=4, tell=told.append)),
        [alone(model, prompt, [STOP], 4) for prompt in prompts(20)],
    )
    assert len(told) == 1 and kind in told[0]


def test_while_the_caller_has_an_answer_the_model_attends_as_usual() -> None:
    model = tiny.model("llama", vocabulary=VOCABULARY)
    ids_1T = torch.tensor([[3, 5, 8]])
    usual = model(input_ids=ids_1T).logits
    for _ in greedy(model, prompts(0), stop_ids=[STOP], max_new_tokens=3, batch_size=2):
        assert torch.equal(model(input_ids=ids_1T).logits, usual)


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
