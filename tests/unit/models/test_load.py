"""Loading: whole or not at all, with the stored numbers."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from fullrank.errors import DataError, ModelError
from fullrank.models.load import attention_for, load_model, load_tokenizer

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_weights_are_those_of_the_file(tiny_model_folder: Callable[..., Path], family: str) -> None:
    model, wanted = load_model(tiny_model_folder(family), device=CPU), tiny.model(family)
    assert {n: p.dtype for n, p in model.named_parameters()} == {n: torch.float32 for n, _ in wanted.named_parameters()}
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), wanted.parameters(), strict=True))


def test_stored_bf16_is_raised_to_fp32_or_kept(tiny_model_folder: Callable[..., Path]) -> None:
    folder = tiny_model_folder("llama", dtype="bfloat16")
    raised, kept = load_model(folder, device=CPU), load_model(folder, device=CPU, dtype=None)
    for high, low in zip(raised.parameters(), kept.parameters(), strict=True):
        assert (high.dtype, low.dtype) == (torch.float32, torch.bfloat16)
        assert torch.equal(high, low.float())


@pytest.mark.parametrize("spoil", ["missing", "another shape"])
def test_weights_that_are_not_there_are_never_made_up(tiny_model_folder: Callable[..., Path], tmp_path: Path, spoil: str) -> None:
    folder = Path(shutil.copytree(tiny_model_folder("llama"), tmp_path / "llama"))
    tensors, name = load_file(folder / "model.safetensors"), "model.layers.1.mlp.up_proj.weight"
    whole = tensors.pop(name)
    if spoil == "another shape":
        tensors[name] = whole[:-1].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"weights are missing or of another shape: .*layers\.1\.mlp\.up_proj") as refusal:
        load_model(folder, device=CPU)
    assert refusal.value.exit_code == 2


def test_a_file_replaced_under_the_process_changes_nothing(tiny_model_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model_folder("llama"), tmp_path / "llama"))
    model = load_model(folder, device=CPU)
    weights = folder / "model.safetensors"
    with weights.open("r+b") as file:
        file.truncate(0)
    wanted = tiny.model("llama")
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), wanted.parameters(), strict=True))


def test_soft_capped_attention_is_not_left_to_sdpa() -> None:
    def config(cap: float | None) -> SimpleNamespace:
        text = SimpleNamespace(attn_logit_softcapping=cap)
        return SimpleNamespace(get_text_config=lambda: text)

    assert (attention_for(config(50.0)), attention_for(config(None))) == ("eager", "sdpa")


def test_a_template_file_replaces_the_tokenizers_own(tiny_model_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_model_folder("llama")
    assert load_tokenizer(folder).chat_template == tiny.CHATML
    (tmp_path / "mine.jinja").write_text("{{ messages[0].content }}")
    assert load_tokenizer(folder, str(tmp_path / "mine.jinja")).chat_template == "{{ messages[0].content }}"
    with pytest.raises(DataError, match=r"data\.chat_template: .*none\.jinja cannot be read"):
        load_tokenizer(folder, str(tmp_path / "none.jinja"))


def test_a_folder_without_a_tokenizer_says_so(tiny_model_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model_folder("llama"), tmp_path / "llama"))
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ModelError, match="no usable tokenizer"):
        load_tokenizer(folder)
