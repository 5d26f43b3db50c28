"""The general probe: its questions, and that a model's pick is the answer that transformers finds likeliest."""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fullrank.generation.probe import answered, questions
from fullrank.models.load import load_model, load_tokenizer
from fullrank.sequences.chat import ChatRenderer


def test_questions_are_whole() -> None:
    assert Counter(question.group for question in questions()) == dict.fromkeys(
        ("facts", "instructions", "arithmetic", "formats"), 30
    )
    for question in questions():
        assert len(question.answers) == len(set(question.answers)) == 4, question
        assert all(answer.strip() for answer in question.answers)
    assert len({question.prompt for question in questions()}) == len(questions())


@pytest.mark.parametrize("template", [True, False])
def test_the_likeliest_answer_is_picked(template: bool, tiny_model_folder: Callable[..., Path]) -> None:
    folder = tiny_model_folder("llama") if template else tiny_model_folder("llama", chat_template=None)
    model, tokenizer = load_model(folder, device=torch.device("cpu")).train(), load_tokenizer(folder)
    renderer = ChatRenderer(tokenizer, datetime.date(2025, 1, 1), "tiny")
    assert renderer.has_template == template
    asked = [*questions()[:6], *questions()[90:96]]
    found = answered(model, renderer, asked, 300)
    assert model.training
    model.eval()
    for question, one in zip(asked, found, strict=True):
        if template:
            turns = [{"role": "user", "content": question.prompt}]
            before = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
            prefix, space = tokenizer(before, add_special_tokens=False)["input_ids"], ""
        else:
            prefix, space = tokenizer(f"Question: {question.prompt}\nAnswer:")["input_ids"], " "
        losses = []
        for answer in question.answers:
            ids = tokenizer(space + answer, add_special_tokens=False)["input_ids"]
            labels = torch.tensor([[-100] * len(prefix) + ids])
            with torch.no_grad():
                losses.append(model(input_ids=torch.tensor([prefix + ids]), labels=labels).loss.item())
        assert one.is_right == (min(range(4), key=losses.__getitem__) == 0)
        assert one.loss / one.tokens == pytest.approx(losses[0], rel=1e-5)
