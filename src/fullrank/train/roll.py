"""The roll call: before anything is loaded, ranks find out whether they are about to do the same thing on the same ground.

A rank with another version of a library, another recipe, another base model, other data or a folder of its own would not fail
at once: it would train something else, or hang. So each tells what it has, all compare, and what differs is named by rank,
everything at once.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import secrets
import socket
from collections import Counter
from typing import Any

import torch

from fullrank.errors import UsageError
from fullrank.models.resolved import ResolvedModel
from fullrank.parallel import device as devices
from fullrank.parallel.world import World
from fullrank.recipe import Recipe
from fullrank.records import DataCard, RankFacts, Ranks
from fullrank.run import Run, fingerprint, write_record, write_text

_PACKAGES = ("fullrank", "torch", "transformers", "safetensors", "numpy")


def call(recipe: Recipe, run: Run, base: ResolvedModel, data: DataCard, world: World, device: torch.device) -> None:
    """Writes down who trains (`train/ranks.json`), once all have the same recipe, base model, data, versions and folder.

    Raises:
        UsageError: naming what differs, and on which ranks.
    """
    if world.size == 1:
        return
    total, free = devices.memory_bytes(device)
    mine: dict[str, Any] = {
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in _PACKAGES},
        "recipe": fingerprint(recipe.train.model_dump(mode="json"), recipe.export.model_dump(mode="json"))[:16],
        "base model": base.facts.fingerprint[:16],
        "training data": data.training_fingerprint[:16],
        "kind of device": device.type,
        "run folder": _seen(run, world),
    }
    facts = RankFacts(
        host=socket.gethostname(),
        process=os.getpid(),
        local_rank=world.local_rank,
        device_name=devices.name(device),
        memory_bytes=total,
        memory_free_bytes=free,
    )
    told = world.gathered({"same": mine, "own": facts.model_dump()})
    problems = []
    for key in mine:
        found = [one["same"][key] for one in told]
        usual, _ = Counter(found).most_common(1)[0]
        pairs = zip(told, found, strict=True)
        odd = [f"rank {rank} on {one['own']['host']} has {value}" for rank, (one, value) in enumerate(pairs) if value != usual]
        if odd:
            problems.append(f"{key}: {', '.join(odd)}, the others {usual}")
    if problems:
        raise UsageError(
            "the ranks are not about to do the same:\n" + "\n".join(problems),
            hint="give every machine the same environment, the same recipe and model, and a shared folder for runs (--runs-dir)",
        )
    if world.is_first:
        ranks = [RankFacts.model_validate(one["own"]) for one in told]
        write_record(run.train / "ranks.json", Ranks(ranks=ranks))


def _seen(run: Run, world: World) -> str:
    """What stands in a file that the first rank has just written: another folder of the same name has another text."""
    path = run.train / "roll.txt"
    if world.is_first:
        write_text(path, secrets.token_hex(8))
    world.wait()
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return "no such file"
    finally:
        world.wait()
        if world.is_first:
            path.unlink(missing_ok=True)
