"""`fullrank`: the verbs, and how errors become one clear message and an exit code.

0 success; 1 unexpected; 2 recipe or usage; 3 data; 4 does not fit; 75 stopped with the state saved. Torch and transformers are
imported by the verbs that need them, never by `--help`.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from types import FrameType

import typer

from fullrank.cli import data, launch, look, srun, start, talk, work
from fullrank.errors import FullrankError, Stopped

app = typer.Typer(
    name="fullrank",
    help="Full fine-tuning of language models, every weight updated, with evidence.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
start.register(app)
data.register(app)
work.register(app)
talk.register(app)
look.register(app)
launch.register(app)


def main() -> None:
    """Entry point of the command."""
    # Libraries that report to a network, draw bars of their own or fork their tokenizers have no business here.
    for name, value in (("HF_HUB_DISABLE_TELEMETRY", "1"), ("DO_NOT_TRACK", "1"), ("TOKENIZERS_PARALLELISM", "true")):
        os.environ.setdefault(name, value)
    # Where DeepSpeed is installed, transformers imports it to save a model, and it warns of what this machine lacks.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        srun.adopt()
        app()
    except FullrankError as error:
        _leave(_told(error))
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    except SystemExit as end:
        _leave(end.code if isinstance(end.code, int) else 1 if end.code else 0)


def _leave(code: int) -> None:
    """Ends the process; one of several ranks without waiting for threads that may be waiting for other ranks."""
    if "RANK" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _told(error: FullrankError) -> int:
    label = "stopped" if isinstance(error, Stopped) else "error"
    print(f"{label}: {error.message}", file=sys.stderr)
    if error.hint:
        print(f"  -> {error.hint}", file=sys.stderr)
    return error.exit_code
