"""An evaluation that is killed goes on from the answers it has; its record is that of one that was not."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from staging import Staged, staged, write_case
from tiny import chat_rows, write_jsonl

from fullrank.evaluate import stage
from fullrank.generation.decode import Answer, greedy
from fullrank.run import read_json_lines

ITEMS = 6


class Killed(BaseException):
    """What no handler stops."""


@pytest.fixture
def case(tmp_path: Path, tiny_model_folder: Callable[..., Path]) -> Staged:
    write_jsonl(tmp_path / "test.jsonl", chat_rows(40)[-ITEMS:])
    tasks: dict[str, Any] = {"tasks": [{"metric": "exact_match"}], "max_new_tokens": 4}
    recipe = write_case(
        tmp_path, tiny_model_folder("llama"), rows=8, train={"epochs": 1}, evaluate=tasks, data={"test": "test.jsonl"}
    )
    found = staged(recipe)
    found.data(), found.plan(), found.train()
    return found


def counted(monkeypatch: pytest.MonkeyPatch, end: int | None = None) -> list[int]:
    """How many prompts each call was given; with `end`, the process dies after so many answers in all."""
    asked: list[int] = []
    answers = 0

    def watched(model: Any, prompts: Any, **arguments: Any) -> Iterator[Answer]:
        nonlocal answers
        asked.append(len(prompts))
        for answer in greedy(model, prompts, **arguments):
            if answers == end:
                raise Killed
            answers += 1
            yield answer

    monkeypatch.setattr(stage, "greedy", watched)
    return asked


def test_it_goes_on_from_the_answers_there_are(case: Staged, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = stage.stage(case.recipe, case.run, case.base)
    predictions = {path.name: path.read_bytes() for path in sorted(case.run.evaluate.glob("*.jsonl"))}
    assert len(predictions) == 2
    shutil.rmtree(case.run.evaluate)

    asked = counted(monkeypatch, end=ITEMS + 2)  # all of the base model's, two of the tuned one's
    with pytest.raises(Killed):
        stage.stage(case.recipe, case.run, case.base)
    assert asked == [ITEMS, ITEMS] and not case.run.evaluate.exists()
    (torn,) = case.run.root.rglob("test-tuned.jsonl")
    with torn.open("ab") as file:
        file.write(b'{"prompt": 5, "ans')  # as a power cut leaves it

    asked = counted(monkeypatch)
    again = stage.stage(case.recipe, case.run, case.base)
    assert asked == [0, ITEMS - 2]
    assert again.tests == whole.tests
    assert {path.name: path.read_bytes() for path in sorted(case.run.evaluate.glob("*.jsonl"))} == predictions
    assert not list(case.run.root.glob(".evaluate*")), "nothing is left of it"


def test_answers_to_something_else_are_not_taken_up(case: Staged, monkeypatch: pytest.MonkeyPatch) -> None:
    counted(monkeypatch, end=2)
    with pytest.raises(Killed):
        stage.stage(case.recipe, case.run, case.base)
    other = staged(case.run.root.parent.parent / "recipe.yaml", ["evaluate.max_new_tokens=5"])
    asked = counted(monkeypatch)
    card = stage.stage(other.recipe, case.run, case.base)
    assert asked == [ITEMS, ITEMS] and card.max_new_tokens == 5
    rows = read_json_lines(case.run.evaluate / "predictions-test-tuned.jsonl")
    assert len(rows) == ITEMS
