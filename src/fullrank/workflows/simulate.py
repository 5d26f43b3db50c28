"""A simulation of a recipe: its data prepared, then memory, time and cost on more and more devices, as a record and a chart.

The devices are not here, and neither need be the weights: what only they have (the precision of their kind, `machine.device`) is
resolved for them, and data are prepared on this machine as for any run. Nothing is trained, and no plan is made or changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from fullrank.data import stage as data_stage
from fullrank.errors import UsageError
from fullrank.loading import LoadedRecipe
from fullrank.models.sizes import sizes_of
from fullrank.models.source import load_config
from fullrank.parallel import device as devices
from fullrank.plan import cluster as clusters
from fullrank.plan import here, scaling
from fullrank.recipe import Recipe
from fullrank.records import Simulation
from fullrank.report import scaling as chart
from fullrank.run import Listener, Run, write_record
from fullrank.workflows.described import Described, describe
from fullrank.workflows.stages import opened


def simulate(
    loaded: LoadedRecipe,
    runs_dir: Path,
    listener: Listener | None = None,
    *,
    device: str,
    most: int | None,
    model: str | None,
    hybrid: bool,
    assumed: Mapping[str, Any],
) -> tuple[Run, Simulation]:
    """Writes `simulation.json` and, with the `report` extra, `simulation.png`.

    Args:
        loaded: the recipe.
        runs_dir: folder of the runs.
        listener: see `fullrank.run.Listener`.
        device: a name of `fullrank.plan.cluster`, or this machine.
        most: devices; None for 1,024, and for those that this machine has.
        model: sizes of another model than the recipe's (`fullrank.models.sizes`); its tokenizer stays the recipe's.
        hybrid: see `fullrank.plan.scaling.simulation`.
        assumed: fields of the cluster that the user gives; None for those left alone.

    Raises:
        FullrankError: whatever is wrong with recipe, data, device or assumptions.
    """
    clusters.known(device)
    is_here = device == clusters.THIS_MACHINE
    if most is None:
        most = here.most() if is_here else scaling.MOST_DEVICES
    config, facts = sizes_of(model) if model is not None else (None, None)
    told = _described_here(loaded.recipe, listener)
    with opened(loaded, told.recipe, runs_dir, listener) as run:
        data_stage.stage(told.recipe, run, told.base, told.chat)
        run.tell("started", stage="simulate")
        config, facts = config or load_config(told.base.folder), facts or told.base.facts
        recipe = _for_devices(loaded.recipe, "cpu" if is_here and devices.choose("auto").type == "cpu" else "cuda")
        subject = scaling.subject_of(recipe, run, config, facts)
        if is_here:
            cluster, subject = here.measured(subject, run, config, ranks=most)
        else:
            compute_type: Literal["bf16", "fp32"] = "fp32" if recipe.train.precision == "fp32" else "bf16"
            cluster = clusters.preset(device, compute_type)
        found = scaling.simulation(subject, clusters.changed(cluster, assumed), most=most, hybrid=hybrid)
        if model is not None:
            told_of = f"tokens: as the tokenizer of {loaded.recipe.model.source} counts them, not that of {model}"
            found = found.model_copy(update={"assumptions": [*found.assumptions, told_of]})
        write_record(run.simulation_path, found)
        try:
            run.simulation_path.with_suffix(".png").write_bytes(chart.draw(found).png)
        except UsageError as error:
            run.tell("note", stage="simulate", words=f"no chart: {error.message}; {error.hint}")
        run.tell("finished", stage="simulate", seconds=0.0)
    return run, found


def _described_here(recipe: Recipe, listener: Listener | None) -> Described:
    """The recipe as far as preparing its data goes; what this machine lacks and simulated devices have stays as written."""
    on_any = recipe.model_copy(
        update={
            "machine": recipe.machine.model_copy(update={"device": "auto", "optimizer_states": "device"}),
            "train": recipe.train.model_copy(update={"precision": "auto"}),
        }
    )
    told = describe(on_any, lambda words: None, needs_weights=False)
    machine, precision = recipe.machine, recipe.train.precision
    as_written = {"optimizer_states": machine.optimizer_states} | ({} if machine.device == "auto" else {"device": machine.device})
    resolved = told.recipe.model_copy(
        update={
            "machine": told.recipe.machine.model_copy(update=as_written),
            "train": told.recipe.train.model_copy(update={} if precision == "auto" else {"precision": precision}),
        }
    )
    return replace(told, recipe=resolved)


def _for_devices(recipe: Recipe, device_type: str) -> Recipe:
    """Every `auto` as the devices have it."""
    precision = recipe.train.precision
    if precision == "auto":
        precision = "bf16-mixed" if device_type == "cuda" else "fp32"
    return recipe.model_copy(
        update={
            "machine": recipe.machine.model_copy(update={"device": device_type, "gradients": recipe.gradients}),
            "train": recipe.train.model_copy(update={"precision": precision, "max_grad_norm": recipe.train.clip_norm}),
        }
    )
