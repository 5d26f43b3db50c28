"""Verbs that work on a run: plan, profile, simulate, train, evaluate, report, run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fullrank.cli.options import RUNS_DIR, AsJson, Overrides, RunsDir, Target, loaded, stoppable

if TYPE_CHECKING:
    from fullrank.run import Run
    from fullrank.workflows.stages import StageName


def register(app: typer.Typer) -> None:
    """Adds the verbs."""

    @app.command()
    def plan(target: Target, overrides: Overrides = None, runs_dir: RunsDir = RUNS_DIR, as_json: AsJson = False) -> None:
        """Prepare the data and show steps, memory, disk and time before anything is trained."""
        _work("plan", target, overrides, runs_dir, as_json, _plan_json)

    @app.command()
    def profile(
        target: Target,
        overrides: Overrides = None,
        steps: Annotated[
            int, typer.Option("--steps", min=1, help="Steps to time, beside the first; as many again by parts.")
        ] = 3,
        runs_dir: RunsDir = RUNS_DIR,
        as_json: AsJson = False,
    ) -> None:
        """Run a few steps and show where their time and memory go, and what to change; nothing is saved of them."""
        recipe = loaded(target, overrides, runs_dir)
        with stoppable():
            from fullrank.cli.console import Console
            from fullrank.cli.profile_text import profile_text
            from fullrank.workflows.stages import profile as profiled

            with Console(quiet_results=as_json) as console:
                run, found = profiled(recipe, runs_dir, console.hear, steps=steps)
        print(found.model_dump_json() if as_json else f"{profile_text(found)}\nprofile: {run.profile_path}")

    @app.command()
    def simulate(
        target: Target,
        overrides: Overrides = None,
        device: Annotated[
            str, typer.Option("--device", help="A device by name, such as h100-sxm, or this-machine.")
        ] = "h100-sxm",
        most: Annotated[int | None, typer.Option("--most", help="Most devices: 1,024; of this machine 4, or its GPUs.")] = None,
        per_node: Annotated[int | None, typer.Option("--devices-per-node", help="8, unless said otherwise.")] = None,
        price: Annotated[float | None, typer.Option("--price-per-hour", help="Of a device; without it no cost is told.")] = None,
        model: Annotated[
            str | None, typer.Option("--model", help="Sizes of another model: a name such as llama-3.1-70b, or its config.json.")
        ] = None,
        hybrid: Annotated[
            bool, typer.Option("--hybrid", help="Every node holds the model once, instead of all together.")
        ] = False,
        assume: Annotated[
            list[str] | None,
            typer.Option("--assume", metavar="KEY=VALUE", help="Another number for an assumption that is printed."),
        ] = None,
        runs_dir: RunsDir = RUNS_DIR,
        as_json: AsJson = False,
    ) -> None:
        """Show memory, time and cost on 1 to 1,024 devices, from stated assumptions; weights need not be there."""
        recipe = loaded(target, overrides, runs_dir)
        with stoppable():
            from rich.console import Console as RichConsole

            from fullrank.cli.console import Console
            from fullrank.cli.simulation_text import printed
            from fullrank.plan.cluster import assumptions_in
            from fullrank.workflows.simulate import simulate as simulated

            assumed = {**assumptions_in(assume or []), "devices_per_node": per_node, "price_per_hour": price}
            with Console(quiet_results=as_json) as console:
                run, found = simulated(
                    recipe, runs_dir, console.hear, device=device, most=most, model=model, hybrid=hybrid, assumed=assumed
                )
        if as_json:
            print(found.model_dump_json())
            return
        printed(found, RichConsole(highlight=False))
        print(f"simulation: {run.simulation_path}")

    @app.command()
    def train(target: Target, overrides: Overrides = None, runs_dir: RunsDir = RUNS_DIR, as_json: AsJson = False) -> None:
        """Train every weight, prove and export the model; the same command continues a stopped run."""
        _work("train", target, overrides, runs_dir, as_json, _summary_json)

    @app.command()
    def evaluate(target: Target, overrides: Overrides = None, runs_dir: RunsDir = RUNS_DIR, as_json: AsJson = False) -> None:
        """Score the base and the tuned model on the same test data."""
        _work("evaluate", target, overrides, runs_dir, as_json, _summary_json)

    @app.command()
    def report(target: Target, overrides: Overrides = None, runs_dir: RunsDir = RUNS_DIR, as_json: AsJson = False) -> None:
        """Write the report page and the model card, running what they need first."""
        _work("report", target, overrides, runs_dir, as_json, _summary_json)

    @app.command()
    def run(target: Target, overrides: Overrides = None, runs_dir: RunsDir = RUNS_DIR, as_json: AsJson = False) -> None:
        """All stages: data, plan, train, evaluate, report."""
        _work("report", target, overrides, runs_dir, as_json, _summary_json)


def _work(
    last: StageName,
    target: str,
    overrides: list[str] | None,
    runs_dir: Path,
    as_json: bool,
    describe: Callable[[Run], dict[str, Any]],
) -> None:
    recipe = loaded(target, overrides, runs_dir)  # its problems are told before torch is imported
    with stoppable():
        from fullrank.cli.console import Console
        from fullrank.workflows.stages import run_until

        with Console(quiet_results=as_json) as console:
            run = run_until(last, recipe, runs_dir, console.hear)
            if not run.tells:  # one of several ranks, of which the first one tells
                return
            console.conclude(run)
    if as_json:
        print(json.dumps(describe(run)))


def _summary_json(run: Run) -> dict[str, Any]:
    from fullrank.workflows.stages import summary

    return summary(run)


def _plan_json(run: Run) -> dict[str, Any]:
    return dict(json.loads(run.plan_path.read_text(encoding="utf-8")))
