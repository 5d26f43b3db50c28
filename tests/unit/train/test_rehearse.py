"""The rehearsal: what it tries, what it leaves, and how a layout that does not fit becomes one that does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from staging import Staged, staged, write_case

from fullrank.errors import FitError, TrainingError
from fullrank.models.load import load_model
from fullrank.parallel.engine import StepOutcome
from fullrank.parallel.single import SingleDevice
from fullrank.plan import speed
from fullrank.records import Rehearsal
from fullrank.run import read_record
from fullrank.train import rehearse
from fullrank.train import stage as train_stage


@pytest.fixture
def case(tmp_path: Path, tiny_model_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(speed, "measure", lambda *arguments, **options: None)
    monkeypatch.setattr(train_stage._Training, "fit", _enough)
    return write_case(tmp_path, tiny_model_folder("llama", num_hidden_layers=4), rows=22, train={"epochs": 1})


def _enough(_: Any) -> None:
    raise Enough


class Enough(Exception):
    """Ends a training before its first step."""


def rehearsal_of(case: Path, *overrides: str) -> tuple[Staged, Rehearsal]:
    """A training up to its first step."""
    run = staged(case, overrides)
    run.data()
    run.plan()
    with pytest.raises(Enough):
        run.train()
    found = read_record(run.run.train / "layout.json", Rehearsal)
    assert found is not None
    return run, found


def fails(monkeypatch: pytest.MonkeyPatch, is_too_much: Callable[[SingleDevice, int], bool]) -> list[tuple[int, str]]:
    """Has rehearsed steps run out of memory; what was tried is told."""
    tried: list[tuple[int, str]] = []
    real = SingleDevice.step

    def step(engine: SingleDevice, micro_batches: Any, *rest: Any, **options: Any) -> Any:
        rows = list(micro_batches)
        if options["learning_rate"] == 0.0:
            largest = max(row.tokens for row in rows)
            tried.append((largest, engine.recompute))
            if is_too_much(engine, largest):
                raise torch.OutOfMemoryError("no memory is left")
        return real(engine, rows, *rest, **options)

    monkeypatch.setattr(SingleDevice, "step", step)
    return tried


def test_it_leaves_weights_and_optimizer_as_they_were(case: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    forget = SingleDevice.forget

    def watched(engine: SingleDevice) -> None:
        seen["updated"] = dict(engine.state().facts["updates"])
        forget(engine)
        seen["state"] = engine.state()

    monkeypatch.setattr(SingleDevice, "forget", watched)
    run, found = rehearsal_of(case)
    assert seen["updated"] and not seen["state"].facts["updates"] and not seen["state"].facts["reached"]
    base = load_model(run.base.folder, device=torch.device("cpu")).state_dict()
    assert all(torch.equal(tensor, base[name]) for name, tensor in seen["state"].tensors["weights"].items())
    assert found.amendments == [] and found.peak_bytes > 0 and found.save_seconds > 0
    assert not (run.run.train / "rehearsal").exists()


def test_rows_shrink_and_then_more_is_recomputed(case: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = fails(monkeypatch, lambda engine, tokens: engine.recompute != "block")
    run, found = rehearsal_of(case)
    plan = run.plan()
    assert found.recompute == "block" and len(found.amendments) == len(tried) - 2  # what fits takes two steps
    assert found.micro_batch_tokens < plan.micro_batch_tokens and plan.recompute == "none"
    assert tried[0][0] >= tried[-3][0] and [how for _, how in tried[-4:]] == ["none", "selective", "block", "block"]
    assert run.events("rehearsed")[0]["amendments"] == found.amendments


def test_more_than_the_limit_is_too_much(case: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = iter([10**12, 10**12, 10**6])
    monkeypatch.setattr(rehearse.devices, "device_peak_bytes", lambda device: next(peaks))
    _, found = rehearsal_of(case)
    assert len(found.amendments) == 2 and "1 TB needed" in found.amendments[0] and found.peak_bytes == 10**6


def test_what_fits_in_no_way_is_refused(case: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fails(monkeypatch, lambda engine, tokens: True)
    run = staged(case)
    run.data()
    run.plan()
    with pytest.raises(FitError, match="the worst batch does not fit, however it is laid out") as caught:
        run.train()
    assert "recomputation block: out of memory" in caught.value.message


def test_a_layout_found_before_is_kept(case: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = fails(monkeypatch, lambda engine, tokens: engine.recompute == "none")
    _, found = rehearsal_of(case)
    count = len(tried)
    _, again = rehearsal_of(case)
    assert again == found and len(tried) == count


@pytest.mark.parametrize("gradients", ["release", "spill"])
def test_block_by_block_the_largest_step_is_tried(case: Path, gradients: str) -> None:
    _, found = rehearsal_of(case, f"machine.gradients={gradients}")
    assert found.recompute == "block" and found.amendments == []


def test_a_batch_that_is_not_finite_is_named_before_anything_is_trained(case: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def step(*_: Any, **__: Any) -> StepOutcome:
        return StepOutcome(float("nan"), float("nan"), updated=False)

    monkeypatch.setattr(SingleDevice, "step", step)
    run = staged(case)
    run.data()
    run.plan()
    with pytest.raises(TrainingError, match="the base model's loss on the largest batch is nan") as caught:
        run.train()
    assert "train.jsonl:" in caught.value.message
    assert not (run.run.train / "layout.json").exists() and not (run.run.train / "inputs.json").exists()
