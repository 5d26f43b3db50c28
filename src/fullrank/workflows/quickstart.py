"""The quickstart: generates the prudential case, then runs its recipe through every stage."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import yaml

from fullrank.cases import prudential
from fullrank.loading import load
from fullrank.run import Listener, Run, write_text
from fullrank.workflows.stages import run_until

#: Examples of each file: what a two-core CPU trains on in under four minutes, and test sets that say something.
SIZES = {"train": 400, "validation": 16, "test": 64, "unseen": 64}


def quickstart(runs_dir: Path, overrides: Sequence[str] = (), listener: Listener | None = None) -> Run:
    """Writes the case beside the runs and runs it; what is there already is used again.

    Raises:
        FullrankError: whatever a stage refuses.
    """
    return run_until("report", load(prepare(runs_dir), overrides), runs_dir, listener)


def prepare(runs_dir: Path) -> Path:
    """Writes data and recipe of the quickstart into `<runs_dir>/quickstart-case`; returns the recipe's path.

    The same bytes every time, so that a second quickstart finds its tokens prepared.
    """
    folder = runs_dir / "quickstart-case"
    prudential.write_case(folder, **SIZES, seed=0)
    text = (files("fullrank.cases") / "quickstart.yaml").read_text(encoding="utf-8")
    # The base model does not know the codes; it is told what training teaches the tuned one.
    instructions = yaml.safe_dump({"base_instructions": prudential.INSTRUCTIONS}, allow_unicode=True, width=120)
    indented = "".join(f"  {line}\n" for line in instructions.splitlines())
    recipe = folder / "quickstart.yaml"
    write_text(recipe, text + indented)
    return recipe
