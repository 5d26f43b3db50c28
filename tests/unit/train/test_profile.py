"""A profile of a tiny run: what it counts is what training would do, what it measures adds up, and it leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from staging import Staged, staged, write_case

from fullrank.models.load import load_model
from fullrank.parallel import device as devices
from fullrank.plan import speed
from fullrank.records import Plan, Profile
from fullrank.run import need_record, read_record, write_record
from fullrank.sequences.layout import micro_batches, needed_tokens
from fullrank.sequences.order import Order
from fullrank.sequences.store import TokenStore
from fullrank.train import profile as profiles

BEST = 1e9


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "measure", lambda *arguments, **options: None)
    monkeypatch.setattr(devices, "best_product_rate", lambda device, dtype: BEST)


@pytest.fixture
def profiled(tmp_path: Path, tiny_model_folder: Callable[..., Path]) -> tuple[Staged, Profile]:
    run = staged(write_case(tmp_path, tiny_model_folder("llama")))  # 16 examples, 4 a step, 2 epochs: 8 steps
    run.data()
    run.plan()
    return run, profiles.profile(run.recipe, run.run, run.base, 2)


def test_it_counts_what_training_does(profiled: tuple[Staged, Profile]) -> None:
    run, found = profiled
    plan, store = need_record(run.run.plan_path, Plan, "plan"), TokenStore(run.run.data / "train")
    order = Order(16, 4, 2, run.recipe.train.seed)
    timed = [order.step(2), order.step(3)]  # the first step is told apart
    lengths = [[needed_tokens(store[int(example)]) for example in step] for step in timed]
    rows = [row for step in timed for row in micro_batches(store, step, plan.micro_batch_tokens, packed=True)]
    assert found.separate_tokens == sum(map(sum, lengths))
    assert found.computed_tokens == sum(row.tokens for row in rows) < found.separate_tokens
    assert found.padded_tokens == sum(4 * max(step) for step in lengths)
    assert found.predictions == sum(len(row.targets_S) for row in rows)
    assert (found.steps, found.steps_planned, found.rows_per_step) == (2, 8, len(rows) / 2)


def test_its_parts_add_up(profiled: tuple[Staged, Profile]) -> None:
    _, found = profiled
    assert list(found.phases) == ["data wait", "forward", "head", "backward", "optimizer"]
    assert all(seconds > 0 for name, seconds in found.phases.items() if name != "data wait")
    named = {module.module for module in found.modules}
    assert {"embed_tokens", "layers.*.self_attn", "layers.*.mlp.gate_proj", "norm"} <= named
    inside = sum(module.forward_seconds for module in found.modules)
    assert 0 < inside <= found.phases["forward"]
    assert sum(module.backward_seconds for module in found.modules) <= found.phases["backward"]
    assert found.utilisation == pytest.approx(found.needed_flops * found.examples_per_second / 4 / BEST, rel=1e-6)


def test_its_memory_is_that_of_the_tensors(profiled: tuple[Staged, Profile]) -> None:
    run, found = profiled
    model = load_model(run.base.folder, device=devices.choose("cpu"))
    count = sum(parameter.numel() for parameter in model.parameters())
    measured = {part.part: part.measured_bytes for part in found.memory}
    assert (measured["weights"], measured["gradients"]) == (4 * count, 4 * count)
    assert measured["optimizer"] == 8 * count
    planned = {part.part: part.planned_bytes for part in found.memory}
    # What the embedding, the last norm and the attention's sums keep counts for more in so small a model.
    assert measured["activations"] == pytest.approx(planned["activations"], rel=0.35)


def test_it_leaves_a_record_and_nothing_else(profiled: tuple[Staged, Profile]) -> None:
    run, found = profiled
    assert read_record(run.run.profile_path, Profile) == found
    assert not run.run.train.exists() and not run.run.model.exists()


@pytest.mark.parametrize("how", ["selective", "block", "offload"])
def test_recomputed_steps_are_profiled(tmp_path: Path, tiny_model_folder: Callable[..., Path], how: str) -> None:
    run = staged(write_case(tmp_path, tiny_model_folder("llama")))
    run.data()
    plan = run.plan()
    write_record(run.run.plan_path, plan.model_copy(update={"recompute": how}))
    found = profiles.profile(run.recipe, run.run, run.base, 1)
    assert sum(module.forward_seconds + module.backward_seconds for module in found.modules) <= sum(found.phases.values())
    assert {part.measured_bytes for part in found.memory if part.part == "activations"} == {None}


def test_more_steps_than_the_run_has_are_taken_again(tmp_path: Path, tiny_model_folder: Callable[..., Path]) -> None:
    run = staged(write_case(tmp_path, tiny_model_folder("llama"), train={"epochs": 0.25}))
    run.data()
    assert run.plan().steps == 1
    assert profiles.profile(run.recipe, run.run, run.base, 2).steps == 2


def test_the_steps_that_are_watched_are_those_that_were_timed(
    tmp_path: Path, tiny_model_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    real = profiles.laid_out_ahead

    def noted(store: Any, order: Any, layout: Any, wanted: Any) -> Any:
        taken.extend(wanted)
        return real(store, order, layout, wanted)

    monkeypatch.setattr(profiles, "laid_out_ahead", noted)
    run = staged(write_case(tmp_path, tiny_model_folder("llama")))
    run.data()
    run.plan()
    profiles.profile(run.recipe, run.run, run.base, 2)
    assert taken == [1, 2, 3, 2, 3]


@pytest.mark.parametrize("gradients", ["release", "spill"])
def test_steps_block_by_block_are_profiled(gradients: str, tmp_path: Path, tiny_model_folder: Callable[..., Path]) -> None:
    run = staged(write_case(tmp_path, tiny_model_folder("llama")), [f"machine.gradients={gradients}"])
    run.data()
    run.plan()
    found = profiles.profile(run.recipe, run.run, run.base, 2)
    assert all(found.phases[phase] > 0 for phase in ("forward", "head", "backward", "optimizer"))
    assert {part.part for part in found.memory} >= {"weights", "gradients", "optimizer"}


@pytest.mark.parametrize(
    ("changes", "plan_changes", "note", "words"),
    [
        ({}, {}, "", "nothing stands out"),
        ({}, {}, "examples that share a row reach one another", "reach one another"),
        ({}, {"recompute": "selective"}, "", "machine.memory_limit"),
        ({"row_tokens": 100, "rows_per_step": 1}, {}, "", "larger train.global_batch_size"),
        ({"phases": {"forward": 1.0, "optimizer": 0.5}}, {}, "", "the optimizer takes 0.33"),
        ({"phases": {"forward": 1.0, "data wait": 0.5}}, {}, "", "waits for rows 0.33"),
        ({}, {"machine": {"threads": 1, "cores": 4}}, "", "1 of 4 cores"),  # with OMP_NUM_THREADS
    ],
)
def test_advice_follows_the_figures(
    profiled: tuple[Staged, Profile],
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    plan_changes: dict[str, Any],
    note: str,
    words: str,
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run, found = profiled
    plan = need_record(run.run.plan_path, Plan, "plan")
    machine = plan.machine.model_copy(update={"threads": 2, "cores": 2} | plan_changes.pop("machine", {}))
    fine = {"row_tokens": 800, "rows_per_step": 4.0, "phases": {"forward": 1.0, "backward": 2.0}}
    said = profiles.advice(
        found.model_copy(update=fine | changes), plan.model_copy(update={"machine": machine, **plan_changes}), note
    )
    assert len(said) == 1 and words in said[0]
