"""The roll call, as one of two ranks hears it: what the other one has is told by the test."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from staging import Staged, staged, write_case

from fullrank.errors import UsageError
from fullrank.parallel.world import World
from fullrank.records import DataCard, Ranks
from fullrank.run import need_record, read_record
from fullrank.train import roll


@dataclass(frozen=True)
class Pair(World):
    """Two ranks, of which the second has what the first has, but for some facts."""

    size: int = 2
    other: tuple[tuple[str, str], ...] = ()

    def gathered(self, facts: Any) -> list[Any]:
        return [facts, {**facts, "same": {**facts["same"], **dict(self.other)}}]

    def wait(self) -> None:
        """The other one is here."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Callable[..., Path]) -> Staged:
    found = staged(write_case(tmp_path_factory.mktemp("roll"), tiny_model_folder("llama")))
    found.data()
    return found


def call(run: Staged, world: World) -> None:
    data = need_record(run.run.data / "card.json", DataCard, "data")
    roll.call(run.recipe, run.run, run.base, data, world, torch.device("cpu"))


def test_ranks_that_have_the_same_are_written_down(run: Staged) -> None:
    call(run, Pair())
    found = read_record(run.run.train / "ranks.json", Ranks)
    assert found is not None and len(found.ranks) == 2
    assert not (run.run.train / "roll.txt").exists()


def test_everything_that_differs_is_named_with_its_rank(run: Staged) -> None:
    with pytest.raises(UsageError) as refused:
        call(run, Pair(other=(("torch", "1.0"), ("base model", "another"))))
    assert "torch: rank 1 on " in refused.value.message and "has 1.0, the others " in refused.value.message
    assert "base model: rank 1 on " in refused.value.message
    assert "python" not in refused.value.message


def test_another_model_of_the_same_name_is_another_model(run: Staged) -> None:
    told: list[dict[str, Any]] = []

    @dataclass(frozen=True)
    class Hearing(Pair):
        def gathered(self, facts: Any) -> list[Any]:
            told.append(facts["same"])
            return super().gathered(facts)

    call(run, Hearing())
    base = replace(run.base, facts=run.base.facts.model_copy(update={"fingerprint": "f" * 64}))
    call(replace(run, base=base), Hearing())
    assert {key for key in told[0] if told[0][key] != told[1][key]} == {"base model", "run folder"}
