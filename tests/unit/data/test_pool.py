"""Work in other processes: in order, bounded, lean, and no process left behind whatever happens to it."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fullrank.data.pool import Pool
from fullrank.errors import DataError, FullrankError

#: What is wrong with processes shows as waiting.
pytestmark = pytest.mark.timeout(60)

#: Tasks are sent by name, so a process must be able to import them.
TASKS = '''
import os, sys, time
from fullrank.errors import DataError

class Echo:
    """Answers with the process and how often this task came to it."""
    def __init__(self):
        self.arrivals = 0
    def __setstate__(self, state):
        global ARRIVALS
        self.__dict__ = state
        ARRIVALS += 1
    def warm(self):
        pass
    def run(self, value, seconds=0.0):
        time.sleep(seconds)
        print("a library says", value)
        return value, os.getpid(), ARRIVALS
ARRIVALS = 0

class Fails:
    def warm(self):
        pass
    def run(self, how):
        if how == "refuse":
            raise DataError("rows.jsonl:3: no answer", hint="write one")
        if how == "break":
            return {}["missing"]
        if how == "leave":
            os._exit(7)
        return how

class Warms(Echo):
    LOADED_BY = None
    def warm(self):
        Warms.LOADED_BY = os.getpid()
    def run(self, seconds):
        time.sleep(seconds)
        return os.getpid(), Warms.LOADED_BY

class Modules:
    def warm(self):
        raise ValueError("what cannot be loaded is told by the task")
    def run(self):
        import fullrank.data.prepare
        return sorted({name.partition(".")[0] for name in sys.modules}), dict(os.environ)
'''


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    (tmp_path / "pool_tasks.py").write_text(TASKS, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    known = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{known}" if known else str(tmp_path))
    import pool_tasks

    yield pool_tasks
    del sys.modules["pool_tasks"]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every process that is started, in order."""
    found: list[int] = []
    start = subprocess.Popen

    def noting(*arguments: Any, **options: Any) -> Any:
        process = start(*arguments, **options)
        found.append(process.pid)
        return process

    monkeypatch.setattr(subprocess, "Popen", noting)
    return found


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def soon(holds: Any) -> bool:
    """Whether something comes true within seconds."""
    deadline = time.monotonic() + 20
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.01)
    return bool(holds())


@pytest.mark.parametrize("processes", [0, 1, 3])
def test_results_come_in_the_order_of_the_jobs(tasks: Any, processes: int) -> None:
    jobs = [(number, 0.05 if number % 4 == 0 else 0.0) for number in range(12)]
    with Pool(processes) as pool:
        results = list(pool.each(tasks.Echo(), iter(jobs)))
    assert [value for value, _, _ in results] == list(range(12))
    workers = {process for _, process, _ in results}
    assert workers == {os.getpid()} if processes == 0 else os.getpid() not in workers and len(workers) <= processes
    if processes:
        assert {arrivals for _, _, arrivals in results} == {1}  # a task travels once to each process


def test_jobs_are_taken_as_there_is_room(tasks: Any) -> None:
    taken = 0

    def jobs() -> Iterator[tuple[int]]:
        nonlocal taken
        for number in range(40):
            taken += 1
            yield (number,)

    with Pool(2) as pool:
        for done, _ in enumerate(pool.each(tasks.Echo(), jobs()), start=1):
            assert taken - done <= 2 + 2  # one at each process, one ready, and the one in hand


def test_processes_serve_several_tasks(tasks: Any) -> None:
    """One after the other, each let go of when it is done: none may be taken for one that was there before."""
    with Pool(1) as pool:
        workers = set()
        for number in range(20):
            ((value, process, _),) = pool.each(tasks.Echo(), [(number,)])
            assert value == number
            workers.add(process)
            assert list(pool.each(tasks.Fails(), [("well",)])) == ["well"]
        assert len(workers) == 1


def test_processes_that_rest_are_gone_until_there_is_work(tasks: Any, started: list[int]) -> None:
    with Pool(2) as pool:
        workers = {process for _, process, _ in pool.each(tasks.Echo(), [(n, 0.05) for n in range(6)])}
        pool.rest()
        assert len(workers) == 2 and soon(lambda: not any(map(is_running, [*workers, *started])))
        again = list(pool.each(tasks.Echo(), [(n,) for n in range(6)]))
        assert [value for value, _, _ in again] == list(range(6))
        workers = {process for _, process, _ in again}
    assert soon(lambda: not any(map(is_running, [*workers, *started])))


def test_what_a_task_needs_is_loaded_once(tasks: Any) -> None:
    """By the process that the workers are copies of: each would load it again where it travels to each."""
    with Pool(3) as pool:
        results = list(pool.each(tasks.Warms(), [(0.1,)] * 6))
    assert len({process for process, _ in results}) == 3
    assert len({loader for _, loader in results}) == 1 and not {process for process, _ in results} & {results[0][1]}


def test_no_process_is_started_for_nothing(tasks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fullrank.data.pool._Family", None)
    with Pool(3) as pool:
        assert list(pool.each(tasks.Echo(), [])) == []


def test_what_a_task_refuses_arrives_as_it_was_raised(tasks: Any) -> None:
    with Pool(1) as pool:
        with pytest.raises(DataError) as caught:
            list(pool.each(tasks.Fails(), [("refuse",)]))
        assert (caught.value.message, caught.value.hint) == ("rows.jsonl:3: no answer", "write one")
        assert list(pool.each(tasks.Fails(), [("goes on",)])) == ["goes on"]


def test_a_task_that_breaks_says_where(tasks: Any) -> None:
    with (
        Pool(1) as pool,
        pytest.raises(FullrankError, match="a process that prepares data failed: KeyError: 'missing'") as caught,
    ):
        list(pool.each(tasks.Fails(), [("break",)]))
    assert "pool_tasks.py" in caught.value.hint


@pytest.mark.parametrize(("job", "words"), [("leave", "exit code 7"), ("killed", "signal 9")])
def test_a_process_that_ends_is_told_with_advice(tasks: Any, job: str, words: str) -> None:
    with Pool(2) as pool:
        (_, process, _), *_ = list(pool.each(tasks.Echo(), [(1,)]))
        with pytest.raises(FullrankError, match="a process that prepares data ended") as caught:
            if job == "killed":
                results = pool.each(tasks.Echo(), [(number, 0.3) for number in range(8)])
                next(results)
                os.kill(process, signal.SIGKILL)
                list(results)
            else:
                list(pool.each(tasks.Fails(), [(job,)] * 4))
    assert words in caught.value.message
    assert "machine.workers=1" in caught.value.hint and "what was prepared is kept" in caught.value.hint


@pytest.mark.parametrize("ends", ["well", "in an error"])
def test_no_process_outlives_the_pool(tasks: Any, started: list[int], ends: str) -> None:
    begun = time.monotonic()
    with contextlib.suppress(ZeroDivisionError), Pool(2) as pool:
        results = pool.each(tasks.Echo(), [(number, 20.0 if number > 5 else 0.05) for number in range(12)])
        workers = {next(results)[1] for _ in range(4)}
        if ends == "in an error":
            raise ZeroDivisionError
    assert soon(lambda: not any(map(is_running, [*workers, *started])))
    assert time.monotonic() - begun < 15  # nobody waits for work that is under way, or begins what was waiting


def test_processes_whose_parent_is_killed_end_without_a_word(tasks: Any, tmp_path: Path) -> None:
    """Their words would stand in the terminal of someone who has just killed a run."""
    script = """
import os, pool_tasks
from fullrank.data.pool import Pool
with Pool(2) as pool:
    for _, process, _ in pool.each(pool_tasks.Echo(), [(n, 0.3) for n in range(40)]):
        print(process, flush=True)
"""
    errors = tmp_path / "errors"
    with errors.open("wb") as told:
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=told, text=True)
        assert process.stdout
        workers = {int(process.stdout.readline()) for _ in range(4)}
        process.kill()
        process.wait()
        process.stdout.close()
    assert len(workers) == 2 and soon(lambda: not any(map(is_running, workers)))
    time.sleep(0.3)  # the process they are copies of hears of it last
    assert set(errors.read_text(encoding="utf-8").split()) <= {"a", "library", "says", *map(str, range(40))}


@pytest.mark.parametrize("sent", [0.0, 0.5])
def test_a_process_that_is_told_nothing_or_half_ends_without_a_word(tasks: Any, sent: float) -> None:
    message = pickle.dumps((1, tasks.Echo()), protocol=pickle.HIGHEST_PROTOCOL)
    found = subprocess.run(
        [sys.executable, "-m", "fullrank.data.worker"], input=message[: int(len(message) * sent)], capture_output=True, check=True
    )
    assert found.stdout == found.stderr == b""


def test_processes_are_lean_and_do_not_start_threads_of_their_own(tasks: Any) -> None:
    with Pool(1) as pool:
        ((modules, environment),) = pool.each(tasks.Modules(), [()])
    assert "fullrank" in modules and not {"torch", "pandas", "pyarrow"} & set(modules)
    assert environment["OMP_NUM_THREADS"] == "1" and environment["TOKENIZERS_PARALLELISM"] == "false"


def test_interrupting_the_terminal_is_left_to_the_parent(tasks: Any) -> None:
    with Pool(1) as pool:
        ((_, process, _),) = pool.each(tasks.Echo(), [(1,)])
        assert os.getsid(process) != os.getsid(0)
