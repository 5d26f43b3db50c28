"""Weights written a tensor at a time: byte for byte what transformers writes of a model that is whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch

from fullrank.models import export, streamed
from fullrank.models.load import load_model, load_tokenizer
from fullrank.models.streamed import StreamedWeights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_folder_is_that_of_save_pretrained(
    family: str, dtype: torch.dtype, tmp_path: Path, tiny_model_folder: Callable[..., Path]
) -> None:
    folder = tiny_model_folder(family)
    model, tokenizer = load_model(folder, device=torch.device("cpu")), load_tokenizer(folder)
    export.cast(model, dtype)
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for made in (ours, theirs):
        made.mkdir()
    export.write_description(model, dtype, tokenizer, [3], ours)
    writer = StreamedWeights(ours, model, dtype)
    for name, p in reversed(list(model.named_parameters())):  # in any order
        writer.write(name, p)
    export.write_model(model, tokenizer, [3], theirs)
    names = sorted(path.name for path in theirs.iterdir())
    assert sorted(path.name for path in ours.iterdir()) == names
    for name in names:
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name


def test_several_files_have_the_index_of_save_pretrained(
    tmp_path: Path, tiny_model_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(tiny_model_folder("llama"), device=torch.device("cpu"))
    monkeypatch.setattr(streamed, "MOST_FILE_BYTES", "50KB")
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir()
    writer = StreamedWeights(ours, model, torch.float32)
    for name, p in model.named_parameters():
        writer.write(name, p)
    model.save_pretrained(theirs, max_shard_size="50KB")
    names = sorted(path.name for path in theirs.glob("model*"))
    assert len(names) > 2 and sorted(path.name for path in ours.iterdir()) == names
    for name in names:
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
