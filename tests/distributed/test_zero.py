"""The engine on DeepSpeed ZeRO against the one of a single process."""
from __future__ import annotations
import pytest, torch
from dataclasses import replace
from rank_work import Asked, differences, stepped
from fullrank.parallel.world import World
CLOSE = 1e-9
import numpy as np

def alone(asked):
    return stepped(World(), replace(asked, checkpoints="", zero={}), False)
def same(found, wanted, tolerance):
    print(np.asarray(found["losses"])/np.asarray(wanted["losses"])-1, np.asarray(found["norms"])/np.asarray(wanted["norms"])-1, differences(found["weights"], wanted["weights"]))
    assert np.allclose(found["losses"], wanted["losses"], rtol=tolerance, atol=0)
    assert np.allclose(found["norms"], wanted["norms"], rtol=tolerance, atol=0)
    assert differences(found["weights"], wanted["weights"]) <= tolerance

@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_two(stage, family, ranks, tiny_model_folder):
    zero = {"stage": stage, "reduce_bucket_size": 100000, "stage3_param_persistence_threshold": 0}
    asked = Asked(str(tiny_model_folder(family)), zero=zero)
    one, other = ranks(2).ask(stepped, asked)
    assert one["losses"] == other["losses"] and one["norms"] == other["norms"]
    assert differences(one["weights"], other["weights"]) == 0.0
    same(one, alone(asked), CLOSE)

@pytest.mark.parametrize("size, zero, changes", [
 (1, {"stage": 1}, {}), (1, {"stage": 2}, {}), (1, {"stage": 3}, {}),
 (3, {"stage": 1}, {}), (3, {"stage": 2}, {}), (3, {"stage": 3}, {}),
 (2, {"stage": 3}, {}),
 (2, {"stage": 3, "sub_group_size": 5000}, {}),
 (2, {"stage": 1, "offload_optimizer": {"device": "cpu"}}, {}),
 (2, {"stage": 2, "offload_optimizer": {"device": "cpu"}}, {}),
 (2, {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}, {}),
 (2, {"stage": 2, "round_robin_gradients": True, "overlap_comm": True}, {}),
 (2, {"stage": 1}, {"recompute": "block"}), (2, {"stage": 2}, {"recompute": "selective"}),
 (2, {"stage": 3}, {"recompute": "block"}), (2, {"stage": 3}, {"recompute": "selective"}),
 (2, {"stage": 2}, {"train": {"frozen": ["model.embed_tokens", "model.layers.0.*"]}}),
 (2, {"stage": 3}, {"train": {"frozen": ["model.embed_tokens", "model.layers.0.*"]}}),
 (2, {"stage": 2}, {"train": {"optimizer": {"name": "lomo", "learning_rate": 1e-2}}}),
 (2, {"stage": 3}, {"train": {"optimizer": {"name": "lomo", "learning_rate": 1e-2}}}),
 (2, {"stage": 2}, {"train": {"optimizer": {"learning_rate": 1e-2, "layer_decay": 0.5, "weight_decay": 0.1, "eps": 1e-6}}}),
 (2, {"stage": 3}, {"train": {"optimizer": {"learning_rate": 1e-2, "layer_decay": 0.5, "weight_decay": 0.1, "eps": 1e-6}}}),
], ids=str)
def test_ways(size, zero, changes, ranks, tiny_model_folder):
    zero = {"reduce_bucket_size": 20000, "stage3_param_persistence_threshold": 0, **zero}
    asked = Asked(str(tiny_model_folder("llama")), zero=zero, **changes)
    found = ranks(size).ask(stepped, asked)
    same(found[0], alone(replace(asked, recompute="none")), CLOSE)

@pytest.mark.parametrize("train", [{}, {"optimizer": {"name": "adamw", "learning_rate": 1e-2, "moments": "int8", "eps": 1e-6}}, {"optimizer": {"name": "lomo", "learning_rate": 1e-2}, "frozen": ["model.layers.0.*"]}], ids=["adamw", "int8", "lomo"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_ckpt(stage, train, ranks, tiny_model_folder, tmp_path):
    zero = {"stage": stage, "reduce_bucket_size": 20000, "stage3_param_persistence_threshold": 0}
    asked = Asked(str(tiny_model_folder("llama", hidden_size=64)), train=train, dtype=torch.float32, steps=3, examples=5, zero=zero)
    saved = replace(asked, checkpoints=str(tmp_path))
    ranks(2).ask(stepped, saved)
    going_on = replace(saved, first=3, steps=2)
    two = ranks(2).ask(stepped, going_on)[0]
    again = ranks(2).ask(stepped, going_on)[0]
    assert two["losses"] == again["losses"] and differences(two["weights"], again["weights"]) == 0.0
    others = {
        "fsdp2": ranks(2).ask(stepped, replace(going_on, zero={}))[0],
        "fsdp2x3": ranks(3).ask(stepped, replace(going_on, zero={}))[0],
        "zerox3": ranks(3).ask(stepped, replace(going_on, zero={"stage": stage % 3 + 1}))[0],
        "one": stepped(World(), replace(going_on, zero={}), False),
    }
    for name, other in others.items():
        print(name, np.asarray(other["losses"])/np.asarray(two["losses"])-1, differences(other["weights"], two["weights"]))
        assert np.allclose(other["losses"], two["losses"], rtol=1e-4)
        assert differences(other["weights"], two["weights"]) <= (2e-2 if train else 1e-5)

@pytest.mark.parametrize("stage", [1, 3])
def test_ckpt_read(stage, ranks, tiny_model_folder, tmp_path):
    asked = Asked(str(tiny_model_folder("llama")), steps=3)
    for size in (0, 2):
        folder = tmp_path / str(size); folder.mkdir()
        saving = replace(asked, checkpoints=str(folder))
        stepped(World(), saving, False) if size == 0 else ranks(size).ask(stepped, saving)
        going_on = replace(saving, first=3, steps=2)
        wanted = stepped(World(), going_on, False)
        same(ranks(2).ask(stepped, replace(going_on, zero={"stage": stage}))[0], wanted, CLOSE)
