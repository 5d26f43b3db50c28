"""What stops a run: numbers that are not finite, and people."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest
from tiny import random_tokens, write_store

from fullrank.errors import TrainingError
from fullrank.parallel.engine import StepOutcome
from fullrank.records import StepRow
from fullrank.sequences.layout import micro_batches
from fullrank.train.guard import Interrupted, StopRequest, check_finite
from fullrank.train.loop import Step


def step_of(examples: list[int], outcome: StepOutcome) -> Step:
    row = StepRow(
        step=7,
        epoch=1.0,
        loss=outcome.loss,
        learning_rate=1e-3,
        grad_norm=outcome.grad_norm,
        examples=len(examples),
        tokens=1,
        computed_tokens=1,
        supervised_tokens=1,
        seconds=1.0,
        memory_bytes=1,
        changed_ratio=1.0,
    )
    return Step(row, np.asarray(examples), outcome)


def test_a_good_step_passes(tmp_path: Path) -> None:
    check_finite(step_of([0], StepOutcome(1.0, 2.0, updated=True)), write_store(tmp_path / "s", random_tokens(1)))


def test_a_step_that_is_not_finite_names_its_examples(tmp_path: Path) -> None:
    store = write_store(tmp_path / "s", random_tokens(15))
    with pytest.raises(TrainingError) as caught:
        check_finite(step_of([4, 2], StepOutcome(float("nan"), float("inf"), updated=False)), store)
    assert "step 7: loss nan, gradient norm inf" in caught.value.message
    assert caught.value.message.endswith("its examples: rows.jsonl:5, rows.jsonl:3")
    assert "learning_rate" in caught.value.hint and caught.value.exit_code == 1
    with pytest.raises(TrainingError, match=r"rows\.jsonl:10 and 5 more\n"):
        check_finite(step_of(list(range(15)), StepOutcome(float("nan"), 1.0, updated=False)), store)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_first_signal_is_a_flag_and_a_second_one_interrupts(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before


def test_rows_end_before_the_next_one_once_a_stop_is_asked_for(tmp_path: Path) -> None:
    rows = micro_batches(write_store(tmp_path / "s", random_tokens(3)), range(3), 1, packed=False)
    given = []
    with StopRequest() as stop, pytest.raises(Interrupted):
        for row in stop.between(rows):
            given.append(row)
            if len(given) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
    assert given == rows[:2]
