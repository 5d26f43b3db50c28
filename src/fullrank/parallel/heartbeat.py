"""Who among the ranks still lives, and what each is at: a rank that falls silent or stands still is named, and all of them end.

Ranks compute together, so one that died or hangs makes all the others wait, in a collective that says nothing. Here each rank
tells a store that all of them reach, every other second, which step and phase it is in. The first rank looks at what all others
tell, and these look at what it tells, so that the store is asked as often as there are ranks, and not the square of it. A rank
that has told nothing for `silence_seconds` is dead or stopped. One that lives, but has been in the same phase for
`standstill_seconds` while no rank got anywhere, hangs: of those, the first rank names the one that is furthest behind, since the
others wait for it. Who sees it says so in the store; then every rank writes the stacks of its threads beside the run and ends,
and the launcher ends those that cannot. A rank that leaves by an error of its own falls silent as well, so that those who still
wait for it end, too, whoever started them.

It promises no more than to name and to end. What continues is the last checkpoint.
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import distributed

from fullrank.parallel.world import World

#: Between two beats.
BEAT_SECONDS = 2.0
#: A rank that has told nothing for so long is dead or stopped: several beats, and what a busy machine may delay them.
SILENCE_SECONDS = 15.0
#: At least so long in one phase, without any rank getting anywhere, is a standstill; more where phases have taken longer.
STANDSTILL_SECONDS = 1800.0
_TIMES_LONGER = 10.0


@dataclass(frozen=True)
class Beat:
    """What a rank tells of itself."""

    step: int
    phase: str
    moves: int
    """Phases it has entered so far."""
    host: str
    process: int

    @property
    def words(self) -> str:
        """For a message."""
        return f"process {self.process} on {self.host}, in {self.phase or 'its start'} of step {self.step}"


class Heartbeat:
    """`with Heartbeat(...) as heart:` around what ranks do together; `heart.phase` is a `fullrank.sequences.loss.Watch`.

    Args:
        world: the ranks.
        folder: where stacks are written.
        end: called once, on every rank that still can, with what was seen; it should end the process.
        silence_seconds: see above.
        standstill_seconds: see above.
    """

    def __init__(
        self,
        world: World,
        folder: Path,
        end: Callable[[str], None],
        *,
        silence_seconds: float = SILENCE_SECONDS,
        standstill_seconds: float = STANDSTILL_SECONDS,
    ) -> None:
        self._world, self._folder, self._end = world, folder, end
        self._silence, self._standstill = silence_seconds, standstill_seconds
        self._step, self._phase, self._moves = 0, "", 0
        self._longest_phase, self._since = 0.0, time.monotonic()
        self._over, self._is_missed = threading.Event(), False
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        if self._world.size > 1:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None = None, *_: object) -> None:
        self._is_missed = kind is not None
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def at(self, phase: str, step: int | None = None) -> None:
        """Says what this rank begins with."""
        now = time.monotonic()
        self._longest_phase, self._since = max(self._longest_phase, now - self._since), now
        self._step = self._step if step is None else step
        self._phase = phase
        self._moves += 1

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Inside, this rank is in a phase of its step."""
        self.at(name)
        yield

    # ---- the thread -----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        store = distributed.TCPStore(  # type: ignore[attr-defined]
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=datetime.timedelta(seconds=self._silence),
        )
        watched = range(self._world.size if self._world.is_first else 1)
        keys = [_key(rank) for rank in watched]
        # A rank may die before its first beat: it is waited for from now on.
        heard = {rank: (b"", time.monotonic()) for rank in watched}
        beats: dict[int, Beat] = {}
        moved, moves, number = time.monotonic(), -1, 0
        while True:
            number += 1
            mine = Beat(self._step, self._phase, self._moves, socket.gethostname(), os.getpid())
            try:
                store.set(_key(self._world.rank), json.dumps([number, vars(mine)]))
                if store.check(keys):
                    told = store.multi_get(keys)
                else:
                    told = [store.get(key) if store.check([key]) else b"" for key in keys]
                seen = store.get(_SEEN).decode() if store.check([_SEEN]) else ""
            except (RuntimeError, OSError) as error:  # the store is gone, and with it the launcher or the first rank
                self._leave(f"rank {self._world.rank} reaches the others no more: {error}")
                return
            now = time.monotonic()
            for rank, words in enumerate(told):
                if words == _GONE:
                    heard.pop(rank, None)
                    beats.pop(rank, None)
                elif words and rank in heard and heard[rank][0] != words:
                    heard[rank] = (words, now)
                    beats[rank] = Beat(**json.loads(words)[1])
            total = sum(beat.moves for beat in beats.values())
            if total != moves:
                moved, moves = now, total
            seen = seen or self._trouble(heard, beats, now, moved)
            if seen:
                with contextlib.suppress(RuntimeError, OSError):
                    store.set(_SEEN, seen)
                self._leave(seen)
                return
            if self._over.wait(BEAT_SECONDS):
                break
        if not self._is_missed:
            with contextlib.suppress(RuntimeError, OSError):
                store.set(_key(self._world.rank), _GONE.decode())  # nobody need wait for this one

    def _trouble(self, heard: dict[int, tuple[bytes, float]], beats: dict[int, Beat], now: float, moved: float) -> str:
        silent = [rank for rank, (_, when) in heard.items() if now - when > self._silence]
        if silent:
            rank = silent[0]
            last = beats[rank].words if rank in beats else "it never said anything"
            return f"rank {rank} has been silent for {now - heard[rank][1]:.0f} s ({last})"
        patience = max(self._standstill, _TIMES_LONGER * self._longest_phase)
        if self._world.is_first and beats and now - moved > patience:
            behind = min(beats, key=lambda rank: (beats[rank].moves, rank))
            return f"no rank got anywhere for {now - moved:.0f} s, and rank {behind} is furthest behind ({beats[behind].words})"
        return ""

    def _leave(self, seen: str) -> None:
        if self._over.is_set():
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"stacks-{self._world.rank:04d}.txt"
        with contextlib.suppress(OSError), path.open("w", encoding="utf-8") as file:
            file.write(f"{seen}\nrank {self._world.rank}, in {self._phase} of step {self._step}:\n\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        self._end(seen)


_SEEN = "fullrank/seen"
_GONE = b"gone"


def _key(rank: int) -> str:
    return f"fullrank/beat/{rank}"
