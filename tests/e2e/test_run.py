"""The verbs from end to end on a tiny model, as a user types them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from staging import leftovers, write_case
from tiny import chat_rows, write_jsonl

from fullrank.loading import load
from fullrank.run import read_json_lines, verify_manifest


def fullrank(*arguments: str, cwd: Path, input: str = "") -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own, which must succeed."""
    done = subprocess.run(
        [sys.executable, "-m", "fullrank", *arguments],
        cwd=cwd,
        input=input,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Callable[..., Path]) -> Path:
    """A working directory with a recipe and its data."""
    folder = tmp_path_factory.mktemp("work")
    write_jsonl(folder / "seen.jsonl", chat_rows(5)[2:])
    write_jsonl(folder / "unseen.jsonl", chat_rows(30)[28:])
    tasks = [{"metric": "f1", "pattern": "is (.*)"}, {"metric": "rouge_l"}, {"metric": "exact_match"}]
    write_case(
        folder,
        tiny_model_folder("llama"),
        data={"test": {"seen": "seen.jsonl", "unseen": "unseen.jsonl"}},
        evaluate={"tasks": tasks, "max_new_tokens": 6},
    )
    return folder


@pytest.fixture(scope="module")
def first(folder: Path) -> subprocess.CompletedProcess[str]:
    return fullrank("run", "recipe.yaml", "--json", cwd=folder)


def test_the_last_line_is_the_documented_object(folder: Path, first: subprocess.CompletedProcess[str]) -> None:
    (line,) = first.stdout.splitlines()  # progress goes to standard error
    result: dict[str, Any] = json.loads(line)
    assert {"run", "scores", "stages", "plan"} <= result.keys()
    assert (folder / result["run"]).resolve() == folder / "runs" / "tiny"
    assert result["scores"].keys() == {"base", "tuned"}
    for scores in result["scores"].values():
        assert {"f1", "rouge_l", "exact_match", "validation_loss", "perplexity"} <= scores.keys()
        for score in scores.values():
            assert score.keys() == {"value", "low", "high"} and score["low"] <= score["value"] <= score["high"]
    assert {"data", "plan", "train", "evaluate"} <= result["stages"].keys()
    for stage in result["stages"].values():
        assert stage.keys() == {"seconds", "peak_bytes"} and stage["seconds"] > 0 and stage["peak_bytes"] > 0
    assert result["plan"].keys() == {"peak_bytes_predicted", "peak_bytes_measured"}
    assert result["scores"]["tuned"]["validation_loss"]["value"] < result["scores"]["base"]["validation_loss"]["value"]


def test_the_run_folder_holds_everything(folder: Path, first: subprocess.CompletedProcess[str]) -> None:
    run = folder / "runs" / "tiny"
    for path in ("recipe.yaml", "plan.json", "environment.json", "events.jsonl", "data/card.json", "train/steps.jsonl"):
        assert (run / path).is_file(), path
    assert "auto" not in str(yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))["machine"])
    for name in ("seen", "unseen"):
        for who in ("base", "tuned"):
            assert read_json_lines(run / "evaluate" / f"predictions-{name}-{who}.jsonl")
    page = (run / "report" / "index.html").read_text(encoding="utf-8")
    assert page.lstrip().lower().startswith("<!doctype html") and 'src="http' not in page
    assert list((run / "report" / "figures").glob("*.png"))
    assert (run / "model" / "README.md").is_file() and verify_manifest(run / "model") is None
    assert leftovers(run) == []


def test_progress_is_plain_lines_where_there_is_no_terminal(first: subprocess.CompletedProcess[str]) -> None:
    assert "step 8/8" in first.stderr and "validation loss" in first.stderr and "\x1b" not in first.stderr


def test_a_second_run_finds_everything_done(folder: Path, first: subprocess.CompletedProcess[str]) -> None:
    weights = folder / "runs" / "tiny" / "model" / "model.safetensors"
    written = weights.stat().st_mtime_ns
    again = fullrank("run", "tiny", "--json", cwd=folder)  # by the name of the run
    for stage in ("data", "plan", "train", "evaluate"):
        assert f"{stage}: unchanged, using" in again.stderr
    assert weights.stat().st_mtime_ns == written
    assert json.loads(again.stdout) == json.loads(first.stdout)


def test_verbs_that_look(folder: Path, first: subprocess.CompletedProcess[str]) -> None:
    (told,) = json.loads(fullrank("runs", "--json", cwd=folder).stdout)["runs"]
    assert (told["run"], told["state"]) == ("tiny", "reported")
    assert told["validation_loss"]["best"] < told["validation_loss"]["before"]
    assert "tiny" in fullrank("runs", cwd=folder).stdout
    plan = json.loads(fullrank("plan", "recipe.yaml", "--json", cwd=folder).stdout)
    assert plan["steps"] == 8 and plan["fits"] and {line["part"] for line in plan["ledger"]} >= {"weights", "activations"}
    report = folder / "runs" / "tiny" / "report"
    before = (report / "index.html").stat().st_mtime_ns
    assert "report: runs/tiny/report/index.html" in fullrank("report", "tiny", cwd=folder).stdout
    assert (report / "index.html").stat().st_mtime_ns >= before


def test_chat_answers_once_or_line_by_line(folder: Path, first: subprocess.CompletedProcess[str]) -> None:
    once = fullrank("chat", "tiny", "-m", "what is the limit of bank 3", "--max-new-tokens", "8", cwd=folder)
    assert once.stdout.endswith("\n") and once.stderr == ""
    lines = fullrank("chat", "tiny", "--max-new-tokens", "8", cwd=folder, input="what is the limit of bank 3\n")
    assert lines.stdout == once.stdout
    other = fullrank("chat", "tiny", "--base", "-m", "what is the limit of bank 3", "--max-new-tokens", "8", cwd=folder)
    assert other.stdout != once.stdout


def test_init_writes_a_recipe_that_loads_and_fits_the_schema(tmp_path: Path) -> None:
    told = fullrank("init", "mine.yaml", cwd=tmp_path).stdout
    assert "fullrank plan mine.yaml" in told
    recipe = load(tmp_path / "mine.yaml", need_files=False).recipe
    schema = json.loads(fullrank("schema", cwd=tmp_path).stdout)
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(yaml.safe_load((tmp_path / "mine.yaml").read_text(encoding="utf-8").replace("2e-5", "2.0e-5")), schema)
    assert recipe.name == "my-run"
    again = subprocess.run(
        [sys.executable, "-m", "fullrank", "init", "mine.yaml"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert again.returncode == 2 and "it is there already" in again.stderr


LIGHT = """
import sys
sys.argv = ["fullrank", *{arguments!r}]
from fullrank.cli.app import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
heavy = [name for name in ("torch", "transformers", "numpy", "datasets", "altair") if name in sys.modules]
assert not heavy, heavy
"""


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["schema"], ["runs"]], ids=" ".join)
def test_light_verbs_import_nothing_heavy(arguments: list[str], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIGHT.format(arguments=arguments)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_help_is_there_at_once(tmp_path: Path) -> None:
    def seconds() -> float:
        started = time.perf_counter()
        assert "quickstart" in fullrank("--help", cwd=tmp_path).stdout
        return time.perf_counter() - started

    # the fastest of a few: other work on the machine is not the command's doing
    assert min(seconds() for _ in range(5)) < 0.5
