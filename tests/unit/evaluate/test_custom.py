"""A user's own metric: what it is given, what it may return, and what is said when it does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fullrank.errors import UsageError
from fullrank.evaluate.metrics import digests, score
from fullrank.recipe import Task


def task(folder: Path, body: str, **keys: Any) -> Task:
    """A task whose function has this body."""
    path = folder / "own.py"
    lines = ["import dataclasses", "def grade(references, answers, prompts):", *("    " + line for line in body.splitlines())]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return Task(metric="python", function=f"{path}:grade", **keys)


def test_it_is_given_references_answers_and_prompts(tmp_path: Path) -> None:
    own = task(tmp_path, "return [(r == a + p) / 2 for r, a, p in zip(references, answers, prompts)]")
    scores = score(own, ["ab", "cd", "x"], ["a", "c", "y"], prompts=["b", "d", "x"])
    assert list(scores) == ["grade"]
    assert scores["grade"].per_item == [0.5, 0.5, 0.0]
    assert scores["grade"].value == pytest.approx(1 / 3)
    assert not (tmp_path / "__pycache__").exists()


def test_the_pattern_picks_what_it_is_given(tmp_path: Path) -> None:
    own = task(tmp_path, "return [len(a) for a in answers]", pattern="is (.*)", name="length", range=(0, 9))
    assert score(own, ["is a", "is a"], ["it is four", "no"])["length"].per_item == [4.0, 0.0]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return [0.5, 1.7]", r"returned 1\.7 for item 2 of 2 \(t\.jsonl:4\); each must be a number from 0 to 1"),
        ("return [0.5, float('nan')]", r"returned nan for item 2 of 2 \(t\.jsonl:4\)"),
        ("return [None, 1]", r"returned nothing for item 1 of 2 \(t\.jsonl:3\)"),
        ("return ['1', 1]", r"returned a str: '1' for item 1 of 2"),
        ("return [1]", "returned 1 numbers for 2 items"),
        ("return 0.5", r"returned a float: 0\.5; it must return a list"),
        ("pass", "returned nothing; it must return a list"),
        ("return {'a': 1, 'b': 2}", "returned a dict"),
        ("\nreturn [1 / 0]", r"raised ZeroDivisionError: division by zero \(line 4\)"),
    ],
)
def test_what_it_must_not_return(tmp_path: Path, body: str, said: str) -> None:
    own = task(tmp_path, body)
    with pytest.raises(UsageError, match=rf"^task grade: .*own\.py:grade: {said}"):
        score(own, ["a", "b"], ["a", "b"], places=["t.jsonl:3", "t.jsonl:4"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def other(): pass", "'grade' is not in the file; functions there: other"),
        ("grade = 3", "'grade' is not a function; functions there: none"),
        ("import no_such_package_at_all", r"cannot be loaded: ModuleNotFoundError: .* \(line 1\)"),
        ("x = 1\ndef grade(:", r"cannot be loaded: SyntaxError: .* \(line 2\)"),
        ("raise SystemExit(3)", "cannot be loaded: SystemExit: 3"),
    ],
)
def test_a_file_that_cannot_be_used(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "own.py"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=said):
        score(Task(metric="python", function=f"{path}:grade"), ["a"], ["a"])


def test_the_digest_changes_with_the_file(tmp_path: Path) -> None:
    own = task(tmp_path, "return [1]")
    before = digests(own)
    assert digests(task(tmp_path, "return [0]")) != before
    assert digests(task(tmp_path, "return [1]")) == before
    assert digests(Task(metric="f1")) == []
