"""Tensors in files: the numbers that safetensors reads, in any type, and files that are not whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fullrank.errors import ModelError
from fullrank.models import stored
from fullrank.models.stored import StoredTensors, weight_files

TYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    tensors = {str(dtype): (torch.randn(7, 5) * 3).to(dtype) for dtype in TYPES}
    tensors |= {"none": torch.zeros(0, 3), "number": torch.tensor(2.5)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("piece", [1 << 20, 4])
def test_they_are_the_tensors_that_safetensors_reads(path: Path, monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    monkeypatch.setattr(stored, "_PIECE", piece)
    found, wanted = StoredTensors(path), load_file(path)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            cast = found.index[name].read(dtype=dtype)
            assert cast.dtype == dtype and torch.equal(cast, tensor.to(dtype))
            assert found.index[name].equals(tensor.to(dtype))
        if tensor.numel():
            other = tensor.clone()
            other.view(-1)[-1] = ~other.view(-1)[-1] if tensor.dtype == torch.bool else other.view(-1)[-1] + 1
            assert not found.index[name].equals(other)
            assert not found.index[name].equals(tensor[None])


@pytest.mark.parametrize("damage", ["cut", "no header", "header cut", "not JSON", "unknown type"])
def test_files_that_are_not_whole(path: Path, damage: str) -> None:
    raw = path.read_bytes()
    spoilt = {
        "cut": raw[:-1],
        "no header": b"",
        "header cut": raw[:40],
        "not JSON": raw[:8] + b"?" + raw[9:],
        "unknown type": raw.replace(b'"BF16"', b'"XF16"'),
    }
    path.write_bytes(spoilt[damage])
    with pytest.raises(ModelError, match=r"model\.safetensors: not a whole safetensors file"):
        StoredTensors(path)


def test_a_file_that_is_cut_while_it_is_read(path: Path) -> None:
    found = StoredTensors(path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ModelError, match="ends too early"):
        for name in found:
            found[name]


def test_a_models_files_are_those_that_transformers_reads(tmp_path: Path) -> None:
    for name in ("model-1.safetensors", "model-2.safetensors", "consolidated.safetensors"):
        (tmp_path / name).touch()
    assert len(weight_files(tmp_path)) == 3
    index = {"weight_map": {"a": "model-2.safetensors", "b": "model-1.safetensors", "c": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert [path.name for path in weight_files(tmp_path)] == ["model-1.safetensors", "model-2.safetensors"]
    (tmp_path / "model.safetensors").touch()
    assert [path.name for path in weight_files(tmp_path)] == ["model.safetensors"]
