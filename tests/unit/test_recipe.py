"""The recipe's words: defaults, refusals, and that every one of them is documented."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import ValidationError

from fullrank.recipe import (
    ALIASES,
    REFUSED,
    AdamW,
    Data,
    EarlyStopping,
    Recipe,
    Section,
    Source,
    Task,
    Train,
    ValidationSplit,
)

LEAST: dict[str, Any] = {"name": "a", "model": {"source": "m"}, "data": {"train": "t.jsonl"}}


def sections(section: type[Section] = Section) -> Iterator[type[Section]]:
    for below in section.__subclasses__():
        yield below
        yield from sections(below)


def problems(section: type[Section], **fields: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        section(**fields)
    return str(caught.value)


def test_name_model_and_training_data_are_enough() -> None:
    recipe = Recipe.model_validate(LEAST)
    assert recipe.data.train == [Source(path="t.jsonl")]
    assert recipe.data.validation == ValidationSplit(ratio=0.1)
    assert recipe.train.optimizer.learning_rate == 2e-5


@pytest.mark.parametrize("section", list(sections()), ids=lambda section: section.__name__)
def test_every_section_and_field_is_documented(section: type[Section]) -> None:
    assert section.__doc__
    assert [name for name, field in section.model_fields.items() if not field.description] == []


@pytest.mark.parametrize(
    ("section", "fields"),
    [(Recipe, LEAST), (EarlyStopping, {"patience": 1}), (Source, {"path": "a"}), (Task, {"metric": "f1"})],
)
def test_defaults_are_valid_when_written_out(section: type[Section], fields: dict[str, Any]) -> None:
    filled = section.model_validate(fields)
    assert section.model_validate(filled.model_dump()) == filled


@pytest.mark.parametrize("section", list(sections()), ids=lambda section: section.__name__)
def test_unknown_keys_are_refused(section: type[Section]) -> None:
    assert "Extra inputs are not permitted" in problems(section, unheard_of=1)


def test_a_recipe_does_not_change() -> None:
    recipe = Recipe.model_validate(LEAST)
    with pytest.raises(ValidationError, match="frozen"):
        recipe.name = "b"


@pytest.mark.parametrize("target", sorted(set(ALIASES.values())), ids=str)
def test_every_alias_points_at_a_key_there_is(target: str) -> None:
    section: Any = Recipe
    for part in target.split("."):
        assert part in section.model_fields, f"{target}: no key {part}"
        inner = section.model_fields[part].annotation
        candidates = [inner, *getattr(inner, "__args__", ())]
        section = next((c for c in candidates if isinstance(c, type) and issubclass(c, Section)), None)


def test_no_alias_is_a_key_and_no_refused_key_an_alias() -> None:
    keys = {name for section in sections() for name in section.model_fields}
    assert not keys & REFUSED.keys()
    assert not ALIASES.keys() & REFUSED.keys()


# ---- data -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("a.jsonl", [Source(path="a.jsonl")]),
        ({"path": "a.csv", "limit": 3}, [Source(path="a.csv", limit=3)]),
        (
            ["a.jsonl", {"hub": "org/set", "split": "test"}],
            [Source(path="a.jsonl"), Source(hub="org/set", split="test")],
        ),
    ],
)
def test_sources_have_short_forms(written: Any, meant: list[Source]) -> None:
    data = Data.model_validate({"train": written, "validation": written, "test": written})
    assert data.train == data.validation == data.test["test"] == meant


def test_test_sets_may_have_names() -> None:
    data = Data.model_validate({"train": "t", "test": {"seen": "a", "unseen": ["b", {"path": "c"}]}})
    assert data.test == {"seen": [Source(path="a")], "unseen": [Source(path="b"), Source(path="c")]}


@pytest.mark.parametrize("fields", [{}, {"path": "a", "hub": "b"}])
def test_a_source_is_a_file_or_a_hub_dataset(fields: dict[str, str]) -> None:
    assert "either `path` (a file) or `hub`" in problems(Source, **fields)


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.1, 2])
def test_a_validation_ratio_leaves_something_on_both_sides(ratio: float) -> None:
    assert "ratio" in problems(Data, train="t", validation={"ratio": ratio})


# ---- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "fields"),
    [
        (AdamW, {"learning_rate": 0}),
        (AdamW, {"learning_rate": float("nan")}),
        (AdamW, {"learning_rate": float("inf")}),
        (AdamW, {"betas": [0.9, 1.0]}),
        (AdamW, {"betas": [-0.1, 0.9]}),
        (AdamW, {"betas": [0.9]}),
        (AdamW, {"weight_decay": -1}),
    ],
)
def test_numbers_outside_their_range_are_refused(section: type[Section], fields: dict[str, Any]) -> None:
    assert next(iter(fields)) in problems(section, **fields)


@pytest.mark.parametrize("epochs", [0, -1, float("inf"), float("nan")])
def test_epochs_are_finite_and_more_than_none(epochs: float) -> None:
    assert "train.epochs" in problems(Recipe, **LEAST, train={"epochs": epochs})


@pytest.mark.parametrize("name", ["", "a b", "../a", ".a", "a/b", "a\n"])
def test_a_name_that_is_no_folder_name_is_refused(name: str) -> None:
    assert "name" in problems(Recipe, **{**LEAST, "name": name})


@pytest.mark.parametrize("size", ["8XB", "much"])
def test_a_memory_limit_is_a_size(size: str) -> None:
    assert "is not a size" in problems(Recipe, **LEAST, machine={"memory_limit": size})


# ---- tasks ----------------------------------------------------------------------------------------------------------


def test_a_task_is_named_after_its_metric_unless_named() -> None:
    assert Task(metric="f1").key == "f1"
    assert Task(metric="f1", name="codes").key == "codes"


def test_the_scores_of_a_task_are_named() -> None:
    assert Task(metric="json_fields").keys == ["json_fields", "json_fields_whole"]
    assert Task(metric="choice", name="quiz").keys == ["quiz", "quiz_per_token"]
    assert Task(metric="python", function="a/b.py:tone").keys == ["tone"]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"metric": "python"}, "metric: python needs `function`"),
        ({"metric": "python", "function": "grade.py"}, "a function is named as path/to/file.py:name"),
        ({"metric": "python", "function": "grade:tone"}, "a function is named as path/to/file.py:name"),
        ({"metric": "python", "function": "grade.py:Tone"}, "the function's name 'Tone' cannot name a score"),
        ({"metric": "python", "function": "grade.py:tone", "range": [1, 1]}, "the lowest must be the smaller"),
        ({"metric": "f1", "range": [0, 2]}, "`range` belongs to metric: python, and the metric is f1"),
        ({"metric": "chrf", "tokenize": "zh"}, "`tokenize` belongs to metric: bleu"),
        ({"metric": "json_fields", "json_schema": "a"}, "`json_schema` belongs to metric: json_valid"),
        ({"metric": "choice", "pattern": "(a)"}, "generates no answer to match `pattern`"),
        ({"metric": "f1", "tests": []}, "tests"),
    ],
)
def test_keys_of_a_task_belong_to_its_metric(keys: dict[str, Any], said: str) -> None:
    assert said in problems(Task, **keys)


def test_a_task_names_test_sets_that_there_are() -> None:
    task = {"metric": "choice", "tests": ["quizz"]}
    data = {"train": "a", "test": {"quiz": "b"}}
    assert "data.test has no set 'quizz'; did you mean 'quiz'?" in problems(
        Recipe, **{**LEAST, "data": data}, evaluate={"tasks": [task]}
    )


@pytest.mark.parametrize(("pattern", "said"), [("a.*", "needs a group"), ("(", "not a regular expression")])
def test_a_pattern_is_a_regular_expression_with_a_group(pattern: str, said: str) -> None:
    assert said in problems(Task, metric="f1", pattern=pattern)


def test_an_empty_separator_is_refused() -> None:
    assert "separator" in problems(Task, metric="f1", separator="")


@pytest.mark.parametrize(
    "tasks",
    [
        [{"metric": "f1"}, {"metric": "f1", "pattern": "(a)"}],
        [{"metric": "f1"}, {"metric": "rouge_l", "name": "f1"}],
        [{"metric": "f1"}, {"metric": "rouge_l", "name": "f1_macro"}],
    ],
)
def test_no_two_scores_have_one_name(tasks: list[dict[str, str]]) -> None:
    assert "are named 'f1" in problems(Recipe, **LEAST, evaluate={"tasks": tasks})


# ---- optimizers -----------------------------------------------------------------------------------------------------


def test_an_optimizer_is_one_of_those_there_are() -> None:
    assert "there is no optimizer 'sgd' here; allowed: adamw, muon" in problems(Train, optimizer={"name": "sgd"})


def test_weights_of_16_bits_without_care_are_refused_with_the_reason() -> None:
    for precision in ("bf16", "bfloat16"):
        assert "half a unit in the last place" in problems(Train, precision=precision)
    with pytest.raises(ValidationError, match="bf16-nearest with adamw would learn next to nothing"):
        Train(precision="bf16-nearest")
    assert Train(precision="bf16-nearest", optimizer={"name": "lomo"}).precision == "bf16-nearest"


def test_adalomo_is_not_clipped_unless_asked() -> None:
    assert Train().clip_norm == 1.0 and Train(optimizer={"name": "adalomo"}).clip_norm is None
    assert Train(optimizer={"name": "adalomo"}, max_grad_norm=2.0).clip_norm == 2.0
    assert "max_grad_norm" in problems(Train, max_grad_norm=0.0)


def test_fused_rules_release_their_gradients() -> None:
    recipe = {"name": "a", "model": {"source": "a"}, "data": {"train": "a"}, "train": {"optimizer": {"name": "lomo"}}}
    assert Recipe.model_validate(recipe).gradients == "release"
    with pytest.raises(ValidationError, match="lomo is fused into the backward pass"):
        Recipe.model_validate(recipe | {"machine": {"gradients": "keep"}})
