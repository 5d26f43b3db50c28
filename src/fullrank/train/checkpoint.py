"""Checkpoints: everything a run continues from, under a name only when it is complete.

A checkpoint is a folder of safetensors and JSON (no pickle), written beside, fsynced, listed with SHA-256 in its manifest, then
renamed. The newest one stays; the one before is removed once the new one is there.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from fullrank.errors import TrainingError
from fullrank.parallel.engine import EngineState
from fullrank.run import new_folder, verify_manifest, write_manifest

_STATE = "state.json"


def save(checkpoints: Path, step: int, state: EngineState, facts: dict[str, Any]) -> Path:
    """Writes `step-00000500/` and removes older checkpoints.

    Args:
        checkpoints: folder of the run's checkpoints.
        step: optimizer steps done.
        state: the engine's.
        facts: the loop's own state, as JSON holds it.
    """
    folder = checkpoints / f"step-{step:08d}"
    with new_folder(folder) as partial:
        for stem, tensors in state.tensors.items():
            save_file({name: _storable(tensor) for name, tensor in tensors.items()}, partial / f"{stem}.safetensors")
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
    """(step, engine state, the loop's facts) of a checkpoint."""
    everything = json.loads((folder / _STATE).read_text(encoding="utf-8"))
    tensors = {path.stem: load_file(path) for path in folder.glob("*.safetensors")}
    return everything["step"], EngineState(tensors, everything["engine"]), everything["loop"]


def save_weights(best: Path, step: int, weights: Mapping[str, torch.Tensor]) -> None:
    """Writes `step-00000500/` with weights alone: the best so far. The one before stays too, for a run that continues from a
    checkpoint older than this."""
    with new_folder(best / f"step-{step:08d}") as partial:
        save_file({name: _storable(tensor) for name, tensor in weights.items()}, partial / "weights.safetensors")
        write_manifest(partial)
    for old in sorted(best.glob("step-*"))[:-2]:
        shutil.rmtree(old, ignore_errors=True)


def load_weights(best: Path, step: int) -> dict[str, torch.Tensor]:
    """The weights `save_weights` wrote after a step.

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
    return load_file(folder / "weights.safetensors")


def _storable(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous()
