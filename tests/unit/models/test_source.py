"""`model.source` -> a safe folder: what is refused, what is found, and the hub (one of our own, on this machine)."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from fullrank.errors import ModelError
from fullrank.models.source import resolve
from fullrank.recipe import Model


def _load_hub() -> Any:
    # A helper beside this file; test folders are no packages.
    path = Path(__file__).with_name("hub.py")
    spec = importlib.util.spec_from_file_location("fake_hub", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fake_hub"] = module
    spec.loader.exec_module(module)
    return module


hub = _load_hub()


@pytest.fixture
def llama(tiny_model_folder: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(tiny_model_folder("llama"), tmp_path / "llama"))


# ---- folders ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_folder_resolves_to_itself_with_its_facts(tiny_model_folder: Callable[..., Path], family: str) -> None:
    folder = tiny_model_folder(family)
    found = resolve(Model(source=str(folder)))
    model = tiny.model(family)
    assert found.folder == folder
    assert found.facts.kind == "folder"
    assert found.facts.commit is None
    assert found.facts.parameters == sum(p.numel() for p in model.parameters())
    assert found.facts.architecture == type(model).__name__
    assert (found.facts.layers, found.facts.heads, found.facts.head_dim) == (2, 4, 8)
    assert found.facts.key_value_heads == (4 if family == "gpt2" else 2)
    assert found.facts.hidden_size == 32
    assert found.facts.intermediate_size == (128 if family == "gpt2" else 48)
    assert found.facts.context_tokens == 512
    assert found.facts.dtype == "float32"
    assert found.facts.tied_embeddings == (model.get_input_embeddings().weight is model.get_output_embeddings().weight)


def test_the_fingerprint_follows_every_byte_of_weights_config_and_tokenizer(llama: Path) -> None:
    first = resolve(Model(source=str(llama))).facts.fingerprint
    assert resolve(Model(source=str(llama))).facts.fingerprint == first
    (llama / "notes.txt").write_text("not part of the model")
    assert resolve(Model(source=str(llama))).facts.fingerprint == first
    for name in ("model.safetensors", "tokenizer.json", "chat_template.jinja"):
        path = llama / name
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        assert resolve(Model(source=str(llama))).facts.fingerprint != first, name
        path.write_bytes(whole)
    assert resolve(Model(source=str(llama))).facts.fingerprint == first


def test_stored_bf16_weights_are_a_fact(tiny_model_folder: Callable[..., Path]) -> None:
    assert resolve(Model(source=str(tiny_model_folder("llama", dtype="bfloat16")))).facts.dtype == "bfloat16"


def test_pickle_weights_are_refused_without_being_opened(llama: Path, tmp_path: Path) -> None:
    proof = tmp_path / "a-pickle-was-run"

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (proof,))

    (llama / "model.safetensors").unlink()
    torch.save({"w": Bomb()}, llama / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"its weights are pickles \(pytorch_model\.bin\)") as refusal:
        resolve(Model(source=str(llama)))
    assert refusal.value.exit_code == 2
    assert not proof.exists()
    torch.load(llama / "pytorch_model.bin", weights_only=False)
    assert proof.exists(), "the bomb works where a pickle is opened"


def test_pickles_beside_safetensors_are_no_matter(llama: Path) -> None:
    (llama / "training_args.bin").write_bytes(b"\x80")
    assert resolve(Model(source=str(llama))).folder == llama


@pytest.mark.parametrize("own_code", [True, False])
def test_an_architecture_that_transformers_does_not_have_is_refused_and_its_code_not_run(llama: Path, own_code: bool) -> None:
    config = json.loads((llama / "config.json").read_text()) | {"model_type": "homemade"}
    if own_code:
        config["auto_map"] = {"AutoConfig": "configuration_homemade.HomemadeConfig"}
        (llama / "configuration_homemade.py").write_text("raise SystemExit('this code was run')")
    (llama / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="does not implement its model_type 'homemade'") as refusal:
        resolve(Model(source=str(llama)))
    assert ("brings code of its own, which is never run" in refusal.value.message) is own_code


def test_own_code_of_a_known_architecture_is_left_alone(llama: Path) -> None:
    config = json.loads((llama / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_homemade.HomemadeConfig"}
    (llama / "configuration_homemade.py").write_text("raise SystemExit('this code was run')")
    (llama / "config.json").write_text(json.dumps(config))
    assert resolve(Model(source=str(llama))).facts.architecture == "LlamaForCausalLM"


def test_a_folder_without_config_weights_or_json_says_what_is_missing(llama: Path) -> None:
    config = (llama / "config.json").read_text()
    (llama / "config.json").write_text(config[:-3])
    with pytest.raises(ModelError, match=r"config\.json: not valid JSON"):
        resolve(Model(source=str(llama)))
    (llama / "config.json").unlink()
    with pytest.raises(ModelError, match=r"no config\.json in .*llama"):
        resolve(Model(source=str(llama)))
    (llama / "config.json").write_text(config)
    (llama / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no \.safetensors weights in it"):
        resolve(Model(source=str(llama)))


def test_an_architecture_that_writes_no_text_is_refused(llama: Path) -> None:
    import transformers

    transformers.ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2).save_pretrained(llama)
    with pytest.raises(ModelError, match="'vit'"):
        resolve(Model(source=str(llama)))


def test_an_architecture_without_attention_heads_resolves_or_is_refused_in_words(llama: Path) -> None:
    import transformers

    transformers.MambaConfig(vocab_size=324, hidden_size=32, num_hidden_layers=1, state_size=8).save_pretrained(llama)
    with pytest.raises(ModelError, match="attention"):
        resolve(Model(source=str(llama)))


# ---- the hub ----------------------------------------------------------------------------------------------------------------

_RESOLVE = """
import json, sys
import torch
from fullrank.errors import FullrankError
from fullrank.models.load import load_model, load_tokenizer
from fullrank.models.source import resolve
from fullrank.recipe import Model
answers = {}
for asked in json.loads(sys.argv[1]):
    source, _, revision = asked.partition("@")
    told = []
    try:
        found = resolve(Model(source=source, revision=revision or None), told.append)
    except FullrankError as error:
        answers[asked] = {"code": error.exit_code, "message": str(error)}
        continue
    load_model(found.folder, device=torch.device("cpu"))
    load_tokenizer(found.folder)
    files = sorted(path.name for path in found.folder.iterdir())
    answers[asked] = {"code": 0, "facts": found.facts.model_dump(mode="json"), "told": told, "files": files}
print(json.dumps(answers))
"""
_GOOD, _PICKLED, _GATED, _MISSPELT = "someone/good", "someone/pickled", "someone/gated", "smollm2-135m-instuct"
_NO_REVISION = f"{_GOOD}@nowhere"


@dataclass
class Answers:
    """What resolving came to while the hub was up, what the hub was asked for, and then while it was down."""

    up: dict[str, Any]
    requests: list[str]
    down: dict[str, Any]


@pytest.fixture(scope="module")
def answers(tiny_model_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """A hub with a good model, one that is pickles, and one for accepted users only; the cache is kept when it goes down."""
    scratch = tmp_path_factory.mktemp("hub")
    good = Path(shutil.copytree(tiny_model_folder("llama"), scratch / "good"))
    (good / "optimizer.bin").write_bytes(b"a pickle nobody wants")
    pickled = Path(shutil.copytree(tiny_model_folder("llama"), scratch / "pickled"))
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with hub.FakeHub({_GOOD: good, _PICKLED: pickled, _GATED: good}, gated={_GATED}).serving() as running:
        up = _ask(running.url, scratch / "cache", _GOOD, _PICKLED, _MISSPELT, _GATED, _NO_REVISION)
    return Answers(up, running.asked, _ask(running.url, scratch / "cache", _GOOD, "someone/never-fetched"))


def _ask(url: str, cache: Path, *sources: str) -> dict[str, Any]:
    """Resolves in a process of its own, since the hub's address is read when huggingface_hub is imported."""
    environment = {k: v for k, v in os.environ.items() if "proxy" not in k.lower() and not k.startswith("HF_")}
    environment |= {"HF_ENDPOINT": url, "HF_HOME": str(cache), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-c", _RESOLVE, json.dumps(sources)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_a_hub_model_is_fetched_and_its_commit_recorded(answers: Answers) -> None:
    found = answers.up[_GOOD]
    assert found["facts"]["kind"] == "hub"
    assert found["facts"]["commit"] == hub.COMMIT
    assert found["facts"]["source"] == _GOOD
    assert "model.safetensors" in found["files"]
    assert "optimizer.bin" not in found["files"], "pickles are not even fetched"
    assert any(_GOOD in words for words in found["told"])


def test_without_a_network_what_an_earlier_run_fetched_serves(answers: Answers) -> None:
    assert answers.down[_GOOD]["code"] == 0, answers.down[_GOOD]
    assert answers.down[_GOOD]["facts"] == answers.up[_GOOD]["facts"]


def test_a_hub_that_cannot_be_reached_is_told_apart_from_an_unknown_name(answers: Answers) -> None:
    assert answers.down["someone/never-fetched"]["code"] == 2
    assert "the hub cannot be reached" in answers.down["someone/never-fetched"]["message"]


def test_a_pickled_hub_model_is_refused_before_it_is_fetched(answers: Answers) -> None:
    assert answers.up[_PICKLED]["code"] == 2
    assert "its weights are pickles (pytorch_model.bin)" in answers.up[_PICKLED]["message"]
    assert not [line for line in answers.requests if f"{_PICKLED}/resolve/" in line]


def test_an_unknown_hub_model_is_refused_with_what_there_is(answers: Answers) -> None:
    refused = answers.up[_MISSPELT]
    assert refused["code"] == 2
    assert (
        "no embedded model (there is: smollm2-135m-instruct), no local folder and no hub model has this name"
        in refused["message"]
    )
    assert "did you mean 'smollm2-135m-instruct'?" in refused["message"]


def test_gated_models_and_unknown_revisions_say_so(answers: Answers) -> None:
    assert answers.up[_GATED]["code"] == 2
    assert "accepted users only" in answers.up[_GATED]["message"]
    assert "HF_TOKEN" in answers.up[_GATED]["message"]
    assert answers.up[_NO_REVISION]["code"] == 2
    assert "it has no revision 'nowhere'" in answers.up[_NO_REVISION]["message"]


def test_a_name_the_hub_could_not_have_is_unknown() -> None:
    with pytest.raises(ModelError, match="no local folder and no hub model has this name"):
        resolve(Model(source="./no/such/folder"))
