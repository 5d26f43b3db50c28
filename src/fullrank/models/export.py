"""The export: a plain Hugging Face folder, and the proof that it holds what was trained.

The folder carries weights, tokenizer, chat template and a generation configuration that stops where training taught the model
to stop. Its proof is a fresh process that loads it and computes bitwise the same logits.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from fullrank.errors import ProofError
from fullrank.models.load import DTYPES
from fullrank.models.stored import StoredTensors, weight_files

#: Logits that a probe compares, and the fewest tokens that it does with the largest vocabularies.
_KEPT_NUMBERS = 8 << 20
_FEWEST_KEPT = 16


def export_dtype(wanted: str, base: str) -> torch.dtype:
    """The recipe's `export.dtype` as a torch type; `base` is the type of the base model's stored weights."""
    dtype: torch.dtype = getattr(torch, base) if wanted == "base" else DTYPES[wanted]
    return dtype


def cast(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Casts the parameters in place, and only them: buffers such as rotary frequencies keep the type a fresh load gives them."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype


def write_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int], folder: Path) -> None:
    """Writes model, tokenizer, chat template and generation configuration into a folder."""
    model.generation_config = _generation_config(model, tokenizer, stop_ids)
    model.config._name_or_path = ""  # a path of this machine says nothing elsewhere
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _open_to_all(folder)


def write_description(
    model: PreTrainedModel, dtype: torch.dtype, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int], folder: Path
) -> None:
    """Writes all that `write_model` does, but the weights (`fullrank.models.streamed`)."""
    config = copy.deepcopy(model.config)
    config.dtype = str(dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__.removeprefix("FSDP")]
    config._name_or_path = ""
    config.save_pretrained(folder)
    if model.can_generate():
        _generation_config(model, tokenizer, stop_ids).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _open_to_all(folder)


def _open_to_all(folder: Path) -> None:
    for path in folder.iterdir():  # safetensors makes files that only their owner may read; a model is as open as its folder
        path.chmod(folder.stat().st_mode & 0o666)


def _generation_config(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int]) -> GenerationConfig:
    config = GenerationConfig.from_dict(model.generation_config.to_dict() if model.generation_config else {})
    config.eos_token_id = list(stop_ids) if len(stop_ids) > 1 else stop_ids[0]
    config.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stop_ids[0]
    if tokenizer.bos_token_id is not None:
        config.bos_token_id = tokenizer.bos_token_id
    try:
        config.validate(strict=True)
    except ValueError:  # sampling values without sampling, as some published models have them, are refused when saving
        config.do_sample = True
    return config


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a folder's weights, read from the headers of their files."""
    return {name: tensor.shape for name, tensor in StoredTensors(*weight_files(folder)).index.items()}


def changed_tensors(export: Path, base: Path) -> tuple[int, int]:
    """(stored tensors that differ from the base's in the export's type, stored tensors)."""
    ours, theirs = (StoredTensors(*weight_files(folder)).index for folder in (export, base))
    return sum(name not in theirs or not theirs[name].becomes(tensor) for name, tensor in ours.items()), len(ours)


def keys_equal(export: Path, base: Path, tied: set[str]) -> bool:
    """True when both folders hold the same names and shapes; a tied tensor may be stored once or twice."""
    ours, theirs = tensor_shapes(export), tensor_shapes(base)
    return {n: s for n, s in ours.items() if n not in tied} == {n: s for n, s in theirs.items() if n not in tied}


def tied_names(model: PreTrainedModel) -> set[str]:
    """Names of tensors that are another one's memory."""
    first: dict[int, str] = {}
    tied = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if first.setdefault(tensor.data_ptr(), name) != name and tensor.numel():
            tied |= {name, first[tensor.data_ptr()]}
    return tied


def tied_parameters(model: PreTrainedModel) -> set[str]:
    """`tied_names` of a model whose numbers are elsewhere: names of parameters that are one and the same."""
    names: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    return {name for own in names.values() if len(own) > 1 for name in own}


@torch.no_grad()
def probe_logits(model: PreTrainedModel, ids_1T: torch.Tensor) -> torch.Tensor:
    """Logits logits_1KV of one row's last K tokens, in evaluation mode: of all of them where vocabularies are small.

    The last tokens have seen all the others, and logits of a long row may take more memory than a training step does.
    """
    model.eval()
    kept = max(_FEWEST_KEPT, _KEPT_NUMBERS // int(model.config.get_text_config().vocab_size))
    keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
    more = {"logits_to_keep": kept} if keeps and kept < ids_1T.shape[1] else {}
    logits: torch.Tensor = model(input_ids=ids_1T.to(model.device), use_cache=False, **more).logits
    return logits.cpu()


@dataclass(frozen=True)
class Fresh:
    """What a new process found in an export."""

    logits_1TV: torch.Tensor
    tied: set[str]
    text_ids: list[int]
    """Its tokens of the probe's text."""
    chat_template: str | None
    stop_ids: list[int]
    digests: dict[str, str]
    """SHA-256 of every parameter, by name."""


def fresh_process(folder: Path, ids_1T: torch.Tensor, text: str, device: torch.device, scratch: Path) -> Fresh:
    """Loads an export in a new Python process and asks it for logits, ties, tokens of a text, template and stop tokens.

    Raises:
        ProofError: when the process cannot load it.
    """
    request = {
        "folder": str(folder),
        "ids": ids_1T[0].tolist(),
        "text": text,
        "device": str(device),
        "threads": torch.get_num_threads(),
    }
    (scratch / "probe.json").write_text(json.dumps(request), encoding="utf-8")
    logits = scratch / "logits.safetensors"
    command = [sys.executable, "-m", "fullrank.models.fresh", str(scratch / "probe.json"), str(logits)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ProofError(f"{folder}: a fresh process cannot load the export:\n{done.stderr.strip()[-2000:]}")
    facts = json.loads(done.stdout.splitlines()[-1])
    return Fresh(
        logits_1TV=load_file(logits)["logits"],
        tied=set(facts["tied"]),
        text_ids=facts["text_ids"],
        chat_template=facts["chat_template"],
        stop_ids=facts["stop_ids"],
        digests=facts["digests"],
    )


def digest(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's numbers."""
    flat = tensor.detach().cpu().contiguous().view(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().data).hexdigest()
