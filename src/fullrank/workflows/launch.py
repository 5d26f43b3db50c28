"""A run on several ranks: starting them on this machine, hearing what they tell, stopping them, and naming the one that failed.

The process that a person started prepares, plans and holds the run's folder; PyTorch's elastic agent starts one process a rank
(`python -m fullrank.workflows.launch`), each of which trains. They are connected by a local socket: the first rank's events go to
the console as if they had happened here, any rank's error comes back as what it was, and a request to stop goes to all of them,
who finish their step and save.

Under torchrun or another launcher that sets its variables the ranks are there already: see `fullrank.workflows.stages`.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
import traceback
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from fullrank import errors
from fullrank.errors import FullrankError, Stopped
from fullrank.loading import load
from fullrank.parallel import device as devices
from fullrank.parallel.world import World, joined, told
from fullrank.parallel.zeroed import forget_groups
from fullrank.recipe import Recipe
from fullrank.records import StepRow
from fullrank.run import Run
from fullrank.workflows.described import describe

#: Where a rank finds the socket of the process that started it.
_SOCKET = "FULLRANK_SOCKET"
#: How long a rank waits for another: a stage between two steps (a checkpoint, a validation) may take hours.
PATIENCE_SECONDS = 86_400.0
#: How long the others have to end once one rank has failed; they may hang in what they were doing together.
_CLOSING_SECONDS = 5


def world_here(recipe: Recipe) -> World:
    """The world that this machine's own ranks will be, as its first rank sees it: for plans, before there are any."""
    wanted = recipe.parallel.ranks
    size = wanted if isinstance(wanted, int) else devices.count(recipe.machine.device)
    return World(0, size, 0, size)


def train(recipe: Recipe, run: Run, size: int) -> None:
    """Starts `size` ranks here and trains a planned run on them.

    Raises:
        FullrankError: what a rank refused or met, by its own class; or naming the rank that ended otherwise.
    """
    _on_ranks(recipe, run, size)


def profile(recipe: Recipe, run: Run, size: int, steps: int) -> None:
    """Starts `size` ranks here and profiles a planned run on them (`fullrank.train.profile`).

    Raises:
        FullrankError: as `train`.
    """
    _on_ranks(recipe, run, size, str(steps))


def _on_ranks(recipe: Recipe, run: Run, size: int, *more: str) -> None:
    """Starts ranks, which do what `main` is told.

    Raises:
        FullrankError: what a rank refused or met, by its own class; or naming the rank that ended otherwise.
    """
    with tempfile.TemporaryDirectory(prefix="fullrank-") as folder, _Line(Path(folder) / "socket", run) as line:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=size,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",
            local_addr="127.0.0.1",
            max_restarts=0,
            signals_to_handle="SIGQUIT",  # the others are ours: a rank that is asked to stop saves first
        )
        logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # what it says is said better below
        with _environment(recipe, size, line.path):
            try:
                elastic_launch(config, sys.executable)("-m", "fullrank.workflows.launch", str(run.root), *more)
            except ChildFailedError as failed:
                line.close()
                if not line.errors:
                    raise _unexplained(failed, run, asked=line.stopping) from None
        line.close()
        if line.errors:
            raise line.errors[0]


@contextlib.contextmanager
def _environment(recipe: Recipe, size: int, path: Path) -> Iterator[None]:
    """Inside, what ranks inherit."""
    added = {_SOCKET: str(path)}
    uses_cores = recipe.machine.device == "cpu" or recipe.parallel.offload_parameters  # whose update is computed here
    if uses_cores and "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        added["OMP_NUM_THREADS"] = str(max(1, cores // size))
    before = {name: os.environ.get(name) for name in added}
    os.environ.update(added)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _unexplained(failed: ChildFailedError, run: Run, *, asked: bool) -> FullrankError:
    """What ended the ranks, of whom none has said why; `asked` where they had been asked to stop."""
    rank, failure = failed.get_first_failure()
    if asked and failure.exitcode == -signal.SIGTERM:  # they load, or export: there is nothing to save that is not saved
        return Stopped(
            "stopped before the first step or after the last",
            hint=f"type the same command to continue with what is in {run.train}",
        )
    how = f"was ended by signal {-failure.exitcode}" if failure.exitcode < 0 else f"ended with exit code {failure.exitcode}"
    return FullrankError(
        f"rank {rank} (process {failure.pid}) {how}, and the others were stopped",
        hint=f"what it said is above; type the same command to continue from the last checkpoint in {run.train}",
    )


@dataclass
class _Line:
    """The socket that ranks talk to."""

    path: Path
    run: Run
    errors: list[FullrankError] = field(default_factory=list)
    _ranks: list[socket.socket] = field(default_factory=list)
    _threads: list[threading.Thread] = field(default_factory=list)
    _processes: list[int] = field(default_factory=list)
    _closed: threading.Event = field(default_factory=threading.Event)
    stopping: bool = False
    """Whether the ranks were asked to stop."""
    _before: dict[int, Any] = field(default_factory=dict)

    def __enter__(self) -> _Line:
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(str(self.path))
        self._server.listen()
        self._spawn(self._accept)
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._stop)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self.close()

    def close(self) -> None:
        """Hears what was still said."""
        self._closed.set()
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        for thread in self._threads:
            thread.join(timeout=5.0)

    def _spawn(self, work: Any, *given: Any) -> None:
        self._threads.append(threading.Thread(target=work, args=given, daemon=True))
        self._threads[-1].start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                rank, _ = self._server.accept()
                self._ranks.append(rank)
                if self.stopping:  # asked while this one was still starting
                    _ask(rank)
                self._spawn(self._hear, rank)

    def _hear(self, rank: socket.socket) -> None:
        with rank, rank.makefile(encoding="utf-8") as lines, contextlib.suppress(OSError):
            for line in lines:
                said = json.loads(line)
                if "process" in said:
                    self._processes.append(said["process"])
                elif "error" in said:
                    self.errors.append(getattr(errors, said["error"])(said["message"], hint=said["hint"]))
                    if not isinstance(self.errors[-1], Stopped):
                        self._spawn(self._end_the_rest)
                else:
                    facts = said["facts"]
                    if said["event"] == "step":
                        facts["row"] = StepRow.model_validate(facts["row"])
                    self.run.show(said["event"], **facts)

    def _end_the_rest(self) -> None:
        """Ranks that hang, or were stopped, hear no request: after a moment they are killed, and the agent sees it."""
        if self._closed.wait(_CLOSING_SECONDS):
            return
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self.stopping:
            raise KeyboardInterrupt
        self.stopping = True
        for rank in self._ranks:
            _ask(rank)


def _ask(rank: socket.socket) -> None:
    with contextlib.suppress(OSError):
        rank.sendall(b"stop\n")


# ---- in a rank ------------------------------------------------------------------------------------------------------------


def main(root: str, steps: str = "") -> int:
    """Trains as one rank of a planned run, or profiles so many of its steps; returns the exit code."""
    world = told()
    assert world is not None, "started by `train`"
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(os.environ[_SOCKET])
        threading.Thread(target=_obey, args=(line,), daemon=True).start()
        say = _Say(line)
        say.process()
        run = Run(root, say.event if world.is_first else None, tells=world.is_first)
        try:
            recipe = load(run.recipe_path, need_files=False).recipe
            if steps:
                profile_as(recipe, run, world, int(steps))
            else:
                train_as(recipe, run, world, lambda seen: _end(say, run, seen))
        except Stopped as error:
            if world.is_first:
                say.error(error)
            return 0
        except FullrankError as error:
            say.error(error)
            return 1
        except Exception as error:  # a bug, or what no check foresaw: named like anything else, and whole where it happened
            traceback.print_exc()
            words = f"rank {world.rank}: {type(error).__name__}: {error}"
            say.error(FullrankError(words, hint=f"what led to it is above; the same command continues from {run.train}"))
            return 1
    return 0


def _end(say: _Say, run: Run, seen: str) -> None:
    error = FullrankError(
        f"{seen}; the others were stopped",
        hint=f"the stacks of all that could still write them are in {run.train}/stacks-*.txt; type the same command to continue "
        "from the last checkpoint",
    )
    say.error(error)
    os._exit(1)


def train_as(recipe: Recipe, run: Run, world: World, end: Callable[[str], None] | None = None) -> None:
    """Trains as one of the ranks there are.

    Args:
        recipe: as saved in the run.
        run: planned.
        world: the ranks.
        end: see `fullrank.train.stage.stage`.

    Raises:
        FullrankError: whatever training refuses.
    """
    from fullrank.train import stage as train_stage

    described = describe(recipe, lambda words: None)
    with joined(world, described.recipe.machine.device, patience_seconds=PATIENCE_SECONDS):
        train_stage.stage(described.recipe, run, described.base, world, end)
        forget_groups()
        gc.collect()  # what still holds the ranks' groups, before they go


def profile_as(recipe: Recipe, run: Run, world: World, steps: int) -> None:
    """Profiles as one of the ranks there are.

    Raises:
        FullrankError: whatever setting up refuses.
    """
    from fullrank.train import profile as profiles

    described = describe(recipe, lambda words: None)
    with joined(world, described.recipe.machine.device, patience_seconds=PATIENCE_SECONDS):
        profiles.profile(described.recipe, run, described.base, steps, world)
        forget_groups()
        gc.collect()  # what still holds the ranks' groups, before they go


def _obey(line: socket.socket) -> None:
    """A request to stop is what a signal to this process would be."""
    with contextlib.suppress(OSError):
        while line.recv(64):
            os.kill(os.getpid(), signal.SIGTERM)


class _Say:
    """Tells the process that started this one."""

    def __init__(self, line: socket.socket) -> None:
        self._line, self._lock = line, threading.Lock()

    def process(self) -> None:
        """Which process this is."""
        self._send({"process": os.getpid()})

    def event(self, event: str, facts: dict[str, Any]) -> None:
        """See `fullrank.run.Listener`."""
        plain = {key: value.model_dump() if isinstance(value, StepRow) else value for key, value in facts.items()}
        self._send({"event": event, "facts": plain})

    def error(self, error: FullrankError) -> None:
        """What this rank refused or met."""
        self._send({"error": type(error).__name__, "message": error.message, "hint": error.hint})

    def _send(self, said: dict[str, Any]) -> None:
        with self._lock, contextlib.suppress(OSError):  # who started this may be gone
            self._line.sendall(json.dumps(said).encode() + b"\n")


if __name__ == "__main__":
    code = main(*sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # after an error, threads of the ranks' groups may be waiting for others, and would hold this process
