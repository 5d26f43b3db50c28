"""Writing a model's weights a tensor at a time, for a model that is whole nowhere.

The files are byte for byte those of transformers' `save_pretrained`: names as the hub has them, tied weights once, several files
where one would be too large. Headers are written first, from shapes alone; a tensor then goes to its place in its file, so that
memory never holds more than the one tensor (and it once more, where its type changes or it is stored in parts).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

#: The format's names of types, in the order in which safetensors lays tensors out: widest numbers first, then by name.
_TYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}
#: As transformers has it.
MOST_FILE_BYTES = "50GB"
_ORDER = {dtype: number for number, dtype in enumerate(_TYPES)}


class StreamedWeights:
    """Files of weights that are filled parameter by parameter, in any order.

    Args:
        folder: of the model to be.
        model: names, shapes and conversions; its numbers are not asked for, but those of buffers that are saved.
        dtype: of the parameters in the files.
    """

    def __init__(self, folder: Path, model: PreTrainedModel, dtype: torch.dtype) -> None:
        self._folder, self._model, self._dtype = folder, model, dtype
        parameters = {name: torch.empty(p.shape, dtype=dtype, device="meta") for name, p in model.named_parameters()}
        known = dict(model.named_parameters(remove_duplicate=False))
        buffers = {name: tensor for name, tensor in model.state_dict().items() if name not in known}
        self._together = self._not_alone(parameters)
        self._waiting: dict[str, torch.Tensor] = {}
        stored = {**self._parts(parameters), **buffers}
        split = split_torch_state_dict_into_shards(
            stored, filename_pattern="model{suffix}.safetensors", max_shard_size=MOST_FILE_BYTES
        )
        self._places: dict[str, tuple[Path, int]] = {}
        for file, names in split.filename_to_tensors.items():
            self._begin(folder / file, {name: stored[name] for name in names})
        if split.is_sharded:
            parameters_in_all = sum(p.numel() for p in parameters.values())
            index = {
                "metadata": {"total_parameters": parameters_in_all, **split.metadata},
                "weight_map": split.tensor_to_filename,
            }
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
        for name, tensor in buffers.items():
            self._put(name, tensor)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """A whole parameter, of the files' type; each once."""
        if name not in self._together:
            self._put_all({name: tensor})
            return
        self._waiting[name] = tensor  # one that is stored together with others waits for them
        if len(self._waiting) == len(self._together):
            self._put_all(self._waiting)
            self._waiting = {}

    def _not_alone(self, parameters: Mapping[str, torch.Tensor]) -> set[str]:
        """Parameters of which several make one stored tensor."""
        found = set()
        for name, blank in parameters.items():
            try:
                self._parts({name: blank})
            except (RuntimeError, ValueError, KeyError, IndexError):
                found.add(name)
        return found

    def _parts(self, parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return dict(revert_weight_conversion(self._model, dict(parameters)))

    def _put_all(self, parameters: Mapping[str, torch.Tensor]) -> None:
        for part, tensor in self._parts(parameters).items():
            self._put(part, tensor)

    def _put(self, name: str, tensor: torch.Tensor) -> None:
        path, offset = self._places[name]
        octets: Any = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(octets)

    def _begin(self, path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
        """Writes a file's header, and makes it as long as it will be."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for name in sorted(tensors, key=lambda name: (-_ORDER[tensors[name].dtype], name)):
            tensor = tensors[name]
            size = math.prod(tensor.shape) * tensor.dtype.itemsize
            header[name] = {"dtype": _TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, at + size]}
            at += size
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + at)
        for name in tensors:
            self._places[name] = (path, 8 + len(text) + header[name]["data_offsets"][0])
