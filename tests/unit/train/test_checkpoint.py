"""Checkpoints: whole or not there, and passed over aloud when damaged."""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from staging import leftovers

from fullrank.errors import FullrankError, TrainingError
from fullrank.parallel.engine import EngineState
from fullrank.train import checkpoint


def state(value: float) -> EngineState:
    weights = {"a.weight": torch.full((3, 4), value).T, "b": torch.tensor([value])}  # one of them is not contiguous
    return EngineState({"weights": weights, "exp_avg": {"b": torch.tensor([-value])}}, {"updates": {"b": 3}})


def same(one: EngineState, other: EngineState) -> bool:
    flat = [{f"{stem}/{n}": t for stem, ts in s.tensors.items() for n, t in ts.items()} for s in (one, other)]
    return flat[0].keys() == flat[1].keys() and all(torch.equal(flat[0][n], flat[1][n]) for n in flat[0])


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    folder = checkpoint.save(tmp_path, 12, state(1.5), {"best_loss": float("inf"), "resumed_from": [3]})
    step, found, facts = checkpoint.load(folder)
    assert (folder.name, step, facts) == ("step-00000012", 12, {"best_loss": float("inf"), "resumed_from": [3]})
    assert same(found, state(1.5)) and found.facts == {"updates": {"b": 3}}
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json"}  # no pickle


def test_the_one_before_goes_when_the_new_one_is_there(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, state(step), {})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


def test_a_save_that_fails_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = checkpoint.save(tmp_path, 1, state(1), {})

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(FullrankError, match="the disk is full"):
        checkpoint.save(tmp_path, 2, state(2), {})
    assert checkpoint.newest(tmp_path, pytest.fail) == before and leftovers(tmp_path) == []


@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "manifest", "no manifest"])
def test_a_damaged_one_is_passed_over_aloud(tmp_path: Path, damage: str) -> None:
    older = checkpoint.save(tmp_path / "other", 4, state(4), {})
    newer = checkpoint.save(tmp_path, 8, state(8), {})
    older = Path(shutil.move(older, tmp_path))
    weights = newer / "weights.safetensors"
    if damage == "flip":
        raw = bytearray(weights.read_bytes())
        raw[-1] ^= 1
        weights.write_bytes(raw)
    elif damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif damage == "missing":
        weights.unlink()
    elif damage == "manifest":
        (newer / "MANIFEST.json").write_text("{", encoding="utf-8")
    else:
        (newer / "MANIFEST.json").unlink()
    heard: list[str] = []
    assert checkpoint.newest(tmp_path, heard.append) == older
    assert len(heard) == 1 and heard[0].startswith("the checkpoint step-00000008 is not used: ")
    (older / "state.json").unlink()
    assert checkpoint.newest(tmp_path, heard.append) is None and "step-00000004 is not used: state.json is missing" in heard[-1]


def test_a_half_written_one_is_none(tmp_path: Path) -> None:
    folder = checkpoint.save(tmp_path, 5, state(5), {})
    folder.rename(tmp_path / ".step-00000005.partial")
    assert checkpoint.newest(tmp_path, pytest.fail) is None


def test_weights_alone(tmp_path: Path) -> None:
    best = tmp_path / "best"
    for step in (1, 2, 3):
        checkpoint.save_weights(best, step, {"a": torch.tensor([float(step)])})
    assert sorted(path.name for path in best.iterdir()) == ["step-00000002", "step-00000003"], "the last two stay"
    assert checkpoint.load_weights(best, 3)["a"].tolist() == [3.0]
    damaged = best / "step-00000003" / "weights.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"!")
    for step in (1, 3):
        with pytest.raises(TrainingError, match=f"step-{step:08d}: the weights of the lowest validation loss"):
            checkpoint.load_weights(best, step)


class Made(Mapping[str, torch.Tensor]):
    """Tensors that exist while someone holds them, and how many did at once."""

    def __init__(self, count: int) -> None:
        self.count, self.alive, self.most = count, 0, 0

    def __getitem__(self, name: str) -> torch.Tensor:
        memory = np.full(256, float(name), dtype=np.float32)  # 1 KiB, alive as long as any tensor looks at it
        self.alive += 1
        self.most = max(self.most, self.alive)
        weakref.finalize(memory, self._gone)
        return torch.from_numpy(memory)

    def _gone(self) -> None:
        self.alive -= 1

    def __iter__(self) -> Iterator[str]:
        return (str(number) for number in range(self.count))

    def __len__(self) -> int:
        return self.count


def test_state_larger_than_memory_is_written_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "_PART_BYTES", 4 << 10)
    made = Made(10)
    folder = checkpoint.save(tmp_path, 1, EngineState({"exp_avg": made, "none": {}}, {}), {})
    assert made.most <= 5, "a part, and the tensor that begins the next"
    assert sorted(path.name for path in folder.glob("*.safetensors")) == [
        "exp_avg-00002.safetensors",
        "exp_avg-00003.safetensors",
        "exp_avg.safetensors",
        "none.safetensors",
    ]
    _, found, _ = checkpoint.load(folder)
    assert found.tensors.keys() == {"exp_avg", "none"} and not found.tensors["none"]
    assert found.tensors["exp_avg"].keys() == set(made)
    assert all(torch.equal(found.tensors["exp_avg"][name], made[name]) for name in made)
    (folder / "exp_avg-00002.safetensors").unlink()
    heard: list[str] = []
    assert checkpoint.newest(tmp_path, heard.append) is None and "exp_avg-00002.safetensors is missing" in heard[0]


def test_what_was_read_is_memory_of_its_own(tmp_path: Path) -> None:
    folder = checkpoint.save(tmp_path, 1, state(2.5), {})
    _, found, _ = checkpoint.load(folder)
    tensor = found.tensors["weights"]["a.weight"]
    (folder / "weights.safetensors").write_bytes(b"")
    assert torch.equal(tensor, torch.full((4, 3), 2.5))
    assert found.tensors["exp_avg"]["b"] is not found.tensors["exp_avg"]["b"]
