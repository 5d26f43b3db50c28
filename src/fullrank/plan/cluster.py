"""Clusters by the name of their device: what vendors publish of it, and what is assumed beside.

Published: memory, peak rates (dense, without sparsity), rates of links. Assumed, and therefore the user's to change: the share of
the peak that training reaches, the share of a link that collectives reach, latencies, how much of the communication hides behind
compute, and the network (one adapter a device, as in the vendors' own systems of eight). There is no default price.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import yaml
from pydantic import ValidationError

from fullrank.errors import UsageError
from fullrank.records import Cluster

#: The device that is measured (`fullrank.plan.here`).
THIS_MACHINE = "this-machine"

#: Of NCCL's own model of a ring (`src/graph/tuning.cc`, protocol Simple): 8.4 us a call; a hop of 3.4 us over NVLink, 5.7 us over
#: PCIe, 14 us over a network.
_CALL, _NVLINK, _PCIE, _NETWORK = 8.4e-6, 3.4e-6, 5.7e-6, 14e-6

_REACHED_A100 = "0.45 of the peak is reached, as torchtitan publishes of Llama 3 8B on 64 A100 (2,904 tokens/s each)"
_REACHED_H100 = (
    "0.35 of the peak is reached, between what torchtitan publishes of Llama 3.1 8B on 8 H100 without and with compilation"
)
_REACHED = "0.35 of the peak is assumed to be reached, as on H100"


@dataclass(frozen=True)
class _Device:
    """What is published of a device; rates of links each way."""

    data_sheet: str
    reached: str
    reached_ratio: float
    memory_bytes: int
    bf16_flops: float
    fp32_flops: float
    memory_bytes_per_second: float
    node_bytes_per_second: float
    network_bytes_per_second: float
    host_bytes_per_second: float
    """Not published: about 0.8 of what PCIe x16 of its generation is rated at."""
    hop: float = _NVLINK


DEVICES: dict[str, _Device] = {
    "a100-40g": _Device(
        "NVIDIA's data sheet of the A100 SXM4 40 GB and of DGX A100 (NVLink 600 GB/s both ways, 200 Gb/s a device)",
        _REACHED_A100,
        *(0.45, 40 * 10**9, 312e12, 19.5e12, 1.555e12, 300e9, 25e9, 25e9),
    ),
    "a100-80g": _Device(
        "NVIDIA's data sheet of the A100 SXM4 80 GB and of DGX A100 (NVLink 600 GB/s both ways, 200 Gb/s a device)",
        _REACHED_A100,
        *(0.45, 80 * 10**9, 312e12, 19.5e12, 2.039e12, 300e9, 25e9, 25e9),
    ),
    "h100-sxm": _Device(
        "NVIDIA's data sheet of the H100 SXM5 and of DGX H100 (NVLink 900 GB/s both ways, 400 Gb/s a device)",
        _REACHED_H100,
        *(0.35, 80 * 10**9, 989e12, 67e12, 3.35e12, 450e9, 50e9, 50e9),
    ),
    "h200-sxm": _Device(
        "NVIDIA's data sheet of the H200 SXM and of DGX H200 (NVLink 900 GB/s both ways, 400 Gb/s a device)",
        _REACHED,
        *(0.35, 141 * 10**9, 989e12, 67e12, 4.8e12, 450e9, 50e9, 50e9),
    ),
    "b200": _Device(
        "NVIDIA's Blackwell data sheet, a GPU of HGX B200, and that of DGX B200 (NVLink 1,800 GB/s both ways, 400 Gb/s a device)",
        _REACHED,
        *(0.35, 180 * 10**9, 2250e12, 75e12, 7.7e12, 900e9, 50e9, 50e9),
    ),
    "mi300x": _Device(
        "AMD's data sheet of the Instinct MI300X and its platform of eight (7 links of 128 GB/s both ways; 400 Gb/s a device)",
        "0.30 of the peak is assumed to be reached",
        *(0.30, 192 * 10**9, 1307e12, 163.4e12, 5.3e12, 448e9, 50e9, 50e9),
    ),
    "l40s": _Device(
        "NVIDIA's data sheet of the L40S (PCIe 4.0 x16, 64 GB/s both ways); a network of 100 Gb/s a device is assumed",
        "0.40 of the peak is assumed to be reached",
        *(0.40, 48 * 10**9, 362e12, 91.6e12, 0.864e12, 32e9, 12.5e9, 25e9),
        hop=_PCIE,
    ),
}


def known(name: str) -> None:
    """Does nothing for a device that can be simulated.

    Raises:
        UsageError: there is none of this name; the message lists them.
    """
    names = [*DEVICES, THIS_MACHINE]
    if name not in names:
        near = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.4)
        raise UsageError(
            f"--device: there is no device {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""),
            hint=f"there are {', '.join(names)}; every number of one can be changed with --assume KEY=VALUE",
        )


def preset(name: str, compute_type: Literal["bf16", "fp32"]) -> Cluster:
    """The cluster of a published device, eight to a node.

    Args:
        name: one of `DEVICES`.
        compute_type: of the products; fp32 is taken at the rate of fp32 units, since torch uses no TF32 unless told to.
    """
    device = DEVICES[name]
    is_bf16 = compute_type == "bf16"
    return Cluster(
        device=name,
        device_type="cuda",
        source=f"{device.data_sheet}; " + (device.reached if is_bf16 else "0.70 of the peak is assumed to be reached in fp32"),
        compute_type=compute_type,
        memory_bytes=device.memory_bytes,
        flops_per_second=device.bf16_flops if is_bf16 else device.fp32_flops,
        reached_ratio=device.reached_ratio if is_bf16 else 0.7,
        memory_bytes_per_second=device.memory_bytes_per_second,
        host_bytes_per_second=device.host_bytes_per_second,
        devices_per_node=8,
        node_bytes_per_second=device.node_bytes_per_second,
        network_bytes_per_second=device.network_bytes_per_second,
        link_ratio=0.8,
        call_latency_seconds=_CALL,
        node_latency_seconds=device.hop,
        network_latency_seconds=_NETWORK,
        overlap_ratio=0.9,
        shares_node=False,
    )


#: What is not a number of the cluster, but follows from the device and the recipe.
_FIXED = ("device", "device_type", "source", "compute_type", "shares_node")


def assumptions_in(words: Sequence[str]) -> dict[str, Any]:
    """`KEY=VALUE` words as fields of a cluster.

    Raises:
        UsageError: every word that names no assumption or has no value, at once.
    """
    keys = [name for name in Cluster.model_fields if name not in _FIXED]
    found, problems = {}, []
    for word in words:
        key, equals, value = word.partition("=")
        if key not in keys:
            near = difflib.get_close_matches(key, keys, n=1, cutoff=0.4)
            problems.append(f"--assume {word}: there is no {key!r} to assume" + (f"; did you mean {near[0]!r}?" if near else ""))
        elif not equals or not value:
            problems.append(f"--assume {word}: it has no value; write {key}=VALUE")
        else:
            found[key] = _number(value)
    if problems:
        raise UsageError("\n".join(problems), hint=f"there are {', '.join(keys)}")
    return found


def _number(text: str) -> Any:
    try:
        return float(text) if not text.isdigit() else int(text)  # YAML takes 450e9 for a string
    except ValueError:
        return yaml.safe_load(text)


def changed(cluster: Cluster, changes: Mapping[str, Any]) -> Cluster:
    """The cluster with some assumptions the user's.

    Raises:
        UsageError: a value is not possible.
    """
    told = {name: value for name, value in changes.items() if value is not None}
    named = [name for name in told if name not in ("devices_per_node", "price_per_hour")]
    source = cluster.source + (f"; as assumed by the user: {', '.join(named)}" if named else "")
    try:
        return Cluster.model_validate({**cluster.model_dump(), "source": source, **told})
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, one['loc']))}: {told.get(str(one['loc'][0]))!r}: {one['msg']}" for one in error.errors()]
        raise UsageError("\n".join(problems), hint="ratios are in (0, 1], all other assumptions positive numbers") from None
