"""The ledger: every part by hand for one small model, and the activation formula against what autograd really keeps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fullrank.models.rows import RowModel
from fullrank.plan.memory import Row, block_activation_bytes, ledger, table, total
from fullrank.records import ModelFacts
from fullrank.sequences.layout import row_of
from fullrank.sequences.store import Example


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
    defaults: dict[str, Any] = {"precision": "fp32", "recompute": "none", "process_bytes": 7, "eager": False, "device": "cpu"}
    return {line.part: line.bytes for line in ledger(facts(), Row(tokens=10, predictions=4), **(defaults | options))}


def test_every_part_by_hand() -> None:
    # a block: 4h + 2q + 2k + 3i = 4*8 + 2*(2*4) + 2*4 + 3*16 = 104 floats a token; 10 tokens, 4 bytes: 4160 bytes
    assert parts() == {
        "process": 7,
        "weights": 4 * 1000,
        "gradients": 4 * 1000,
        "optimizer": 8 * 1000,
        "activations": 2 * 4160,
        "logits": 4 * 50 * 8,
        "heap": int(0.35 * 2 * 4160),
    }


def test_every_part_on_an_accelerator_by_hand() -> None:
    # a block of the model's own modules: 6h + 5q + 4i = 6*8 + 5*(2*4) + 4*16 = 152 floats a token
    found = parts(device="cuda")
    assert (found["activations"], found["head"], found["mask"]) == (2 * 6080, 4 * 50 * 8, 10 * 10)


def test_logits_are_those_of_a_chunk() -> None:
    many = {line.part: line.bytes for line in ledger(facts(vocabulary=100_000), Row(5000, 5000), **LEDGER)}
    assert many["logits"] == 2 * 4 * 100_000 * (64 * 2**20 // 400_000)


def test_recomputed_blocks_keep_their_inputs_and_one_block() -> None:
    assert parts(recompute="block")["activations"] == 2 * 10 * 8 * 4 + 4160
    assert parts(recompute="offload")["activations"] == 2 * 10 * 8 * 4 + 4160  # two inputs at a time, whatever the depth
    deep = {line.part: line.bytes for line in ledger(facts(layers=50), Row(10, 4), **(LEDGER | {"recompute": "offload"}))}
    assert deep["activations"] == parts(recompute="offload")["activations"]


def test_selective_recomputation_keeps_what_products_gave() -> None:
    # 3h + 2q + 2k + 2i = 3*8 + 2*(2*4) + 2*4 + 2*16 = 80 floats a token and block
    assert parts(recompute="selective")["activations"] == 2 * 10 * 80 * 4 + 4160


def test_bf16_halves_activations_and_adds_casts() -> None:
    mixed = parts(precision="bf16-mixed", device="cuda")
    assert mixed["activations"] == 6080
    assert mixed["weights"] == 4 * 1000 + 2 * 1000
    assert mixed["logits"] == 4 * 50 * 10
    assert (mixed["gradients"], mixed["optimizer"]) == (4000, 8000)


def test_eager_attention_keeps_its_scores() -> None:
    scores = 3 * 4 * 2 * 10 * 10  # three fp32 copies of heads x T x T
    assert parts(eager=True)["activations"] - parts()["activations"] == 2 * scores
    assert parts(eager=True, recompute="block")["activations"] - parts(recompute="block")["activations"] == scores


def test_the_peak_is_the_sum_and_the_table_tells_every_part() -> None:
    lines = ledger(facts(), Row(10, 4), **LEDGER)
    assert total(lines) == 4000 + 4000 + 8000 + 8320 + 1600 + int(0.35 * 8320)
    for line, told in zip(lines, table(lines).splitlines(), strict=True):
        assert line.part in told and line.formula in told


LEDGER: dict[str, Any] = {"precision": "fp32", "recompute": "none", "process_bytes": 0, "eager": False, "device": "cpu"}


def kept_by_autograd(layers: int, tokens: int, *, tuned: bool) -> int:
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

    ids = torch.randint(WIDE.vocabulary, (2, tokens // 2 + 1)).numpy()
    examples = [Example(some, np.arange(len(some)) == len(some) - 1) for some in ids]
    batch = row_of(list(enumerate(examples)), shared=True)
    assert batch.tokens == tokens
    rows = RowModel(model, adds_gradients=tuned)
    rows.trims = False  # the last block like the others
    with rows.ready(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        rows.predictions(batch)
    return sum(saved.values())


WIDE = facts(hidden_size=192, intermediate_size=512, heads=4, key_value_heads=2, head_dim=48, vocabulary=64)


@pytest.mark.parametrize(("tuned", "tolerance"), [(True, 0.05), (False, 0.25)])
@pytest.mark.parametrize("tokens", [64, 160])
def test_the_activation_formula_is_what_autograd_keeps(tokens: int, tuned: bool, tolerance: float) -> None:
    # Blocks only: what the embedding, the final norm and the mask keep is the same for one block as for four.
    a_block = (kept_by_autograd(4, tokens, tuned=tuned) - kept_by_autograd(1, tokens, tuned=tuned)) / 3
    # A quarter where the library's modules decide: the formula counts a present-day block's, they keep a few more or fewer.
    assert block_activation_bytes(WIDE, tokens, 4, tuned=tuned) == pytest.approx(a_block, rel=tolerance)
