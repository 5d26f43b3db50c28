"""Loading models and tokenizers from a checked folder, always whole and always from safetensors.

transformers builds the model and decides what goes where, which names are converted and which weights are tied; only the reading
is ours (`fullrank.models.stored`), so that loading needs the memory of the weights it makes, once, and no more.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateSyntaxError
from torch import nn
from transformers import AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging

from fullrank.errors import DataError, ModelError
from fullrank.models.source import load_config
from fullrank.models.stored import StoredTensor, StoredTensors, weight_files
from fullrank.sequences.chat import ChatFormat

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_model(folder: Path, *, device: torch.device, dtype: torch.dtype | None = torch.float32) -> PreTrainedModel:
    """A causal language model from safetensors; dtype None keeps the stored type.

    Raises:
        ModelError: when weights are missing: a tensor made up at random is never trained on or measured.
    """
    logging.disable_progress_bar()  # transformers draws bars of its own
    model, info = _read(folder, load_config(folder), device, dtype)
    missing = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if missing:
        raise ModelError(f"{folder}: weights are missing or of another shape: {', '.join(missing[:5])} ({len(missing)} in all)")
    model.to(device)  # type: ignore[arg-type] # transformers wraps torch's `to` in a way mypy cannot follow
    return model


def _read(
    folder: Path, config: PreTrainedConfig, device: torch.device, dtype: torch.dtype | None
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model, and what transformers tells of missing and mismatched names."""
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    attention = attention_for(config)
    if kind.config_class == config.sub_configs.get("text_config"):  # of a model that sees, the part that reads
        config = config.get_text_config()
    stored = StoredTensors(*weight_files(folder)).index
    with _in_turn():
        loaded: Any = kind.from_pretrained(
            None,
            config=config,
            state_dict={name: _Unread(tensor, device) for name, tensor in stored.items()},
            dtype=dtype if dtype is not None else "auto",
            attn_implementation=attention,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # so that they are reported with the others
            output_loading_info=True,
        )
    model: PreTrainedModel = loaded[0]
    model.config.name_or_path = model.name_or_path = str(folder)
    if model.can_generate():
        model.generation_config = _generation_config(folder)
    return model, loaded[1]


def held_by(folder: Path, model: PreTrainedModel) -> dict[str, bool] | None:
    """Parameter name -> whether the folder holds these very numbers, once they are of the parameter's type.

    Read a piece at a time, where the folder holds every parameter as such or in parts (experts are stored one by one). None where
    it does not, as when several parameters are stored as one tensor.
    """
    stored = StoredTensors(*weight_files(folder)).index
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)  # a tied parameter is stored under one of its names, or under all
    held = {}
    for parameter, own in names.items():
        for name in own:
            try:
                parts = revert_weight_conversion(model, {name: parameter.detach()})
            except (RuntimeError, ValueError, KeyError, IndexError):  # it is stored together with others
                continue
            if all(part in stored and stored[part].shape == tuple(tensor.shape) for part, tensor in parts.items()):
                held[own[0]] = all(stored[part].equals(tensor) for part, tensor in parts.items())
                break
        else:
            return None
    return held


class _Unread:
    """A tensor as transformers' loader takes them: indexed by `...` and then moved, which is when it is read."""

    def __init__(self, stored: StoredTensor, device: torch.device) -> None:
        self._stored, self._device, self.dtype = stored, device, stored.dtype

    def __getitem__(self, all_of_it: Any) -> _Unread:
        if all_of_it is not Ellipsis:
            raise TypeError(f"a tensor of {self._stored.path} is read as a whole, not {all_of_it}")
        return self

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Read, on the device the model is wanted on."""
        return self._stored.read(device=self._device, dtype=dtype)

    def is_floating_point(self) -> bool:
        """As of a tensor."""
        return self.dtype.is_floating_point


@contextlib.contextmanager
def _in_turn() -> Iterator[None]:
    """Inside, transformers reads a tensor when it is its turn, where its threads would run ahead of what is converted."""
    name = "HF_DEACTIVATE_ASYNC_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _generation_config(folder: Path) -> GenerationConfig:
    try:
        return GenerationConfig.from_pretrained(folder)
    except OSError:  # the folder has none: older models keep it in their configuration
        return GenerationConfig.from_pretrained(folder, config_file_name="config.json", _from_model_config=True)


def attention_for(config: Any) -> str:
    """sdpa, but eager where attention scores are soft-capped (Gemma 2), which sdpa would leave out."""
    return "eager" if getattr(config.get_text_config(), "attn_logit_softcapping", None) else "sdpa"


def load_tokenizer(folder: Path, chat_template: str | None = None) -> PreTrainedTokenizerBase:
    """The folder's tokenizer; `chat_template` is a Jinja file that replaces its template.

    Raises:
        DataError: when the template file cannot be read.
        ModelError: when the folder has no tokenizer.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: no usable tokenizer: {error}") from None
    if chat_template:
        try:
            tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"data.chat_template: {chat_template} cannot be read: {error}") from None
    return tokenizer


def load_chat_format(folder: Path, chat_template: str | None, date: datetime.date, name: str) -> ChatFormat:
    """What conversations are rendered and tokenized with, in plain values.

    Args:
        folder: of the tokenizer.
        chat_template: a Jinja file that replaces its template.
        date: the day that templates see.
        name: what messages call the template.

    Raises:
        DataError: the template cannot be read or is no Jinja (what it makes of conversations is told with the records).
        ModelError: when the folder has no tokenizer.
    """
    tokenizer = load_tokenizer(folder, chat_template)
    try:
        if tokenizer.chat_template:
            tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    except TemplateSyntaxError as error:
        where = chat_template or f"the chat template of {name}"
        problem = f"{where}:{error.lineno}: not a Jinja template: {error.message}"
        raise DataError(problem, hint="mend it, or give another one as data.chat_template") from None
    except Exception:
        logging.get_logger(__name__).debug("%s refuses a lone question", name)
    return ChatFormat.of(tokenizer, date, name)


def drops(config: PreTrainedConfig) -> bool:
    """Whether a model of this configuration is trained with dropout."""
    rates = config.get_text_config().to_dict().items()
    heads = ("summary", "classifier")  # dropout of heads that no causal model has
    return any("drop" in name and not name.startswith(heads) and isinstance(rate, float) and rate > 0 for name, rate in rates)
