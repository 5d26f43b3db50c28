"""The updater: the rules through every rounding, code and shelf; divided calls; state that resumes bit by bit; bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fullrank import recipe
from fullrank.optim import update as update_module
from fullrank.optim.shelf import InHost, OnDisk, Shelf
from fullrank.optim.update import Rounding, Updater, state_bytes

RULES: dict[str, recipe.Optimizer] = {
    "adamw": recipe.AdamW(weight_decay=0.1),
    "adamw-int8": recipe.AdamW(weight_decay=0.1, moments="int8"),
    "muon": recipe.Muon(name="muon", weight_decay=0.1),
    "adafactor": recipe.Adafactor(name="adafactor", weight_decay=0.1),
    "lomo": recipe.Lomo(name="lomo", weight_decay=0.1),
    "adalomo": recipe.AdaLomo(name="adalomo", weight_decay=0.1),
}
ROUNDINGS: list[Rounding] = ["none", "stochastic", "kahan", "nearest"]
#: A matrix of whole blocks of 256, one with a block cut short, a small one, a vector and a stack of experts.
SHAPES = {"embed": (96, 64), "block.w": (91, 71), "block.small": (8, 16), "block.norm": (64,), "block.experts": (3, 40, 50)}
HIDDEN = {"block.w", "block.small", "block.experts", "block.norm"}


def parameters(rounding: Rounding) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    dtype = torch.float32 if rounding == "none" else torch.bfloat16
    return {name: nn.Parameter((torch.randn(shape, generator=generator) / 10).to(dtype)) for name, shape in SHAPES.items()}


def gradients(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(shape, generator=generator) / 100 for name, shape in SHAPES.items()}


def updater(rule: str, rounding: Rounding, shelf: Shelf | None = None, **changes: Any) -> Updater:
    return Updater(parameters(rounding), RULES[rule], rounding=rounding, hidden=HIDDEN, shelf=shelf, **changes)


def run(made: Updater, steps: range) -> None:
    for step in steps:
        made.update(gradients(step), learning_rate=1e-3, key=step)


def weights(made: Updater) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in made._parameters.items()}


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(params=["device", "disk", "host"])
def shelf(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Shelf | None]:
    made = {"device": lambda: None, "disk": lambda: OnDisk(tmp_path, waiting_bytes=50_000), "host": lambda: InHost("cpu")}
    shelf = made[request.param]()
    yield shelf
    if shelf is not None:
        shelf.close()


@pytest.fixture(params=[(rule, rounding) for rule in RULES for rounding in ROUNDINGS], ids="-".join)
def kind(request: pytest.FixtureRequest) -> tuple[str, Rounding]:
    return request.param


def test_adamw_is_torchs_with_matrices_decayed_and_vectors_not() -> None:
    made, torchs = updater("adamw", "none"), parameters("none")
    groups = [
        {"params": [p for p in torchs.values() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in torchs.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, fused=True)
    run(made, range(1, 6))
    for step in range(1, 6):
        for name, gradient in gradients(step).items():
            torchs[name].grad = gradient
        optimizer.step()
    assert same(weights(made), {name: p.detach() for name, p in torchs.items()})
    state = {kind: {name: optimizer.state[p][kind] for name, p in torchs.items()} for kind in ("exp_avg", "exp_avg_sq")}
    assert made.tensors().keys() == state.keys()
    assert all(same(made.tensors()[kind], state[kind]) for kind in state)


def test_parameters_of_64_bits_are_updated_in_64_bits() -> None:
    start, gradient = torch.randn(70, 70, dtype=torch.float64), torch.randn(70, 70, dtype=torch.float64)
    ours, torchs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    made = Updater({"w": ours}, recipe.AdamW(moments="int8"), rounding="none")
    optimizer = torch.optim.AdamW([torchs], lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    for step in range(3):
        torchs.grad = gradient * (step + 1)
        optimizer.step()
        made.update({"w": gradient * (step + 1)}, learning_rate=1e-3, key=step)
    assert torch.equal(ours, torchs)


def test_weights_do_not_depend_on_how_calls_are_divided(kind: tuple[str, Rounding]) -> None:
    together, apart = updater(*kind), updater(*kind)
    run(together, range(1, 4))
    for step in range(1, 4):
        given = gradients(step)
        for names in (["block.norm", "block.w"], ["embed"], ["block.experts", "block.small"]):
            apart.update({name: given[name] for name in names}, learning_rate=1e-3, key=step)
    assert same(weights(together), weights(apart))
    assert together.updates == apart.updates == dict.fromkeys(SHAPES, 3)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("rule", ["adamw", "adamw-int8", "lomo"])
def test_weights_do_not_depend_on_stretches(rule: str, rounding: Rounding, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = updater(rule, rounding)
    run(whole, range(1, 4))
    monkeypatch.setattr(update_module, "chunk_elements", lambda device: 1024)
    cut = updater(rule, rounding)
    run(cut, range(1, 4))
    assert same(weights(whole), weights(cut))


def test_a_shelf_changes_nothing(kind: tuple[str, Rounding], shelf: Shelf | None) -> None:
    plain, shelved = updater(*kind), updater(*kind, shelf)
    run(plain, range(1, 4))
    run(shelved, range(1, 4))
    assert same(weights(plain), weights(shelved))
    assert plain.tensors().keys() == shelved.tensors().keys()
    assert all(same(plain.tensors()[slot], shelved.tensors()[slot]) for slot in plain.tensors())


def test_a_run_goes_on_bit_by_bit_from_its_state(kind: tuple[str, Rounding], shelf: Shelf | None) -> None:
    through = updater(*kind)
    run(through, range(1, 6))
    before = updater(*kind)
    run(before, range(1, 3))
    before.update({"embed": gradients(9)["embed"]}, learning_rate=1e-3, key=9)  # counts differ from tensor to tensor
    after = updater(*kind, shelf)
    run(after, range(50, 52))  # what it has is replaced
    for name, p in after._parameters.items():
        p.data.copy_(before._parameters[name])
    after.load(before.tensors(), before.updates)
    assert after.updates == before.updates == {**dict.fromkeys(SHAPES, 2), "embed": 3}
    run(before, range(3, 6))
    run(after, range(3, 6))
    assert same(weights(before), weights(after))
    assert not torch.equal(weights(through)["embed"], weights(after)["embed"])  # the extra update is felt


def test_a_loaded_state_is_a_copy_and_the_start_is_forgotten(shelf: Shelf | None) -> None:
    one, other = updater("adamw", "none"), updater("adamw", "none", shelf)
    one.update({"embed": gradients(1)["embed"]}, learning_rate=1e-3, key=1)
    run(other, range(1, 3))
    other.load(one.tensors(), one.updates)
    kept = one.tensors()["exp_avg"]["embed"].clone()
    run(other, range(3, 4))
    assert torch.equal(one.tensors()["exp_avg"]["embed"], kept)
    assert other.updates == {**dict.fromkeys(SHAPES, 1), "embed": 2}
    fresh = updater("adamw", "none")
    run(fresh, range(3, 4))  # tensors that the loaded state does not have start from zeros
    assert torch.equal(other.tensors()["exp_avg"]["block.w"], fresh.tensors()["exp_avg"]["block.w"])


def test_a_state_of_another_kind_is_refused() -> None:
    full, coded = updater("adamw", "none"), updater("adamw-int8", "none")
    run(full, range(1, 2))
    with pytest.raises(ValueError, match=r"exp_avg of embed is torch\.float32"):
        coded.load(full.tensors(), full.updates)
    lomo = updater("lomo", "none")
    run(lomo, range(1, 2))
    with pytest.raises(KeyError):
        full.load(lomo.tensors(), lomo.updates)


def test_state_bytes_are_what_there_is(kind: tuple[str, Rounding]) -> None:
    rule, rounding = kind
    made = updater(*kind)
    assert made.tensors() == {}
    run(made, range(1, 2))
    there = sum(tensor.nbytes for tensors in made.tensors().values() for tensor in tensors.values())
    assert state_bytes(RULES[rule], SHAPES, rounding=rounding, hidden=HIDDEN) == there


def test_state_bytes_of_a_model_that_fits_nowhere() -> None:
    shapes = {f"{index}": (8192, 28672) for index in range(300)}
    elements = 300 * 8192 * 28672
    assert state_bytes(recipe.AdamW(), shapes, rounding="none") == 8 * elements
    assert state_bytes(recipe.AdamW(moments="int8"), shapes, rounding="stochastic") == 2 * elements + 2 * 4 * elements // 256
    assert state_bytes(recipe.Lomo(name="lomo"), shapes, rounding="kahan") == 2 * elements
    assert state_bytes(recipe.Muon(name="muon"), shapes, rounding="none", hidden=set(shapes)) == 4 * elements
    assert state_bytes(recipe.AdaLomo(name="adalomo"), shapes, rounding="none") == 300 * 4 * (8192 + 28672)


def test_rates_are_factors_by_name() -> None:
    slowed, plain = updater("lomo", "none", rates={"embed": 0.25}), updater("lomo", "none")
    slowed.update(gradients(1), learning_rate=0.5, key=0)
    plain.update(gradients(1), learning_rate=0.5, key=0)
    assert torch.equal(weights(slowed)["block.w"], weights(plain)["block.w"])
    plain = updater("lomo", "none")
    plain.update({"embed": gradients(1)["embed"]}, learning_rate=0.125, key=0)
    assert torch.equal(weights(slowed)["embed"], weights(plain)["embed"])


def test_chance_is_of_the_key_and_the_tensor() -> None:
    starts = parameters("stochastic")["embed"].detach()
    moved = []
    for key, names in ((1, "ab"), (1, "ab"), (2, "ab")):
        twins = {name: nn.Parameter(starts.clone()) for name in names}
        made = Updater(twins, recipe.Lomo(name="lomo"), rounding="stochastic")
        made.update({name: gradients(1)["embed"] for name in names}, learning_rate=1e-2, key=key)
        moved.append(twins)
    assert torch.equal(moved[0]["a"], moved[1]["a"])
    assert not torch.equal(moved[0]["a"], moved[0]["b"])
    assert not torch.equal(moved[0]["a"], moved[2]["a"])


@pytest.mark.parametrize(("rule", "rounding"), [(rule, rounding) for rule in RULES for rounding in ("stochastic", "kahan")])
def test_bf16_weights_follow_the_fp32_ones(rule: str, rounding: Rounding) -> None:
    """Where small updates would be lost, both roundings keep what fp32 weights come to on average."""
    short = updater(rule, rounding)
    long = Updater(
        {n: nn.Parameter(p.detach().float()) for n, p in parameters(rounding).items()},
        RULES[rule],
        rounding="none",
        hidden=HIDDEN,
    )
    start = weights(long)["embed"].clone()
    for step in range(1, 201):
        for made in (short, long):
            rate = {"lomo": 3e-3, "adafactor": 3e-4, "adalomo": 3e-4}.get(rule, 3e-5)
            made.update({"embed": gradients(0)["embed"] + gradients(step)["embed"] / 3}, learning_rate=rate, key=step)
    moved, expected = weights(short)["embed"].float() - start, weights(long)["embed"] - start
    along = (moved * expected).sum() / expected.square().sum()
    assert along.item() == pytest.approx(1.0, abs=0.02)


def test_nearest_loses_small_updates_and_the_sample_shows_it() -> None:
    shares = {}
    for rounding in ("nearest", "stochastic"):
        made = updater("lomo", rounding)
        made.update({"embed": gradients(1)["embed"]}, learning_rate=1e-4, key=1)
        looked_at, changed = made.changed
        assert looked_at == 878  # every seventh of 96 x 64
        shares[rounding] = changed / looked_at
        made.reset_changed()
        assert made.changed == (0, 0)
    # Updates of about 1e-6 beside weights of 0.1, whose steps are 5e-4: by chance a few of them show, to the nearest hardly any.
    assert shares["nearest"] < 0.004 < shares["stochastic"] < 0.1


def test_the_sample_counts_what_changed() -> None:
    p = nn.Parameter(torch.zeros(64, 64))
    made = Updater({"w": p}, recipe.Lomo(name="lomo"), rounding="none")
    gradient = torch.zeros(64, 64)
    gradient[:16] = 1.0  # a quarter
    made.update({"w": gradient}, learning_rate=1.0, key=0)
    looked_at, changed = made.changed
    assert looked_at == 820  # every fifth of 4096
    assert changed == 205
    made.update({"w": gradient}, learning_rate=0.0, key=0)
    assert made.changed == (1640, 205)


@pytest.mark.parametrize(
    ("dtype", "rounding"), [(torch.bfloat16, "none"), (torch.float16, "none"), (torch.float16, "stochastic")]
)
def test_types_that_the_rounding_does_not_serve_are_refused(dtype: torch.dtype, rounding: Rounding) -> None:
    with pytest.raises(ValueError, match=f"w is {dtype}"):
        Updater({"w": nn.Parameter(torch.ones(2, dtype=dtype))}, recipe.AdamW(), rounding=rounding)


def test_a_shelf_holds_the_state_and_the_updater_none(tmp_path: Path) -> None:
    shelf = OnDisk(tmp_path)
    made = updater("adamw-int8", "kahan", shelf)
    run(made, range(1, 3))
    assert made._states == {}
    tensors = made.tensors()
    assert set(tensors) == {"exp_avg", "exp_avg.scale", "exp_avg_sq", "exp_avg_sq.scale", "compensation"}
    assert set(tensors["exp_avg"]) == set(SHAPES)
    assert "block.norm" not in tensors["exp_avg.scale"]  # small tensors keep fp32
    with pytest.raises(KeyError):
        tensors["exp_avg.scale"]["block.norm"]
    shelf.close()
