"""The proof after training: tensors that did not move, and exports that are not the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from staging import fresh_here
from tiny import tokenizer

from fullrank.errors import ProofError
from fullrank.models import export
from fullrank.models.load import load_model
from fullrank.models.resolved import ResolvedModel
from fullrank.models.source import resolve
from fullrank.recipe import Model
from fullrank.train import proof
from fullrank.train.proof import check_changed, export_and_prove, unchanged_tensors

CPU = torch.device("cpu")
PROBE = torch.arange(12)[None]


@pytest.fixture
def base(tiny_model_folder: Callable[..., Path]) -> ResolvedModel:
    return resolve(Model(source=str(tiny_model_folder("llama"))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("family", "norm"), [("llama", "model.norm.weight"), ("gpt2", "transformer.ln_f.weight")])
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_tensors_that_did_not_move_are_found(
    tiny_model_folder: Callable[..., Path], family: str, norm: str, stored: str, dtype: torch.dtype
) -> None:
    folder = tiny_model_folder(family, dtype=stored)
    model = load_model(folder, device=CPU, dtype=dtype)
    assert unchanged_tensors(model, folder) == [name for name, _ in model.named_parameters()]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != norm:
                parameter.view(-1)[-1] += 1  # one number of a tensor is enough
    assert unchanged_tensors(model, folder) == [norm]
    model.get_parameter(norm).requires_grad_(False)
    assert unchanged_tensors(model, folder) == []


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_the_base_is_not_loaded_again(
    tiny_model_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    folder = tiny_model_folder(family)  # of experts, stored one by one and held as one tensor, one number is enough as well
    model = load_model(folder, device=CPU)
    monkeypatch.setattr(proof, "load_model", pytest.fail)
    assert unchanged_tensors(model, folder) == [name for name, _ in model.named_parameters()]
    name = "model.layers.1.mlp.experts.gate_up_proj" if family == "qwen3_moe" else "model.layers.1.mlp.up_proj.weight"
    with torch.no_grad():
        model.get_parameter(name).view(-1)[-1] += 1
    assert unchanged_tensors(model, folder) == [other for other, _ in model.named_parameters() if other != name]


def test_where_names_do_not_tell_the_base_is_loaded(base: ResolvedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(base.folder, device=CPU, dtype=torch.bfloat16)
    monkeypatch.setattr(proof, "held_by", lambda *_: None)
    with torch.no_grad():
        model.get_parameter("model.norm.weight")[-1] += 1
    assert unchanged_tensors(model, base.folder) == [n for n, _ in model.named_parameters() if n != "model.norm.weight"]


def test_only_what_no_gradient_reached_may_stay() -> None:
    assert check_changed([], {"a"}, rounded=False, trained=3) == ([], [])
    assert check_changed(["experts.3"], {"experts.3", "experts.4"}, rounded=False, trained=3) == (["experts.3"], [])
    assert check_changed(["experts.3", "norm"], {"experts.3"}, rounded=True, trained=3) == (["experts.3"], ["norm"])
    with pytest.raises(ProofError, match=r"1 trainable tensors .*although they had gradients: norm") as caught:
        check_changed(["experts.3", "norm"], {"experts.3"}, rounded=False, trained=3)
    assert "learning_rate" in caught.value.hint and caught.value.exit_code == 1


def test_weights_of_16_bits_may_leave_some_tensors_but_not_all() -> None:
    with pytest.raises(ProofError, match="although they had gradients") as caught:
        check_changed(["a", "b"], set(), rounded=True, trained=2)
    assert "too small for 16 bits" in caught.value.hint


def prove(base: ResolvedModel, folder: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Any:
    """export_and_prove with a fresh load in this process; `changes` are what that load is made to find instead."""

    def fresh(*arguments: Any) -> export.Fresh:
        found = fresh_here(*arguments)
        return replace(
            found,
            logits_1TV=found.logits_1TV + changes.get("shift", 0.0),
            tied=found.tied | changes.get("tied", set()),
            chat_template=changes.get("chat_template", found.chat_template),
        )

    monkeypatch.setattr(export, "fresh_process", fresh)
    folder.mkdir()
    return export_and_prove(
        load_model(base.folder, device=CPU),
        tokenizer(),
        base,
        dtype=changes.get("dtype", torch.float32),
        stop_ids=[1],
        probe_ids_1T=PROBE,
        unreached=["model.norm.weight"],
        unmoved=[],
        folder=folder,
    )


def test_an_export_that_is_the_model(base: ResolvedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = prove(base, tmp_path / "m", monkeypatch, dtype=torch.bfloat16)
    trainable = len(list(load_model(base.folder, device=CPU).parameters()))
    assert (found.trainable_tensors, found.changed_tensors) == (trainable, trainable - 1)
    assert found.never_reached_tensors == ["model.norm.weight"] and found.export_dtype == "bfloat16"
    assert found.export_logits_identical and found.export_keys_equal and found.ties_kept
    assert found.export_probe_tokens == 12


def test_other_logits_are_refused(base: ResolvedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ProofError, match=r"other logits .*largest difference 0\.5"):
        prove(base, tmp_path / "m", monkeypatch, shift=0.5)


def test_ties_that_came_or_went_are_refused(base: ResolvedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ProofError, match="tied weights came apart"):
        prove(base, tmp_path / "m", monkeypatch, tied={"lm_head.weight"})


def test_other_names_are_refused(
    base: ResolvedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model_folder: Callable[..., Path]
) -> None:
    deeper = tiny_model_folder("llama", num_hidden_layers=3)
    real = export.keys_equal
    monkeypatch.setattr(export, "keys_equal", lambda ours, theirs, tied: real(ours, deeper, tied))
    with pytest.raises(ProofError, match="names or shapes differ"):
        prove(base, tmp_path / "m", monkeypatch)
