"""Verbs that start a run elsewhere: `fullrank launch slurm`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fullrank.cli.options import RUNS_DIR, AsJson, Overrides, RunsDir, Target, loaded
from fullrank.errors import UsageError


def register(app: typer.Typer) -> None:
    """Adds the verbs."""
    launch = typer.Typer(help="Start a run elsewhere: slurm.", no_args_is_help=True)
    app.add_typer(launch, name="launch")

    @launch.callback()
    def elsewhere() -> None:
        """Start a run elsewhere."""

    @launch.command()
    def slurm(
        target: Target,
        overrides: Overrides = None,
        nodes: Annotated[int, typer.Option("--nodes", min=1, help="Machines.")] = 1,
        ranks_per_node: Annotated[
            int, typer.Option("--ranks-per-node", min=1, help="Processes on each machine, one a device.")
        ] = 8,
        minutes: Annotated[int, typer.Option("--minutes", min=2, help="Time limit of a sitting; the job is requeued.")] = 1440,
        stopping_seconds: Annotated[
            int, typer.Option("--stopping-seconds", min=10, help="Before the limit: when the run is asked to save and stop.")
        ] = 300,
        only_train: Annotated[bool, typer.Option("--only-train", help="Train and export; do not evaluate and report.")] = False,
        option: Annotated[
            list[str] | None, typer.Option("--option", metavar="NAME=VALUE", help="Of sbatch, such as partition=gpu; repeatable.")
        ] = None,
        runs_dir: RunsDir = RUNS_DIR,
        as_json: AsJson = False,
    ) -> None:
        """Hand a run on several machines to Slurm, as a batch job that is requeued when it is pre-empted, and continues."""
        recipe = loaded(target, overrides, runs_dir)
        pairs = [pair.removeprefix("--").partition("=") for pair in option or []]
        if wrong := [name for name, equals, _ in pairs if not equals]:
            raise UsageError(f"--option {wrong[0]}: not NAME=VALUE", hint="write sbatch's long option, such as partition=gpu")
        from fullrank.workflows.slurm import submit

        where = Path(target).resolve() if Path(target).exists() else target
        verb = "train" if only_train else "run"
        folder = (recipe.run_root or runs_dir / recipe.recipe.name).resolve() / "slurm"
        number, script = submit(
            [verb, str(where), *(overrides or []), "--runs-dir", str(runs_dir.resolve())],
            folder,
            name=recipe.recipe.name,
            nodes=nodes,
            ranks_per_node=ranks_per_node,
            gpus=recipe.recipe.machine.device in ("auto", "cuda"),
            minutes=minutes,
            stopping_seconds=stopping_seconds,
            options={name: value for name, _, value in pairs},
        )
        if as_json:
            print(json.dumps({"job": number, "script": str(script), "logs": str(folder)}))
        else:
            print(f"job {number}: {nodes} x {ranks_per_node} ranks\nscript: {script}\nlogs: {folder}")
