"""All stages through the workflow: what may change between two calls, what may be deleted, what is told before it is too late."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from staging import fresh_here, write_case
from tiny import chat_rows, write_jsonl

from fullrank.cli.options import loaded
from fullrank.errors import DataError, FullrankError, ModelError, ProofError, RecipeError
from fullrank.models import export
from fullrank.plan import speed
from fullrank.records import DataCard, TrainCard
from fullrank.run import Run, read_json_lines, read_record, verify_manifest
from fullrank.sequences.store import TokenStore
from fullrank.train import stage as train_stage
from fullrank.workflows.stages import run_until, summary

TASKS = {"tasks": [{"metric": "exact_match"}], "max_new_tokens": 4}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "fresh_process", fresh_here)
    monkeypatch.setattr(speed, "measure", lambda *arguments, **options: None)


@pytest.fixture
def case(tmp_path: Path, tiny_model_folder: Callable[..., Path]) -> Path:
    write_jsonl(tmp_path / "test.jsonl", chat_rows(3))
    model = tiny_model_folder("llama")
    return write_case(tmp_path, model, rows=8, train={"epochs": 1}, evaluate=TASKS, data={"test": "test.jsonl"})


def go(case: Path, last: str, *overrides: str, target: str | None = None, runs_dir: Path | None = None) -> tuple[Run, list[str]]:
    """The run, and the stages that found their work done."""
    reused: list[str] = []

    def hear(event: str, facts: dict[str, Any]) -> None:
        if event == "reused":
            reused.append(facts["stage"])

    runs_dir = runs_dir or case.parent / "runs"
    recipe = loaded(target or str(case), list(overrides), runs_dir)
    return run_until(last, recipe, runs_dir, hear), reused  # type: ignore[arg-type]


def test_a_deleted_stage_comes_back(case: Path) -> None:
    run, _ = go(case, "report")
    before = (run.model / "model.safetensors").read_bytes()
    for folder in (run.data, run.evaluate, run.report):
        shutil.rmtree(folder)
    _, reused = go(case, "report")
    assert reused == ["plan", "train"]
    assert all((folder / name).exists() for folder, name in ((run.data, "card.json"), (run.evaluate, "card.json")))
    shutil.rmtree(run.model)
    go(case, "train")
    assert (run.model / "model.safetensors").read_bytes() == before


def test_test_data_may_change_after_training_and_training_data_may_not(case: Path) -> None:
    go(case, "evaluate")
    write_jsonl(case.parent / "test.jsonl", chat_rows(5))
    run, reused = go(case, "evaluate")
    assert reused == ["plan", "train"] and summary(run)["scores"]["tuned"]["exact_match"]["low"] >= 0
    write_jsonl(case.parent / "train.jsonl", chat_rows(9))
    with pytest.raises(FullrankError, match="have changed since"):
        go(case, "evaluate")


def test_a_run_is_reported_where_it_is_after_its_files_have_moved(case: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = go(case, "evaluate")
    (case.parent / "train.jsonl").rename(case.parent / "moved.jsonl")
    renamed = run.root.rename(run.root.with_name("other"))
    elsewhere = case.parent / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    again, reused = go(case, "report", target=str(renamed), runs_dir=Path("runs"))
    assert again.root == renamed and reused == ["data", "plan", "train", "evaluate"]
    assert (renamed / "report" / "index.html").is_file() and not (elsewhere / "runs").exists()


def test_a_damaged_model_is_not_blessed(case: Path) -> None:
    run, _ = go(case, "report")
    path = run.model / "model.safetensors"
    content = path.read_bytes()
    (run.model / "README.md").write_text("an edited card", encoding="utf-8")
    go(case, "evaluate")  # a card may be edited
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ProofError, match=r"model\.safetensors differs from its manifest"):
        go(case, "report")
    assert verify_manifest(run.model, ignoring={"README.md"}) is not None


def test_scores_of_an_earlier_model_go_with_it(case: Path) -> None:
    run, _ = go(case, "report")
    shutil.rmtree(run.train)
    shutil.rmtree(run.model)
    go(case, "train", "train.optimizer.learning_rate=1e-3")
    assert not run.evaluate.exists() and not run.report.exists() and "scores" not in summary(run)


def test_an_export_that_fails_costs_no_step(case: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any) -> export.Fresh:
        raise ProofError("not today")

    monkeypatch.setattr(export, "fresh_process", broken)
    monkeypatch.setattr(train_stage, "_SHORTEST_GAP_SECONDS", 0.0)  # as if the run had taken minutes
    with pytest.raises(ProofError, match="not today"):
        go(case, "train")
    monkeypatch.setattr(export, "fresh_process", fresh_here)
    run, _ = go(case, "train")
    card = read_record(run.train / "card.json", TrainCard)
    assert card is not None and card.resumed_from_steps == [card.steps]


def test_what_cannot_be_scored_is_told_before_training(case: Path) -> None:
    with pytest.raises(DataError, match="does not match the reference"):
        go(case, "report", "evaluate.tasks=[{metric: exact_match, pattern: '#### (.*)'}]")
    assert not (case.parent / "runs" / "tiny" / "train").exists()


@pytest.mark.parametrize("name", ["../esc", "a/b", "validation", ""])
def test_a_test_set_has_the_name_of_a_file(case: Path, name: str) -> None:
    with pytest.raises(RecipeError, match="cannot be the name of a test set"):
        go(case, "data", f"data.test={json.dumps({name: 'test.jsonl'})}")


def test_no_document_is_on_both_sides(case: Path) -> None:
    write_jsonl(case.parent / "train.jsonl", [{"text": f"{n} the sea is wide and the bank is small. " * 20} for n in range(6)])
    run, _ = go(case, "data", "data.validation={ratio: 0.3}", "data.too_long=chunk", "data.max_length=32")
    sides = []
    for split in ("train", "validation"):
        store = TokenStore(run.data / split)
        sides.append({store.origin(n) for n in range(len(store))})
        assert len(store) > len(sides[-1])
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 6
    card = read_record(run.data / "card.json", DataCard)
    assert card is not None and (card.train.formats, card.validation.formats) == ({"text": 4}, {"text": 2})


def test_a_single_document_is_held_out_from_its_end(case: Path) -> None:
    write_jsonl(case.parent / "train.jsonl", [{"text": "the sea is wide and the bank is small. " * 40}])
    run, _ = go(case, "data", "data.validation={ratio: 0.25}", "data.too_long=chunk", "data.max_length=32")
    train, validation = (len(TokenStore(run.data / split)) for split in ("train", "validation"))
    assert validation == round(0.25 * (train + validation))


def test_the_models_context_is_a_limit(case: Path, tiny_model_folder: Callable[..., Path]) -> None:
    short = tiny_model_folder("gpt2", n_positions=16)
    with pytest.raises(DataError, match=r"train\.jsonl:1: \d+ tokens, the model's context is 16"):
        go(case, "data", f"model.source={short}", "data.max_length=2048")


def test_min_delta_is_about_patience_and_not_about_the_best_weights(case: Path) -> None:
    run, _ = go(
        case, "train", "train.early_stopping={patience: 9, min_delta: 50}", "train.evaluate_every_steps=1", "train.epochs=3"
    )
    card = read_record(run.train / "card.json", TrainCard)
    losses = {row["step"]: row["validation_loss"] for row in read_json_lines(run.train / "steps.jsonl")}
    assert card is not None and card.validation_loss_best == min(losses.values()) == losses[card.best_step]


def test_sampling_values_of_a_base_do_not_stop_the_export(
    case: Path, tiny_model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    own = shutil.copytree(tiny_model_folder("llama"), tmp_path / "sampling")
    (own / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "top_p": 0.9}), encoding="utf-8")
    run, _ = go(case, "train", f"model.source={own}")
    assert json.loads((run.model / "generation_config.json").read_text())["temperature"] == 0.6


def test_models_that_cannot_be_trained_are_refused_by_name(
    case: Path, tiny_model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    own = shutil.copytree(tiny_model_folder("llama"), tmp_path / "own")
    weights = own / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="not a whole safetensors file"):
        go(case, "data", f"model.source={own}")
    weights.write_bytes(whole)
    config = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq", "bits": 4}}))
    with pytest.raises(ModelError, match=r"quantized \(gptq\)"):
        go(case, "data", f"model.source={own}")


def test_memory_that_runs_out_is_a_matter_of_fit(case: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(train_stage, "validation_loss", full)
    with pytest.raises(FullrankError, match="out of memory, although") as caught:
        go(case, "train")
    assert caught.value.exit_code == 4
