"""`model.source` -> a local folder that is safe to load, and the facts about it.

Embedded names, local folders and hub ids end as the same thing: a folder with config.json, safetensors and a tokenizer. Pickle
weights are refused by name, and code that comes with a model is never run.
"""

from __future__ import annotations

import difflib
import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fullrank.errors import ModelError
from fullrank.models.embedded import EMBEDDED, folder_of
from fullrank.models.resolved import ResolvedModel
from fullrank.recipe import Model
from fullrank.records import ModelFacts
from fullrank.run import file_digest, fingerprint

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_SMALL = ["*.json", "*.jinja", "*.model", "*.txt"]
_WANTED = ["*.safetensors", "*.safetensors.index.json", *_SMALL]


def resolve(model: Model, tell: Callable[[str], None] = lambda words: None, *, needs_weights: bool = True) -> ResolvedModel:
    """Finds (and if need be fetches) the base model.

    Args:
        model: the recipe's model section.
        tell: called with words on what takes time.
        needs_weights: False where configuration and tokenizer are enough: weights are then neither fetched nor missed.

    Raises:
        ModelError: unknown, not reachable, pickle weights only, or an architecture that transformers does not implement.
    """
    kind: Literal["embedded", "folder", "hub"]
    commit: str | None = None
    if model.source in EMBEDDED:
        kind, folder = "embedded", folder_of(model.source, tell)
        commit = EMBEDDED[model.source].wheel_sha256
    elif Path(model.source).is_dir():
        kind, folder = "folder", Path(model.source)
    else:
        kind = "hub"
        folder, commit = _fetch(model, tell, _WANTED if needs_weights else _SMALL)
    _refuse_unsafe(folder, model.source, needs_weights=needs_weights)
    return ResolvedModel(folder, _facts(folder, model.source, kind, commit))


def _fetch(model: Model, tell: Callable[[str], None], wanted: list[str]) -> tuple[Path, str]:
    """Downloads a hub model's files of the wanted names: (folder, commit)."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    near = difflib.get_close_matches(model.source.lower(), EMBEDDED, n=1)
    perhaps = f"; did you mean {near[0]!r}?" if near else ""
    where = f"model.source: {model.source!r}"
    try:
        info = HfApi().model_info(model.source, revision=model.revision, timeout=20)
        files = [sibling.rfilename for sibling in info.siblings or []]
        _refuse_pickles(files, model.source)
        tell(f"fetching {model.source} at {str(info.sha)[:12]} from the hub")
        # By its own name, so that the cache knows what the name meant when there is no network; the folder is the commit's.
        folder = Path(snapshot_download(model.source, revision=model.revision, allow_patterns=wanted))
        return folder, folder.name
    except GatedRepoError:
        raise ModelError(
            f"{where}: the hub gives it to accepted users only", hint="accept its terms on the hub and set HF_TOKEN"
        ) from None
    except RevisionNotFoundError:
        raise ModelError(f"{where}: it has no revision {model.revision!r}") from None
    except (RepositoryNotFoundError, ValueError):
        embedded = ", ".join(EMBEDDED)
        raise ModelError(
            f"{where}: no embedded model (there is: {embedded}), no local folder and no hub model has this name{perhaps}",
            hint="private hub models need HF_TOKEN",
        ) from None
    except Exception as error:
        if not isinstance(error, (OfflineModeIsEnabled, HfHubHTTPError, OSError)) and "httpx" not in type(error).__module__:
            raise  # a connection that fails is an error of the hub's HTTP client: httpx, httpx2, ...
        try:  # what an earlier run has fetched serves without a network
            folder = Path(snapshot_download(model.source, revision=model.revision, allow_patterns=wanted, local_files_only=True))
            return folder, folder.name
        except (LocalEntryNotFoundError, ValueError):
            raise ModelError(
                f"{where}: no embedded model or local folder has this name, and the hub cannot be reached "
                f"({type(error).__name__}){perhaps}",
                hint="check the name and the network, or give a local folder",
            ) from None


def _refuse_pickles(files: list[str], name: str) -> None:
    if any(file.endswith(".safetensors") for file in files):
        return
    pickles = [file for file in files if file.endswith(_PICKLES)]
    if pickles:
        raise ModelError(
            f"{name}: its weights are pickles ({', '.join(sorted(pickles)[:3])}), which can run any code when they are loaded",
            hint="use a revision with .safetensors files, or convert them where that is safe",
        )
    raise ModelError(
        f"{name}: no .safetensors weights in it", hint="a model folder has config.json, *.safetensors and tokenizer.json"
    )


def _refuse_unsafe(folder: Path, name: str, *, needs_weights: bool = True) -> None:
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"{name}: no config.json in {folder}", hint="a model folder has config.json, *.safetensors and tokenizer.json"
        )
    if needs_weights:
        _refuse_pickles([path.name for path in folder.iterdir()], name)
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{folder / 'config.json'}: not valid JSON: {error}") from None
    if config.get("model_type") in CONFIG_MAPPING and config["model_type"] not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ModelError(
            f"{name}: its model_type {config['model_type']!r} is no causal language model",
            hint="use a model that transformers loads with AutoModelForCausalLM",
        )
    if config.get("quantization_config"):
        raise ModelError(
            f"{name}: its weights are quantized ({config['quantization_config'].get('quant_method', 'unnamed method')})",
            hint="full fine-tuning needs the unquantized model",
        )
    if config.get("model_type") not in CONFIG_MAPPING:
        own_code = " and brings code of its own, which is never run" if "auto_map" in config else ""
        raise ModelError(
            f"{name}: transformers does not implement its model_type {config.get('model_type')!r}{own_code}",
            hint="use a model whose architecture is part of transformers",
        )


def _stored_dtype(folder: Path) -> str:
    """The type that most numbers of a folder's safetensors are stored in, by torch's name."""
    sizes: Counter[str] = Counter()
    for path in folder.glob("*.safetensors"):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                    view = file.get_slice(name)
                    sizes[view.get_dtype()] += math.prod(view.get_shape())
        except SafetensorError as error:
            raise ModelError(f"{path}: not a whole safetensors file: {error}", hint="fetch or copy it again") from None
    names = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
    if not sizes:  # weights are not here
        return str(load_config(folder).dtype or torch.float32).removeprefix("torch.")
    most = sizes.most_common(1)[0][0]
    if most not in names:
        raise ModelError(
            f"{folder}: its weights are stored as {most}, which cannot be trained",
            hint=f"use the unquantized model; trainable types are {', '.join(names)}",
        )
    return names[most]


def load_config(folder: Path) -> PreTrainedConfig:
    """The configuration of a folder that `resolve` has checked."""
    config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    return config


def _facts(folder: Path, source: str, kind: Literal["embedded", "folder", "hub"], commit: str | None) -> ModelFacts:
    files = sorted(
        path for path in folder.iterdir() if path.is_file() and path.suffix in (".json", ".safetensors", ".jinja", ".model")
    )
    digests = fingerprint({path.name: file_digest(path) for path in files})
    return facts_of(load_config(folder), source, kind=kind, commit=commit, fingerprint=digests, dtype=_stored_dtype(folder))


def facts_of(
    config: PreTrainedConfig,
    source: str,
    *,
    kind: Literal["embedded", "folder", "hub", "configuration"],
    commit: str | None,
    fingerprint: str,
    dtype: str,
) -> ModelFacts:
    """The facts about a model of this configuration, of which nothing is made.

    Raises:
        ModelError: it has no one number of attention heads.
    """
    text = config.get_text_config()
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    heads = getattr(text, "num_attention_heads", None)
    if not isinstance(heads, int):
        raise ModelError(
            f"{source}: {type(skeleton).__name__} has no one number of attention heads, so its memory cannot be planned",
            hint="use a transformer model",
        )
    mlp_width = getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * text.hidden_size
    widest = max(mlp_width) if isinstance(mlp_width, (list, tuple)) else mlp_width  # some give one to each layer
    return ModelFacts(
        source=source,
        kind=kind,
        commit=commit,
        fingerprint=fingerprint,
        architecture=type(skeleton).__name__,
        parameters=sum(parameter.numel() for parameter in skeleton.parameters()),
        dtype=dtype,
        hidden_size=text.hidden_size,
        layers=text.num_hidden_layers,
        heads=heads,
        key_value_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        intermediate_size=widest,
        vocabulary=text.vocab_size,
        tied_embeddings=bool(text.tie_word_embeddings),
        context_tokens=getattr(text, "max_position_embeddings", None),
    )
