"""Which examples make up a step: a pure function of (seed, number of examples, batch size, step).

Every epoch is a fresh permutation; its last step holds what is left over. Nothing has to be remembered or replayed to
continue at any step, and micro-batches, ranks or packing cannot change which examples a step holds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

_STEPS_LOOKED_AT = 200


@dataclass(frozen=True)
class Order:
    """The order of examples over a run.

    Args:
        examples: number of training examples.
        global_batch_size: examples per optimizer step.
        epochs: passes over the data; a fraction ends inside an epoch.
        seed: seed of the permutations.
    """

    examples: int
    global_batch_size: int
    epochs: float
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.examples / self.global_batch_size)

    @property
    def steps(self) -> int:
        """Optimizer steps of the run: at least one."""
        whole = math.floor(self.epochs)
        rest = self.epochs - whole
        return max(1, whole * self.steps_per_epoch + math.ceil(rest * self.examples / self.global_batch_size - 1e-9))

    def step(self, step: int) -> np.ndarray:
        """Examples of a step (1-based), as positions in the store: examples_B."""
        epoch, within = divmod(step - 1, self.steps_per_epoch)
        permutation = _permutation(self.seed, epoch, self.examples)
        return permutation[within * self.global_batch_size : (within + 1) * self.global_batch_size]

    @property
    def first_steps(self) -> range:
        """Steps that stand for the run where rows are looked at before it."""
        return range(1, min(self.steps, _STEPS_LOOKED_AT) + 1)

    def epoch_after(self, step: int) -> float:
        """Passes over the data completed after a step."""
        epochs, within = divmod(step, self.steps_per_epoch)
        return epochs + min(within * self.global_batch_size, self.examples) / self.examples


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, examples: int) -> np.ndarray:
    # Philox is counter-based and specified bit by bit, so the order is the same on every machine and numpy version; the
    # sort of its raw draws stands in for Generator.permutation, whose algorithm numpy may change.
    draws = np.random.Philox(key=[seed, epoch]).random_raw(examples)
    permutation = np.argsort(draws, kind="stable")
    permutation.setflags(write=False)
    return permutation


def held_out(groups: np.ndarray, ratio: float, seed: int) -> np.ndarray:
    """Whether each record goes to validation: at least one does and one does not, the same for every run with this seed.

    Args:
        groups: groups_N, a number for each record; records of one group stay together.
        ratio: share of the records.
        seed: chooses them.
    """
    records = len(groups)
    count = min(records - 1, max(1, round(records * ratio)))
    draws = np.random.Philox(key=[seed, 2**63]).random_raw(records)
    names, first, sizes = np.unique(groups, return_index=True, return_counts=True)
    if len(names) == 1:  # nothing to keep together without giving all of it away
        return np.isin(np.arange(records), np.argsort(draws, kind="stable")[:count])
    order = np.argsort(draws[first], kind="stable")  # a group is drawn as its first record is
    fitting = order[sizes[order] <= max(count, int(sizes.min()))]
    taken = fitting[: max(1, int(np.searchsorted(np.cumsum(sizes[fitting]), count, side="right")))]
    return np.isin(groups, names[taken])
