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
    kind, config, attention = _kind_of(config)
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
    return _named(loaded[0], folder), loaded[1]


def blank_model(folder: Path, *, dtype: torch.dtype) -> PreTrainedModel:
    """The model without numbers: its parameters are of the device `meta`, its buffers are there."""
    kind, config, attention = _kind_of(load_config(folder))
    with _without_numbers():
        made: PreTrainedModel = kind._from_config(config, dtype=dtype, attn_implementation=attention)
    return _named(made, folder)


@contextlib.contextmanager
def _without_numbers() -> Iterator[None]:
    """Inside, parameters that modules are given have shape and type alone; buffers are left as they are."""
    register = nn.Module.register_parameter

    def blank(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:  # one that is blank already may be tied
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = blank  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _kind_of(config: PreTrainedConfig) -> tuple[Any, PreTrainedConfig, str]:
    """The class of the causal model, its configuration, and its attention."""
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    attention = attention_for(config)
    if kind.config_class == config.sub_configs.get("text_config"):  # of a model that sees, the part that reads
        config = config.get_text_config()
    return kind, config, attention


def _named(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    model.config.name_or_path = model.name_or_path = str(folder)
    if model.can_generate():
        model.generation_config = _generation_config(folder)
    return model


def held_by(folder: Path, model: PreTrainedModel) -> dict[str, bool] | None:
    """Parameter name -> whether the folder holds these very numbers, once they are of the parameter's type.

    Read a piece at a time, where the folder holds every parameter as such or in parts (experts are stored one by one). None where
    it does not, as when several parameters are stored as one tensor.
    """
    base = Base(folder, model)
    held = {name: base.holds(name, parameter) for name, parameter in model.named_parameters()}
    return None if None in held.values() else {name: bool(same) for name, same in held.items()}


class Base:
    """A folder's numbers, for one parameter of a model to be compared with at a time.

    Args:
        folder: of the weights.
        model: that knows under which names, and in which parts, its parameters are stored.
    """

    def __init__(self, folder: Path, model: PreTrainedModel) -> None:
        self._stored, self._model = StoredTensors(*weight_files(folder)).index, model
        self._names: dict[str, list[str]] = {}
        first: dict[int, str] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            # a tied parameter is stored under one of its names, or under all
            self._names.setdefault(first.setdefault(id(parameter), name), []).append(name)

    def holds(self, name: str, tensor: torch.Tensor) -> bool | None:
        """Whether the folder has these numbers for a (whole) parameter; None where it is stored together with others."""
        for own in self._names[name]:
            try:
                parts = revert_weight_conversion(self._model, {own: tensor.detach()})
            except (RuntimeError, ValueError, KeyError, IndexError):
                continue
            if all(part in self._stored and self._stored[part].shape == tuple(t.shape) for part, t in parts.items()):
                return all(self._stored[part].equals(t) for part, t in parts.items())
        return None


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
