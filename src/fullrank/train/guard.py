"""What stops a run: numbers that are not finite, and people.

A non-finite loss or gradient stops the run before anything of the step is kept, and the step's examples are named. A first SIGINT
or SIGTERM is honoured between micro-batches; a second one interrupts at once.
"""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Iterable, Iterator
from types import FrameType, TracebackType

from fullrank.errors import TrainingError
from fullrank.sequences.layout import MicroBatch
from fullrank.sequences.store import TokenStore
from fullrank.train.loop import Step

_NAMED = 10


def check_finite(step: Step, store: TokenStore) -> None:
    """Stops at a step whose loss or gradient was not finite.

    Raises:
        TrainingError: naming the step and its examples.
    """
    if step.outcome.updated:
        return
    raise TrainingError(
        f"step {step.row.step}: loss {step.outcome.loss}, gradient norm {step.outcome.grad_norm}: not finite, so nothing "
        f"of this step is kept\nits examples: {named_examples(store, step.examples)}",
        hint="look at these records; a lower train.optimizer.learning_rate or more warmup often helps",
    )


def named_examples(store: TokenStore, examples: Iterable[int]) -> str:
    """Where the first of some examples come from, and how many more there are."""
    origins = [store.origin(int(example)) for example in examples]
    rest = len(origins) - _NAMED
    return ", ".join(origins[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")


def check_finite_validation(loss: float, step: int) -> None:
    """Stops at a validation loss that is not finite: it could neither be compared nor be reported.

    Raises:
        TrainingError: naming the step.
    """
    if not math.isfinite(loss):
        raise TrainingError(
            f"the validation loss is {loss} after step {step}",
            hint="a lower train.optimizer.learning_rate or more warmup often helps; the base model's own loss is that of step 0",
        )


class Interrupted(Exception):
    """Raised between micro-batches once a stop was asked for."""


class StopRequest:
    """`with StopRequest() as stop:` turns the first SIGINT or SIGTERM into a flag."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def between(self, rows: Iterable[MicroBatch]) -> Iterator[MicroBatch]:
        """The rows, until a stop is asked for.

        Raises:
            Interrupted: before the next row.
        """
        for row in rows:
            if self.requested:
                raise Interrupted
            yield row
