"""A simulation from a recipe: the record, the chart, the text, and a run that stays what it was."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from staging import write_case

from fullrank import loading
from fullrank.cli.simulation_text import printed
from fullrank.errors import ModelError, UsageError
from fullrank.parallel import device as devices
from fullrank.parallel import links
from fullrank.records import Simulation
from fullrank.report import scaling as chart
from fullrank.run import Run, read_record
from fullrank.workflows.simulate import simulate
from fullrank.workflows.stages import run_until


@pytest.fixture
def case(tmp_path: Path, tiny_model_folder: Callable[..., Path]) -> Path:
    return write_case(tmp_path, tiny_model_folder("llama"))


def simulated(case: Path, *overrides: str, **changes: Any) -> tuple[Run, Simulation]:
    given: dict[str, Any] = {"device": "h100-sxm", "most": 8, "model": None, "hybrid": False, "assumed": {}}
    return simulate(loading.load(case, overrides), case.parent / "runs", **(given | changes))


def text(found: Simulation) -> str:
    out = io.StringIO()
    printed(found, Console(file=out, width=60))
    return out.getvalue()


def test_the_record_says_what_was_assumed_and_the_chart_lies_beside(case: Path) -> None:
    run, found = simulated(case, assumed={"price_per_hour": 2.5})
    assert read_record(run.simulation_path, Simulation) == found
    assert found.cluster.device == "h100-sxm" and found.cluster.price_per_hour == 2.5
    assert [(row.scaling, row.devices) for row in found.rows] == [(kind, 2**k) for kind in ("strong", "weak") for k in range(4)]
    pytest.importorskip("vl_convert")
    assert (run.root / "simulation.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert {part["part"] for part in chart.parts(found, "strong")} == {"compute", "exposed communication", "update"}


def test_without_the_extra_there_is_a_record_and_a_word(case: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: Simulation) -> Any:
        raise UsageError("drawing charts needs altair", hint="install it")

    monkeypatch.setattr(chart, "draw", missing)
    heard: list[tuple[str, dict[str, Any]]] = []
    loaded = loading.load(case, [])
    run, _ = simulate(
        loaded,
        case.parent / "runs",
        lambda event, facts: heard.append((event, facts)),
        device="b200",
        most=1,
        model=None,
        hybrid=False,
        assumed={},
    )
    assert run.simulation_path.is_file() and not (run.root / "simulation.png").exists()
    assert any("no chart: drawing charts needs altair; install it" in facts.get("words", "") for _, facts in heard)


def test_the_text_tells_assumptions_rows_and_notes(case: Path) -> None:
    least = simulated(case, assumed={"memory_bytes": 1})[1].rows[2].peak_bytes  # of four devices, which nothing suffices
    _, found = simulated(case, assumed={"price_per_hour": 2.5, "memory_bytes": int(least / 0.9) + 2})
    words = text(found)
    for said in ("989 TFLOP/s", "67 TFLOP/s"):
        assert (said in words) == (said == "67 TFLOP/s")  # the recipe says fp32
    assert "price: 2.5 an hour a device" in words and "strong scaling" in words and "weak scaling" in words
    for assumption in (*found.assumptions, *found.notes, found.cluster.source):
        assert assumption in words
    lines = [line for line in words.splitlines() if re.match(r" +[\d,]+ +[\d.]+ [KMGT]?B ", line)]
    assert len(lines) == len(found.rows) and "…" not in words
    for line, row in zip(lines, found.rows, strict=True):
        assert ("too large" in line) == (not row.fits)
    assert any("too large" in line for line in lines) and not all("too large" in line for line in lines)
    _, free = simulated(case)
    assert "price: not given" in text(free) and all(row.price is None for row in free.rows)


def test_auto_is_what_the_devices_have_and_the_run_keeps_its_own(case: Path) -> None:
    run, found = simulated(case, "train.precision=auto")
    assert found.precision == "bf16-mixed" and found.cluster.compute_type == "bf16"
    assert loading.load(run.recipe_path, need_files=False).recipe.train.precision == "fp32"  # as this CPU has it


def test_what_this_machine_lacks_can_be_simulated(case: Path) -> None:
    run, found = simulated(case, "train.precision=bf16-mixed", "machine.device=cuda", "machine.optimizer_states=host")
    assert found.precision == "bf16-mixed"
    saved = loading.load(run.recipe_path, need_files=False).recipe
    assert (saved.train.precision, saved.machine.device, saved.machine.optimizer_states) == ("bf16-mixed", "cuda", "host")
    assert (found.rows[0].update_seconds or 0) > (simulated(case, "train.precision=bf16-mixed")[1].rows[0].update_seconds or 0)


def test_a_run_that_was_planned_is_not_touched(case: Path) -> None:
    run = run_until("plan", loading.load(case), case.parent / "runs")
    before = {path: path.read_bytes() for path in (run.plan_path, run.recipe_path, run.data / "card.json")}
    simulated(case)
    assert {path: path.read_bytes() for path in before} == before
    run_until("plan", loading.load(case), case.parent / "runs")
    assert run.plan_path.read_bytes() == before[run.plan_path]


def test_sizes_of_another_model(case: Path) -> None:
    _, found = simulated(case, "train.precision=auto", model="llama-2-7b", most=2)
    assert found.model.parameters == 6_738_415_616
    assert found.assumptions[-1].endswith("not that of llama-2-7b")
    assert not found.rows[0].fits  # 16 bytes a parameter are 108 GB
    with pytest.raises(ModelError, match="did you mean 'llama-2-7b'"):
        simulated(case, model="llama-2-7")


def test_a_model_without_weights(case: Path, tmp_path: Path, tiny_model_folder: Callable[..., Path]) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in tiny_model_folder("llama").iterdir():
        if file.suffix != ".safetensors":
            (bare / file.name).write_bytes(file.read_bytes())
    _, found = simulated(case, f"model.source={bare}")
    assert found.model.parameters == simulated(case)[1].model.parameters


def test_this_machine_is_measured(case: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "best_product_rate", lambda *_: 1e30)
    monkeypatch.setattr(links, "measure", lambda _: links.Link(1e6, 1e-3))
    _, found = simulated(case, device="this-machine", most=4)
    assumed = found.cluster
    assert assumed.device_type == "cpu" and assumed.shares_node and assumed.overlap_ratio == 0
    assert (assumed.node_bytes_per_second, assumed.node_latency_seconds, assumed.devices_per_node) == (1e6, 1e-3, 4)
    assert 0 < assumed.reached_ratio * assumed.flops_per_second < 1e13  # what two tiny blocks reach, not what was made up
    weak = [row for row in found.rows if row.scaling == "weak"]
    assert weak[2].compute_seconds == pytest.approx(4 * (weak[0].compute_seconds or 0))
    assert weak[1].exposed_seconds == pytest.approx(weak[1].communication_seconds)


def test_wrong_input_is_told_before_anything_is_prepared(case: Path) -> None:
    with pytest.raises(UsageError, match="no device 'h100'"):
        simulated(case, device="h100")
    assert not (case.parent / "runs").exists()
    with pytest.raises(UsageError, match=r"price_per_hour: -1: "):
        simulated(case, assumed={"price_per_hour": -1})
    assert not (case.parent / "runs" / "tiny" / "simulation.json").exists()
