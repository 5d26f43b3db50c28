"""The export: the tensors of the base, ties kept, stop tokens written down, and the same logits in a fresh process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig

from fullrank.errors import ProofError
from fullrank.models import export
from fullrank.models.load import load_model, load_tokenizer

CPU = torch.device("cpu")
IDS_1T = torch.arange(3, 40)[None]


def written(base: Path, folder: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """A base whose every weight was moved, cast and written into a folder."""
    model = load_model(base, device=CPU)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.01).add_(0.001)
    export.cast(model, dtype)
    folder.mkdir()
    export.write_model(model, load_tokenizer(base), [322], folder)
    return model


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_an_export_holds_the_bases_tensors_and_the_models_numbers(
    tiny_model_folder: Callable[..., Path], tmp_path: Path, family: str
) -> None:
    base = tiny_model_folder(family)
    model = written(base, tmp_path / "out")
    tied = export.tied_names(model)  # type: ignore[arg-type]
    assert bool(tied) == (family in ("qwen3", "gemma2", "gemma3", "gpt2"))
    assert export.keys_equal(tmp_path / "out", base, tied)
    again = load_model(tmp_path / "out", device=CPU, dtype=None)
    assert export.tied_names(again) == tied
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    assert torch.equal(export.probe_logits(model, IDS_1T), export.probe_logits(again, IDS_1T))  # type: ignore[arg-type]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_of_long_rows_the_last_logits_are_compared(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model(family)
    whole = export.probe_logits(model, IDS_1T)
    assert whole.shape[1] == IDS_1T.shape[1]
    monkeypatch.setattr(export, "_KEPT_NUMBERS", 20 * whole.shape[2])
    last = export.probe_logits(model, IDS_1T)
    assert last.shape[1] == 20 and torch.allclose(last, whole[:, -20:], rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(export, "_KEPT_NUMBERS", 0)
    assert export.probe_logits(model, IDS_1T).shape[1] == 16


@pytest.mark.parametrize(("family", "dtype"), [("llama", torch.bfloat16), ("gemma3", torch.float32)], ids=["untied bf16", "tied"])
def test_a_fresh_process_computes_the_same_bits(
    tiny_model_folder: Callable[..., Path], tmp_path: Path, family: str, dtype: torch.dtype
) -> None:
    model = written(tiny_model_folder(family), tmp_path / "out", dtype)
    fresh = export.fresh_process(tmp_path / "out", IDS_1T, "the sea", CPU, tmp_path)
    assert torch.equal(fresh.logits_1TV, export.probe_logits(model, IDS_1T))  # type: ignore[arg-type]
    assert fresh.tied == export.tied_names(model)  # type: ignore[arg-type]
    assert fresh.logits_1TV.dtype == dtype
    spoken = tiny.tokenizer()
    assert fresh.text_ids == spoken("the sea", add_special_tokens=False)["input_ids"]
    assert fresh.chat_template == spoken.chat_template


def test_an_export_that_cannot_be_loaded_is_quoted(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ProofError, match=r"a fresh process cannot load the export:\n(.|\n)*config\.json"):
        export.fresh_process(tmp_path / "out", IDS_1T, "the sea", CPU, tmp_path)


def test_the_cast_touches_parameters_only(tiny_model_folder: Callable[..., Path]) -> None:
    model = load_model(tiny_model_folder("llama"), device=CPU)
    wanted = {name: p.to(torch.bfloat16) for name, p in model.named_parameters()}
    export.cast(model, torch.bfloat16)
    assert all(torch.equal(p, wanted[name]) for name, p in model.named_parameters())
    assert {b.dtype for name, b in model.named_buffers() if "inv_freq" in name} == {torch.float32}
    assert model.config.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("wanted", "base", "dtype"),
    [("base", "bfloat16", torch.bfloat16), ("base", "float32", torch.float32), ("fp16", "float32", torch.float16)],
)
def test_the_type_is_the_bases_unless_said(wanted: str, base: str, dtype: torch.dtype) -> None:
    assert export.export_dtype(wanted, base) == dtype


@pytest.mark.parametrize(("stop_ids", "written_ids"), [([322], 322), ([320, 322], [320, 322])])
def test_generation_stops_where_training_taught_it_to(
    tiny_model_folder: Callable[..., Path], tmp_path: Path, stop_ids: list[int], written_ids: int | list[int]
) -> None:
    base = tiny_model_folder("llama")
    export.write_model(load_model(base, device=CPU), load_tokenizer(base), stop_ids, tmp_path)
    config = GenerationConfig.from_pretrained(tmp_path)
    assert config.eos_token_id == written_ids
    assert config.pad_token_id == 323
    assert config.bos_token_id == 320
    assert load_tokenizer(tmp_path).chat_template == tiny.CHATML
    assert str(base) not in (tmp_path / "config.json").read_text(), "a path of this machine says nothing elsewhere"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_changes_are_counted_in_the_exports_type(
    tiny_model_folder: Callable[..., Path], tmp_path: Path, dtype: torch.dtype
) -> None:
    base = tiny_model_folder("llama")
    tensors = load_file(base / "model.safetensors")
    ours = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    save_file(ours, tmp_path / "model.safetensors")
    assert export.changed_tensors(tmp_path, base) == (0, len(tensors))
    name = "model.layers.0.mlp.up_proj.weight"
    moved = tensors[name].clone()
    moved[-1, -1] *= 1 + 2**-11  # an update that bf16 rounds away
    save_file(ours | {name: moved.to(dtype)}, tmp_path / "model.safetensors")
    assert export.changed_tensors(tmp_path, base) == (int(dtype == torch.float32), len(tensors))
    save_file(ours | {name: ours[name][:-1].clone(), "another": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert export.changed_tensors(tmp_path, base) == (2, len(tensors) + 1)


def test_keys_differ_by_a_name_a_shape_or_a_tie_that_is_none(tiny_model_folder: Callable[..., Path], tmp_path: Path) -> None:
    base = tiny_model_folder("llama")
    tensors = load_file(base / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    for number, changed in enumerate(
        (
            {n: t for n, t in tensors.items() if n != name},
            tensors | {"extra": torch.zeros(1)},
            tensors | {name: tensors[name][:-1].clone()},
        )
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        save_file(changed, folder / "model.safetensors")
        assert not export.keys_equal(folder, base, set())
    assert export.keys_equal(tmp_path / "0", base, {name})
