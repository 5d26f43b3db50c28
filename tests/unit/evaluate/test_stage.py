"""What a model is asked of each test set, and what is told before anything is trained, on a tiny model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from staging import Staged, staged, write_case
from tiny import write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

from fullrank.errors import DataError, UsageError
from fullrank.evaluate import stage as room
from fullrank.evaluate.answers import KeptAnswers
from fullrank.records import DataCard, Plan
from fullrank.run import need_record, read_json_lines

CHOICES = [
    {"question": f"what is the colour of sky {n}", "choices": ["blue", "a dark green", "red"], "answer": n % 3} for n in range(4)
]
SUMS = [{"prompt": f"what is {n} and {n}", "completion": f"it is {2 * n}"} for n in range(3)]
OWN = "def shorter(references, answers, prompts):\n    return [float(len(a) < len(p)) for a, p in zip(answers, prompts)]\n"


def case(folder: Path, model: Path, tasks: list[dict[str, Any]], **tests: list[dict[str, Any]]) -> Staged:
    """A recipe with these tasks and test sets, its data prepared."""
    for name, rows in tests.items():
        write_jsonl(folder / f"{name}.jsonl", rows)
    (folder / "own.py").write_text(OWN, encoding="utf-8")
    named = {name: f"{name}.jsonl" for name in tests}
    path = write_case(folder, model, data={"test": named}, evaluate={"tasks": tasks, "max_new_tokens": 4})
    found = staged(path)
    found.data()
    return found


def measured(found: Staged) -> dict[str, Any]:
    """The base model on every test set, with the base's folder in the place of an export."""
    found.plan()
    shutil.copytree(found.base.folder, found.run.model, dirs_exist_ok=True)
    plan, data = need_record(found.run.plan_path, Plan, "plan"), need_record(found.run.data / "card.json", DataCard, "data")
    kept = KeptAnswers(found.run.root / ".evaluate.answers", "these")
    return room._Evaluation(found.recipe, found.run, found.base, plan, kept, stop_ids=data.stop_ids).measure("base")


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Callable[..., Path]) -> tuple[Staged, dict[str, Any]]:
    tasks = [
        {"metric": "choice"},
        {"metric": "numeric", "tests": ["sums"]},
        {"metric": "python", "function": "own.py:shorter", "tests": ["sums"]},
    ]
    found = case(tmp_path_factory.mktemp("both"), tiny_model_folder("llama"), tasks, colours=CHOICES, sums=SUMS)
    room.rehearse(found.recipe, found.run)
    return found, measured(found)


def test_each_set_has_the_tasks_that_are_meant(both: tuple[Staged, dict[str, Any]]) -> None:
    results = both[1]
    assert list(results["colours"].scores) == ["choice", "choice_per_token"]
    assert list(results["sums"].scores) == ["numeric", "shorter"]
    assert not results["colours"].generated and results["sums"].generated
    for result in results["sums"].predictions:  # the prompt that the function is told is the user's turn
        assert result.scores["shorter"] == float(len(result.answer) < len("what is 0 and 0"))
        assert result.choices is None


def test_choices_have_the_likelihoods_that_transformers_gives_them(both: tuple[Staged, dict[str, Any]]) -> None:
    found, results = both
    tokenizer: Any = AutoTokenizer.from_pretrained(found.base.folder)
    model = AutoModelForCausalLM.from_pretrained(found.base.folder).eval()
    assert len(results["colours"].predictions) == len(CHOICES)
    for row, result in zip(CHOICES, results["colours"].predictions, strict=True):
        turns = [{"role": "user", "content": row["question"]}]
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        assert result.prompt == prompt
        sums = []
        for option, text in zip(result.choices, row["choices"], strict=True):
            ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
            answer = tokenizer(text, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logits = model(torch.tensor([ids + answer])).logits[0].double()
            rows = torch.log_softmax(logits[len(ids) - 1 : -1], dim=-1)
            sums.append(float(rows[torch.arange(len(answer)), torch.tensor(answer)].sum()))
            assert (option.text, option.tokens) == (text, len(answer))
            assert option.log_likelihood == pytest.approx(sums[-1], rel=1e-4)  # fp32 against sums in float64
        per_byte = [value / len(text) for value, text in zip(sums, row["choices"], strict=True)]
        best = row["choices"][per_byte.index(max(per_byte))]
        assert result.answer == best
        assert result.scores["choice"] == float(best == result.reference)
        assert result.reference == row["choices"][row["answer"]]


def test_the_tokens_of_a_choice_are_those_that_training_learns(both: tuple[Staged, dict[str, Any]]) -> None:
    from fullrank.sequences.chat import ChatRenderer

    data = both[0].recipe.data
    renderer = ChatRenderer(tiny.tokenizer(), data.template_date, "tiny")
    turns = [{"role": "user", "content": "the colour"}]
    for text in ("blue", " blue", "two words\n"):
        learned = renderer.examples([*turns, {"role": "assistant", "content": text}])[0]
        ids = [*renderer.prompt_ids(turns), *renderer.answer_ids(renderer.prompt(turns), text)]
        assert learned.ids[: len(ids)] == ids


def test_a_generated_answer_stands_beside_the_choices(tmp_path: Path, tiny_model_folder: Callable[..., Path]) -> None:
    found = case(tmp_path, tiny_model_folder("llama"), [{"metric": "choice"}, {"metric": "exact_match"}], colours=CHOICES[:2])
    result = measured(found)["colours"]
    assert list(result.scores) == ["choice", "choice_per_token", "exact_match"]
    assert result.generated
    assert all(len(prediction.choices) == 3 for prediction in result.predictions)


@pytest.mark.parametrize(
    ("tasks", "tests", "said"),
    [
        ([{"metric": "choice"}], {"sums": SUMS}, r"data\.test\.sums: no task of the recipe measures it"),
        ([{"metric": "choice"}, {"metric": "numeric"}], {"sums": SUMS}, "task choice: no test record has choices"),
        ([{"metric": "choice"}], {"mixed": [*CHOICES, *SUMS]}, r"mixed\.jsonl:5: task choice: the record has no choices"),
        ([{"metric": "numeric"}], {"colours": CHOICES}, "there is no number in the reference 'blue'"),
    ],
)
def test_what_cannot_be_measured_is_told_before_training(
    tmp_path: Path, tiny_model_folder: Callable[..., Path], tasks: list[dict[str, Any]], tests: dict[str, Any], said: str
) -> None:
    found = case(tmp_path, tiny_model_folder("llama"), tasks, **tests)
    with pytest.raises(DataError, match=said):
        room.rehearse(found.recipe, found.run)


def test_a_function_that_fails_is_told_before_training(tmp_path: Path, tiny_model_folder: Callable[..., Path]) -> None:
    tasks = [{"metric": "python", "function": "own.py:shorter", "range": [2, 3]}]
    found = case(tmp_path, tiny_model_folder("llama"), tasks, sums=SUMS)
    with pytest.raises(UsageError, match=r"returned 1\.0 for item 1 of 3 \(.*sums\.jsonl:1\); each must be a number from 2 to 3"):
        room.rehearse(found.recipe, found.run)


def test_test_items_hold_their_choices(both: tuple[Staged, dict[str, Any]]) -> None:
    items = list(read_json_lines(both[0].run.data / "tests" / "colours.jsonl"))
    assert [item["choices"] for item in items] == [row["choices"] for row in CHOICES]
    assert json.loads((both[0].run.data / "card.json").read_text())["tests"]["colours"]["examples"] == len(CHOICES)
