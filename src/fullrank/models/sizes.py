"""Models as sizes alone: a configuration, from a file or by a well-known name, of which nothing is loaded.

The names stand for the published `config.json` of each model (hub ids of the same names at meta-llama, mistralai and Qwen); the
tests hold the numbers of parameters that their authors publish against them.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fullrank.errors import ModelError
from fullrank.models.source import facts_of
from fullrank.records import ModelFacts
from fullrank.run import fingerprint


def _sizes(
    family: str, hidden: int, layers: int, heads: int, key_value_heads: int, intermediate: int, vocabulary: int
) -> dict[str, Any]:
    return {
        "model_type": family,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "intermediate_size": intermediate,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
    }


SIZES: dict[str, dict[str, Any]] = {
    "llama-2-7b": _sizes("llama", 4096, 32, 32, 32, 11008, 32000),
    "llama-2-13b": _sizes("llama", 5120, 40, 40, 40, 13824, 32000),
    "llama-2-70b": _sizes("llama", 8192, 80, 64, 8, 28672, 32000),
    "llama-3.1-8b": _sizes("llama", 4096, 32, 32, 8, 14336, 128256),
    "llama-3.1-70b": _sizes("llama", 8192, 80, 64, 8, 28672, 128256),
    "llama-3.1-405b": _sizes("llama", 16384, 126, 128, 8, 53248, 128256),
    "mistral-7b": _sizes("mistral", 4096, 32, 32, 8, 14336, 32000),
    "qwen2.5-7b": _sizes("qwen2", 3584, 28, 28, 4, 18944, 152064),
    "qwen2.5-14b": _sizes("qwen2", 5120, 48, 40, 8, 13824, 152064),
    "qwen2.5-32b": _sizes("qwen2", 5120, 64, 40, 8, 27648, 152064),
    "qwen2.5-72b": _sizes("qwen2", 8192, 80, 64, 8, 29568, 152064),
}


def sizes_of(source: str) -> tuple[PreTrainedConfig, ModelFacts]:
    """(configuration, facts) of a model by name, by its folder, or by its config.json.

    Raises:
        ModelError: no such name or file, or no causal language model that transformers implements.
    """
    path = Path(source)
    file = path / "config.json" if path.is_dir() else path
    if source in SIZES:
        written = SIZES[source]
    elif file.is_file():
        try:
            written = dict(json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ModelError(f"{file}: not a configuration: {error}") from None
    else:
        near = difflib.get_close_matches(source.lower(), SIZES, n=1)
        raise ModelError(
            f"no sizes are known by the name {source!r}, and no config.json is there"
            + (f"; did you mean {near[0]!r}?" if near else ""),
            hint=f"give the folder of a model, its config.json, or one of {', '.join(SIZES)}",
        )
    kind = str(written.get("model_type"))
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ModelError(
            f"{source}: transformers implements no causal language model of model_type {kind!r}",
            hint="use a model whose architecture is part of transformers",
        )
    given = {name: value for name, value in written.items() if name not in ("model_type", "auto_map")}
    config: PreTrainedConfig = AutoConfig.for_model(kind, **given)
    dtype = str(config.dtype or "bfloat16").removeprefix("torch.")
    found = facts_of(config, source, kind="configuration", commit=None, fingerprint=fingerprint(written), dtype=dtype)
    return config, found
