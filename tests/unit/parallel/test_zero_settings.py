"""What a DeepSpeed file may say beside a recipe: its own settings, "auto", and what the recipe says as well."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from fullrank.errors import UsageError
from fullrank.parallel.zero import refused_by_zero
from fullrank.parallel.zero_settings import BUCKET_ELEMENTS, settings_of, stage_of
from fullrank.recipe import Recipe

RANKS = 2


def recipe(folder: Path, given: Any = None, **sections: dict[str, Any]) -> Recipe:
    """A recipe for DeepSpeed; `given` is the content of the user's file."""
    parallel = {"engine": "deepspeed", **sections.pop("parallel", {})}
    if given is not None:
        path = folder / "ds.json"
        path.write_text(given if isinstance(given, str) else json.dumps(given), encoding="utf-8")
        parallel["deepspeed_config"] = str(path)
    train = {"global_batch_size": 16, "precision": "fp32", **sections.pop("train", {})}
    return Recipe.model_validate(
        {
            "name": "t",
            "model": {"source": "m"},
            "data": {"train": "t.jsonl"},
            "train": train,
            "parallel": parallel,
            **sections,
        }
    )


def problems(folder: Path, given: Any, **sections: dict[str, Any]) -> str:
    with pytest.raises(UsageError) as refused:
        settings_of(recipe(folder, given, **sections), RANKS)
    return refused.value.message


AUTOS = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto", "loss_scale": 0},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
    "scheduler": {
        "type": "WarmupCosineLR",
        "params": {"warmup_num_steps": "auto", "total_num_steps": "auto", "warmup_min_ratio": 0.0},
    },
    "zero_optimization": {
        "stage": 2,
        "overlap_comm": True,
        "reduce_bucket_size": "auto",
        "allgather_bucket_size": 2e8,
        "offload_optimizer": {"device": "none"},
    },
    "steps_per_print": 50,
    "wall_clock_breakdown": False,
}


def test_autos_are_filled_in_and_settings_of_speed_go_through(tmp_path: Path) -> None:
    found = settings_of(recipe(tmp_path, AUTOS), RANKS)
    assert found["zero_optimization"] == {
        "stage": 2,
        "overlap_comm": True,
        "reduce_bucket_size": BUCKET_ELEMENTS,
        "allgather_bucket_size": 2e8,
    }
    assert found["steps_per_print"] == 50
    assert (found["train_batch_size"], found["gradient_clipping"]) == (RANKS, 0.0)
    assert not {"optimizer", "scheduler", "bf16", "fp16"} & found.keys()


def test_what_says_the_same_is_welcome(tmp_path: Path) -> None:
    given = {
        "train_batch_size": 16,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "optimizer": {"type": "Adam", "params": {"lr": 2e-5, "betas": [0.9, 0.95], "torch_adam": True}},
    }
    settings_of(recipe(tmp_path, given, train={"precision": "bf16-mixed"}), RANKS)


def test_every_contradiction_is_named_with_both_values_at_once(tmp_path: Path) -> None:
    given = {
        "train_batch_size": 32,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 0.5,
        "fp16": {"enabled": True},
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "weight_decay": 0.1}},
        "scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": 100}},
        "activation_checkpointing": {"partition_activations": True},
        "zero_optimization": {"stage": 1, "offload_optimizer": {"device": "nvme"}, "zero_quantized_weights": True, "new_key": 1},
        "curriculum_learning": {"enabled": True},
    }
    told = problems(tmp_path, given, parallel={"zero_stage": 3}).splitlines()
    wanted = [
        ("train_batch_size is 32", "train.global_batch_size is 16"),
        ("train_micro_batch_size_per_gpu 4 x gradient_accumulation_steps 4 x 2 ranks = 32", "global_batch_size 16"),
        ("gradient_clipping is 0.5", "train.max_grad_norm is 1.0"),
        ("fp16:", "train.precision"),
        ("bf16.enabled is true", "train.precision is \"fp32\": write false or 'auto' here"),
        ("optimizer.params.lr is 0.0001", "train.optimizer.learning_rate is 2e-05"),
        ("optimizer.params.weight_decay is 0.1", "train.optimizer.weight_decay is 0.0"),
        ('scheduler.type is "WarmupDecayLR"', 'train.schedule.name is "cosine"'),
        ("activation_checkpointing", "plan"),
        ("zero_optimization.stage is 1", "parallel.zero_stage is 3"),
        ("zero_optimization.offload_optimizer.device: nvme", "machine.optimizer_states: disk"),
        ("zero_optimization.zero_quantized_weights", "rounds weights"),
        ("zero_optimization.new_key", "not known"),
        ("curriculum_learning", "order of examples"),
    ]
    for theirs, ours in wanted:
        assert any(theirs in line and ours in line for line in told), (theirs, told)
    assert len(told) == len(wanted)


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_a_file_that_is_no_configuration_is_refused(text: str, tmp_path: Path) -> None:
    assert "deepspeed_config" in problems(tmp_path, text)


def test_the_stage_is_the_recipes_then_the_files_then_three(tmp_path: Path) -> None:
    assert stage_of(recipe(tmp_path)) == 3
    assert stage_of(recipe(tmp_path, {"zero_optimization": {"stage": 1}})) == 1
    assert stage_of(recipe(tmp_path, parallel={"zero_stage": 2})) == 2


def test_states_in_host_memory_are_offloaded(tmp_path: Path) -> None:
    hosted = recipe(tmp_path, machine={"optimizer_states": "host"}, parallel={"offload_parameters": True})
    zero = settings_of(hosted, RANKS)["zero_optimization"]
    assert zero["offload_optimizer"]["device"] == zero["offload_param"]["device"] == "cpu"
    told = problems(tmp_path, {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}})
    assert 'machine.optimizer_states is "device"' in told


@pytest.mark.parametrize(
    ("train", "named"),
    [
        ({"optimizer": {"name": "muon"}}, ["muon"]),
        ({"optimizer": {"name": "adafactor"}}, ["adafactor"]),
        ({"optimizer": {"name": "adalomo"}, "precision": "bf16-nearest"}, ["adalomo", "bf16-nearest"]),
        ({"precision": "bf16-stochastic"}, ["bf16-stochastic"]),
        ({"optimizer": {"moments": "int8"}}, []),
        ({"optimizer": {"name": "lomo"}, "precision": "bf16-mixed"}, []),
    ],
    ids=str,
)
def test_rules_that_look_at_whole_tensors_are_refused_by_name(train: dict[str, Any], named: list[str], tmp_path: Path) -> None:
    told = refused_by_zero(recipe(tmp_path, train=train).train)
    assert len(told) == len(named)
    for problem, name in zip(told, named, strict=True):
        assert name in problem and "fsdp2" in problem


@pytest.mark.parametrize(
    "parallel",
    [
        {"engine": "fsdp2", "zero_stage": 2},
        {"engine": "auto", "deepspeed_config": "ds.json"},
        {"zero_stage": 2, "offload_parameters": True},
    ],
    ids=str,
)
def test_keys_of_deepspeed_need_it(parallel: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=r"deepspeed|zero_stage"):
        recipe(tmp_path, parallel=parallel)
