"""The engine on DeepSpeed ZeRO against the one of a single process, in float64 where the mathematics is the question."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rank_work import Asked, differences, not_finite, read_and_saved, stepped
from ranks import Ranks
from staging import staged, write_case

from fullrank.parallel.world import World

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: pip install 'fullrank[deepspeed]'")

Folder = Callable[..., Path]
Worlds = Callable[[int], Ranks]

#: Sums of float64 in another order.
CLOSE = 1e-9


def alone(asked: Asked) -> dict[str, Any]:
    """The same steps in this process, the model whole."""
    return stepped(World(), replace(asked, checkpoints="", zero={}, recompute="none"), False)


def same(found: dict[str, Any], wanted: dict[str, Any], tolerance: float) -> None:
    assert np.allclose(found["losses"], wanted["losses"], rtol=tolerance, atol=0)
    assert np.allclose(found["norms"], wanted["norms"], rtol=tolerance, atol=0)
    assert differences(found["weights"], wanted["weights"]) <= tolerance


# ---- the same steps -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_ranks_learn_what_one_process_does(stage: int, family: str, ranks: Worlds, tiny_model_folder: Folder) -> None:
    """Tied embeddings, biases, steps of several rows; the last step has one example, so a rank has nothing but an idle row."""
    asked = Asked(str(tiny_model_folder(family)), zero={"stage": stage})
    one, other = ranks(2).ask(stepped, asked)
    assert one["losses"] == other["losses"] and one["norms"] == other["norms"]
    assert differences(one["weights"], other["weights"]) == 0.0
    same(one, alone(asked), CLOSE)
    assert one["never_reached"] == set()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_in_fp32_the_first_ten_steps_agree(stage: int, ranks: Worlds, tiny_model_folder: Folder) -> None:
    asked = Asked(str(tiny_model_folder("llama")), zero={"stage": stage}, dtype=torch.float32, steps=10, examples=5)
    found, wanted = ranks(2).ask(stepped, asked)[0], alone(asked)
    assert np.allclose(found["losses"], wanted["losses"], rtol=1e-5, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_fifty_steps_agree(stage: int, ranks: Worlds, tiny_model_folder: Folder) -> None:
    asked = Asked(str(tiny_model_folder("llama")), zero={"stage": stage}, steps=50, examples=5)
    same(ranks(2).ask(stepped, asked)[0], alone(asked), CLOSE)


@pytest.mark.parametrize(
    ("size", "zero", "changes"),
    [
        (1, {"stage": 1}, {}),
        (1, {"stage": 3}, {}),
        (3, {"stage": 2}, {}),
        (3, {"stage": 3}, {"examples": 11}),
        (2, {"stage": 3, "stage3_param_persistence_threshold": 100_000}, {}),
        (2, {"stage": 3, "sub_group_size": 5000}, {}),
        (2, {"stage": 2, "round_robin_gradients": True, "overlap_comm": True}, {}),
        (2, {"stage": 1}, {"recompute": "block"}),
        (2, {"stage": 3}, {"recompute": "block"}),
        (2, {"stage": 2}, {"train": {"frozen": ["model.embed_tokens", "model.layers.0.*"]}}),
        (2, {"stage": 3}, {"train": {"frozen": ["model.embed_tokens", "model.layers.0.*"]}}),
        (2, {"stage": 1}, {"train": {"optimizer": {"name": "lomo", "learning_rate": 1e-2}}}),
        (2, {"stage": 3}, {"train": {"optimizer": {"name": "lomo", "learning_rate": 1e-2}, "max_grad_norm": None}}),
        (
            2,
            {"stage": 2},
            {"train": {"optimizer": {"learning_rate": 1e-2, "layer_decay": 0.5, "weight_decay": 0.1, "eps": 1e-6}}},
        ),
        (
            2,
            {"stage": 3},
            {"train": {"optimizer": {"learning_rate": 1e-2, "layer_decay": 0.5, "weight_decay": 0.1, "eps": 1e-6}}},
        ),
    ],
    ids=str,
)
def test_every_way_to_divide_is_the_same_step(
    size: int, zero: dict[str, Any], changes: dict[str, Any], ranks: Worlds, tiny_model_folder: Folder
) -> None:
    asked = Asked(str(tiny_model_folder("llama")), zero=zero, **changes)
    wanted = alone(asked)
    for found in ranks(size).ask(stepped, asked):
        same(found, wanted, CLOSE)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_waits_in_host_memory_is_updated_there(stage: int, ranks: Worlds, tiny_model_folder: Folder) -> None:
    """DeepSpeed takes the norm of such gradients in fp32."""
    zero = {"stage": stage, "offload_optimizer": {"device": "cpu"}}
    if stage == 3:
        zero["offload_param"] = {"device": "cpu"}
    asked = Asked(str(tiny_model_folder("llama")), zero=zero)
    same(ranks(2).ask(stepped, asked)[0], alone(asked), 1e-6)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_step_that_is_not_finite_changes_nothing(stage: int, ranks: Worlds, tiny_model_folder: Folder) -> None:
    asked = Asked(str(tiny_model_folder("llama")), zero={"stage": stage})
    for updated, moved, after in ranks(2).ask(not_finite, asked):
        assert not updated and moved == 0.0
        assert after, "the next step is taken"


# ---- checkpoints --------------------------------------------------------------------------------------------------------

_INT8 = {"name": "adamw", "learning_rate": 1e-2, "moments": "int8", "eps": 1e-6}


@pytest.mark.parametrize(
    ("stage", "train"),
    [
        (1, {"optimizer": _INT8}),
        (2, {"optimizer": {"name": "lomo", "learning_rate": 1e-2}, "frozen": ["model.layers.0.*"]}),
        (3, {}),
        (3, {"optimizer": _INT8, "frozen": ["model.layers.0.*"]}),
    ],
    ids=str,
)
def test_a_checkpoint_continues_bit_by_bit_and_on_the_other_engine(
    stage: int, train: dict[str, Any], ranks: Worlds, tiny_model_folder: Folder, tmp_path: Path
) -> None:
    """Saved by two ranks; continued by them, by FSDP2 on two, by another stage on three, by one process without an engine."""
    folder = str(tiny_model_folder("llama", hidden_size=64))
    asked = Asked(folder, train=train, dtype=torch.float32, steps=3, examples=5, zero={"stage": stage})
    saved = replace(asked, checkpoints=str(tmp_path))
    ranks(2).ask(stepped, saved)
    going_on = replace(saved, first=3, steps=2)
    two, again = (ranks(2).ask(stepped, going_on)[0] for _ in range(2))
    assert two["losses"] == again["losses"] and differences(two["weights"], again["weights"]) == 0.0
    others = [
        ranks(2).ask(stepped, replace(going_on, zero={}))[0],
        ranks(3).ask(stepped, replace(going_on, zero={"stage": stage % 3 + 1}))[0],
        stepped(World(), replace(going_on, zero={}), False),
    ]
    tolerance = 2e-2 if train else 1e-5
    for other in others:
        assert np.allclose(other["losses"], two["losses"], rtol=1e-4)
        assert differences(other["weights"], two["weights"]) <= tolerance


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_checkpoints_of_one_process_and_of_fsdp2_are_read(
    stage: int, ranks: Worlds, tiny_model_folder: Folder, tmp_path: Path
) -> None:
    asked = Asked(str(tiny_model_folder("llama")), steps=3)
    for engine in ("one", "fsdp2"):
        saving = replace(asked, checkpoints=str(tmp_path / engine))
        (tmp_path / engine).mkdir()
        if engine == "one":
            stepped(World(), saving, False)
        else:
            ranks(2).ask(stepped, saving)
        going_on = replace(saving, first=3, steps=2)
        wanted = stepped(World(), going_on, False)
        same(ranks(2).ask(stepped, replace(going_on, zero={"stage": stage}))[0], wanted, CLOSE)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_weights_go_through_a_checkpoint_exactly(stage: int, ranks: Worlds, tiny_model_folder: Folder, tmp_path: Path) -> None:
    asked = Asked(
        str(tiny_model_folder("qwen3")), dtype=torch.float32, zero={"stage": stage}, train={"frozen": ["model.layers.0.*"]}
    )
    for saved, read, files in ranks(2).ask(read_and_saved, replace(asked, checkpoints=str(tmp_path))):
        assert differences(saved, read) == 0.0
        assert all(name.endswith((".safetensors", ".json")) for name in files)


# ---- a whole run --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [2, 3])
def test_a_run_on_two_ranks_has_the_losses_of_one_process(stage: int, tiny_model_folder: Folder, tmp_path: Path) -> None:
    from fullrank.workflows import launch

    losses, engines = {}, {}
    for name, parallel in (
        ("one", {}),
        ("two", {"ranks": 2, "engine": "deepspeed", "zero_stage": stage}),
    ):
        folder = tmp_path / name
        folder.mkdir()
        case = staged(write_case(folder, tiny_model_folder("llama"), parallel=parallel))
        case.data()
        world = launch.world_here(case.recipe)
        from fullrank.loading import dump
        from fullrank.plan.stage import stage as plan_stage
        from fullrank.run import write_text

        plan = plan_stage(case.recipe, case.run, case.base, world)
        engines[name] = (plan.engine, plan.zero_stage)
        write_text(case.run.recipe_path, dump(case.recipe))
        if name == "one":
            case.train()
        else:
            launch.train(case.recipe, case.run, 2)
        losses[name] = case.losses()
        assert (case.run.model / "model.safetensors").is_file()
    assert engines == {"one": ("single", None), "two": ("deepspeed", stage)}
    assert np.allclose(losses["two"], losses["one"], rtol=1e-4)
