"""Preparing data, killed, stopped, or done twice at once: the same bytes in the end, and nothing done twice that was done."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from staging import leftovers, write_case
from tiny import chat_rows, write_jsonl

from fullrank.cli.options import loaded
from fullrank.data import sources
from fullrank.workflows.data import prepare

#: Longest wait for a process to get somewhere: imports take seconds on a busy machine.
PATIENCE_SECONDS = 120.0

#: `fullrank` as a user types it, made easy to catch in the act: small blocks, cut slowly, for processes of its own.
DRIVER = """
import os, time
from fullrank.data import sources, stage

whole = sources.blocks

def slow(source):
    for block in whole(source, block_bytes=700):
        time.sleep(float(os.environ["BLOCK_SECONDS"]))
        yield block

sources.blocks, stage._SMALL_BYTES = slow, 0
from fullrank.cli.app import main

main()
"""


@pytest.fixture
def case(tmp_path: Path, tiny_model_folder: Callable[..., Path]) -> Path:
    """Several dozen blocks, some records of which cannot be used."""
    made = write_case(tmp_path, tiny_model_folder("llama"))
    rows: list[dict[str, Any]] = chat_rows(110)
    rows[7:7] = [{"prompt": "who"}]
    rows[60:60] = [{"messages": []}]
    write_jsonl(tmp_path / "train.jsonl", rows)
    return made


OVERRIDES = ["data.quarantine_budget=2", "machine.workers=2"]


def start(case: Path, *overrides: str, block_seconds: float = 0.0) -> subprocess.Popen[str]:
    arguments = ["data", str(case), *OVERRIDES, *overrides, "--runs-dir", str(case.parent / "runs")]
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"BLOCK_SECONDS": str(block_seconds), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )


def shards(case: Path) -> dict[str, int]:
    """Name and inode of every shard: one that is written again gets another inode."""
    return {path.name: path.stat().st_ino for path in (case.parent / "runs" / ".shards").glob("*.safetensors")}


def wait_for_shards(process: subprocess.Popen[str], case: Path, more_than: int) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while len(shards(case)) <= more_than:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"no more than {more_than} shards after {PATIENCE_SECONDS} s"
        time.sleep(0.002)


def finish(process: subprocess.Popen[str]) -> str:
    output, errors = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 0, errors
    assert "Traceback" not in errors
    return output


def contents(run: Path) -> dict[str, bytes]:
    """Every file of `data/` but for the times of the card."""
    data = run / "data"
    found = {str(path.relative_to(data)): path.read_bytes() for path in data.rglob("*") if path.is_file()}
    card = json.loads(found["card.json"])
    found["card.json"] = json.dumps({**card, "seconds": 0, "peak_bytes": 0}).encode()
    return found


def untouched(case: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """What comes of it when nobody interferes, done in one process."""
    monkeypatch.setattr(sources, "blocks", partial(sources.blocks, block_bytes=700))
    runs = case.parent / "untouched"
    assert prepare(loaded(str(case), OVERRIDES, runs), runs).refusal is None
    return contents(runs / "tiny")


def test_a_preparation_that_is_killed_and_stopped_goes_on(case: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In two runs at once: they share the shards, and neither spoils what the other makes."""
    runs = [case.parent / "runs" / name for name in ("tiny", "other")]
    moment = random.Random(0)
    before: dict[str, int] = {}
    for number in (signal.SIGKILL, signal.SIGTERM):
        process = start(case, block_seconds=0.04)
        wait_for_shards(process, case, len(before) + moment.randint(2, 7))
        time.sleep(moment.uniform(0.0, 0.08))
        process.send_signal(number)
        # The workers hold the same standard error: it ends when the last of them has.
        _, errors = process.communicate(timeout=PATIENCE_SECONDS)
        assert "Traceback" not in errors and "Error" not in errors, errors
        if number == signal.SIGKILL:
            assert process.returncode == -signal.SIGKILL
        else:
            assert process.returncode == 75 and "type the same command to continue" in errors
        assert not (runs[0] / "data").exists()
        done = shards(case)
        assert before.items() <= done.items() and len(done) > len(before)
        before = done
    both = [start(case, f"name={run.name}", "machine.workers=1", block_seconds=0.01) for run in runs]
    for process in both:
        finish(process)
    after = shards(case)
    assert before.items() <= after.items() and len(after) > len(before)  # none was written again
    alone = untouched(case, monkeypatch)
    for run in runs:
        assert contents(run) == alone
        assert leftovers(run) == []
