"""Loading models and tokenizers from a checked folder, always whole and always from safetensors."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateSyntaxError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from fullrank.errors import DataError, ModelError
from fullrank.models.source import load_config
from fullrank.sequences.chat import ChatFormat

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_model(folder: Path, *, device: torch.device, dtype: torch.dtype | None = torch.float32) -> PreTrainedModel:
    """A causal language model from safetensors; dtype None keeps the stored type.

    Raises:
        ModelError: when weights are missing: a tensor made up at random is never trained on or measured.
    """
    logging.disable_progress_bar()  # transformers draws bars of its own
    config = load_config(folder)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype if dtype is not None else "auto",
        attn_implementation=attention_for(config),
        use_safetensors=True,
        trust_remote_code=False,
        ignore_mismatched_sizes=True,  # so that they are reported below, with the others
        output_loading_info=True,
    )
    model: PreTrainedModel = loaded[0]
    info: dict[str, Any] = loaded[1]
    missing = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if missing:
        raise ModelError(f"{folder}: weights are missing or of another shape: {', '.join(missing[:5])} ({len(missing)} in all)")
    if device.type == "cpu":
        # Weights come memory-mapped from the file. What is trained must be memory of its own: a file that is replaced under a
        # running process kills it, and unaligned memory rounds (and runs) differently from aligned memory.
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    model.to(device)  # type: ignore[arg-type] # transformers wraps torch's `to` in a way mypy cannot follow
    return model


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
