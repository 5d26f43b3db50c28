"""Wrong input, typed as a user types it: one clear message, the right exit code, and nothing half-written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from staging import leftovers, write_case, write_lines
from tiny import chat_rows, write_jsonl


def fullrank(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "fullrank", *arguments],
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )


@pytest.fixture
def case(tmp_path: Path, tiny_model_folder: Callable[..., Path]) -> Path:
    return write_case(tmp_path, tiny_model_folder("llama"))


def refused(case: Path, code: int, *overrides: str, verb: str = "run") -> str:
    """Runs a verb that must fail: the words of its one error."""
    done = fullrank(verb, case.name, *overrides, cwd=case.parent)
    assert done.returncode == code, done.stderr
    assert done.stdout == "" and "Traceback" not in done.stderr
    assert done.stderr.count("error: ") == 1
    runs = case.parent / "runs"
    assert leftovers(runs) == [] and not list(runs.glob("*/model")) and not list(runs.glob("*/train"))
    return done.stderr[done.stderr.index("error: ") :]


def edit(case: Path, section: str, key: str, value: object) -> int:
    """Sets a key of the recipe; the line on which it then stands."""
    document = json.loads(case.read_text(encoding="utf-8"))
    document[section][key] = value
    case.write_text(json.dumps(document, indent=1), encoding="utf-8")
    return next(n for n, line in enumerate(case.read_text(encoding="utf-8").splitlines(), 1) if f'"{key}"' in line)


# ---- recipe and usage -----------------------------------------------------------------------------------------------


def test_a_misspelt_key(case: Path) -> None:
    line = edit(case, "train", "lerning_rate", 1e-5)
    words = refused(case, 2)
    assert f"recipe.yaml:{line}: train.lerning_rate: unknown key; did you mean 'train.optimizer.learning_rate'?" in words
    assert not (case.parent / "runs").exists()


def test_every_problem_of_a_recipe_at_once(case: Path) -> None:
    lines = [edit(case, "data", "too_long", "cut"), edit(case, "train", "lr", 1e-5)]  # in the order of the file
    words = refused(case, 2, "train.epochs=no")
    assert f"recipe.yaml:{lines[0]}: data.too_long" in words and f"recipe.yaml:{lines[1]}: train.lr" in words
    assert "override 'train.epochs=no'" in words


def test_no_such_recipe(case: Path) -> None:
    words = refused(case.with_name("recipes.yaml"), 2)
    assert "recipes.yaml: no such recipe; did you mean recipe.yaml?" in words and "fullrank init" in words


def test_no_such_run(case: Path) -> None:
    for arguments in (("report", "nothing"), ("chat", "nothing", "-m", "hello")):
        done = fullrank(*arguments, cwd=case.parent)
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
        assert "error: no run 'nothing' in runs (runs there: none)" in done.stderr


def test_no_such_verb_or_option(case: Path) -> None:
    for arguments in (("trane", "recipe.yaml"), ("run", "recipe.yaml", "--gpu")):
        done = fullrank(*arguments, cwd=case.parent)
        assert (
            done.returncode == 2
            and "Traceback" not in done.stderr
            and arguments[-1 if "--" in arguments[-1] else 0] in done.stderr
        )


# ---- model ----------------------------------------------------------------------------------------------------------


def test_an_unknown_model(case: Path) -> None:
    words = refused(case, 2, "model.source=smollm2-135m-instruc")
    assert "smollm2-135m-instruc" in words and "did you mean 'smollm2-135m-instruct'?" in words


def test_a_model_of_pickles(case: Path) -> None:
    folder = case.parent / "pickled"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    assert "pickles (pytorch_model.bin)" in refused(case, 2, "model.source=pickled")


def test_devices_that_cannot_be_simulated(case: Path) -> None:
    simulate = ("simulate", case.name)
    for options, told in (
        (("--device", "h100"), "there is no device 'h100'; did you mean 'h100-sxm'?"),
        (("--assume", "reached=0.5"), "there is no 'reached' to assume; did you mean 'reached_ratio'?"),
        (("--price-per-hour", "-1"), "price_per_hour: -1.0: "),
        (("--model", "lama-3.1-70b"), "did you mean 'llama-3.1-70b'?"),
    ):
        done = fullrank(*simulate, *options, cwd=case.parent)
        assert done.returncode == 2 and "Traceback" not in done.stderr and done.stdout == "", done.stderr
        assert told in done.stderr and done.stderr.count("error: ") == 1
        assert not list((case.parent / "runs").glob("*/simulation.json"))


# ---- data -----------------------------------------------------------------------------------------------------------


def test_a_missing_data_file(case: Path) -> None:
    line = edit(case, "data", "validation", "validatoin.jsonl")
    words = refused(case, 3)
    assert f"recipe.yaml:{line}: data.validation: file not found: validatoin.jsonl" in words
    assert not (case.parent / "runs").exists()


def test_a_bad_line_of_json(case: Path) -> None:
    rows = [json.dumps(row) for row in chat_rows(3)]
    write_lines(case.parent / "train.jsonl", [rows[0], rows[1][:-2], rows[2]])
    assert f"{case.parent / 'train.jsonl'}:2: not valid JSON" in refused(case, 3)


def test_an_empty_file(case: Path) -> None:
    (case.parent / "train.jsonl").write_text("", encoding="utf-8")
    assert f"{case.parent / 'train.jsonl'}: holds no records" in refused(case, 3)


def test_a_record_without_an_answer(case: Path) -> None:
    question = {"messages": [{"role": "user", "content": "and the sky"}]}
    write_jsonl(case.parent / "train.jsonl", [*chat_rows(2), question])
    words = refused(case, 3)
    assert f"{case.parent / 'train.jsonl'}:3: messages: record without an answer" in words


def test_a_record_that_is_too_long(case: Path) -> None:
    words = refused(case, 3, "data.max_length=50", verb="plan")
    assert f"{case.parent / 'train.jsonl'}:1: " in words and "data.max_length is 50 and data.too_long is error" in words
    assert "  -> raise data.max_length (up to the model's context), or say data.too_long: drop" in words


def test_an_answer_that_is_cut_away(case: Path) -> None:
    rows = chat_rows(3)
    rows[1]["messages"][0]["content"] = "and so on" * 50
    write_jsonl(case.parent / "train.jsonl", rows)
    words = refused(case, 3, "data.too_long=truncate")
    assert f"{case.parent / 'train.jsonl'}:2: no supervised token is left: the answer begins after token 128" in words


# ---- fit ------------------------------------------------------------------------------------------------------------


def test_too_little_memory(case: Path) -> None:
    words = refused(case, 4, "machine.memory_limit=10MB")
    assert "does not fit" in words and "10 MB available" in words and "machine.memory_limit (or memory) of at least" in words
    assert (case.parent / "runs" / "tiny" / "data" / "card.json").is_file()  # what was complete stays
