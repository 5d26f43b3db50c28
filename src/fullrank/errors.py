"""What can go wrong, as one tree of errors; the exit code belongs to the class.

    FullrankError                 1   anything unexpected that fullrank itself can describe
    ├── RecipeError               2   the recipe or an override is wrong; every problem is listed
    ├── UsageError                2   the command cannot be carried out as typed (locked run, missing extra, ...)
    ├── ModelError                2   the model cannot be found, or is refused (pickle weights, remote code)
    ├── DataError                 3   a data file, a record or a template
    │   └── DataRefused           3   prepared data that cannot be trained on as they are; they are there to look at
    ├── FitError                  4   not enough memory or disk, before or during the run
    ├── TrainingError             1   the numbers went wrong (a loss or gradient that is not finite)
    ├── ProofError                1   what the run claims did not hold (an unchanged tensor, an export that differs)
    └── Stopped                  75   stopped on request; state is saved and the same command continues

A message has four parts: what was found, where (file:line), what is allowed, what to do next. The message carries the
first three, one problem a line; `hint` carries the last.
"""

from __future__ import annotations


class FullrankError(Exception):
    """Base of every error that fullrank raises on purpose.

    Args:
        message: what was found and where; several problems stand on lines of their own.
        hint: what to do next, in one sentence.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


class RecipeError(FullrankError):
    """The recipe file or an override is wrong."""

    exit_code = 2


class UsageError(FullrankError):
    """The command cannot be carried out as typed."""

    exit_code = 2


class ModelError(FullrankError):
    """The model cannot be found, or is refused."""

    exit_code = 2


class DataError(FullrankError):
    """A data file, a record or a chat template cannot be used."""

    exit_code = 3


class DataRefused(DataError):
    """The data were prepared, and what was found in them stops a run."""


class FitError(FullrankError):
    """The run does not fit into memory or onto the disk."""

    exit_code = 4


class TrainingError(FullrankError):
    """The numbers of a training step went wrong."""


class ProofError(FullrankError):
    """Something the run would have to claim does not hold."""


class Stopped(FullrankError):
    """Stopped on request with the state saved: the same command continues."""

    exit_code = 75


def missing_extra(package: str, extra: str, purpose: str) -> UsageError:
    """The error for an optional package that is not installed."""
    return UsageError(
        f"{purpose} needs the package {package!r}, which is not installed",
        hint=f"install it with: pip install 'fullrank[{extra}]'",
    )
