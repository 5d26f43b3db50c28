"""Plans of weights that wait in host memory under FSDP2: when they may, what the host must hold, when they are proposed.

There is no CUDA device here: the machine is said to have one, as its facts would.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from staging import Staged, staged, write_case

from fullrank.errors import FitError, UsageError
from fullrank.models.source import load_config
from fullrank.parallel.groups import shapes_of
from fullrank.parallel.world import ALONE, World
from fullrank.plan import clock, memory
from fullrank.plan import stage as plan_stage
from fullrank.plan.speed import Speed
from fullrank.plan.stage import engine_of
from fullrank.recipe import Recipe
from fullrank.records import MachineFacts, Plan
from fullrank.run import read_record
from fullrank.units import format_bytes

TWO = World(0, 2, 0, 2)
GB = 10**9


def recipe(device: str = "cuda", states: str = "host", **parallel: Any) -> Recipe:
    sections = {
        "machine": {"device": device, "optimizer_states": states},
        "parallel": {"offload_parameters": True, **parallel},
    }
    return Recipe.model_validate({"name": "t", "model": {"source": "m"}, "data": {"train": "t.jsonl"}, **sections})


@pytest.mark.parametrize("world", [ALONE, TWO], ids=["one", "two"])
@pytest.mark.parametrize("engine", ["auto", "fsdp2"])
@pytest.mark.parametrize("states", ["host", "disk"])
def test_fsdp2_takes_them_on_any_number_of_ranks(world: World, engine: str, states: str) -> None:
    assert engine_of(recipe(engine=engine, states=states), world) == "fsdp2"


@pytest.mark.parametrize("engine", ["auto", "fsdp2", "deepspeed"])
def test_a_cpu_has_no_memory_beside_it(engine: str) -> None:
    for world in (ALONE, TWO):
        with pytest.raises(UsageError, match=r"parallel.offload_parameters: there is no other memory beside the device cpu"):
            engine_of(recipe("cpu", "disk", engine=engine), world)


def test_states_that_stay_on_the_device_are_refused_with_the_rest() -> None:
    with pytest.raises(UsageError) as refused:
        engine_of(recipe(states="device", replicas=3), TWO)
    first, second = refused.value.message.split("\n")
    assert "parallel.offload_parameters" in first and "machine.optimizer_states is device" in first and "host, or disk" in first
    assert "parallel.replicas: 3 does not divide 2 ranks" in second


# ---- plans ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """`host(device_bytes, host_bytes)`: a machine with so much of either memory."""

    def is_of(device_bytes: int, host_bytes: int) -> None:
        facts = MachineFacts(
            device="cuda",
            device_name="a device",
            cores=1,
            threads=1,
            memory_bytes=device_bytes,
            memory_available_bytes=device_bytes,
            disk_free_bytes=GB,
        )
        monkeypatch.setattr(plan_stage, "look", lambda *given: facts)
        monkeypatch.setattr(plan_stage, "host_memory_bytes", lambda: host_bytes)
        monkeypatch.setattr(clock.devices, "choose", lambda wanted: torch.device("cpu"))
        speed = Speed(forward_per_token=1e-3, forward_backward_per_token=3e-3, optimizer_step=0.5, basis="a stated speed")
        monkeypatch.setattr(clock.speed, "measure", lambda *given, **named: speed)
        monkeypatch.setattr(clock.speed, "host_bytes_per_second", lambda device: 1e9)

    return is_of


@pytest.fixture
def case(tmp_path: Path, tiny_model_folder: Callable[..., Path]) -> Path:
    """Blocks are most of the parameters, parameters most of the memory."""
    return write_case(tmp_path, tiny_model_folder("llama", num_hidden_layers=150), rows=8, machine={"device": "cuda"})


AWAY = ("machine.optimizer_states=host", "parallel.offload_parameters=true")


def planned(case: Path, *overrides: str) -> tuple[Staged, Plan]:
    """The plan of two ranks, fitting or not."""
    made = staged(case, overrides)
    made.data()
    with contextlib.suppress(FitError):
        plan_stage.stage(made.recipe, made.run, made.base, TWO)
    plan = read_record(made.run.plan_path, Plan)
    assert plan is not None
    return made, plan


def test_the_host_must_hold_what_all_ranks_of_the_machine_take_there(case: Path, host: Callable[[int, int], None]) -> None:
    host(GB, GB)
    made, plan = planned(case, *AWAY)
    assert plan.fits and plan.engine == "fsdp2" and plan.offload_parameters
    assert "weights in host memory" in plan.waiting and "weights and gradients to and from host memory" in plan.seconds_basis
    assert {line.part: line.bytes for line in plan.ledger}["weights"] == 0
    needed = memory.offloaded_host_bytes(shapes_of(load_config(made.base.folder), []), made.recipe, ranks=2, here=2)
    assert needed > 16 * plan.model.parameters  # weights, gradients and two moments in fp32
    host(GB, needed - 1)
    _, refused = planned(case, *AWAY, "name=more")
    assert f"does not fit into host memory: {format_bytes(needed)} wait there" in refused.refusal
    host(GB, needed)
    assert planned(case, *AWAY, "name=enough")[1].fits


def test_a_device_that_is_too_small_is_told_of_its_host(case: Path, host: Callable[[int, int], None]) -> None:
    host(1000, GB)  # of plans that do not fit, the one that needs least is kept
    states = planned(case, AWAY[0])[1].peak_bytes_predicted
    least = planned(case, *AWAY, "name=away")[1].peak_bytes_predicted
    assert least < states
    host((least + states) // 2, GB)
    # As the recipe is once `auto` is resolved, which is how plans see it.
    resolved = ("machine.gradients=keep", "train.max_grad_norm=1.0")
    refusal = planned(case, *resolved, "name=small")[1].refusal
    assert f"{' '.join(AWAY)}  (" in refusal and "time not estimated, the same weights" in refusal
    assert planned(case, *resolved, *AWAY, "name=fits")[1].fits
    host((least + states) // 2, 1000)  # nor has the host any
    assert AWAY[1] not in planned(case, *resolved, "name=nowhere")[1].refusal


def test_a_begun_run_whose_weights_move_is_planned_anew(case: Path, host: Callable[[int, int], None]) -> None:
    host(GB, GB)
    made, _ = planned(case, AWAY[0])
    made.run.train.mkdir(exist_ok=True)
    (made.run.train / "inputs.json").write_text("{}\n", encoding="utf-8")
    again, _ = planned(case, AWAY[0])
    assert again.reused("plan")
    moved, plan = planned(case, *AWAY)
    assert not moved.reused("plan") and plan.offload_parameters
