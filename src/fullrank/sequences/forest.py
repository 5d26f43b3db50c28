"""Examples that begin alike, laid out as trees of tokens: what they share is in the row once.

A row is a forest. Each node is a segment, a stretch of tokens that stand together in every example that runs through it; a token
attends to the tokens before it in its segment and to its segment's ancestors, and its position is its depth. One example that
shares nothing is a segment without a parent, so that plain packing is the same thing. Segments are in depth-first order: what
continues a segment follows it directly.

Sharing is exact: a causal model computes the same hidden state for a token whatever follows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

#: Tokens that examples must begin with alike to share them: fewer save less than the attention calls that they cost.
LEAST_SHARED = 4


class Segment(NamedTuple):
    """Tokens [start, end) of the row, at depths from `depth`; all that continues them is [end, below)."""

    start: int
    end: int
    below: int
    depth: int
    parent: int
    """Number of the segment that it continues; -1 where it begins an example."""


@dataclass(frozen=True)
class Forest:
    """The segments of a row and where each of its examples lies."""

    segments: tuple[Segment, ...]
    ids_T: np.ndarray
    positions_T: np.ndarray
    paths: tuple[np.ndarray, ...]
    """For each example, in the order given, the row position of each of its tokens."""


@dataclass
class _Node:
    example: int
    """Whose tokens it holds, from depth `low` to depth `high`."""
    low: int
    high: int
    parent: _Node | None
    children: list[_Node]
    ending: list[int]
    """Examples that end with it."""


def shared_prefix(first: np.ndarray, second: np.ndarray) -> int:
    """Tokens that two examples begin with alike."""
    length = min(len(first), len(second))
    differs = first[:length] != second[:length]
    return int(differs.argmax()) if differs.any() else length


def in_order(examples: Sequence[np.ndarray]) -> list[int]:
    """Numbers of the examples, those that begin alike side by side; ties keep the order given."""
    return sorted(range(len(examples)), key=lambda n: examples[n].tolist())


def grow(examples: Sequence[np.ndarray], *, least_shared: int = LEAST_SHARED) -> Forest:
    """The forest of some examples.

    Args:
        examples: ids of each, none of them empty.
        least_shared: shorter common beginnings are laid out again for each example.
    """
    roots: list[_Node] = []
    path: list[_Node] = []  # of the example before
    before: int | None = None
    for number in in_order(examples):
        ids = examples[number]
        alike = shared_prefix(examples[before], ids) if before is not None else 0
        branch = _branch(path, alike) if alike >= least_shared else None
        if branch is None or branch.high < len(ids):
            leaf = _Node(number, branch.high if branch else 0, len(ids), branch, [], [])
            (branch.children if branch else roots).append(leaf)
            branch = leaf
        branch.ending.append(number)
        path = _ancestry(branch)
        before = number
    return _laid_out(examples, roots)


def _branch(path: list[_Node], alike: int) -> _Node | None:
    """The node after which an example that is alike to this depth goes its own way; a node is cut in two for it."""
    last: _Node | None = None
    for node in path:
        if alike > node.low:
            last = node
        if alike < node.high:
            break
    if last is not None and alike < last.high:
        rest = _Node(last.example, alike, last.high, last, last.children, last.ending)
        for child in rest.children:
            child.parent = rest
        last.high, last.children, last.ending = alike, [rest], []
    return last


def _ancestry(node: _Node | None) -> list[_Node]:
    found: list[_Node] = []
    while node is not None:
        found.append(node)
        node = node.parent
    return found[::-1]


def _laid_out(examples: Sequence[np.ndarray], roots: list[_Node]) -> Forest:
    segments: list[Segment] = []
    ids: list[np.ndarray] = []
    paths: dict[int, np.ndarray] = {}
    nothing = np.empty(0, np.int64)
    waiting = [(root, -1, nothing) for root in reversed(roots)]
    tokens = 0
    while waiting:
        node, parent, above_T = waiting.pop()
        start, tokens = tokens, tokens + node.high - node.low
        number = len(segments)
        segments.append(Segment(start, tokens, tokens, node.low, parent))
        ids.append(examples[node.example][node.low : node.high])
        path_T = np.concatenate([above_T, np.arange(start, tokens)])
        paths.update(dict.fromkeys(node.ending, path_T))
        waiting += [(child, number, path_T) for child in reversed(node.children)]
    for number in reversed(range(len(segments))):
        segment = segments[number]
        if segment.parent >= 0:
            above = segments[segment.parent]
            segments[segment.parent] = above._replace(below=max(above.below, segment.below))
    return Forest(
        segments=tuple(segments),
        ids_T=np.concatenate([nothing, *ids]).astype(np.int64),
        positions_T=np.concatenate([nothing, *(np.arange(s.end - s.start) + s.depth for s in segments)]),
        paths=tuple(paths[number] for number in range(len(examples))),
    )
