"""Multiple choice: likelihoods against transformers' own, shares against hand-made ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from fullrank.data import convert
from fullrank.data.parse import Origin, RawRecord
from fullrank.errors import DataError
from fullrank.evaluate.choice import choice, likeliest
from fullrank.generation.likelihood import answer_losses
from fullrank.recipe import Task
from fullrank.records import ChoiceLikelihood

PUBLIC = Path(__file__).resolve().parents[4] / "shared" / "data"


def option(text: str, log_likelihood: float, tokens: int) -> ChoiceLikelihood:
    return ChoiceLikelihood(text=text, log_likelihood=log_likelihood, tokens=tokens)


def test_options_are_compared_by_byte_and_by_token() -> None:
    items = [
        # per byte: -2/1 against -6/4; per token: -2/1 against -6/2
        [option("a", -2.0, 1), option("long", -6.0, 2)],
        # two bytes for the one character: -3/2 against -2/1
        [option("é", -3.0, 1), option("e", -2.0, 1)],
        # alike in all: the first
        [option("x", -1.0, 1), option("y", -1.0, 1)],
        # an option with the text of the right one
        [option("z", -3.0, 1), option("w", -9.0, 1), option("w", -1.0, 1)],
    ]
    scores = choice(Task(metric="choice"), ["long", "é", "y", "w"], items)
    assert list(scores) == ["choice", "choice_per_token"]
    assert scores["choice"].per_item == [1.0, 1.0, 0.0, 1.0]
    assert scores["choice_per_token"].per_item == [0.0, 0.0, 0.0, 1.0]
    assert scores["choice"].value == 0.75
    assert likeliest(items[0]) == "long"


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_likelihoods_are_those_of_transformers(family: str) -> None:
    model = tiny.model(family).train()
    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> list[int]:
        return torch.randint(0, 250, (length,), generator=generator).tolist()

    prompts = [ids(24), ids(5)]
    asked = [(prompts[n % 2], ids(length)) for n, length in enumerate((1, 3, 7, 2, 4, 1))]
    found = answer_losses(model, asked, 64)
    assert model.training
    model.eval()
    for (prompt, answer), (loss, tokens) in zip(asked, found, strict=True):
        labels = torch.tensor([[-100] * len(prompt) + answer])
        with torch.no_grad():
            mean = model(input_ids=torch.tensor([[*prompt, *answer]]), labels=labels).loss.item()
        assert tokens == len(answer)
        assert loss == pytest.approx(mean * len(answer), rel=1e-5)  # fp32, sums in another order


def test_what_is_longer_than_the_context_is_refused() -> None:
    with pytest.raises(DataError, match="take 513 tokens, and the model's context is 512"):
        answer_losses(tiny.model("llama"), [([1] * 510, [2, 3, 4])], 64)


# ---- records --------------------------------------------------------------------------------------------------------


def normalised(**fields: Any) -> tuple[str, Any]:
    return convert.normalise(RawRecord(Origin("t.jsonl", 3), fields))


@pytest.mark.parametrize(("answer", "right"), [(0, 0), (2, 2), ("blue", 1)])
def test_the_right_choice_is_named_by_number_or_text(answer: Any, right: int) -> None:
    choices = ["red", "blue", "green"]
    form, pair = normalised(question="the sky?", choices=choices, answer=answer, subject="colours")
    assert form == "choices"
    assert pair == convert.Pair("the sky?", choices[right], tuple(choices), right)
    assert normalised(prompt="the sky?", choices=choices, answer=answer)[1] == pair


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"answer": 3}, "answer: must be the text of a choice, or its number from 0 to 1, found 3"),
        ({"answer": -1}, "found -1"),
        ({"answer": True}, "found True"),
        ({"answer": "B"}, "found 'B'"),
        ({"answer": None}, "found None"),
        ({"choices": ["a"]}, "choices: must be a list of at least two texts, found 1 of them"),
        ({"choices": "a, b"}, "choices: must be a list of at least two texts, found"),
        ({"choices": ["a", 1]}, r"choices\[1\]: must be text, found"),
        ({"choices": ["a", " "]}, r"choices\[1\]: must be text, found an empty one"),
        ({"question": ""}, "question: record without a prompt"),
    ],
)
def test_choices_that_cannot_be_used(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        normalised(**{"question": "which?", "choices": ["a", "b"], "answer": 0, **fields})
    with pytest.raises(DataError, match="neither 'question' nor 'prompt'"):
        normalised(choices=["a", "b"], answer=0)


def test_choices_beside_an_answer_are_further_columns() -> None:
    form, pair = normalised(prompt="which?", completion="a", choices=["a", "b"], answer=0)
    assert form == "prompt_completion"
    assert pair == convert.Pair("which?", "a")


@pytest.mark.parametrize("name", ["commonsense_mc/arc_easy", "commonsense_mc/piqa", "mmlu/test"])
def test_public_sets_are_read_as_they_are(name: str) -> None:
    path = PUBLIC / f"{name}.jsonl"
    if not path.exists():
        pytest.skip(f"{name}.jsonl is not here")
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) >= 500
    for line in lines:
        row = json.loads(line)
        form, pair = normalised(**row)
        assert form == "choices"
        assert (pair.prompt, pair.completion) == (row["question"], row["choices"][row["answer"]])
