"""A small general probe: questions with four answers each, of which a model picks the one it finds likeliest.

Facts, instructions, arithmetic and formats, thirty of each (`probe.yaml`), written for this package: nothing is fetched, and no
fine-tuning data will hold them by accident. A model is not told the four answers; each is scored as what it would write after the
question, by the mean log-likelihood of its tokens (longer answers are not put at a disadvantage; Brown et al. 2020, section 2.4).
It says whether a model still knows and does what it did before, not how good a model is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import yaml
from transformers import PreTrainedModel

from fullrank.generation.likelihood import answer_losses
from fullrank.generation.samples import prompt_ids
from fullrank.sequences.chat import ChatRenderer


@dataclass(frozen=True)
class Question:
    """An item of the probe."""

    group: str
    prompt: str
    answers: tuple[str, ...]
    """The right one first."""


@dataclass(frozen=True)
class Answered:
    """What a model makes of a question."""

    is_right: bool
    """Whether the right answer is the likeliest."""
    loss: float
    """Of the right answer, nats."""
    tokens: int
    """Of the right answer."""


@cache
def questions() -> tuple[Question, ...]:
    """All of them."""
    groups = yaml.safe_load((files("fullrank.generation") / "probe.yaml").read_text(encoding="utf-8"))
    return tuple(Question(group, prompt, tuple(answers)) for group, items in groups.items() for prompt, *answers in items)


def answered(model: PreTrainedModel, renderer: ChatRenderer, asked: Sequence[Question], budget_tokens: int) -> list[Answered]:
    """What a model makes of each question.

    Args:
        model: in any mode; it is used in evaluation mode.
        renderer: of its tokenizer and chat template; a model without one is asked `Question: ...` and continues `Answer:`.
        asked: the questions.
        budget_tokens: most tokens of a row.
    """
    asked_ids = [pair for question in asked for pair in _ids(renderer, question)]
    sums = answer_losses(model, asked_ids, budget_tokens)
    found, first = [], 0
    for question in asked:
        own = sums[first : first + len(question.answers)]
        first += len(own)
        means = [loss / count for loss, count in own]
        found.append(Answered(means[0] < min(means[1:]), *own[0]))
    return found


def _ids(renderer: ChatRenderer, question: Question) -> list[tuple[list[int], list[int]]]:
    """(ids of the question, ids of an answer) of each answer; an answer's tokens are what would be written next."""
    if renderer.has_template:
        before, space = prompt_ids(renderer, question.prompt), ""
    else:
        before, space = renderer.text_ids(f"Question: {question.prompt}\nAnswer:"), " "
    return [(before, renderer.ids(space + answer)) for answer in question.answers]
