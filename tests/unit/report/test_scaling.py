"""The chart of a simulation: what it draws, and what it leaves without a bar."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

import pytest

from fullrank.records import Cluster, ModelFacts, SimulatedRow, Simulation
from fullrank.report import scaling

CLUSTER = Cluster(
    device="a-device",
    device_type="cuda",
    source="made up",
    compute_type="bf16",
    memory_bytes=1000,
    flops_per_second=1.0,
    reached_ratio=0.5,
    memory_bytes_per_second=1.0,
    host_bytes_per_second=1.0,
    devices_per_node=4,
    node_bytes_per_second=1.0,
    network_bytes_per_second=1.0,
    link_ratio=1.0,
    call_latency_seconds=0.0,
    node_latency_seconds=0.0,
    network_latency_seconds=0.0,
    overlap_ratio=0.0,
    shares_node=False,
)


def model() -> ModelFacts:
    numbers = dict.fromkeys(
        ("parameters", "hidden_size", "layers", "heads", "key_value_heads", "head_dim", "intermediate_size", "vocabulary"), 8
    )
    words: dict[str, Any] = {
        "source": "a-model",
        "kind": "configuration",
        "commit": None,
        "fingerprint": "0",
        "architecture": "A",
    }
    return ModelFacts(**words, **numbers, dtype="float32", tied_embeddings=True, context_tokens=None)


def row(scaling_: str, devices: int, *, fits: bool) -> SimulatedRow:
    times = ("compute", "communication", "exposed", "update", "step", "run")
    facts: dict[str, Any] = {f"{name}_seconds": float(devices) if fits else None for name in times}
    rest = {"tokens_per_second": 1.0, "efficiency_ratio": 1 / devices, "price": 3.0}
    return SimulatedRow(
        devices=devices,
        scaling=scaling_,  # type: ignore[arg-type]
        replicas=1,
        global_batch_size=4,
        steps=8,
        rows_per_device=1,
        row_tokens=16,
        busy_ratio=1.0,
        recompute="none",
        sync="step",
        ledger=[],
        peak_bytes=2000,
        available_bytes=900,
        fits=fits,
        **facts,
        **{name: value if fits else None for name, value in rest.items()},
    )


def simulation() -> Simulation:
    rows = [row(kind, devices, fits=devices > 1) for kind in ("strong", "weak") for devices in (1, 2, 1024)]
    return Simulation(
        model=model(),
        trained_parameters=8,
        precision="fp32",
        optimizer="adamw",
        tokens_per_step=64.0,
        steps_looked_at=8,
        cluster=CLUSTER,
        assumptions=[],
        rows=rows,
        notes=[],
    )


def test_only_what_fits_has_a_bar() -> None:
    found = scaling.parts(simulation(), "weak")
    assert {part["devices"] for part in found} == {"2", "1,024"}
    assert [part["seconds"] for part in found if part["devices"] == "2"] == [2.0, 2.0, 2.0]


def test_the_chart_stands_alone() -> None:
    pytest.importorskip("altair")
    pytest.importorskip("vl_convert")
    figure = scaling.draw(simulation())
    assert figure.png.startswith(b"\x89PNG\r\n")
    words = [text.text for text in ElementTree.fromstring(figure.svg).iter("{http://www.w3.org/2000/svg}text")]
    assert "a-model on a-device, 4 to a node: simulated, not measured" in words
    assert words.count("does not fit") == 2 and "Seconds of a step" in words and "1,024" in words
    assert "not measured" in figure.caption
