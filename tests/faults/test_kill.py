"""A run that is killed, stopped or written to twice: it ends with bitwise the weights of the run that nobody touched."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from staging import leftovers, write_case

from fullrank.records import TrainCard
from fullrank.run import Run, read_json_lines, read_record, verify_manifest

DRIVER = Path(__file__).with_name("driver.py")
STEPS = 12
#: Longest wait for a process to get somewhere: imports take seconds on a busy machine.
PATIENCE_SECONDS = 120.0


def start(case: Path, step_seconds: float = 0.0) -> subprocess.Popen[str]:
    command = [sys.executable, str(DRIVER), "train", str(case), "--runs-dir", str(case.parent / "runs")]
    environment = os.environ | {"STEP_SECONDS": str(step_seconds), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def steps_done(case: Path) -> int:
    rows = read_json_lines(case.parent / "runs" / "tiny" / "train" / "steps.jsonl")
    return int(rows[-1]["step"]) if rows else 0


def wait_for_step(process: subprocess.Popen[str], case: Path, step: int) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while steps_done(case) < step:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"no step {step} after {PATIENCE_SECONDS} s"
        time.sleep(0.005)


def finish(case: Path) -> tuple[bytes, Run]:
    process = start(case)
    _, errors = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 0, errors
    run = Run(case.parent / "runs" / "tiny")
    assert [row["step"] for row in read_json_lines(run.train / "steps.jsonl")] == list(range(1, STEPS + 1))
    assert verify_manifest(run.model) is None and leftovers(run.root) == []
    return (run.model / "model.safetensors").read_bytes(), run


@pytest.fixture(scope="module")
def model(tiny_model_folder: Callable[..., Path]) -> Path:
    return tiny_model_folder("llama")


def case_in(folder: Path, model: Path) -> Path:
    return write_case(folder, model, train={"epochs": 3})  # 16 examples, 4 a step: 12 steps


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory, model: Path) -> bytes:
    """The weights of a run that was left alone."""
    return finish(case_in(tmp_path_factory.mktemp("untouched"), model))[0]


@pytest.mark.parametrize("seed", [0, 1])
def test_a_killed_run_ends_with_the_same_weights(seed: int, tmp_path: Path, model: Path, untouched: bytes) -> None:
    """SIGKILL twice: somewhere in a step, in a save, in a validation, wherever the moment falls."""
    case = case_in(tmp_path, model)
    moment = random.Random(seed)
    for first, last in ((1, 5), (6, 10)):
        process = start(case, step_seconds=0.05)
        wait_for_step(process, case, moment.randint(first, last))
        time.sleep(moment.uniform(0.0, 0.08))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert not (tmp_path / "runs" / "tiny" / "model").exists()
    weights, run = finish(case)
    assert weights == untouched
    card = read_record(run.train / "card.json", TrainCard)
    assert card is not None and card.resumed_from_steps and card.steps == STEPS


def test_signals_save_and_the_same_command_goes_on(tmp_path: Path, model: Path, untouched: bytes) -> None:
    case = case_in(tmp_path, model)
    for number, step in ((signal.SIGTERM, 3), (signal.SIGINT, 7)):
        process = start(case, step_seconds=0.2)
        wait_for_step(process, case, step)
        process.send_signal(number)
        output, errors = process.communicate(timeout=PATIENCE_SECONDS)
        assert process.returncode == 75, errors
        assert output == "" and "Traceback" not in errors
        assert "stopped: stopped at step" in errors and "type the same command to continue" in errors
    weights, run = finish(case)
    assert weights == untouched
    card = read_record(run.train / "card.json", TrainCard)
    assert card is not None and len(card.resumed_from_steps) == 2


def test_a_signal_before_the_first_step_leaves_something_to_continue(tmp_path: Path, model: Path, untouched: bytes) -> None:
    case = case_in(tmp_path, model)
    process = start(case)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (tmp_path / "runs" / "tiny" / "recipe.yaml").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 75, errors
    assert "Traceback" not in errors and errors.splitlines()[-1] == "  -> type the same command to continue"
    assert finish(case)[0] == untouched


def test_a_second_writer_is_refused_by_name(tmp_path: Path, model: Path) -> None:
    case = case_in(tmp_path, model)
    with Run(tmp_path / "runs" / "tiny").locked():
        before = _listing(tmp_path / "runs")
        process = start(case)
        output, errors = process.communicate(timeout=PATIENCE_SECONDS)
        assert process.returncode == 2
        assert output == "" and "Traceback" not in errors
        assert f"this run is being written by process {os.getpid()} on " in errors
        assert _listing(tmp_path / "runs") == before


def _listing(folder: Path) -> list[Any]:
    return sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*"))
