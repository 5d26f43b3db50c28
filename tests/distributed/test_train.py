"""Training on several ranks as a user types it: the same as on one, stopped, killed and hung, and how it goes on."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from staging import leftovers, write_case

from fullrank.records import Plan, TrainCard
from fullrank.run import Run, read_json_lines, read_record, verify_manifest

SITE = Path(__file__).with_name("site")
STEPS = 12
#: Longest wait for a process to get somewhere: imports take seconds on a busy machine.
PATIENCE_SECONDS = 240.0


@pytest.fixture(scope="module")
def model(tiny_model_folder: Callable[..., Path]) -> Path:
    return tiny_model_folder("llama")


@pytest.fixture
def case(tmp_path: Path, model: Path) -> Path:
    return write_case(tmp_path, model, train={"epochs": 3})  # 16 examples, 4 a step: 12 steps


def start(case: Path, *more: str, step_seconds: float = 0.0, torchrun: int = 0) -> subprocess.Popen[str]:
    launcher = [f"-m torch.distributed.run --standalone --nproc-per-node {torchrun} -m fullrank".split(), ["-m", "fullrank"]]
    command = [sys.executable, *launcher[not torchrun], "train", str(case), *more, "--runs-dir", str(case.parent / "runs")]
    inherited = os.environ.get("PYTHONPATH")
    environment = os.environ | {
        "STEP_SECONDS": str(step_seconds),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(SITE), *([inherited] if inherited else [])]),
    }
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def run_of(case: Path) -> Run:
    return Run(case.parent / "runs" / "tiny")


def finish(case: Path, *more: str, torchrun: int = 0) -> tuple[dict[str, Any], Run]:
    process = start(case, *more, torchrun=torchrun)
    _, errors = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 0, errors
    run = run_of(case)
    assert [row["step"] for row in read_json_lines(run.train / "steps.jsonl")] == list(range(1, STEPS + 1))
    assert verify_manifest(run.model) is None and leftovers(run.root) == []
    return load_file(run.model / "model.safetensors"), run


def losses(run: Run) -> list[float]:
    return [row["loss"] for row in read_json_lines(run.train / "steps.jsonl")]


def wait_for_step(process: subprocess.Popen[str], case: Path, step: int) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not any(row["step"] >= step for row in read_json_lines(run_of(case).train / "steps.jsonl")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"no step {step}"
        time.sleep(0.02)


def processes(case: Path) -> list[int]:
    facts = json.loads((run_of(case).train / "ranks.json").read_text(encoding="utf-8"))
    return [rank["process"] for rank in facts["ranks"]]


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory, model: Path) -> dict[str, Any]:
    """The weights of two ranks that were left alone."""
    return finish(write_case(tmp_path_factory.mktemp("two"), model, train={"epochs": 3}), "parallel.ranks=2")[0]


@pytest.fixture(scope="module")
def of_one(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Run]:
    """The run of one process."""
    yield finish(write_case(tmp_path_factory.mktemp("one"), model, train={"epochs": 3}))[1]


def test_ranks_train_what_one_process_does(case: Path, of_one: Run) -> None:
    weights, run = finish(case, "parallel.ranks=2")
    plan, card = read_record(run.plan_path, Plan), read_record(run.train / "card.json", TrainCard)
    assert plan is not None and (plan.engine, plan.ranks) == ("fsdp2", 2)
    assert card is not None and card.proof.export_weights_identical and card.proof.export_logits_identical is None
    assert np.allclose(losses(run), losses(of_one), rtol=1e-5)
    ledgers = [[row["examples"] for row in read_json_lines(one.train / "ledger.jsonl")] for one in (run, of_one)]
    assert ledgers[0] == ledgers[1]  # the same examples in every step
    wanted = load_file(of_one.model / "model.safetensors")
    assert weights.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert np.linalg.norm(weights[name] - tensor) <= 1e-3 * np.linalg.norm(tensor), name
    for path in of_one.model.iterdir():  # configuration, tokenizer, template: byte for byte
        if path.name not in ("model.safetensors", "MANIFEST.json"):
            assert (run.model / path.name).read_bytes() == path.read_bytes(), path.name


def test_under_torchrun_the_same(case: Path, of_two: dict[str, Any]) -> None:
    weights, _ = finish(case, torchrun=2)
    assert all(np.array_equal(weights[name], tensor) for name, tensor in of_two.items())


def test_what_the_first_rank_refuses_ends_all_of_them(case: Path) -> None:
    (case.parent / "train.jsonl").write_text('{"prompt": "no answer"}\n', encoding="utf-8")
    process = start(case, torchrun=2)
    _, errors = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode != 0
    assert errors.count("error: ") == 1 and "train.jsonl:1" in errors  # one of them says why
    assert "Connection closed by peer" not in errors and "RuntimeError" not in errors


def test_two_machines_that_share_a_folder(case: Path, of_two: dict[str, Any]) -> None:
    """Two agents of one rank each, as on two machines, which meet at an address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = f"--nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-endpoint 127.0.0.1:{port} --local-addr 127.0.0.1"
    command = [sys.executable, "-m", "torch.distributed.run", *meeting.split(), "-m", "fullrank", "train", str(case)]
    agents = [
        subprocess.Popen(
            [*command, "--runs-dir", str(case.parent / "runs")],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    said = [agent.communicate(timeout=PATIENCE_SECONDS) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], said
    weights = load_file(run_of(case).model / "model.safetensors")
    assert all(np.array_equal(weights[name], tensor) for name, tensor in of_two.items())
    assert sum("tensors changed in training" in output for output, _ in said) == 1  # the first rank alone tells


@pytest.mark.parametrize(("how", "words"), [(signal.SIGKILL, "was ended by signal 9"), (signal.SIGSTOP, "has been silent for")])
def test_a_rank_that_dies_or_stops_is_named_and_the_run_goes_on(
    how: signal.Signals, words: str, case: Path, of_two: dict[str, Any]
) -> None:
    process = start(case, "parallel.ranks=2", step_seconds=0.3)
    wait_for_step(process, case, 4)
    victim = processes(case)[1]
    os.kill(victim, how)
    _, errors = process.communicate(timeout=PATIENCE_SECONDS)  # how long it takes: benchmarks/distributed.py
    assert process.returncode == 1, errors
    assert "error: rank 1 " in errors and words in errors and str(victim) in errors, errors
    assert not Path(f"/proc/{victim}").exists() or how == signal.SIGKILL  # nobody is left behind
    if how == signal.SIGSTOP:
        stacks = (run_of(case).train / "stacks-0000.txt").read_text(encoding="utf-8")
        assert "rank 1 has been silent" in stacks and "train/stage.py" in stacks  # where the other one waits, in a step or a save
    weights, run = finish(case, "parallel.ranks=2")
    card = read_record(run.train / "card.json", TrainCard)
    assert card is not None and card.resumed_from_steps and card.resumed_from_steps[0] >= 3
    assert all(np.array_equal(weights[name], tensor) for name, tensor in of_two.items())


def test_a_stopped_run_goes_on_with_another_number_of_ranks(case: Path, of_two: dict[str, Any]) -> None:
    process = start(case, "parallel.ranks=2", step_seconds=0.3)
    wait_for_step(process, case, 3)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 75, errors
    assert "stopped: stopped at step" in errors and "Traceback" not in errors
    weights, run = finish(case, "parallel.ranks=3")
    card = read_record(run.train / "card.json", TrainCard)
    assert card is not None and len(card.resumed_from_steps) == 1
    for name, tensor in of_two.items():
        assert np.linalg.norm(weights[name] - tensor) <= 1e-3 * np.linalg.norm(tensor), name


def test_what_a_rank_refuses_is_said_once(case: Path) -> None:
    process = start(case, "parallel.ranks=2", "train.frozen=[nothing]")
    _, errors = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 2 and errors.count("matches no parameter") == 1, errors
    process = start(case, "parallel.ranks=3", "parallel.replicas=2", "machine.gradients=spill")
    _, errors = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 2
    assert "parallel.replicas: 2 does not divide 3 ranks" in errors and "machine.gradients: spill is for one process" in errors
