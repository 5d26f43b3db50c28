"""The engine on FSDP2 against the one of a single process, in float64 where the mathematics is the question."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rank_work import Asked, best_read, differences, exported, moved_parts, offloaded_as_written, stepped
from ranks import Ranks

from fullrank.models import export
from fullrank.models.load import load_model, load_tokenizer
from fullrank.parallel.world import World

Folder = Callable[..., Path]
Worlds = Callable[[int], Ranks]

#: Sums of float64 in another order.
CLOSE = 1e-9


def alone(asked: Asked) -> dict[str, Any]:
    """The same steps in this process, the model whole."""
    return stepped(World(), replace(asked, checkpoints="", sync="step"), False)


def same(found: dict[str, Any], wanted: dict[str, Any], tolerance: float) -> None:
    assert np.allclose(found["losses"], wanted["losses"], rtol=tolerance, atol=0)
    assert np.allclose(found["norms"], wanted["norms"], rtol=tolerance, atol=0)
    assert differences(found["weights"], wanted["weights"]) <= tolerance


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gemma3", "gpt2", "mistral", "phi", "qwen3_moe"])
def test_two_ranks_learn_what_one_process_does(family: str, ranks: Worlds, tiny_model_folder: Folder) -> None:
    """Tied embeddings, biases, windows, caps, experts; the last step has one example, so a rank has nothing but an idle row."""
    double = family != "qwen3_moe"  # torch multiplies groups of experts in fp32 at most
    asked = Asked(str(tiny_model_folder(family)), dtype=torch.float64 if double else torch.float32)
    one, other = ranks(2).ask(stepped, asked)
    assert one["losses"] == other["losses"] and one["norms"] == other["norms"]
    assert differences(one["weights"], other["weights"]) == 0.0
    same(one, alone(asked), CLOSE if double else 1e-4)
    assert one["never_reached"] == set()


@pytest.mark.parametrize(
    ("size", "changes"),
    [
        (1, {}),
        (4, {}),
        (4, {"replicas": 2, "sync": "row"}),
        (2, {"sync": "row"}),
        (2, {"recompute": "block"}),
        (2, {"recompute": "selective", "sync": "row"}),
        (2, {"train": {"frozen": ["model.embed_tokens", "model.layers.0.*"]}}),
        (1, {"offload": True}),
        (2, {"offload": True, "recompute": "block"}),
        (2, {"offload": True, "sync": "row", "on_disk": True}),
        (4, {"offload": True, "replicas": 2, "train": {"frozen": ["model.embed_tokens", "model.layers.0.*"]}}),
        (2, {"offload": True, "context": 2}),
    ],
    ids=str,
)
def test_every_way_to_divide_is_the_same_step(
    size: int, changes: dict[str, Any], ranks: Worlds, tiny_model_folder: Folder
) -> None:
    asked = Asked(str(tiny_model_folder("llama")), **changes)
    found = ranks(size).ask(stepped, asked)
    wanted = alone(replace(asked, recompute="none"))
    for one in found:
        same(one, wanted, CLOSE)


@pytest.mark.parametrize(
    "train",
    [
        {"optimizer": {"name": "muon", "learning_rate": 1e-2}},
        {"optimizer": {"name": "adafactor", "learning_rate": 1e-2}},
        {"optimizer": {"name": "lomo", "learning_rate": 1e-2}},
        {"optimizer": {"name": "adalomo", "learning_rate": 1e-2}, "max_grad_norm": None},
        {"optimizer": {"learning_rate": 1e-2, "layer_decay": 0.5, "weight_decay": 0.1, "eps": 1e-6}},
    ],
    ids=lambda train: str(train["optimizer"].get("name", "adamw")),
)
def test_rules_that_look_at_whole_tensors_see_them_whole(train: dict[str, Any], ranks: Worlds, tiny_model_folder: Folder) -> None:
    # Muon's iteration is in bf16, where a last bit of its input becomes a last bit of 8.
    tolerance = 2e-2 if train["optimizer"].get("name") == "muon" else CLOSE
    asked = Asked(str(tiny_model_folder("llama")), train=train)
    for size in (2, 4):
        found = ranks(size).ask(stepped, asked)[0]
        wanted = alone(asked)
        assert np.allclose(found["losses"][:1], wanted["losses"][:1], rtol=CLOSE, atol=0)
        assert differences(found["weights"], wanted["weights"]) <= tolerance


@pytest.mark.parametrize("rounding", ["bf16-stochastic", "bf16-kahan"])
@pytest.mark.parametrize("sync", ["step", "row"])
def test_weights_of_16_bits_round_as_on_one_process(rounding: str, sync: str, ranks: Worlds, tiny_model_folder: Folder) -> None:
    """Gradients reach the rule in fp32, and chance is a number of the element, not of the rank."""
    asked = Asked(
        str(tiny_model_folder("llama")),
        train={"precision": rounding},
        dtype=torch.bfloat16,
        compute_type=torch.float32,
        sync=sync,
    )
    found = ranks(2).ask(stepped, asked)[0]
    wide = ranks(1).ask(stepped, asked)[0]
    differing = sum(int((tensor != wide["weights"][name]).sum()) for name, tensor in found["weights"].items())
    # A gradient's last bits in fp32 decide one rounding in thousands.
    assert differing <= 1e-3 * sum(tensor.size for tensor in found["weights"].values())
    assert np.allclose(found["losses"], wide["losses"], rtol=1e-5)


def test_ranks_take_about_as_many_tokens_and_every_example_once(ranks: Worlds, tiny_model_folder: Folder) -> None:
    asked = Asked(str(tiny_model_folder("llama")), steps=3, examples=16, budget=48)
    found = ranks(4).ask(stepped, asked)
    for step in range(2):
        taken = sorted(example for one in found for row in one["orders"][step] for example in row)
        assert taken == list(range(16 * step, 16 * step + 16))
        assert len({len(one["orders"][step]) for one in found}) == 1  # rows, idle ones among them


@pytest.mark.parametrize(("family", "offload"), [("llama", False), ("qwen3", False), ("qwen3_moe", False), ("qwen3_moe", True)])
def test_an_export_of_four_ranks_has_the_bytes_of_one(
    family: str, offload: bool, ranks: Worlds, tiny_model_folder: Folder, tmp_path: Path
) -> None:
    """The same weights, cast, named and put together as transformers has them; experts are stored one by one."""
    folder = tiny_model_folder(family)
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for made in (ours, theirs):
        made.mkdir()
    first, *_ = ranks(4).ask(exported, Asked(str(folder), dtype=torch.float32, offload=offload), str(ours), str(folder))
    model = load_model(folder, device=torch.device("cpu"))
    assert sorted(first["unchanged"]) == sorted(name for name, _ in model.named_parameters())
    export.cast(model, torch.bfloat16)
    export.write_model(model, load_tokenizer(folder), [3], theirs)
    for path in theirs.iterdir():
        assert (ours / path.name).read_bytes() == path.read_bytes(), path.name
    assert first["digests"] == {name: export.digest(p) for name, p in model.named_parameters()}


# ---- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "train",
    [
        {},
        {"optimizer": {"name": "adamw", "learning_rate": 1e-2, "moments": "int8", "eps": 1e-6}},
        {"optimizer": {"name": "adalomo", "learning_rate": 1e-2}},
        {"optimizer": {"name": "muon", "learning_rate": 1e-2}},
    ],
    ids=["adamw", "int8", "adalomo", "muon"],
)
def test_a_checkpoint_continues_bit_by_bit_and_on_other_numbers_of_ranks(
    train: dict[str, Any], ranks: Worlds, tiny_model_folder: Folder, tmp_path: Path
) -> None:
    """Saved by two ranks; continued by two, by four, by one process without an engine for several."""
    asked = Asked(str(tiny_model_folder("llama", hidden_size=64)), train=train, dtype=torch.float32, steps=3, examples=5)
    saved = replace(asked, checkpoints=str(tmp_path))
    first = ranks(2).ask(stepped, saved)[0]
    going_on = replace(saved, first=3, steps=2)
    whole = ranks(2).ask(stepped, replace(asked, steps=5))[0]
    # The last of the first three steps had one example only, so what is compared is two sittings that both had it.
    two = ranks(2).ask(stepped, going_on)[0]
    again = ranks(2).ask(stepped, going_on)[0]
    assert two["losses"] == again["losses"] and differences(two["weights"], again["weights"]) == 0.0
    four = ranks(4).ask(stepped, going_on)[0]
    one = stepped(World(), going_on, False)
    tolerance = 2e-2 if train else 1e-5
    for other in (four, one):
        assert np.allclose(other["losses"], two["losses"], rtol=1e-4)
        assert differences(other["weights"], two["weights"]) <= tolerance
    assert first["losses"][:2] == whole["losses"][:2]


def test_a_checkpoint_of_one_process_is_read_by_ranks(ranks: Worlds, tiny_model_folder: Folder, tmp_path: Path) -> None:
    asked = Asked(str(tiny_model_folder("llama")), steps=3)
    stepped(World(), replace(asked, checkpoints=str(tmp_path)), False)
    going_on = replace(asked, checkpoints=str(tmp_path), first=3, steps=2)
    wanted = stepped(World(), going_on, False)
    for size in (1, 2, 4):
        same(ranks(size).ask(stepped, replace(going_on, offload=size == 2))[0], wanted, CLOSE)


def test_one_process_goes_on_with_what_an_engine_of_one_rank_saved(
    ranks: Worlds, tiny_model_folder: Folder, tmp_path: Path
) -> None:
    asked = Asked(str(tiny_model_folder("llama")), steps=2, checkpoints=str(tmp_path))
    ranks(1).ask(stepped, asked)
    going_on = replace(asked, first=2)
    same(stepped(World(), going_on, False), ranks(1).ask(stepped, going_on)[0], CLOSE)


@pytest.mark.parametrize("replicas", [1, 2])
def test_the_best_weights_are_read_back(replicas: int, ranks: Worlds, tiny_model_folder: Folder, tmp_path: Path) -> None:
    """Also where several ranks have the same parts."""
    asked = Asked(str(tiny_model_folder("llama")), dtype=torch.float32, replicas=replicas, checkpoints=str(tmp_path))
    for saved, read in ranks(2).ask(best_read, asked):
        assert differences(read, saved) == 0.0


def test_what_was_offloaded_is_saved_and_read_as_anything_else(ranks: Worlds, tiny_model_folder: Folder, tmp_path: Path) -> None:
    """Saved by two ranks whose parts wait in host memory; continued by them, by two that hold theirs, by one process."""
    asked = Asked(str(tiny_model_folder("llama")), steps=3, offload=True, checkpoints=str(tmp_path))
    ranks(2).ask(stepped, asked)
    going_on = replace(asked, first=3, steps=2)
    wanted = stepped(World(), going_on, False)
    two, again = (ranks(2).ask(stepped, going_on)[0] for _ in range(2))
    assert two["losses"] == again["losses"] and differences(two["weights"], again["weights"]) == 0.0
    for found in (two, ranks(2).ask(stepped, replace(going_on, offload=False))[0]):
        same(found, wanted, CLOSE)


# ---- parts in host memory ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offload", [False, True])
def test_the_memory_that_is_updated_is_the_one_that_is_gathered(offload: bool, ranks: Worlds, tiny_model_folder: Folder) -> None:
    """FSDP2 puts parts that it has to fill up or page-lock into other memory: before anybody holds them."""
    asked = Asked(str(tiny_model_folder("llama", intermediate_size=47)), dtype=torch.float32, offload=offload)
    for one in ranks(2).ask(moved_parts, asked):
        assert one == []


@pytest.mark.parametrize("sync", ["step", "row"])
def test_offloaded_weights_of_16_bits_get_their_gradients_in_fp32(sync: str, ranks: Worlds, tiny_model_folder: Folder) -> None:
    """Parts of matrices with 47 rows are of two sizes, and the smaller ones filled up where sums lie one after the other."""
    asked = Asked(
        str(tiny_model_folder("llama", intermediate_size=47)),
        train={"precision": "bf16-stochastic"},
        dtype=torch.bfloat16,
        compute_type=torch.float32,
        sync=sync,
        offload=True,
    )
    away = ranks(2).ask(stepped, asked)[0]
    here = ranks(2).ask(stepped, replace(asked, offload=False))[0]
    assert away["losses"] == here["losses"] and differences(away["weights"], here["weights"]) == 0.0
    wide = ranks(1).ask(stepped, asked)[0]
    differing = sum(int((tensor != wide["weights"][name]).sum()) for name, tensor in away["weights"].items())
    # A gradient's last bits decide one rounding in thousands, and a weight that was rounded otherwise some more in later steps.
    assert differing <= 2e-2 * sum(tensor.size for tensor in away["weights"].values())
    assert np.allclose(away["losses"], wide["losses"], rtol=1e-4)


@pytest.mark.parametrize(("states", "shelf"), [("host", None), ("disk", "OnDisk")])
def test_a_recipe_that_offloads_has_states_lie_with_the_weights(
    states: str, shelf: str | None, ranks: Worlds, tiny_model_folder: Folder
) -> None:
    parallel = {"offload_parameters": True}
    assert ranks(1).ask(offloaded_as_written, str(tiny_model_folder("llama")), states, parallel) == [(True, shelf)]
    assert ranks(1).ask(offloaded_as_written, str(tiny_model_folder("llama")), "host", {}) == [(False, "InHost")]
