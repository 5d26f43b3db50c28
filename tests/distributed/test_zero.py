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
