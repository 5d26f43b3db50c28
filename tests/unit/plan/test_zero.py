"""Plans for ranks on DeepSpeed ZeRO: what each stage divides, and what is refused before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from staging import Staged, staged, write_case

from fullrank.errors import UsageError
from fullrank.models.source import load_config
from fullrank.parallel.groups import Shapes, shapes_of
from fullrank.parallel.world import World
from fullrank.plan.stage import stage
from fullrank.records import Plan

Folder = Callable[..., Path]
TWO = World(0, 2, 0, 2)


def case(folder: Path, model: Path, **sections: Any) -> Staged:
    sections["parallel"] = {"ranks": 2, "engine": "deepspeed", **sections.get("parallel", {})}
    made = staged(write_case(folder, model, **sections))
    made.data()
    return made


def shapes(made: Staged) -> Shapes:
    return shapes_of(load_config(made.base.folder), [])


def planned(made: Staged, zero_stage: int) -> Plan:
    parallel = made.recipe.parallel.model_copy(update={"zero_stage": zero_stage})
    return stage(made.recipe.model_copy(update={"parallel": parallel}), made.run, made.base, TWO)


def test_each_stage_divides_more(tmp_path: Path, tiny_model_folder: Folder) -> None:
    made = case(tmp_path, tiny_model_folder("llama"))
    plans = {number: planned(made, number) for number in (1, 2, 3)}
    n = plans[1].model.parameters
    part = 4 * -(-n // 2)
    for number, plan in plans.items():
        assert (plan.engine, plan.zero_stage, plan.ranks) == ("deepspeed", number, 2)
        assert plan.sync == ("step" if number == 1 else "row")
        lines = {line.part: line.bytes for line in plan.ledger}
        assert lines["weights"] == (2 * part if number == 3 else 4 * n + part)
        assert lines["optimizer"] == 8 * n // 2
        assert ("gathered" in lines) == (number == 3)
    gradients = [next(line.bytes for line in plans[number].ledger if line.part == "gradients") for number in (1, 2)]
    assert gradients[0] - gradients[1] == 4 * (n - max(map(math.prod, shapes(made).trained.values())))


def test_what_zero_does_not_serve_is_refused_at_once(tmp_path: Path, tiny_model_folder: Folder) -> None:
    made = case(
        tmp_path,
        tiny_model_folder("llama"),
        train={"optimizer": {"name": "muon"}, "precision": "bf16-kahan"},
        parallel={"replicas": 2, "offload_parameters": True},
    )
    with pytest.raises(UsageError) as refused:
        stage(made.recipe, made.run, made.base, TWO)
    told = refused.value.message
    assert all(word in told for word in ("muon", "bf16-kahan", "parallel.replicas", "parallel.offload_parameters"))


def test_a_file_that_contradicts_is_refused_before_the_plan(tmp_path: Path, tiny_model_folder: Folder) -> None:
    (tmp_path / "ds.json").write_text('{"train_batch_size": 999, "zero_optimization": {"stage": 2}}', encoding="utf-8")
    made = case(tmp_path, tiny_model_folder("llama"), parallel={"deepspeed_config": "ds.json"})
    with pytest.raises(UsageError, match=r"train_batch_size is 999, but train.global_batch_size is 4"):
        stage(made.recipe, made.run, made.base, TWO)
    assert not made.run.plan_path.exists()


def test_the_files_stage_is_planned_for(tmp_path: Path, tiny_model_folder: Folder) -> None:
    (tmp_path / "ds.json").write_text('{"train_batch_size": "auto", "zero_optimization": {"stage": 2}}', encoding="utf-8")
    made = case(tmp_path, tiny_model_folder("llama"), parallel={"deepspeed_config": "ds.json"})
    assert stage(made.recipe, made.run, made.base, TWO).zero_stage == 2
