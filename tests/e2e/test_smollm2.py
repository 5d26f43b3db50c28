"""A small run on the real embedded model: SmolLM2-135M-Instruct learns from 24 reports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fullrank.cases import prudential
from fullrank.errors import FullrankError
from fullrank.models.embedded import folder_of
from fullrank.run import read_json_lines

NAME = "smollm2-135m-instruct"

RECIPE = f"""
name: small
model: {{source: {NAME}}}
data: {{train: train.jsonl, validation: validation.jsonl, test: test.jsonl, max_length: 256}}
train:
  epochs: 1
  global_batch_size: 8
  optimizer: {{learning_rate: 2e-4}}
evaluate:
  max_new_tokens: 24
  tasks:
    - {{metric: f1, pattern: 'Violations:\\s*(.*)'}}
    - {{metric: rouge_l, pattern: 'Directive:\\s*(.*)'}}
"""


@pytest.fixture(scope="module", autouse=True)
def _embedded() -> None:
    try:
        folder_of(NAME)
    except FullrankError as error:
        pytest.skip(f"the embedded model is not cached and cannot be fetched: {error.message}")


def test_a_small_run_on_the_real_model(tmp_path: Path) -> None:
    prudential.write_case(tmp_path, train=24, validation=4, test=4, unseen=4)
    (tmp_path / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "fullrank", "run", "recipe.yaml", "--json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    print(f"{time.monotonic() - started:.0f} s")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    losses = [result["scores"][who]["validation_loss"]["value"] for who in ("base", "tuned")]
    assert losses[1] < losses[0] - 0.5, losses  # nats a token: the answers' form alone is worth more
    card = json.loads((tmp_path / "runs" / "small" / "train" / "card.json").read_text(encoding="utf-8"))
    proof = card["proof"]
    assert proof["changed_tensors"] == proof["trainable_tensors"] == 272 and proof["never_reached_tensors"] == []
    assert proof["export_logits_identical"] and proof["export_keys_equal"] and proof["ties_kept"]
    assert [row["step"] for row in read_json_lines(tmp_path / "runs" / "small" / "train" / "steps.jsonl")] == [1, 2, 3]
    assert (tmp_path / "runs" / "small" / "report" / "index.html").stat().st_size > 10_000
    assert (tmp_path / "runs" / "small" / "model" / "README.md").is_file()
    # the plan is an estimate; twice or half of what was measured would be none
    assert 0.5 < result["plan"]["peak_bytes_predicted"] / result["plan"]["peak_bytes_measured"] < 2.0
