"""What a layout relies on is asked of the model: attention families keep examples apart, state along the row does not."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
import transformers

from fullrank.models.rows import RowModel


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_attention_families_share_rows_and_beginnings_and_have_a_plain_head(family: str) -> None:
    model = tiny.model(family).train()
    before = model.config._attn_implementation
    rows = RowModel(model)
    assert (rows.packs, rows.shares, rows.trims, rows.why) == (True, True, True, "")
    assert rows.head is not None and rows.head.weight_VH is model.get_output_embeddings().weight
    assert rows.head.cap == (3.0 if family == "gemma2" else None)
    assert model.training and model.config._attn_implementation == before


def test_rows_go_to_where_it_is_computed_if_the_model_names_another_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model's own `device` is that of its first parameter, which may wait elsewhere than it computes."""
    monkeypatch.setattr(transformers.PreTrainedModel, "device", property(lambda model: torch.device("meta")))
    rows = RowModel(tiny.model("llama"), adds_gradients=True, device=torch.device("cpu"))
    assert (rows.packs, rows.shares, rows.trims) == (True, True, True) and rows.head is not None and rows.tuned is not None
    with pytest.raises(RuntimeError, match="meta"):
        RowModel(tiny.model("llama"))


@pytest.mark.parametrize(
    ("config", "scale"),
    [(transformers.CohereConfig(logit_scale=0.25), 0.25), (transformers.GraniteConfig(logits_scaling=8.0), 1 / 8)],
    ids=["cohere", "granite"],
)
def test_a_scaled_head_is_found(config: Any, scale: float) -> None:
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "pad_token_id": 0}
    config.update({**sizes, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8})
    rows = RowModel(built(config))
    assert rows.head is not None and rows.head.scale == pytest.approx(scale)


def test_with_dropout_beginnings_are_not_shared() -> None:
    rows = RowModel(tiny.model("gpt2", resid_pdrop=0.1))
    assert rows.packs and not rows.shares and "dropout" in rows.why


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
    rows = RowModel(built(config))
    assert not rows.packs and not rows.shares and rows.why


def test_a_small_leak_is_no_rounding() -> None:
    model = tiny.model("llama")
    forward = model.forward

    def leaky(input_ids: torch.Tensor, **others: Any) -> Any:
        output = forward(input_ids=input_ids, **others)
        running_1T = torch.cumsum(input_ids.float(), 1)[..., None]
        output.logits = output.logits + 1e-5 * running_1T[:, others.get("logits_to_keep", slice(None))]
        return output

    model.forward = leaky
    rows = RowModel(model)
    assert not rows.packs and "reach one another" in rows.why


def test_a_window_that_the_layers_do_not_tell_is_found_out() -> None:
    """Windows are longer than the examples of a trial: one that only a mask held would be lost without a trace."""
    model = tiny.model("mistral", sliding_window=500)
    assert RowModel(model).packs
    model.config.sliding_window = None  # what its layers are given from now on ...
    told = model.config.get_text_config
    model.config.get_text_config = lambda *a, **k: _WithWindow(told(*a, **k))  # ... and what the configuration says
    rows = RowModel(model)
    assert not rows.packs and "do not tell their windows" in rows.why


class _WithWindow:
    def __init__(self, config: Any) -> None:
        self._config, self.sliding_window = config, 500

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)
