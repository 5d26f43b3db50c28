"""Answers as they are given, kept so that an evaluation that was killed goes on from them.

One file for each test and model: its first line says what was asked of which model, each further one is an answer. Answers to
other prompts, or of another model, are not taken up. The folder goes once the evaluation's record is written.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from fullrank.run import append_json_line, fingerprint, read_json_lines


class KeptAnswers:
    """The answers of one evaluation.

    Args:
        folder: made with the first answer.
        asked: fingerprint of everything that answers depend on beside the prompts.
    """

    def __init__(self, folder: Path, asked: str) -> None:
        self._folder, self._asked = folder, asked

    def take_up(self, name: str, prompts: Sequence[Sequence[int]]) -> dict[int, tuple[str, bool]]:
        """(answer, whether it stopped) by number of the prompt, as far as these prompts were answered before.

        Args:
            name: of the test and the model.
            prompts: ids of each.
        """
        path = self._path(name)
        asked = fingerprint(self._asked, name, [list(ids) for ids in prompts])
        lines = read_json_lines(path)
        if lines and lines[0].get("asked") == asked:
            return {int(line["prompt"]): (str(line["answer"]), bool(line["stopped"])) for line in lines[1:]}
        path.unlink(missing_ok=True)
        append_json_line(path, {"asked": asked})
        return {}

    def add(self, name: str, prompt: int, answer: str, *, stopped: bool) -> None:
        """Keeps an answer; `take_up` comes first."""
        append_json_line(self._path(name), {"prompt": prompt, "answer": answer, "stopped": stopped})

    def clear(self) -> None:
        """Removes them all."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.jsonl"
