"""Stages of a run in their order, each with what it needs run before it.

A workflow opens the run folder under its lock, resolves every `auto` into the saved recipe, and runs the stages up to the one
asked for; stages whose inputs have not changed find their work done. The rooms know nothing of one another: the folder joins
them.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from fullrank.data import stage as data_stage
from fullrank.errors import FullrankError, UsageError
from fullrank.loading import LoadedRecipe, differences, dump
from fullrank.recipe import Recipe
from fullrank.records import DataCard, EvaluationCard, Plan, Profile, Score, StageRecord, TrainCard
from fullrank.run import Listener, Run, need_record, read_record, write_text
from fullrank.workflows.described import Described, describe

if TYPE_CHECKING:
    from fullrank.parallel.world import World

StageName = Literal["data", "plan", "train", "evaluate", "report"]
STAGES: tuple[StageName, ...] = ("data", "plan", "train", "evaluate", "report")
_PACKAGES = ("fullrank", "torch", "transformers", "tokenizers", "safetensors", "numpy", "pydantic")


def run_until(last: StageName, loaded: LoadedRecipe, runs_dir: Path, listener: Listener | None = None) -> Run:
    """Runs every stage up to `last`.

    Raises:
        FullrankError: whatever a stage refuses; everything complete stays.
    """
    if "RANK" in os.environ:
        return _run_among_ranks(last, loaded, runs_dir, listener)
    said: list[str] = []
    told = describe(loaded.recipe, said.append)
    with opened(loaded, told.recipe, runs_dir, listener) as run:
        for words in said:
            run.tell("note", stage="model", words=words)
        for name in STAGES[: STAGES.index(last) + 1]:
            _run_stage(name, told, run)
    return run


def _run_among_ranks(last: StageName, loaded: LoadedRecipe, runs_dir: Path, listener: Listener | None) -> Run:
    """As `run_until`, for a rank that torchrun or another launcher started: all train, the first one does the rest."""
    from fullrank.parallel.world import joined
    from fullrank.parallel.world import told as told_world
    from fullrank.parallel.zeroed import forget_groups
    from fullrank.workflows.launch import PATIENCE_SECONDS

    world = told_world()
    assert world is not None
    said: list[str] = []
    told = describe(loaded.recipe, said.append)
    wanted = STAGES[: STAGES.index(last) + 1]
    run = Run(loaded.run_root or runs_dir / told.recipe.name, listener, tells=world.is_first)
    with contextlib.ExitStack() as stack:
        ranks = stack.enter_context(contextlib.ExitStack())
        ranks.enter_context(joined(world, told.recipe.machine.device, patience_seconds=PATIENCE_SECONDS))
        refusal: FullrankError | None = None
        if world.is_first:
            try:
                stack.enter_context(opened(loaded, told.recipe, runs_dir, listener))
                for words in said:
                    run.tell("note", stage="model", words=words)
                for name in ("data", "plan"):
                    _run_stage(name, told, run, world)
            except FullrankError as error:
                refusal = error
        code = world.gathered(refusal.exit_code if refusal else 0)[0]
        if refusal is not None:
            raise refusal
        if code:  # the first rank says why
            raise SystemExit(code)
        if "train" in wanted:
            _run_stage("train", told, run, world)
        forget_groups()
        gc.collect()  # what still holds the ranks' groups, before they go
        ranks.close()
        if world.is_first:
            for name in wanted[3:]:
                _run_stage(name, told, run, world)
    return run


def profile(loaded: LoadedRecipe, runs_dir: Path, listener: Listener | None = None, *, steps: int) -> tuple[Run, Profile]:
    """Plans a recipe and times some of its steps, on the ranks it asks for; nothing is trained.

    Raises:
        UsageError: another launcher has started ranks already.
    """
    if "RANK" in os.environ:
        raise UsageError(
            "fullrank profile starts its ranks itself, and a launcher has started this process as one",
            hint="type it without the launcher; parallel.ranks says how many",
        )
    told = describe(loaded.recipe, lambda words: listener("note", {"words": words}) if listener else None)
    with opened(loaded, told.recipe, runs_dir, listener) as run:
        from fullrank.parallel.world import ALONE
        from fullrank.train.profile import profile as profiled
        from fullrank.workflows import launch

        for name in STAGES[: STAGES.index("plan") + 1]:
            _run_stage(name, told, run)
        if (size := launch.world_here(told.recipe).size) > 1:
            launch.profile(told.recipe, run, size, steps)
        elif told.recipe.parallel.needs_engine:
            launch.profile_as(told.recipe, run, ALONE, steps)
        else:
            profiled(told.recipe, run, told.base, steps)
        return run, need_record(run.profile_path, Profile, "profile")


def prepare_data(loaded: LoadedRecipe, told: Described, runs_dir: Path, listener: Listener | None = None) -> Run:
    """Runs the data stage alone, without torch."""
    with opened(loaded, told.recipe, runs_dir, listener) as run:
        data_stage.stage(told.recipe, run, told.base, told.chat)
    return run


def _run_stage(name: StageName, told: Described, run: Run, world: World | None = None) -> None:
    """One stage; `world` is of the ranks that a launcher started, where there are any."""
    # Rooms are imported when they are entered: preparing data alone needs no torch.
    recipe, base = told.recipe, told.base
    match name:
        case "data":
            from fullrank.evaluate import stage as evaluate_stage

            data_stage.stage(recipe, run, base, told.chat)
            evaluate_stage.rehearse(recipe, run)
        case "plan":
            from fullrank.plan import stage as plan_stage
            from fullrank.workflows.launch import world_here

            plan_stage.stage(recipe, run, base, world or world_here(recipe))
        case "train":
            from fullrank.parallel.world import ALONE
            from fullrank.workflows import launch

            if world is None and (here := launch.world_here(recipe)).size > 1:
                launch.train(recipe, run, here.size)
            elif world is None and recipe.parallel.needs_engine:
                launch.train_as(recipe, run, ALONE)
            else:
                from fullrank.train import stage as train_stage

                train_stage.stage(recipe, run, base, world or ALONE)
        case "evaluate":
            from fullrank.evaluate import stage as evaluate_stage

            evaluate_stage.stage(recipe, run, base)
        case "report":
            from fullrank.report import stage as report_stage

            page = report_stage.stage(run)
            run.tell("finished", stage="report", page=str(page))


@contextmanager
def opened(loaded: LoadedRecipe, recipe: Recipe, runs_dir: Path, listener: Listener | None = None) -> Iterator[Run]:
    """The run's folder, locked, with the resolved recipe and the environment saved in it.

    Raises:
        UsageError: the folder is in use, cannot be written, or holds training begun with another recipe.
    """
    run = Run(loaded.run_root or runs_dir / recipe.name, listener)
    with run.locked():
        _refuse_other_recipe(run, recipe)
        write_text(run.recipe_path, _header(loaded) + dump(recipe))
        write_text(run.environment_path, _environment())
        yield run


def _refuse_other_recipe(run: Run, recipe: Recipe) -> None:
    """A run that has begun to train keeps what it trains on and how; evaluation and report may change."""
    if not (run.train / "inputs.json").exists() or not run.recipe_path.exists():
        return
    begun = _what_is_trained(yaml.safe_load(run.recipe_path.read_text(encoding="utf-8")))
    changed = differences(begun, _what_is_trained(yaml.safe_load(dump(recipe))))
    if changed:
        raise UsageError(
            f"{run.root}: its training was begun with another recipe:\n" + "\n".join(changed),
            hint=f"give this recipe another `name`, or delete {run.root} to start anew",
        )


def _what_is_trained(recipe: dict[str, Any]) -> dict[str, Any]:
    """The sections that training depends on, without the places of files, whose content has a fingerprint of its own."""
    sections = {name: dict(recipe.get(name) or {}) for name in ("model", "data", "train", "export")}
    for key in ("train", "test", "general", "chat_template"):
        sections["data"].pop(key, None)
    if not isinstance(sections["data"].get("validation"), dict):
        sections["data"].pop("validation", None)
    return sections


def _header(loaded: LoadedRecipe) -> str:
    overrides = "".join(f"# override: {override}\n" for override in loaded.overrides)
    return f"# The recipe of this run, resolved: every default is written out. From {loaded.path.name}.\n{overrides}"


def _environment() -> str:
    versions = {package: importlib.metadata.version(package) for package in _PACKAGES if _installed(package)}
    facts = {"python": platform.python_version(), "platform": platform.platform(), "command": " ".join(sys.argv), **versions}
    return json.dumps(facts, indent=2) + "\n"


def _installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


# ---- what a finished run says ---------------------------------------------------------------------------------------


def summary(run: Run) -> dict[str, Any]:
    """What `fullrank run --json` prints: scores of the first test set, stages, the plan against what was measured."""
    records: dict[str, StageRecord | None] = {
        "data": read_record(run.data / "card.json", DataCard),
        "plan": read_record(run.plan_path, Plan),
        "train": read_record(run.train / "card.json", TrainCard),
        "evaluate": read_record(run.evaluate / "card.json", EvaluationCard),
    }
    plan_record, card = records["plan"], records["evaluate"]
    trained = records["train"]
    result: dict[str, Any] = {
        "run": str(run.root),
        "stages": {n: {"seconds": r.seconds, "peak_bytes": r.peak_bytes} for n, r in records.items() if r is not None},
    }
    if isinstance(plan_record, Plan) and isinstance(trained, TrainCard):
        measured = trained.device_peak_bytes or trained.peak_bytes
        result["plan"] = {"peak_bytes_predicted": plan_record.peak_bytes_predicted, "peak_bytes_measured": measured}
    if isinstance(card, EvaluationCard):
        by_test = {name: {"base": _plain(t.base), "tuned": _plain(t.tuned)} for name, t in card.tests.items()}
        losses = by_test["validation"]
        result["scores"] = {who: by_test[card.primary][who] | losses[who] for who in ("base", "tuned")}
        result["tests"] = {name: scores for name, scores in by_test.items() if name not in (card.primary, "validation")}
    return result


def _plain(scores: dict[str, Score]) -> dict[str, dict[str, float]]:
    return {key: score.model_dump() for key, score in scores.items()}
