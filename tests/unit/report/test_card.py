"""card: front matter that the hub reads, claims that stand on records, and no path of the machine that trained."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from fullrank.records import ModelFacts, TrainCard
from fullrank.report import card
from fullrank.report.gather import gather
from fullrank.run import Run

MakeRun = Callable[..., Run]


@pytest.fixture
def written(
    make_run: MakeRun, make_train_card: Callable[..., TrainCard], make_model_facts: Callable[..., ModelFacts]
) -> Callable[..., tuple[dict[str, Any], str]]:
    """The card's front matter and body for a base model of some kind."""

    def write(only_training: bool = False, **model: Any) -> tuple[dict[str, Any], str]:
        train = make_train_card(model=make_model_facts(**model))
        _, front, body = card.write(
            gather(make_run(train=train, only_training=only_training, name=f"bare-{only_training}"))
        ).split("---\n", 2)
        return yaml.safe_load(front), body

    return write


def test_an_embedded_base_names_its_original_and_says_that_it_approximates(written: Callable[..., Any]) -> None:
    front, body = written()
    assert front == {
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["fullrank", "full-fine-tuning"],
    }
    assert "dequantized from a 4-bit (Q4_1) file" in body
    assert "`model: {source: HuggingFaceTB/SmolLM2-135M-Instruct}`" in body


def test_a_hub_base_is_named_with_its_commit(written: Callable[..., Any]) -> None:
    front, body = written(kind="hub", source="some/model", commit="abc123")
    assert front["base_model"] == "some/model" and "commit `abc123`" in body
    assert "dequantized" not in body


def test_a_local_base_gives_no_id_and_no_path(written: Callable[..., Any]) -> None:
    front, body = written(kind="folder", source="/home/someone/models/mine", commit=None)
    assert "base_model" not in front
    assert "(`mine`)" in body


def test_no_path_of_the_machine_is_in_it(written: Callable[..., Any], tmp_path: Path) -> None:
    _, body = written()
    assert "`train.jsonl`" in body
    assert "/home/" not in body and str(tmp_path) not in body


def test_scores_and_limits_are_filled_or_left_out(written: Callable[..., Any]) -> None:
    _, body = written()
    assert "| F1 | 0.146 (0.096 to 0.186) | 0.961 (0.911 to 1.000) | +0.815 (+0.755 to +0.875; p < 0.001) |" in body
    assert "80 items (seen) and 60 items (unseen_wordings)" in body
    assert "more information needed" not in body.lower() and "None" not in body
    _, bare = written(only_training=True)
    assert "## Scores" not in bare and "were not compared on a task" in bare and "None" not in bare


def test_a_proof_that_failed_is_not_claimed(make_run: MakeRun, a_train_card: TrainCard) -> None:
    failed = a_train_card.proof.model_copy(update={"export_logits_identical": False})
    text = card.write(gather(make_run(train=a_train_card.model_copy(update={"proof": failed}))))
    assert "bit for bit" not in text


def test_the_snippet_is_python(make_run: MakeRun) -> None:
    report = gather(make_run())
    snippet = card.usage(report, "runs/it's mine/model")
    names = {node.id for node in ast.walk(ast.parse(snippet)) if isinstance(node, ast.Name)}
    assert {"AutoModelForCausalLM", "AutoTokenizer", "folder"} <= names
    assert "apply_chat_template" in snippet
