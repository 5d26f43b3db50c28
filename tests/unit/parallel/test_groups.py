"""Parameter groups: what is frozen, what learns more slowly, what is a hidden matrix."""

from __future__ import annotations

from typing import Any

import pytest
import tiny

from fullrank.errors import UsageError
from fullrank.parallel.groups import freeze, hidden_matrices, rates, shapes_of


def frozen(model: Any) -> set[str]:
    return {name for name, p in model.named_parameters() if not p.requires_grad}


@pytest.mark.parametrize(
    ("patterns", "wanted"),
    [
        (["model.embed_tokens"], {"model.embed_tokens.weight"}),
        (["*.input_layernorm.*"], {f"model.layers.{n}.input_layernorm.weight" for n in (0, 1)}),
        (["model.layers.[0-3].self_attn.q_proj"], {f"model.layers.{n}.self_attn.q_proj.weight" for n in (0, 1)}),
        (["model.norm.weight", "model.norm"], {"model.norm.weight"}),
    ],
)
def test_patterns_freeze_what_they_name(patterns: list[str], wanted: set[str]) -> None:
    model = tiny.model("llama")
    freeze(model, patterns)
    assert frozen(model) == wanted


def test_every_pattern_that_matches_nothing_is_named_with_what_is_near() -> None:
    with pytest.raises(UsageError) as caught:
        freeze(tiny.model("llama"), ["model.embed_token", "lm_haed.weight", "model.norm"])
    assert "'model.embed_token' matches no parameter" in caught.value.message
    assert "model.embed_tokens.weight" in caught.value.message and "'lm_haed.weight'" in caught.value.message


def test_something_must_be_left_to_train() -> None:
    with pytest.raises(UsageError, match="nothing is left to train"):
        freeze(tiny.model("llama"), ["*"])


def test_rates_fall_from_the_top_block_down() -> None:
    found = rates(tiny.model("llama", num_hidden_layers=3, tie_word_embeddings=False), 0.5)
    assert found["lm_head.weight"] == found["model.norm.weight"] == found["model.layers.2.mlp.up_proj.weight"] == 1.0
    assert found["model.layers.1.mlp.up_proj.weight"] == 0.5
    assert found["model.layers.0.input_layernorm.weight"] == 0.25
    assert found["model.embed_tokens.weight"] == 0.125
    assert rates(tiny.model("llama"), 1.0) == {}
    assert rates(tiny.model("gpt2"), 0.5)["transformer.wpe.weight"] == 0.25  # two blocks: below both


def test_hidden_matrices_are_those_of_blocks() -> None:
    model = tiny.model("llama")
    found = hidden_matrices(model)
    assert {name.split(".")[3] for name in found} == {"self_attn", "mlp"}
    assert not {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} & found


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_shapes_are_those_of_the_model(family: str) -> None:
    model = tiny.model(family)
    shapes = shapes_of(model.config, [])
    assert shapes.trained == {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert shapes.parameters == shapes.trained_parameters == sum(p.numel() for p in model.parameters())
    blocks = [
        sum(p.numel() for p in block.parameters()) for block in getattr(model.base_model, "layers", None) or model.base_model.h
    ]
    assert shapes.block == max(blocks) and shapes.outside == shapes.parameters - sum(blocks)
    assert shapes.largest_tensor == max(p.numel() for p in model.parameters())


def test_what_is_frozen_is_not_trained() -> None:
    config = tiny.model("llama").config
    whole, part = shapes_of(config, []), shapes_of(config, ["model.embed_tokens", "model.layers.0"])
    assert part.outside == whole.outside and part.outside_trained < whole.outside_trained
    assert part.trained_parameters < whole.trained_parameters == part.parameters
