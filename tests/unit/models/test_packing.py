"""Packing is asked of the model: attention families keep examples apart, state along the row does not."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
import transformers

from fullrank.models.packing import keeps_apart


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_attention_families_keep_examples_apart(family: str) -> None:
    model = tiny.model(family).train()
    assert keeps_apart(model)
    assert model.training


def built(config: Any) -> Any:
    torch.manual_seed(0)
    config.initializer_range = 0.15
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize(
    "config",
    [
        transformers.MambaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2, state_size=8),
        transformers.Lfm2Config(
            vocab_size=300,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            layer_types=["conv", "full_attention"],
        ),
        transformers.BloomConfig(vocab_size=300, hidden_size=32, n_layer=2, n_head=4),
    ],
    ids=["state space", "convolution", "positions from the mask"],
)
def test_models_that_leak_along_the_row_are_found_out(config: Any) -> None:
    assert not keeps_apart(built(config))


def test_a_small_leak_is_no_rounding() -> None:
    # One attention layer that looks past the border by a little: the mask of the second example is opened by hand.
    class Leaky(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny.model("llama")
            self.config, self.device = self.inner.config, self.inner.device

        def forward(self, input_ids: torch.Tensor, **others: Any) -> Any:
            output = self.inner(input_ids=input_ids, **others)
            running = torch.cumsum(input_ids.float(), 1)[..., None]
            output.logits = output.logits + 1e-5 * running
            return output

    model: Any = Leaky()
    assert not keeps_apart(model)
