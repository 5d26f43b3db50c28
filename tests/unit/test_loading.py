"""YAML -> Recipe: positions, suggestions, overrides, the saved copy, the schema."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from fullrank.errors import DataError, RecipeError
from fullrank.loading import dump, load, schema
from fullrank.recipe import Recipe, Source, ValidationSplit

LEAST = "name: a\nmodel: {source: m}\ndata: {train: train.jsonl}\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with data files, apart from the working directory."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    home = tmp_path / "home"
    home.mkdir()
    for name in ("train.jsonl", "test.jsonl", "other.jsonl"):
        (home / name).write_text("{}\n", encoding="utf-8")
    return home


def written(folder: Path, text: str, *overrides: str) -> Recipe:
    path = folder / "recipe.yaml"
    path.write_text(textwrap.dedent(text), encoding="utf-8")
    return load(path, overrides).recipe


def refusal(folder: Path, text: str, *overrides: str) -> list[str]:
    """The lines of the error, the folder's name left out."""
    with pytest.raises(RecipeError) as caught:
        written(folder, text, *overrides)
    assert caught.value.exit_code == 2
    return caught.value.message.replace(f"{folder}/", "").splitlines()


# ---- positions and suggestions --------------------------------------------------------------------------------------


def test_all_problems_are_reported_at_once_with_their_lines_in_reading_order(folder: Path) -> None:
    found = refusal(
        folder,
        """\
        model: {source: m, trust_remote_code: true}
        data:
          train: train.jsonl
          validation: {ratio: 2}
          cutoff_len: 3
        train:
          lerning_rate: 2e-5
          optimizer: {learning_rate: 2e-5, lr: 3}
          schedule:
            name: cosin
        """,
    )
    assert found == [
        "recipe.yaml:1: name: is required",
        "recipe.yaml:1: model.trust_remote_code: unknown key: fullrank never runs code that comes with a model; "
        "use a model that transformers itself implements",
        "recipe.yaml:4: data.validation.ratio: input should be less than 1 (found 2)",
        "recipe.yaml:5: data.cutoff_len: unknown key; did you mean 'data.max_length'?",
        "recipe.yaml:7: train.lerning_rate: unknown key; did you mean 'train.optimizer.learning_rate'?",
        "recipe.yaml:8: train.optimizer.lr: unknown key; did you mean 'train.optimizer.learning_rate'?",
        "recipe.yaml:10: train.schedule.name: input should be 'cosine', 'linear' or 'constant' (found 'cosin')",
    ]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (
            "{train: train.jsonl, test: {seen: {path: test.jsonl, lmit: 3}}}",
            "data.test.seen.lmit: unknown key; did you mean 'limit'",
        ),
        ("{train: [train.jsonl, {path: x, limt: 3}]}", "data.train[1].limt: unknown key; did you mean 'limit'"),
        ("{train: [train.jsonl, {limit: 3}]}", "data.train[1]: a source has either `path` (a file) or `hub`"),
        (
            "{train: {path: train.jsonl, limit: 0}}",
            "data.train.limit: input should be greater than or equal to 1 (found 0)",
        ),
        ("{train: []}", "data.train: list should have at least 1 item"),
        ("{train: train.jsonl, validation: {ratio: 0.1, split: x}}", "data.validation.split: unknown key"),
        (
            "{train: train.jsonl, validation: {path: x, split: 3}}",
            "data.validation.split: input should be a valid string",
        ),
        ("{test: test.jsonl}", "data.train: is required"),
    ],
)
def test_paths_are_named_as_the_user_wrote_them(folder: Path, data: str, said: str) -> None:
    [found] = refusal(folder, f"name: a\nmodel: {{source: m}}\ndata: {data}\n")
    assert found.startswith(f"recipe.yaml:3: {said}")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("train: {optimizer: {betas: [0.9]}}", "train.optimizer.betas: too few values"),
        ("machine: {memory_limit: [8]}", "machine.memory_limit: input should be a valid string"),
        ("machine: {device: tpu}", "machine.device: input should be 'auto', 'cpu', 'cuda' or 'mps' (found 'tpu')"),
        ("evaluate: {tasks: [{metric: f1}, {metric: f2}]}", "evaluate.tasks[1].metric: input should be"),
        (
            "evaluate: {tasks: [{metric: acc_norm}]}",
            "evaluate.tasks[0].metric: input should be one of 'exact_match', 'f1', 'rouge_l', ",
        ),
        ("evaluate: {tasks: [{metric: f1, function: a.py:b}]}", "evaluate.tasks[0]: `function` belongs to metric: python, and"),
        (
            "evaluate: {tasks: [{metric: json_valid, schema: a}]}",
            "evaluate.tasks[0].schema: unknown key; did you mean 'json_schema'?",
        ),
        (
            "evaluate: {tasks: [{metric: f1, tests: [seen]}]}",
            "evaluate: tasks[0].tests: data.test has no set 'seen'; there are: none",
        ),
        ("eval_steps: 3", "eval_steps: unknown key; did you mean 'train.evaluate_every_steps'?"),
        ("trian: {}", "trian: unknown key; did you mean 'train'?"),
        ("warmup_ratio: 0.1", "warmup_ratio: unknown key; did you mean 'train.schedule.warmup_ratio'?"),
        ("zzz: 1", "zzz: unknown key; allowed here: name, model, data, train, evaluate, export, machine"),
        ("train: 3", "train: input should be a valid dictionary"),
    ],
)
def test_a_problem_says_what_was_found_and_what_is_allowed(folder: Path, line: str, said: str) -> None:
    assert refusal(folder, f"{LEAST}{line}\n")[0].startswith(f"recipe.yaml:4: {said}")


def test_a_missing_recipe_is_refused_with_its_neighbour(folder: Path) -> None:
    written(folder, LEAST)
    with pytest.raises(RecipeError, match=r"recpe\.yaml: no such recipe; did you mean .*/recipe\.yaml\?"):
        load(folder / "recpe.yaml")


# ---- YAML -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "meant"),
    [
        ("2e-5", 2e-5),
        ("2E-5", 2e-5),
        ("2.e-5", 2e-5),
        (".5", 0.5),
        ("1", 1.0),
        ("+1e-3", 1e-3),
        ("0x10", 16.0),
        ("010", 10),
    ],
)
def test_numbers_are_numbers(folder: Path, value: str, meant: float) -> None:
    assert written(folder, f"{LEAST}train: {{optimizer: {{learning_rate: {value}}}}}").train.optimizer.learning_rate == meant


@pytest.mark.parametrize("word", ["no", "yes", "on", "off", "y", "n", "NO", "12:30", "1_000", "2026-01-01", "0b1"])
def test_words_are_words(folder: Path, word: str) -> None:
    recipe = written(folder, f"{LEAST}evaluate: {{base_instructions: {word}, tasks: [{{metric: f1, none: {word}}}]}}")
    assert recipe.evaluate.base_instructions == recipe.evaluate.tasks[0].none == word


@pytest.mark.parametrize("null", ["null", "~", "", "Null"])
def test_null_switches_off(folder: Path, null: str) -> None:
    assert written(folder, f"{LEAST}train:\n  max_grad_norm: {null}\n").train.max_grad_norm is None


def test_dates_are_dates(folder: Path) -> None:
    text = "name: a\nmodel: {source: m}\ndata: {train: train.jsonl, template_date: 2026-02-03}\n"
    assert written(folder, text).data.template_date.isoformat() == "2026-02-03"


def test_keys_written_twice_are_all_named(folder: Path) -> None:
    assert refusal(folder, "name: a\nmodel:\n  source: x\n  source: y\nname: b\n") == [
        "recipe.yaml:4: model.source: written twice, first at recipe.yaml:3",
        "recipe.yaml:5: name: written twice, first at recipe.yaml:1",
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "recipe.yaml:1: a recipe is a mapping of keys, found an empty file"),
        ("# nothing\n", "recipe.yaml:1: a recipe is a mapping of keys, found an empty file"),
        ("- a\n", "recipe.yaml:1: a recipe is a mapping of keys, found a list"),
        ("name: a\n  b: c\n", "recipe.yaml:2: not valid YAML"),
        ("name: [a\n", "recipe.yaml:2: not valid YAML"),
        ("name: a\n---\nname: b\n", "recipe.yaml:2: not valid YAML"),
        ("name: !!python/object:os.system a\n", "recipe.yaml:1: not valid YAML: could not determine a constructor"),
        ("name: &a {b: *a}\n", "recipe.yaml: an alias (*name) stands inside what it names"),
        (f"name: {'9' * 5000}\n", "recipe.yaml: not valid YAML"),
        ("name: a\nb: \x07\n", "recipe.yaml:2: not valid YAML: the character '\\x07' is not allowed"),
    ],
)
def test_what_is_no_recipe_is_refused(folder: Path, text: str, said: str) -> None:
    [found] = [line for line in refusal(folder, text) if line.startswith("recipe.yaml")]
    assert found.startswith(said)


def test_a_recipe_that_is_not_text_is_refused(folder: Path) -> None:
    (folder / "recipe.yaml").write_bytes(b"name: \xff")
    with pytest.raises(RecipeError, match="cannot be read"):
        load(folder / "recipe.yaml")
    with pytest.raises(RecipeError, match="cannot be read"):
        load(folder)


def test_a_byte_order_mark_is_no_problem(folder: Path) -> None:
    assert written(folder, "\ufeff" + LEAST).name == "a"


# ---- overrides ------------------------------------------------------------------------------------------------------


def test_overrides_are_read_as_yaml_and_go_over_the_file(folder: Path) -> None:
    text = f"{LEAST}train: {{optimizer: {{learning_rate: 1}}, epochs: 2}}\n"
    overrides = (
        "train.optimizer.learning_rate=1e-5",
        "train.early_stopping.patience=2",
        "train.max_grad_norm=null",
        "data.validation=other.jsonl",
        "data.test={seen: test.jsonl}",
        "evaluate.tasks=[{metric: f1, pattern: 'a=(b)'}]",
        "name=b",
    )
    recipe = written(folder, text, *overrides)
    assert recipe.train.optimizer.learning_rate == 1e-5
    assert recipe.train.epochs == 2
    assert recipe.train.early_stopping is not None and recipe.train.early_stopping.patience == 2
    assert recipe.train.max_grad_norm is None
    assert recipe.data.validation == [Source(path=str(folder / "other.jsonl"))]
    assert recipe.data.test == {"seen": [Source(path=str(folder / "test.jsonl"))]}
    assert recipe.evaluate.tasks[0].pattern == "a=(b)"
    assert recipe.name == "b"
    assert load(folder / "recipe.yaml", overrides).overrides == overrides


@pytest.mark.parametrize(
    ("written_as", "meant"), [("acc_norm", "choice"), ("BLUE", "bleu"), ("json_field", "json_fields"), ("gsm8k", "numeric")]
)
def test_a_word_for_a_metric_is_answered_with_the_nearest_one(folder: Path, written_as: str, meant: str) -> None:
    [said] = refusal(folder, f"{LEAST}evaluate: {{tasks: [{{metric: {written_as}}}]}}\n")
    assert said.endswith(f"; did you mean '{meant}'? (found '{written_as}')")


def test_files_of_a_task_are_found_beside_the_recipe(folder: Path) -> None:
    tasks = "[{metric: json_valid, json_schema: a.json}, {metric: python, function: 'own/grade.py:tone'}]"
    with pytest.raises(DataError) as raised:
        written(folder, f"{LEAST}evaluate:\n  tasks: {tasks}\n")
    assert "recipe.yaml:5: evaluate.tasks[0].json_schema: file not found: a.json" in raised.value.message
    assert "recipe.yaml:5: evaluate.tasks[1].function: file not found: own/grade.py" in raised.value.message
    (folder / "own").mkdir()
    (folder / "own" / "grade.py").touch()
    (folder / "a.json").touch()
    first, second = written(folder, f"{LEAST}evaluate:\n  tasks: {tasks}\n").evaluate.tasks
    assert first.json_schema == str(folder / "a.json")
    assert second.function == f"{folder / 'own' / 'grade.py'}:tone"
    assert second.key == "tone"


def test_an_override_takes_the_place_of_a_short_form(folder: Path) -> None:
    text = "name: a\nmodel: {source: m}\ndata: {train: train.jsonl, validation: other.jsonl}\n"
    assert written(folder, text, "data.validation.ratio=0.2").data.validation == ValidationSplit(ratio=0.2)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.epochs", "an override is key.path=value"),
        ("train..epochs=1", "an override is key.path=value"),
        ("=1", "an override is key.path=value"),
        ("train.epochs=[", "the value is not valid YAML"),
        ("train.epoch=3", "train.epoch: unknown key; did you mean 'epochs'?"),
        ("lr=3", "lr: unknown key; did you mean 'train.optimizer.learning_rate'?"),
        ("train.epochs=-1", "train.epochs: input should be greater than 0 (found -1)"),
    ],
)
def test_a_wrong_override_is_named(folder: Path, override: str, said: str) -> None:
    [found] = refusal(folder, LEAST, override)
    assert found.startswith(f"override {override!r}: {said}")


def test_a_wrong_override_does_not_hide_the_files_problems(folder: Path) -> None:
    found = refusal(folder, f"{LEAST}zzz: 1\n", "train.epochs")
    assert [line.split(":")[0] for line in found] == ["override 'train.epochs'", "recipe.yaml"]


# ---- paths ----------------------------------------------------------------------------------------------------------


def test_data_is_looked_for_beside_the_recipe_then_in_the_working_directory(folder: Path) -> None:
    here = Path.cwd()
    (here / "train.jsonl").write_text("{}", encoding="utf-8")
    (here / "here.jsonl").write_text("{}", encoding="utf-8")
    recipe = written(folder, "name: a\nmodel: {source: m}\ndata: {train: [train.jsonl, here.jsonl, {hub: org/set}]}\n")
    assert recipe.data.train == [
        Source(path=str(folder / "train.jsonl")),
        Source(path=str(here / "here.jsonl")),
        Source(hub="org/set"),
    ]


def test_all_missing_files_are_named_at_once(folder: Path) -> None:
    with pytest.raises(DataError) as caught:
        written(
            folder,
            """\
            name: a
            model: {source: m}
            data:
              train: gone.jsonl
              validation: lost.jsonl
              test: {seen: test.jsonl, unseen: away.jsonl}
              chat_template: chat.jinja
            """,
        )
    assert caught.value.exit_code == 3
    lines = caught.value.message.splitlines()
    for line, number, name in zip(lines, (4, 5, 6, 7), ("gone.jsonl", "lost.jsonl", "away.jsonl", "chat.jinja"), strict=True):
        assert line.startswith(f"{folder}/recipe.yaml:{number}: data.")
        assert f"file not found: {name} (looked for {folder / name} and {Path.cwd() / name})" in line


def test_a_model_folder_becomes_absolute_and_a_name_stays(folder: Path) -> None:
    (folder / "org" / "model").mkdir(parents=True)
    assert written(folder, LEAST.replace("source: m", "source: org/model")).model.source == str(folder / "org/model")
    assert written(folder, LEAST.replace("source: m", "source: org/other")).model.source == "org/other"


# ---- the saved copy -------------------------------------------------------------------------------------------------

FULL = """\
name: '1e5'
model: {source: org/model, revision: '0o17'}
data:
  train: [train.jsonl, {hub: org/set, split: 'no', limit: 3}]
  validation: {ratio: 0.25}
  test: {seen: test.jsonl, 'true': {path: other.jsonl, limit: 1}}
  too_long: chunk
  template_date: 2026-02-03
train:
  epochs: 0.5
  optimizer: {learning_rate: 1e-7, betas: [0, 0.5], eps: 1e-30}
  max_grad_norm: null
  early_stopping: {patience: 2}
evaluate:
  tasks: [{metric: f1, name: codes, pattern: "^\\u00fc: (.*)$", separator: "\\n", none: '2e-5'}]
  base_instructions: "two\\nlines: # and \\u2028 more \\t"
machine: {memory_limit: 8GB}
"""


@pytest.mark.parametrize("text", [LEAST, FULL])
def test_the_saved_copy_loads_as_the_same_recipe(folder: Path, text: str) -> None:
    recipe = written(folder, text)
    assert written(folder, dump(recipe)) == recipe


def test_the_saved_copy_means_the_same_to_any_yaml_reader(folder: Path) -> None:
    recipe = written(folder, FULL)
    document = yaml.safe_load(dump(recipe))
    assert document["name"] == "1e5"
    assert document["data"]["train"][1]["split"] == "no"
    assert Recipe.model_validate(document) == recipe


def test_the_saved_copy_writes_every_default_out(folder: Path) -> None:
    assert yaml.safe_load(dump(written(folder, LEAST)))["train"]["schedule"]["min_lr_ratio"] == 0.1


# ---- the schema -----------------------------------------------------------------------------------------------------


def _without_description(node: Any, sections: dict[str, Any], path: str = "") -> Iterator[str]:
    """Paths of the properties below a schema node that say nothing about themselves, nor their sections for them."""
    if isinstance(node, dict):
        for name, below in node.get("properties", {}).items():
            section = sections.get(below.get("$ref", "").removeprefix("#/$defs/"), {})
            if not below.get("description") and not section.get("description"):
                yield f"{path}.{name}"
        for key, below in node.items():
            yield from _without_description(below, sections, f"{path}.{key}")


def test_the_schema_is_json_schema_and_describes_every_field() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator.check_schema(schema())
    assert list(_without_description(schema(), schema()["$defs"])) == []


@pytest.mark.parametrize(
    "text",
    [
        LEAST,
        "name: a\nmodel: {source: m}\ndata: {train: {hub: x}, validation: v.jsonl, test: t.jsonl}",
        "name: a\nmodel: {source: m}\ndata: {train: [a, {path: b}], validation: [v], test: {seen: a, b: [c]}}",
        "name: a\nmodel: {source: m}\ndata: {train: a, validation: {ratio: 0.1}, test: {path: t}}",
    ],
)
def test_what_loads_is_valid_under_the_schema(text: str) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    document = yaml.safe_load(text)
    Recipe.model_validate(document)
    jsonschema.validate(document, schema())
    document["train"] = {"lr": 1}
    with pytest.raises(jsonschema.ValidationError, match="'lr' was unexpected"):
        jsonschema.validate(document, schema())
