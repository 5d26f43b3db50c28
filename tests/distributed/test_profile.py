"""A profile of several ranks, as a user types it, and what it says of each."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rank_work import watched_sum
from ranks import Ranks
from staging import leftovers, write_case

from fullrank.records import Plan, Profile
from fullrank.run import Run, read_record
from fullrank.sequences.layout import dealt, micro_batches
from fullrank.sequences.order import Order
from fullrank.sequences.store import TokenStore

has_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed: pip install 'fullrank[deepspeed]'"
)


def test_a_rank_that_comes_late_is_waited_for(ranks: Callable[[int], Ranks]) -> None:
    """The second rank computes half a second before a sum; the first one waits that long for it."""
    first, second = ranks(2).ask(watched_sum, 0.5)
    assert second["computing"] >= 0.4 and first["computing"] < 0.2
    assert first["exposed"] >= 0.4 > second["exposed"]
    assert first["communicating"] >= first["exposed"]


def profiled(folder: Path, *more: str) -> tuple[Profile, Run]:
    command = [sys.executable, "-m", "fullrank", "profile", str(folder / "recipe.yaml"), "--steps", "2", "--json", *more]
    done = subprocess.run(
        [*command, "--runs-dir", str(folder / "runs")],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    run = Run(folder / "runs" / "tiny")
    found = Profile.model_validate(json.loads(done.stdout))
    assert read_record(run.profile_path, Profile) == found
    assert not run.train.exists() and not run.model.exists() and leftovers(run.root) == []
    return found, run


@pytest.mark.parametrize(
    "settings",
    [
        ["parallel.ranks=2"],
        ["parallel.ranks=2", "parallel.context=2"],
        pytest.param(["parallel.ranks=2", "parallel.engine=deepspeed", "parallel.zero_stage=3"], marks=has_deepspeed),
    ],
    ids=["fsdp2", "ring", "zero-3"],
)
def test_it_tells_of_every_rank(settings: list[str], tmp_path: Path, tiny_model_folder: Callable[..., Path]) -> None:
    write_case(tmp_path, tiny_model_folder("llama"))
    found, run = profiled(tmp_path, *settings)
    plan = read_record(run.plan_path, Plan)
    assert plan is not None and plan.ranks == 2
    store, groups = TokenStore(run.data / "train"), 2 // plan.context
    order = Order(len(store), 4, 2, 0)
    steps = [micro_batches(store, order.step(n), plan.micro_batch_tokens, packed=True, ranks=groups) for n in (2, 3)]
    shares = [[sum(row.tokens for row in own) for own in dealt(step, groups)] for step in steps]
    assert [rank.rank for rank in found.ranks] == [0, 1]
    for rank in found.ranks:
        mine = sum(share[rank.rank // plan.context] for share in shares) / plan.context
        assert rank.computed_tokens == mine / 2
        assert rank.computing_seconds > 0
        assert rank.communicating_seconds >= rank.exposed_seconds > 0
    assert found.balance == pytest.approx(sum(sum(share) / len(share) / max(share) for share in shares) / 2)
    assert found.computed_tokens == sum(row.tokens for step in steps for row in step)
    assert all(found.phases[name] > 0 for name in ("forward", "backward", "optimizer"))
    assert "layers.*.mlp.gate_proj" in {module.module for module in found.modules}
    measured = {part.part: (part.planned_bytes, part.measured_bytes) for part in found.memory}
    planned, weights = measured["weights"]
    assert weights is not None and 0.3 < weights / planned < 1.2, measured
    assert 0 < found.utilisation < 1


def test_a_launcher_of_its_own_is_refused(tmp_path: Path, tiny_model_folder: Callable[..., Path]) -> None:
    case = write_case(tmp_path, tiny_model_folder("llama"))
    told = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    command = [sys.executable, "-m", "fullrank", "profile", str(case)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | told)
    assert done.returncode == 2 and "fullrank profile starts its ranks itself" in done.stderr
