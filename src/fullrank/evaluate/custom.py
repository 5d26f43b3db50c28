"""A metric of the user's own: a Python function in a file beside the recipe.

The file is read and run, not imported: nothing is written beside it, and it can import what is installed, not its neighbours. Its
digest is part of the evaluation's fingerprint (`fullrank.evaluate.metrics.digests`), so that a changed function is asked again.
It is the recipe's author who is trusted here: code that comes with a model is never run.
"""

from __future__ import annotations

import hashlib
import math
import sys
import traceback
import types
from collections.abc import Callable, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from fullrank.errors import UsageError
from fullrank.evaluate.items import Items, mean, place, shortened
from fullrank.recipe import Task


def custom(
    task: Task, references: Sequence[str], answers: Sequence[str | None], prompts: Sequence[str], places: Sequence[str]
) -> Items:
    """The mean of what the function returns for the items.

    Args:
        references, prompts: N each.
        answers: N; None (the pattern does not match) is told to the function as an empty text.
        places: where each record stands.

    Raises:
        UsageError: the file or the function cannot be used, or what it returned is not one number per item in the range.
    """
    assert task.function is not None
    name = f"task {task.key}: {task.function}"
    function = _function(task, name)
    try:
        returned = function(list(references), [answer or "" for answer in answers], list(prompts))
    except Exception as error:
        raise UsageError(f"{name}: raised {_told(error, task.function.rpartition(':')[0])}") from error
    if isinstance(returned, str | bytes | dict | set) or not hasattr(returned, "__len__") or not hasattr(returned, "__iter__"):
        raise UsageError(
            f"{name}: returned {_kind(returned)}; it must return a list of one number per item",
            hint="one for each answer, in order",
        )
    if len(returned) != len(references):
        raise UsageError(f"{name}: returned {len(returned)} numbers for {len(references)} items; it must return one per item")
    low, high = task.range
    for number, value in enumerate(returned):
        is_number = isinstance(value, Real | np.bool_)
        if not is_number or not math.isfinite(value) or not low <= value <= high:
            found = str(value) if is_number else _kind(value)
            raise UsageError(
                f"{name}: returned {found} for item {number + 1} of {len(references)} ({place(places, number)}); "
                f"each must be a number from {low:g} to {high:g}",
                hint="correct the function, or state another `range` for the task",
            )
    return mean([float(value) for value in returned], scale="share" if (low, high) == (0.0, 1.0) else "linear")


def _function(task: Task, name: str) -> Callable[..., Any]:
    path, _, wanted = (task.function or "").rpartition(":")
    try:
        source = Path(path).read_bytes()
    except OSError as error:
        raise UsageError(f"{name}: cannot be read: {error.strerror or error}") from None
    module = types.ModuleType(f"fullrank_metric_{hashlib.sha256(source).hexdigest()[:16]}")
    module.__file__ = path
    sys.modules[module.__name__] = module  # dataclasses and annotations look their module up
    try:
        exec(compile(source, path, "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        raise UsageError(f"{name}: the file cannot be loaded: {_told(error, path)}") from error
    function: Callable[..., Any] | None = getattr(module, wanted, None)
    if function is None or not callable(function):
        found = "is not a function" if hasattr(module, wanted) else "is not in the file"
        functions = [key for key, value in vars(module).items() if isinstance(value, types.FunctionType)]
        raise UsageError(f"{name}: {wanted!r} {found}; functions there: {', '.join(functions) or 'none'}")
    return function


def _told(error: BaseException, path: str) -> str:
    """What was raised, and at which line of the user's file."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    if isinstance(error, SyntaxError):
        lines.append(error.lineno)
    return f"{type(error).__name__}: {error}" + (f" (line {lines[-1]})" if lines else "")


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}: {shortened(repr(value))}"
