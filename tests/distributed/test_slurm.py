"""Jobs for Slurm, on a Slurm of three small scripts: what is asked of it, and what the tasks do with what it tells."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from staging import write_case

from fullrank.cli import srun
from fullrank.errors import UsageError
from fullrank.run import Run

pytest.importorskip("submitit", reason="submitit is not installed")

PATIENCE_SECONDS = 240.0

_SBATCH = """#!{python}
import os, subprocess, sys
script = sys.argv[-1]
with open(os.path.dirname(__file__) + "/asked", "w") as file:
    file.write(script)
environment = {{**os.environ, "SLURM_JOB_ID": "77", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "127.0.0.1"}}
subprocess.Popen(["bash", script], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
print("Submitted batch job 77")
"""
_SRUN = """#!{python}
import os, subprocess, sys
words = sys.argv[1:]
while words and words[0].startswith("-"):
    words = words[1:] if "=" in words[0] or words[0].startswith("--un") else words[2:]
tasks = []
for rank in range({ranks}):
    own = {{"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NTASKS": "{ranks}", "SLURM_NODEID": "0"}}
    own |= {{"SLURM_STEP_NUM_TASKS": "{ranks}", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "127.0.0.1"}}
    own |= {{"SLURM_STEP_TASKS_PER_NODE": "{ranks}", "SLURM_JOB_ID": "77"}}
    log = open(os.path.dirname(__file__) + "/log-" + str(rank), "w")
    tasks.append(subprocess.Popen(words, env={{**os.environ, **own}}, stdout=log, stderr=log))
sys.exit(max(task.wait() for task in tasks))
"""
_SCONTROL = "#!/bin/sh\necho 127.0.0.1\n"


@pytest.fixture
def slurm(tmp_path: Path) -> Path:
    """A folder of commands that are there on a login node."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in {"sbatch": _SBATCH, "srun": _SRUN, "scontrol": _SCONTROL}.items():
        path = folder / name
        path.write_text(text.format(python=sys.executable, ranks=2) if "{" in text else text, encoding="utf-8")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return folder


def fullrank(slurm: Path, *words: str, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PATH": f"{slurm}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    command = [*launcher, sys.executable, "-m", "fullrank", *words]
    return subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment, timeout=PATIENCE_SECONDS, check=False
    )


def test_a_job_is_handed_in_and_its_tasks_train(slurm: Path, tmp_path: Path, tiny_model_folder: Callable[..., Path]) -> None:
    case = write_case(tmp_path, tiny_model_folder("llama"))
    asked = ["--ranks-per-node", "2", "--minutes", "30", "--only-train", "--option", "partition=long", "--json"]
    done = fullrank(slurm, "launch", "slurm", str(case), "train.epochs=1", *asked, "--runs-dir", str(tmp_path / "runs"))
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    script = Path(told["script"]).read_text(encoding="utf-8")
    assert told["job"] == "77" and "#SBATCH --partition=long" in script and "#SBATCH --ntasks-per-node=2" in script
    assert "#SBATCH --signal=USR2@300" in script and "#SBATCH --time=30" in script and "--gpus" not in script
    run = Run(tmp_path / "runs" / "tiny")
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (run.train / "card.json").exists():
        logs = [path.read_text(encoding="utf-8") for path in slurm.glob("log-*")]
        assert time.monotonic() < deadline and not any("Traceback" in log for log in logs), logs
        time.sleep(0.2)
    alone = fullrank(slurm, "train", str(case), "train.epochs=1", "name=alone", "--runs-dir", str(tmp_path / "runs"))
    assert alone.returncode == 0, alone.stderr
    one = load_file(tmp_path / "runs" / "alone" / "model" / "model.safetensors")
    two = load_file(run.model / "model.safetensors")
    assert all(np.linalg.norm(two[name] - one[name]) <= 1e-4 * np.linalg.norm(one[name]) for name in one)


def test_tasks_of_srun_are_ranks(slurm: Path, tmp_path: Path, tiny_model_folder: Callable[..., Path]) -> None:
    case = write_case(tmp_path, tiny_model_folder("llama"))
    words = ("train", str(case), "train.epochs=1", "--runs-dir", str(tmp_path / "runs"))
    assert fullrank(slurm, *words, launcher=(str(slurm / "srun"), "--unbuffered")).returncode == 0
    ranks = json.loads((tmp_path / "runs" / "tiny" / "train" / "ranks.json").read_text(encoding="utf-8"))["ranks"]
    assert [rank["local_rank"] for rank in ranks] == [0, 1]


TOLD = {
    "SLURM_STEP_NUM_TASKS": "20",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2),4",
    "SLURM_STEP_NODELIST": "node3,node5,node9",
    "SLURM_STEP_ID": "2",
    "SLURM_JOB_ID": "40011",
    "SLURM_PROCID": "17",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
}


def test_what_srun_tells_is_read() -> None:
    told = dict(TOLD)
    srun.adopt(told)
    found = {name: told[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")}
    assert found == {"RANK": "17", "WORLD_SIZE": "20", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "node3"}
    assert int(told["MASTER_PORT"]) == 20_000 + 40_013 % 20_000


@pytest.mark.parametrize("changes", [{"RANK": "3"}, {"SLURM_STEP_NUM_TASKS": "1"}])
def test_another_launcher_or_a_single_task_is_left_alone(changes: dict[str, str]) -> None:
    told = TOLD | changes
    srun.adopt(told)
    assert "MASTER_ADDR" not in told


def test_variables_that_say_too_little_are_an_error() -> None:
    told = {name: value for name, value in TOLD.items() if name != "SLURM_NODEID"}
    with pytest.raises(UsageError, match="SLURM_NODEID"):
        srun.adopt(told)


def test_without_slurm_it_is_said(tmp_path: Path, tiny_model_folder: Callable[..., Path]) -> None:
    case = write_case(tmp_path, tiny_model_folder("llama"))
    done = fullrank(tmp_path, "launch", "slurm", str(case), "--runs-dir", str(tmp_path / "runs"))
    assert done.returncode == 2 and "Slurm is not here" in done.stderr
