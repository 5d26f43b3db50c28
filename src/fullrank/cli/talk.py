"""The verb to talk to a model: chat."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Annotated

import typer

from fullrank.cli.options import RUNS_DIR, RunsDir


def register(app: typer.Typer) -> None:
    """Adds the verb."""

    @app.command()
    def chat(
        run_name: Annotated[str, typer.Argument(metavar="RUN", help="Name or folder of a run, or a model folder.")],
        message: Annotated[str | None, typer.Option("--message", "-m", help="Ask this and leave.")] = None,
        system: Annotated[str | None, typer.Option("--system", help="System turn; by default the training data's own.")] = None,
        base: Annotated[bool, typer.Option("--base", help="Talk to the base model instead.")] = False,
        max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer.")] = 256,
        runs_dir: RunsDir = RUNS_DIR,
    ) -> None:
        """Talk to the tuned model (or, with --base, to the model it came from)."""
        from fullrank.workflows.chat import open_chat

        session = open_chat(run_name, runs_dir, use_base=base, system=system, max_new_tokens=max_new_tokens)
        if message is not None:
            _say(session.answer(message))
            return
        if sys.stdin.isatty():
            print(f"Talking to {session.name}. An empty line starts over; Ctrl-D leaves.", file=sys.stderr)
        while True:
            try:
                line = input("you> " if sys.stdin.isatty() else "")
            except EOFError:
                return
            if line.strip():
                _say(session.answer(line))
            else:
                session.forget()


def _say(pieces: Iterable[str]) -> None:
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
