"""Checkpoints: everything a run continues from, under a name only when it is complete.

A checkpoint is a folder of safetensors and JSON (no pickle), written beside, fsynced, listed with SHA-256 in its manifest, then
renamed. The newest one stays; the one before is removed once the new one is there.

State may be larger than memory: it is written in parts (`exp_avg.safetensors`, `exp_avg-00002.safetensors`, ...) and read a
tensor at a time, so that of tensors that are made when they are asked for, no more than a part is there at once.

Of several ranks, each writes the pieces that it holds into files of its own (`exp_avg-r0001.safetensors`), which say where in the
whole tensor a piece lies. So a checkpoint is read by any number of ranks and by any engine: each asks for the elements it wants.
"""

from __future__ import annotations

import functools
import json
import math
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from fullrank.errors import FullrankError, TrainingError
from fullrank.models.stored import StoredTensor, StoredTensors, metadata_of
from fullrank.optim.pieces import Piece, Pieces, Read, assembled
from fullrank.parallel.engine import EngineState
from fullrank.parallel.world import ALONE, World
from fullrank.run import (
    fsync,
    manifest_entry,
    naming_disk_trouble,
    new_folder,
    partial_of,
    verify_manifest,
    write_manifest,
)

_STATE = "state.json"
#: A part ends with the tensor that brings it to so many bytes.
_PART_BYTES = 128 << 20
_PART = re.compile(r"(-r\d{4})?(-\d{5})?$")
#: In a file's metadata: where the pieces in it lie.
_PIECES = "pieces"


def save(checkpoints: Path, step: int, state: EngineState, facts: dict[str, Any], world: World = ALONE) -> Path:
    """Writes `step-00000500/` and removes older checkpoints; all ranks save together.

    Args:
        checkpoints: folder of the run's checkpoints, the same for all ranks.
        step: optimizer steps done.
        state: the engine's; each tensor is asked for once.
        facts: the loop's own state, as JSON holds it; the first rank's counts.
        world: the ranks.

    Raises:
        FullrankError: on every rank, where one of them could not write.
    """
    folder = checkpoints / f"step-{step:08d}"
    everything = {"step": step, "engine": dict(state.facts), "loop": facts}

    def write(partial: Path) -> list[Path]:
        paths = [path for stem, tensors in state.tensors.items() for path in _write(tensors, partial, stem, world)]
        if world.is_first:
            paths.append(partial / _STATE)
            paths[-1].write_text(json.dumps(everything, indent=1), encoding="utf-8")
        return paths

    _together(folder, world, write)
    if world.is_first:
        for old in checkpoints.glob("step-*"):
            if old != folder:
                shutil.rmtree(old, ignore_errors=True)
    return folder


def _together(folder: Path, world: World, write: Callable[[Path], list[Path]]) -> None:
    """Makes a folder that all ranks write into, and that gets its name and a manifest once all of them have.

    Args:
        folder: its final name.
        world: the ranks.
        write: writes this rank's files into the folder it is given, and tells which.
    """
    if world.is_first:
        with new_folder(folder) as partial:
            world.wait()
            write_manifest(partial, _written(partial, world, write))
    else:
        world.wait()
        with naming_disk_trouble(folder):
            _written(partial_of(folder), world, write)
    world.wait()


def _written(partial: Path, world: World, write: Callable[[Path], list[Path]]) -> dict[str, dict[str, Any]]:
    """The manifest entries of all ranks' files, which have reached the disk.

    Raises:
        Exception: this rank's own.
        FullrankError: another rank could not write.
    """
    entries: dict[str, dict[str, Any]] = {}
    failure: Exception | None = None
    try:
        for path in write(partial):
            fsync(path)
            entries[path.name] = manifest_entry(path)
    except Exception as error:  # told to the others, who would wait for this rank
        failure = error
    everyone = world.gathered({"entries": entries, "problem": str(failure or "")})
    if failure is not None:
        raise failure
    problems = [f"rank {rank}: {told['problem']}" for rank, told in enumerate(everyone) if told["problem"]]
    if problems:
        raise FullrankError("\n".join(problems), hint="nothing half-written was left under a final name")
    return {name: entry for told in everyone for name, entry in told["entries"].items()}


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


def save_weights(best: Path, step: int, weights: Mapping[str, torch.Tensor], world: World = ALONE) -> None:
    """Writes `step-00000500/` with weights alone: the best so far. The one before stays too, for a run that continues from a
    checkpoint older than this."""
    _together(best / f"step-{step:08d}", world, lambda partial: _write(weights, partial, "weights", world))
    if world.is_first:
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


def _write(tensors: Mapping[str, torch.Tensor], folder: Path, stem: str, world: World) -> list[Path]:
    """Writes what this rank holds into `stem.safetensors` and what parts come after it; a stem without tensors is a file, too.

    What is not divided is alike on all ranks, and written by the first.
    """
    pieces = tensors.pieces if isinstance(tensors, Pieces) else {}
    part: dict[str, torch.Tensor] = {}
    paths: list[Path] = []
    size = 0

    def close() -> None:
        lying = {name: [pieces[name].start, pieces[name].count, list(pieces[name].shape)] for name in part if name in pieces}
        paths.append(_path(folder, stem, len(paths) + 1, world))
        save_file(part, paths[-1], {_PIECES: json.dumps(lying)} if lying else None)

    for name in tensors:
        if name not in pieces and not world.is_first:
            continue
        part[name] = tensors[name].detach().contiguous()
        size += part[name].nbytes
        if size >= _PART_BYTES:
            close()
            part, size = {}, 0
    if part or not paths:
        close()
    return paths


def _path(folder: Path, stem: str, part: int, world: World) -> Path:
    rank = f"-r{world.rank:04d}" if world.size > 1 else ""
    return folder / (f"{stem}{rank}.safetensors" if part == 1 else f"{stem}{rank}-{part:05d}.safetensors")


def _read(folder: Path) -> Mapping[str, Saved]:
    files: defaultdict[str, list[Path]] = defaultdict(list)
    for path in sorted(folder.glob("*.safetensors")):
        files[_PART.sub("", path.stem)].append(path)
    return {stem: Saved(paths) for stem, paths in files.items()}


class Saved(Mapping[str, torch.Tensor]):
    """Tensors by name out of the files of one stem, whole or in pieces; read whenever they are asked for."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._there: dict[str, list[tuple[Piece, StoredTensor]]] = {}
        for path in paths:
            lying = json.loads(metadata_of(path).get(_PIECES, "{}"))
            for name, tensor in StoredTensors(path).index.items():
                start, count, shape = lying.get(name, (0, tensor.numel, tensor.shape))
                self._there.setdefault(name, []).append((Piece(start, count, tuple(shape)), tensor))
        for pieces in self._there.values():
            pieces.sort(key=lambda one: (one[0].start, one[0].count))

    def __getitem__(self, name: str) -> torch.Tensor:
        there = self._there[name]
        shape = there[0][0].shape
        if len(there) == 1:
            found = there[0][1].read()  # flat, where an engine of one rank saved all of a tensor as a piece
            return found.view(shape) if found.numel() == math.prod(shape) else found
        return assembled(self.parts(name), Piece(0, math.prod(shape), shape), there[0][1].dtype).view(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._there)

    def __len__(self) -> int:
        return len(self._there)

    def parts(self, name: str) -> list[tuple[Piece, Read]]:
        """See `fullrank.optim.pieces.Parts`."""
        return [(piece, functools.partial(_stretch, tensor)) for piece, tensor in self._there[name]]


def _stretch(tensor: StoredTensor, start: int, count: int) -> torch.Tensor:
    return tensor.part(start, count).read()
