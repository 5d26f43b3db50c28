"""Arguments that several verbs share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from fullrank.errors import Stopped
from fullrank.loading import LoadedRecipe, load
from fullrank.run import find_run

Target = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a run.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, such as train.epochs=1.")]
RunsDir = Annotated[Path, typer.Option("--runs-dir", help="Folder of the runs.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on the last line.")]

RUNS_DIR = Path("runs")


def loaded(target: str, overrides: list[str] | None, runs_dir: Path) -> LoadedRecipe:
    """The recipe a target names: a file, or the recipe saved in a run."""
    path = Path(target)
    looks_like_a_file = path.suffix in (".yaml", ".yml") or path.is_file()
    if looks_like_a_file:
        return load(path, overrides or [])
    run = find_run(target, runs_dir)
    # What a run was made from may have moved since; the stage that needs a file again says so.
    saved = load(run.recipe_path, overrides or [], need_files=False)
    is_renamed = any(override.startswith("name=") for override in overrides or [])
    return saved if is_renamed else replace(saved, run_root=run.root)


@contextmanager
def stoppable() -> Iterator[None]:
    """SIGINT and SIGTERM end the work of a verb with exit code 75; typer would make 130 of them.

    Raises:
        Stopped: what was complete is kept, and the same command continues.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise Stopped("stopped; what was complete is kept", hint="type the same command to continue") from None
