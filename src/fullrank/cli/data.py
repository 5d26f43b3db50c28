"""`fullrank data`: prepare and audit the data of a recipe, look at examples, hand records to labelling and take them back."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from fullrank.cli.options import RUNS_DIR, AsJson, Overrides, RunsDir, Target, loaded, stoppable

if TYPE_CHECKING:
    from rich.console import Console as RichConsole

    from fullrank.workflows.data import Prepared

_PREPARE = "prepare"


class _DataGroup(TyperGroup):
    """`fullrank data RECIPE` prepares; `fullrank data show RECIPE` and its like are commands of their own."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = [_PREPARE, *args]
        return super().parse_args(ctx, args)


def register(app: typer.Typer) -> None:
    """Adds the verbs."""
    data = typer.Typer(
        cls=_DataGroup,
        no_args_is_help=True,
        rich_markup_mode=None,
        help="Prepare the data of a recipe, audit them and show what the model will be trained on: fullrank data RECIPE.",
    )
    app.add_typer(data, name="data")

    @data.command(_PREPARE)
    def prepare(target: Target, overrides: Overrides = None, runs_dir: RunsDir = RUNS_DIR, as_json: AsJson = False) -> None:
        """Prepare and audit (the word may be left out); exit code 3 when a run on these data would be refused."""
        recipe = loaded(target, overrides, runs_dir)
        with stoppable():
            from fullrank.cli.console import Console
            from fullrank.workflows.data import prepare as go

            with Console(quiet_results=as_json) as console:
                prepared = go(recipe, runs_dir, console.hear)
        if as_json:
            from fullrank.report import data_page

            data_page.write(prepared.run, recipe.recipe.data.audit.accept)
            print(json.dumps(prepared.as_json()))
        else:
            _print(prepared, recipe.recipe.data.audit.accept)
        if prepared.refusal:
            raise prepared.refusal

    @data.command()
    def show(
        target: Target,
        overrides: Overrides = None,
        split: Annotated[str, typer.Option(help="train or validation.")] = "train",
        example: Annotated[list[int] | None, typer.Option(help="An example by its number, from 0; may be given again.")] = None,
        record: Annotated[str | None, typer.Option(help="The examples made from a record: its line, or file:line.")] = None,
        count: Annotated[int, typer.Option(min=1, help="How many telling examples, when none is asked for.")] = 3,
        ids: Annotated[bool, typer.Option("--ids", help="Show the id of every token.")] = False,
        whole: Annotated[bool, typer.Option("--whole", help="Show long turns whole.")] = False,
        runs_dir: RunsDir = RUNS_DIR,
        as_json: AsJson = False,
    ) -> None:
        """Show examples token by token: what carries loss, control tokens, turns, what was cut off."""
        recipe = loaded(target, overrides, runs_dir)
        with stoppable():
            from fullrank.cli import data_text
            from fullrank.cli.console import Console
            from fullrank.report import data_page
            from fullrank.workflows.data import show as go

            with Console(quiet_results=as_json) as console:
                examples = go(recipe, runs_dir, console.hear, split=split, examples=example or [], record=record, count=count)
        if as_json:
            print(json.dumps({"examples": [shown.model_dump() for shown in examples]}))
            return
        out = _out()
        folder = data_page.common_folder([shown.origin.rpartition(":")[0] for shown in examples])
        for number, shown in enumerate(examples):
            if number:
                out.print()
            out.print(data_text.example_text(shown, ids=ids, folder=folder, most=None if whole else data_text.MOST_TOKENS))

    @data.command()
    def flagged(
        target: Target,
        overrides: Overrides = None,
        out: Annotated[Path, typer.Option(help="The file of tasks to write.")] = Path("tasks.json"),
        kind: Annotated[list[str] | None, typer.Option(help="Only findings of this kind; may be given again.")] = None,
        runs_dir: RunsDir = RUNS_DIR,
    ) -> None:
        """Write the records that findings name as Label Studio tasks, with the labelling interface beside them."""
        recipe = loaded(target, overrides, runs_dir)
        with stoppable():
            from fullrank.cli.console import Console
            from fullrank.units import plural
            from fullrank.workflows.data import flag

            with Console() as console:
                count = flag(recipe, runs_dir, console.hear, kinds=kind or [], out=out)
        print(f"wrote {plural(count, 'task')} to {out}, and the labelling interface to {out.with_suffix('.xml')}")

    @data.command()
    def labelled(
        source: Annotated[Path, typer.Argument(help="The data file that the tasks were made from.")],
        exported: Annotated[Path, typer.Argument(help="Label Studio's export, JSON or JSON-MIN.")],
        out: Annotated[Path, typer.Option(help="The new file to write.")],
    ) -> None:
        """Write a new data file with the decisions made in Label Studio carried out; the source is not touched."""
        from fullrank.workflows.data import relabel

        done = relabel(source, exported, out)
        print(f"wrote {out}: {done.fixed:,} corrected, {done.dropped:,} dropped, {done.kept:,} kept, {done.untouched:,} others")


def _print(prepared: Prepared, accepted: Sequence[str]) -> None:
    from fullrank.cli import data_text
    from fullrank.records import TermsCard
    from fullrank.report import data_page
    from fullrank.run import read_json_lines, read_record

    out = _out()
    page = data_page.write(prepared.run, accepted)
    read = data_page.read(prepared.run, accepted)
    folder = read.folder if read else ""
    out.print(data_text.card_text(prepared.card, folder=folder))
    quarantine = prepared.run.data / "quarantine.jsonl"
    reasons = Counter(str(row["reason"]) for row in read_json_lines(quarantine))
    if reasons:
        out.print(data_text.rejected_text(reasons, quarantine), soft_wrap=True)
    out.print()
    out.print(data_text.findings_text(prepared.audit, accepted=accepted, folder=folder))
    terms = read_record(prepared.run.data / "terms.json", TermsCard)
    if terms is not None:
        out.print()
        out.print(data_text.terms_text(terms))
    out.print(f"\npage: {page}", soft_wrap=True, markup=False)


def _out() -> RichConsole:
    from rich.console import Console as RichConsole

    return RichConsole(highlight=False)
