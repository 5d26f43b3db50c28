"""The ledger: every part by hand for one small model, and the activation formula against what autograd really keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fullrank.plan.memory import Row, block_activation_bytes, ledger, table, total
from fullrank.records import ModelFacts


def facts(**changes: Any) -> ModelFacts:
    sizes: dict[str, Any] = {
        "source": "a-model",
        "kind": "folder",
        "commit": None,
        "fingerprint": "0",
        "architecture": "LlamaForCausalLM",
        "parameters": 1000,
        "dtype": "float32",
        "hidden_size": 8,
        "layers": 2,
        "heads": 2,
        "key_value_heads": 1,
        "head_dim": 4,
        "intermediate_size": 16,
        "vocabulary": 50,
        "tied_embeddings": True,
        "context_tokens": 64,
    }
    return ModelFacts(**(sizes | changes))


def parts(**options: Any) -> dict[str, int]:
    defaults: dict[str, Any] = {"precision": "fp32", "recompute": "none", "process_bytes": 7, "eager": False}
    return {line.part: line.bytes for line in ledger(facts(), Row(tokens=10, supervised_tokens=4), **(defaults | options))}


def test_every_part_by_hand() -> None:
    # a block: 6h + 5q + 4i = 6*8 + 5*(2*4) + 4*16 = 152 floats a token; 10 tokens, 4 bytes: 6080 bytes
    assert parts() == {
        "process": 7,
        "weights": 4 * 1000,
        "gradients": 4 * 1000,
        "optimizer": 8 * 1000,
        "activations": 2 * 6080,
        "logits": 4 * 50 * 12,
        "mask": 10 * 10,
    }


def test_recomputed_blocks_keep_their_inputs_and_one_block() -> None:
    assert parts(recompute="block")["activations"] == 2 * 10 * 8 * 4 + 6080


def test_bf16_halves_activations_and_adds_casts() -> None:
    mixed = parts(precision="bf16-mixed")
    assert mixed["activations"] == 6080
    assert mixed["weights"] == 4 * 1000 + 2 * 1000
    assert mixed["logits"] == 4 * 50 * 14
    assert (mixed["gradients"], mixed["optimizer"]) == (4000, 8000)


def test_eager_attention_keeps_its_scores() -> None:
    scores = 3 * 4 * 2 * 10 * 10  # three fp32 copies of heads x T x T
    assert parts(eager=True)["activations"] - parts()["activations"] == 2 * scores
    assert parts(eager=True, recompute="block")["activations"] - parts(recompute="block")["activations"] == scores


def test_the_peak_is_the_sum_and_the_table_tells_every_part() -> None:
    lines = ledger(facts(), Row(10, 4), precision="fp32", recompute="none", process_bytes=0, eager=False)
    assert total(lines) == 4000 + 4000 + 8000 + 12160 + 2400 + 100
    for line, told in zip(lines, table(lines).splitlines(), strict=True):
        assert line.part in told and line.formula in told


def kept_by_autograd(layers: int, tokens: int) -> int:
    """Bytes of the distinct storages that a forward pass saves for its backward pass, parameters left out."""
    config = LlamaConfig(
        hidden_size=WIDE.hidden_size,
        intermediate_size=WIDE.intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=WIDE.heads,
        num_key_value_heads=WIDE.key_value_heads,
        head_dim=WIDE.head_dim,
        vocab_size=WIDE.vocabulary,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).train()
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, int] = {}
    alive = []  # a storage that is freed could lend its address to another one

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    ids = torch.randint(WIDE.vocabulary, (1, tokens))
    positions = torch.cat([torch.arange(tokens // 2), torch.arange(tokens - tokens // 2)])[None]  # two packed examples
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=1)
    return sum(saved.values())


WIDE = facts(hidden_size=192, intermediate_size=512, heads=4, key_value_heads=2, head_dim=48, vocabulary=64)


@pytest.mark.parametrize("tokens", [64, 160])
def test_the_activation_formula_is_what_autograd_keeps(tokens: int) -> None:
    # Blocks only: what the embedding, the final norm and the mask keep is the same for one block as for four.
    a_block = (kept_by_autograd(4, tokens) - kept_by_autograd(1, tokens)) / 3
    # A quarter: the formula counts tensors of a present-day block, the implementation keeps a few more or fewer.
    assert block_activation_bytes(WIDE, tokens, 4) == pytest.approx(a_block, rel=0.25)
