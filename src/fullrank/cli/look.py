"""Verbs that only look: runs and schema."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import typer

from fullrank.cli.options import RUNS_DIR, AsJson, RunsDir


def register(app: typer.Typer) -> None:
    """Adds the verbs."""

    @app.command()
    def runs(runs_dir: RunsDir = RUNS_DIR, as_json: AsJson = False) -> None:
        """List the runs and how far each has come."""
        from fullrank.run import list_runs

        facts = [_facts(run.root) for run in list_runs(runs_dir)]
        if as_json:
            print(json.dumps({"runs": facts}))
            return
        if not facts:
            print(f"no runs in {runs_dir}; `fullrank quickstart` makes one")
            return
        width = max(len(fact["run"]) for fact in facts)
        for fact in facts:
            loss = fact["validation_loss"]
            told = f"validation loss {loss['before']:.3f} -> {loss['best']:.3f}" if loss else ""
            print(f"{fact['run']:<{width}}  {fact['changed']}  {fact['state']:<10} {told}".rstrip())

    @app.command()
    def schema() -> None:
        """Print the recipe's JSON Schema: every key, its meaning, what is allowed."""
        from fullrank.loading import schema as recipe_schema

        json.dump(recipe_schema(), sys.stdout, indent=2, ensure_ascii=False)
        print()


def _facts(root: Path) -> dict[str, Any]:
    """What the folder of a run tells: how far it came and its validation loss."""
    from fullrank.records import EvaluationCard, TrainCard
    from fullrank.run import Run, read_record

    run = Run(root)
    trained = read_record(run.train / "card.json", TrainCard)
    evaluated = read_record(run.evaluate / "card.json", EvaluationCard)
    reached = {
        "reported": (run.report / "index.html").is_file(),
        "evaluated": evaluated is not None,
        "trained": trained is not None,
        "training": (run.train / "inputs.json").is_file(),
        "planned": run.plan_path.is_file(),
    }
    losses = {"before": trained.validation_loss_before, "best": trained.validation_loss_best} if trained else None
    return {
        "run": run.name,
        "state": next((state for state, there in reached.items() if there), "prepared"),
        "changed": time.strftime("%Y-%m-%d %H:%M", time.localtime(run.recipe_path.stat().st_mtime)),
        "validation_loss": losses,
        "folder": str(root),
    }
