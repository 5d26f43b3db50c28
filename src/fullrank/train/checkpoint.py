"""Checkpoints: everything a run continues from, under a name only when it is complete.

A checkpoint is a folder of safetensors and JSON (no pickle), written beside, fsynced, listed with SHA-256 in its manifest, then
renamed. The newest one stays; the one before is removed once the new one is there.

State may be larger than memory: it is written in parts (`exp_avg.safetensors`, `exp_avg-00002.safetensors`, ...) and read a
tensor at a time, so that of tensors that are made when they are asked for, no more than a part is there at once.
"""

from __future__ import annotations

import json
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from fullrank.errors import TrainingError
from fullrank.models.stored import StoredTensors
from fullrank.parallel.engine import EngineState
from fullrank.run import new_folder, verify_manifest, write_manifest

_STATE = "state.json"
#: A part ends with the tensor that brings it to so many bytes.
_PART_BYTES = 128 << 20
_PART = re.compile(r"-\d{5}$")


def save(checkpoints: Path, step: int, state: EngineState, facts: dict[str, Any]) -> Path:
    """Writes `step-00000500/` and removes older checkpoints.

    Args:
        checkpoints: folder of the run's checkpoints.
        step: optimizer steps done.
        state: the engine's; each tensor is asked for once.
        facts: the loop's own state, as JSON holds it.
    """
    folder = checkpoints / f"step-{step:08d}"
    with new_folder(folder) as partial:
        for stem, tensors in state.tensors.items():
            _write(tensors, partial, stem)
        everything = {"step": step, "engine": dict(state.facts), "loop": facts}
        (partial / _STATE).write_text(json.dumps(everything, indent=1), encoding="utf-8")
        write_manifest(partial)
    for old in checkpoints.glob("step-*"):
        if old != folder:
            shutil.rmtree(old, ignore_errors=True)
    return folder


def newest(checkpoints: Path, complain: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose every file is as its manifest says; damaged ones are passed over aloud."""
    for folder in sorted(checkpoints.glob("step-*"), reverse=True):
        problem = verify_manifest(folder)
        if problem is None:
            return folder
        complain(f"the checkpoint {folder.name} is not used: {problem}")
    return None


def load(folder: Path) -> tuple[int, EngineState, dict[str, Any]]:
    """(step, engine state, the loop's facts) of a checkpoint; tensors are read when they are asked for, as often as they are."""
    everything = json.loads((folder / _STATE).read_text(encoding="utf-8"))
    return everything["step"], EngineState(_read(folder), everything["engine"]), everything["loop"]


def save_weights(best: Path, step: int, weights: Mapping[str, torch.Tensor]) -> None:
    """Writes `step-00000500/` with weights alone: the best so far. The one before stays too, for a run that continues from a
    checkpoint older than this."""
    with new_folder(best / f"step-{step:08d}") as partial:
        _write(weights, partial, "weights")
        write_manifest(partial)
    for old in sorted(best.glob("step-*"))[:-2]:
        shutil.rmtree(old, ignore_errors=True)


def load_weights(best: Path, step: int) -> Mapping[str, torch.Tensor]:
    """The weights `save_weights` wrote after a step, each read when it is asked for.

    Raises:
        TrainingError: they are not there, or damaged.
    """
    folder = best / f"step-{step:08d}"
    problem = verify_manifest(folder)
    if problem:
        raise TrainingError(
            f"{folder}: the weights of the lowest validation loss cannot be used: {problem}",
            hint=f"delete {best.parent} to train again",
        )
    return _read(folder)["weights"]


def _write(tensors: Mapping[str, torch.Tensor], folder: Path, stem: str) -> None:
    """Writes `stem.safetensors` and what parts come after it; a stem without tensors is a file, too."""
    part: dict[str, torch.Tensor] = {}
    parts = size = 0
    for name in tensors:
        part[name] = tensors[name].detach().contiguous()
        size += part[name].nbytes
        if size >= _PART_BYTES:
            parts += 1
            save_file(part, _path(folder, stem, parts))
            part, size = {}, 0
    if part or not parts:
        save_file(part, _path(folder, stem, parts + 1))


def _path(folder: Path, stem: str, part: int) -> Path:
    return folder / (f"{stem}.safetensors" if part == 1 else f"{stem}-{part:05d}.safetensors")


def _read(folder: Path) -> Mapping[str, StoredTensors]:
    parts: defaultdict[str, list[Path]] = defaultdict(list)
    for path in sorted(folder.glob("*.safetensors")):
        parts[_PART.sub("", path.stem)].append(path)
    return {stem: StoredTensors(*paths) for stem, paths in parts.items()}
