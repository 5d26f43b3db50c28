"""Loading: whole or not at all, with the stored numbers."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file

from fullrank.errors import DataError, ModelError
from fullrank.models.export import tied_names
from fullrank.models.load import attention_for, held_by, load_model, load_tokenizer

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


MORE = {
    "qwen2": transformers.Qwen2Config,
    "olmo2": transformers.Olmo2Config,
    "granite": transformers.GraniteConfig,
    "mixtral": transformers.MixtralConfig,
    "gpt_neox": transformers.GPTNeoXConfig,
}


def more(kind: str, folder: Path) -> Path:
    """A tiny model of a family that is not among `tiny.FAMILIES`, in a folder."""
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(MORE[kind](**sizes, num_key_value_heads=4, pad_token_id=0)).save_pretrained(
        folder
    )
    return folder


def seeing(folder: Path) -> Path:
    """A model that sees, of which the part that reads is trained."""
    text = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 2, "head_dim": 8}
    eyes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
    config = transformers.Gemma3Config(text_config=text, vision_config=eyes, mm_tokens_per_image=4)
    torch.manual_seed(0)
    transformers.Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(request: pytest.FixtureRequest, tiny_model_folder: Callable[..., Path], tmp_path: Path) -> Path:
    """The folder of a family, whichever of the three makes it."""
    made: Path
    if request.param == "seeing":
        made = seeing(tmp_path)
    else:
        made = more(request.param, tmp_path) if request.param in MORE else tiny_model_folder(request.param)
    return made


def facts(model: Any) -> dict[str, Any]:
    """All that a load decides, but the numbers."""
    return {
        "class": type(model),
        "dtypes": {name: tensor.dtype for name, tensor in [*model.named_parameters(), *model.named_buffers()]},
        "trained": [name for name, parameter in model.named_parameters() if parameter.requires_grad],
        "modes": {name: module.training for name, module in model.named_modules()},
        "attention": model.config._attn_implementation,
        "experts": getattr(model.config, "_experts_implementation", None),
        "config": model.config.to_dict(),
        "name": (str(model.config.name_or_path), str(model.name_or_path)),
        "generation": model.generation_config.to_dict(),
        "tied": tied_names(model),
        "conversions": [type(conversion) for conversion in model._weight_conversions],
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, None], ids=str)
@pytest.mark.parametrize("folder", [*tiny.FAMILIES, *MORE, "seeing"], indirect=True)
def test_it_is_the_model_that_transformers_loads(folder: Path, dtype: torch.dtype | None) -> None:
    ours = load_model(folder, device=CPU, dtype=dtype)
    attention = attention_for(ours.config)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto", attn_implementation=attention)
    assert facts(ours) == facts(theirs)
    for one, other in [(ours.state_dict(), theirs.state_dict()), (dict(ours.named_buffers()), dict(theirs.named_buffers()))]:
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    ids = torch.tensor([[5, 9, 12, 200, 40, 7]])
    with torch.no_grad():
        assert torch.equal(ours(input_ids=ids).logits, theirs(input_ids=ids).logits)


def test_what_a_folder_does_not_hold_as_such_is_not_told(tiny_model_folder: Callable[..., Path]) -> None:
    model = load_model(tiny_model_folder("llama"), device=CPU)
    assert held_by(tiny_model_folder("llama", num_hidden_layers=3), model) is not None
    assert held_by(tiny_model_folder("llama", intermediate_size=64), model) is None
    assert held_by(tiny_model_folder("gpt2"), model) is None


@pytest.mark.parametrize("folder", [*tiny.FAMILIES, *MORE, "seeing"], indirect=True)
def test_a_folder_holds_what_was_loaded_from_it(folder: Path) -> None:
    model = load_model(folder, device=CPU, dtype=torch.bfloat16)
    held = held_by(folder, model)
    assert held == {name: True for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            parameter.view(-1)[-1] += 1
        held[name] = False
    assert held_by(folder, model) == held


def test_loading_needs_the_memory_of_the_weights_alone(tiny_model_folder: Callable[..., Path], tmp_path: Path) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "num_key_value_heads": 2, "head_dim": 64}
    tiny.write_model_folder(tmp_path, "llama", dtype="bfloat16", **sizes)
    program = """
import sys, torch
from pathlib import Path
from fullrank.models.load import load_model
def kilobytes(name):
    return int(Path("/proc/self/status").read_text().split(name)[1].split()[0])
small, large = (Path(name) for name in sys.argv[1:])
load_model(small, device=torch.device("cpu"))  # the code has been imported
before = kilobytes("VmRSS:")
model = load_model(large, device=torch.device("cpu"))
weights = sum(p.numel() * p.element_size() for p in model.parameters())
print((kilobytes("VmHWM:") - before) * 1024 / weights)
"""
    if not Path("/proc/self/status").exists():
        pytest.skip("peaks are read from /proc")
    done = subprocess.run([sys.executable, "-c", program, tiny_model_folder("llama"), tmp_path], capture_output=True, check=True)
    assert float(done.stdout) < 1.2, "a mapped file counts 0.5 and copies count 1"


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
