"""Clusters by name, and what a user assumes in their place."""

from __future__ import annotations

import pytest

from fullrank.errors import UsageError
from fullrank.plan.cluster import DEVICES, assumptions_in, changed, known, preset


@pytest.mark.parametrize("name", DEVICES)
def test_every_preset_says_where_it_comes_from(name: str) -> None:
    known(name)
    bf16, fp32 = preset(name, "bf16"), preset(name, "fp32")
    assert "data sheet" in bf16.source and "reached" in bf16.source
    assert bf16.flops_per_second > fp32.flops_per_second
    assert bf16.price_per_hour is None  # a price is the user's to give
    assert bf16.node_bytes_per_second >= bf16.network_bytes_per_second


#: As data sheets print it: GB of memory, TFLOPS in bf16 and in fp32, GB/s of memory, GB/s of its links both ways, Gb/s of network
#: a device. Where a sheet gives bf16 "with sparsity" alone, that is here, and halved below.
PRINTED: dict[str, tuple[float, float, float, float, float, float]] = {
    "a100-40g": (40, 624, 19.5, 1555, 600, 200),
    "a100-80g": (80, 624, 19.5, 2039, 600, 200),
    "h100-sxm": (80, 1979, 67, 3350, 900, 400),
    "h200-sxm": (141, 1979, 67, 4800, 900, 400),
    "b200": (180, 4500, 75, 7700, 1800, 400),  # a GPU of HGX B200
    "mi300x": (192, 2614.9, 163.4, 5300, 7 * 128, 400),
    "l40s": (48, 733, 91.6, 864, 64, 100),
}


@pytest.mark.parametrize("name", DEVICES)
def test_presets_are_what_vendors_print(name: str) -> None:
    memory, sparse, fp32, bandwidth, links, network = PRINTED[name]
    found = preset(name, "bf16")
    assert found.memory_bytes == memory * 1e9
    # Sheets round: 989.4 and 1,979, 362.05 and 733.
    assert found.flops_per_second == pytest.approx(sparse / 2 * 1e12, rel=0.013)
    assert preset(name, "fp32").flops_per_second == fp32 * 1e12
    assert found.memory_bytes_per_second == bandwidth * 1e9
    assert found.node_bytes_per_second == links / 2 * 1e9
    assert found.network_bytes_per_second == network / 8 * 1e9


def test_an_unknown_device_is_told_from_those_there_are() -> None:
    with pytest.raises(UsageError, match=r"no device 'h100'; did you mean 'h100-sxm'\?") as refused:
        known("h100")
    assert "this-machine" in str(refused.value.hint) and "mi300x" in str(refused.value.hint)


def test_assumptions_are_fields_of_the_cluster() -> None:
    given = assumptions_in(["network_bytes_per_second=12.5e9", "reached_ratio=0.5", "memory_bytes=96000000000"])
    found = changed(preset("h100-sxm", "bf16"), {**given, "devices_per_node": 4, "price_per_hour": None})
    assert (found.network_bytes_per_second, found.reached_ratio, found.memory_bytes) == (12.5e9, 0.5, 96 * 10**9)
    assert found.devices_per_node == 4 and found.price_per_hour is None
    assert found.source.endswith("as assumed by the user: network_bytes_per_second, reached_ratio, memory_bytes")


def test_every_wrong_assumption_at_once() -> None:
    with pytest.raises(UsageError) as refused:
        assumptions_in(["reached=0.5", "overlap_ratio", "device=mine"])
    words = refused.value.message
    assert "there is no 'reached' to assume; did you mean 'reached_ratio'?" in words
    assert "overlap_ratio: it has no value" in words and "no 'device' to assume" in words


@pytest.mark.parametrize(
    ("key", "value"),
    [("reached_ratio", 1.5), ("price_per_hour", -1.0), ("devices_per_node", 0), ("memory_bytes", "many"), ("link_ratio", 0)],
)
def test_impossible_values(key: str, value: object) -> None:
    with pytest.raises(UsageError, match=rf"{key}: {value!r}: "):
        changed(preset("h100-sxm", "bf16"), {key: value})
