"""Rounding to bf16: only the neighbours, the mean kept, and the same numbers however a tensor is cut up."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from fullrank.optim import rounding
from fullrank.optim.rounding import kahan_, stochastic_, tensor_key


def rounded(values: Tensor, key: int = 7, start: int = 0) -> Tensor:
    target = torch.empty(len(values), dtype=torch.bfloat16)
    stochastic_(target, values.clone(), key=key, start=start)
    return target


def sixteen_bits(key: int, count: int = 2**18) -> Tensor:
    """What the rounding draws, 0 to 65535."""
    return rounding._sixteen_bits(key, 0, count, torch.device("cpu")).to(torch.int64) + 2**15


def every_bf16() -> Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


def test_what_bf16_holds_stays_as_it_is() -> None:
    numbers = every_bf16()
    numbers = numbers[~numbers.isnan()]
    for key in range(5):
        assert torch.equal(rounded(numbers.float(), key).view(torch.int16), numbers.view(torch.int16))  # the sign of zero too
    assert rounded(torch.full((9,), math.nan)).isnan().all()


@pytest.mark.parametrize("scale", [1.0, -1.0, 1e-30, -1e-39, 3e38], ids=str)
def test_only_the_two_neighbours_and_the_mean_is_the_value(scale: float) -> None:
    value = torch.tensor(1.00123) * scale
    low = value.view(torch.int32).bitwise_and(-(2**16)).view(torch.float32)  # towards zero
    high = (value.view(torch.int32).bitwise_and(-(2**16)) + 2**16).view(torch.float32)
    count = 2**18
    found = rounded(value.expand(count)).float()
    assert set(found.unique().tolist()) == {low.item(), high.item()}
    share = ((value.double() - low.double()) / (high.double() - low.double())).item()
    went_up = (found == high).double().mean().item()
    assert abs(went_up - share) < 4 * math.sqrt(share * (1 - share) / count)


def test_any_cut_gives_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(10_001)
    whole = rounded(values)
    for cuts in ([0, 1, 10_001], [0, 3333, 3334, 9999, 10_001], [0, 4096, 8192, 10_001]):
        parts = [rounded(values[a:b], start=a) for a, b in pairwise(cuts)]
        assert torch.equal(torch.cat(parts), whole)
    monkeypatch.setattr(rounding, "CHUNK", 999)
    assert torch.equal(rounded(values), whole)
    assert not torch.equal(rounded(values, start=1), whole)


def test_indices_beyond_32_bits_go_on() -> None:
    values = torch.randn(1000)
    edge = 2**33  # the pairs' counter of 32 bits ends here
    across = rounded(values, start=edge - 500)
    assert torch.equal(across[:500], rounded(values[:500], start=edge - 500))
    assert torch.equal(across[500:], rounded(values[500:], start=edge))
    assert not torch.equal(rounded(values, start=edge), rounded(values, start=0))
    assert not torch.equal(rounded(values, start=2**32), rounded(values, start=0))


def test_keys_are_of_the_step_and_the_name() -> None:
    keys = {tensor_key(step, name) for step in range(20) for name in ("a", "b", "model.layers.0.weight")}
    assert len(keys) == 60
    assert tensor_key(1, "a") == 4823975055621773283  # the same in every process and on every machine


def test_bits_are_even_and_tell_nothing_of_one_another() -> None:
    count = 2**18
    first, second = sixteen_bits(1, count), sixteen_bits(2, count)
    # The mean of uniform numbers on 0..65535, and correlations of neighbours and of keys: 4 standard errors.
    assert abs(first.double().mean().item() - 32767.5) < 4 * 65536 / math.sqrt(12 * count)
    centred = [(x.double() - 32767.5) / (65536 / math.sqrt(12)) for x in (first, second)]
    for a, b in [(centred[0], centred[1])] + [(centred[0][lag:], centred[0][:-lag]) for lag in (1, 2, 3, 576)]:
        assert abs((a * b).mean().item()) < 4 / math.sqrt(count)
    for bit in range(16):
        assert abs((first >> bit & 1).double().mean().item() - 0.5) < 4 * 0.5 / math.sqrt(count)
        flipped = ((first ^ second) >> bit & 1).double().mean().item()
        assert abs(flipped - 0.5) < 4 * 0.5 / math.sqrt(count)


def test_two_keys_numbers_are_not_one_sequence_read_from_two_places() -> None:
    # Keys that move the counter to places within each other's reach: with a counter alone, one would go on where the other is.
    moves = sorted((rounding._halves(key, 0)[0], key) for key in range(3000))
    near = [(b - a, low, high) for (a, low), (b, high) in pairwise(moves) if b - a < 2**10]
    assert near
    for shift, low, high in near:
        first, second = sixteen_bits(low, 2**13), sixteen_bits(high, 2**13)
        assert (first[2 * shift :] == second[: 2**13 - 2 * shift]).double().mean() < 0.01


def test_small_updates_add_up_where_nearest_loses_them() -> None:
    count, steps = 4096, 2000
    update = 2.0**-7 / 1000  # a thousandth of the distance between bf16 numbers above 1
    by_chance, nearest = torch.full((2, count), 1.0, dtype=torch.bfloat16).unbind()
    for step in range(steps):
        stochastic_(by_chance, by_chance.float().add_(update), key=tensor_key(step, "w"))
        nearest.copy_(nearest.float().add_(update))
    assert torch.equal(nearest, torch.ones_like(nearest))
    moved = by_chance.double().mean().item() - 1.0
    # Each element makes `steps` draws that succeed once in a thousand: standard error of the mean of binomials.
    error = 2.0**-7 * math.sqrt(steps * 0.001 * 0.999 / count)
    assert abs(moved - steps * update) < 4 * error


def test_kahan_keeps_a_long_sum() -> None:
    torch.manual_seed(0)
    start = torch.randn(1000).bfloat16()
    weight, rest, plain, exact = start.clone(), torch.zeros_like(start), start.clone(), start.double()
    steps = 1000
    for _ in range(steps):
        update = start.abs().float() * torch.rand(1000) * 4e-4  # a tenth of the distance between bf16 numbers at most
        exact += update
        plain.copy_(plain.float().add_(update))
        kahan_(weight, rest, weight.float().add_(rest).add_(update))
    kept = weight.double() + rest.double()
    # The remainder is at most 2^-8 of the weight and is rounded to 2^-8 of itself: 2^-16 of the weight an update. Weights that
    # cross zero were larger before.
    bound = steps * 2.0**-16 * torch.maximum(exact.abs(), start.double().abs())
    assert ((kept - exact).abs() <= bound).all()
    assert (kept - exact).abs().mean() < 0.1 * bound.mean()  # most of the errors cancel
    assert torch.equal(plain, start)  # to the nearest, all of it is lost
    assert ((weight.double() - kept).abs() <= 2.0**-8 * kept.abs()).all()
