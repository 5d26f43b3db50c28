"""Verbs to start with: quickstart and init."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer

from fullrank.cli.options import RUNS_DIR, AsJson, Overrides, RunsDir, stoppable
from fullrank.errors import UsageError


def register(app: typer.Typer) -> None:
    """Adds the verbs."""

    @app.command()
    def quickstart(overrides: Overrides = None, runs_dir: RunsDir = RUNS_DIR, as_json: AsJson = False) -> None:
        """Fine-tune a real model on this machine's CPU in minutes, and see what it learned."""
        with stoppable():
            from fullrank.cli.console import Console
            from fullrank.workflows.quickstart import quickstart as go
            from fullrank.workflows.stages import summary

            with Console(quiet_results=as_json) as console:
                run = go(runs_dir, overrides or [], console.hear)
                console.conclude(run)
        if as_json:
            print(json.dumps(summary(run)))

    @app.command()
    def init(
        path: Annotated[Path, typer.Argument(help="Where to write the recipe.")] = Path("recipe.yaml"),
        force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
    ) -> None:
        """Write a commented recipe to start from."""
        from fullrank.run import write_text

        if path.is_dir():
            raise UsageError(f"{path}: a folder", hint=f"name a file, such as {path / 'recipe.yaml'}")
        if path.exists() and not force:
            raise UsageError(f"{path}: it is there already", hint="choose another name, or --force to overwrite it")
        write_text(path, (files("fullrank.cli") / "starter.yaml").read_text(encoding="utf-8"))
        print(f"wrote {path}; put your data into it, then: fullrank plan {path}")
