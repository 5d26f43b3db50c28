"""Sizes alone: the parameters that authors publish, a folder's own configuration, and what is no model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fullrank.errors import ModelError
from fullrank.models.sizes import SIZES, sizes_of
from fullrank.models.source import resolve
from fullrank.recipe import Model

#: As the hub counts the parameters of the published weights (safetensors metadata).
PUBLISHED = {
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
}


def test_every_name_has_the_parameters_that_are_published() -> None:
    assert {name: sizes_of(name)[1].parameters for name in SIZES} == PUBLISHED


def test_a_folder_and_its_configuration_are_what_the_model_is(tiny_model_folder: Callable[..., Path]) -> None:
    folder = tiny_model_folder("llama")
    whole = resolve(Model(source=str(folder))).facts.model_dump(exclude={"source", "kind", "fingerprint"})
    for source in (folder, folder / "config.json"):
        _, facts = sizes_of(str(source))
        assert facts.model_dump(exclude={"source", "kind", "fingerprint"}) == whole
        assert facts.kind == "configuration"


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"'lama-3.1-70b'.*did you mean 'llama-3.1-70b'\?"):
        sizes_of("lama-3.1-70b")
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ModelError, match="not a configuration"):
        sizes_of(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}), encoding="utf-8")
    with pytest.raises(ModelError, match="no causal language model of model_type 'vit'"):
        sizes_of(str(tmp_path))


def test_a_model_without_weights_serves_where_none_are_needed(tmp_path: Path, tiny_model_folder: Callable[..., Path]) -> None:
    for file in tiny_model_folder("llama").iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    source = Model(source=str(tmp_path))
    with pytest.raises(ModelError, match=r"no .safetensors weights"):
        resolve(source)
    assert (
        resolve(source, needs_weights=False).facts.parameters
        == resolve(Model(source=str(tiny_model_folder("llama")))).facts.parameters
    )
