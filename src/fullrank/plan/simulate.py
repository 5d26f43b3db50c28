"""What a step costs on N devices, as arithmetic on stated assumptions (`fullrank.records.Cluster`): nothing is measured here.

Letters: n ranks of a group that divides a model, M of a node's of them, R groups (replicas), B bytes, w a link's rate, a a hop's
latency, c a call's latency.

    all-gather, reduce-scatter   c + hops x a + (n - 1) / n x B / w
    all-reduce                   both: twice that

A ring passes n - 1 pieces of B / n, one after the other, over every link at once (Thakur, Rabenseifner & Gropp 2005, Optimization
of Collective Communication Operations in MPICH; fewest bytes: Patarasuk & Yuan 2009). A piece makes n - 1 hops, of which one less
than there are nodes go between nodes. Inside a node w is the device's link. Across nodes as many rings are laid as a node has
devices, each leaving it by another adapter, so that w is M adapters' together, but no more than the device's link: what NCCL's
tests call bus bandwidth.

FSDP2 (Zhao et al. 2023; `fullrank.parallel.sharded`) gathers for every row what is outside the blocks once, and every block
twice, for the forward and for the backward pass; it sums and scatters gradients in fp32 once a step or once a row
(`fullrank.parallel.fsdp2.Sync`), and with replicas sums each part over the groups. While a block computes, the next is gathered
and the last one's gradients travel, so that of each pass

    exposed = what nothing precedes + max(0, the rest - overlap x compute of the pass)

Nothing precedes what is outside the blocks and the first block, and nothing follows the gradients of what is outside. ZeRO-3
(Rajbhandari et al. 2020) is the same, its gradients summed once a row. ZeRO-1 and ZeRO-2 hold weights whole: no row gathers
any, gradients are summed once a step (1) or a row (2), and updated weights are gathered at the end of a step, which nothing
hides. A third of the needed operations are the forward pass's; recomputed blocks repeat theirs in the backward pass
(`fullrank.models.flops`).

Ranks compute rows side by side, and all wait for the longest (`fullrank.sequences.layout.dealt`). Updates read and write memory:
weights and states both ways, gradients twice (for the norm, for the update).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fullrank.parallel.fsdp2 import Sync
from fullrank.records import Cluster

#: Recomputed blocks: their forward pass, a third of what their products need, once more.
_AGAIN = 1 / 3


@dataclass(frozen=True)
class Round:
    """The rows that ranks compute side by side, of which the longest counts."""

    flops: float
    """Needed by the longest row."""
    block_flops: float
    """Of these, those of blocks."""


@dataclass(frozen=True)
class Freight:
    """Bytes that are gathered and summed, of the whole model."""

    blocks: int
    """How many there are."""
    block_bytes: float
    """Of one, mean, as it is gathered."""
    outside_bytes: float
    block_gradient_bytes: float
    """Of one, mean, as they are summed."""
    outside_gradient_bytes: float


@dataclass(frozen=True)
class Timing:
    """Seconds of a step."""

    compute: float
    communication: float
    exposed: float
    update: float

    @property
    def step(self) -> float:
        """Of the wall."""
        return self.compute + self.exposed + self.update


def ranks_of_a_node(cluster: Cluster, ranks: int) -> int:
    """How many of the ranks are on a node, filled one after the other."""
    return min(cluster.devices_per_node, ranks)


def nodes_of(cluster: Cluster, ranks: int) -> int:
    """Nodes that so many ranks fill."""
    return -(-ranks // cluster.devices_per_node)


def share_of_node(cluster: Cluster, ranks: int) -> float:
    """A rank's part of what is said of a device: all of it, unless it is a node's."""
    return 1 / ranks_of_a_node(cluster, ranks) if cluster.shares_node else 1.0


def ring_seconds(cluster: Cluster, bytes_: float, ranks: int, *, all_ranks: int | None = None) -> float:
    """An all-gather, or a reduce-scatter, of `bytes_` in all among ranks that fill one node after the other.

    Args:
        cluster: the assumptions.
        bytes_: of the whole that is gathered or summed.
        ranks: of the group.
        all_ranks: of the run, where that is more: on nodes that are shared they share the links.
    """
    if ranks == 1:
        return 0.0
    nodes, here = nodes_of(cluster, ranks), ranks_of_a_node(cluster, ranks)
    rate = cluster.node_bytes_per_second
    if cluster.shares_node:  # as two ranks of a node had it
        rate *= min(1.0, 2 / ranks_of_a_node(cluster, all_ranks or ranks))
    if nodes > 1:
        rate = min(rate, here * cluster.network_bytes_per_second)
    hops = (ranks - nodes) * cluster.node_latency_seconds + (nodes - 1) * cluster.network_latency_seconds
    return cluster.call_latency_seconds + hops + (ranks - 1) / ranks * bytes_ / (cluster.link_ratio * rate)


def across_seconds(cluster: Cluster, bytes_: float, replicas: int, group: int) -> float:
    """An all-reduce of a rank's `bytes_` over the groups that hold the model once each, by all ranks of a group at once.

    Groups that fill nodes meet over the network, each rank by its own adapter; smaller ones meet inside a node they share.
    """
    if replicas == 1:
        return 0.0
    together = max(1, cluster.devices_per_node // group)  # groups of a node
    nodes = -(-replicas // together)
    rate = cluster.node_bytes_per_second if nodes == 1 else min(cluster.node_bytes_per_second, cluster.network_bytes_per_second)
    if cluster.shares_node:
        rate *= min(1.0, 2 / ranks_of_a_node(cluster, replicas * group))
    hops = (replicas - nodes) * cluster.node_latency_seconds + (nodes - 1) * cluster.network_latency_seconds
    once = cluster.call_latency_seconds + hops + (replicas - 1) / replicas * bytes_ / (cluster.link_ratio * rate)
    return 2 * once


def timing(
    cluster: Cluster,
    rounds: Sequence[Round],
    freight: Freight,
    *,
    ranks: int,
    replicas: int,
    recomputes: bool,
    sync: Sync,
    updated_bytes: float,
    waiting_bytes: float,
    passes: int = 1,
    whole_weights: bool = False,
) -> Timing:
    """A step's seconds.

    Args:
        cluster: the assumptions.
        rounds: of the step, one after the other.
        freight: of the model.
        ranks: devices of the run.
        replicas: groups of them that hold the model once each.
        recomputes: whether blocks are computed again in the backward pass.
        sync: when gradients are summed.
        updated_bytes: that a rank's update reads and writes.
        waiting_bytes: of a rank, that come from host memory and go back, each step.
        passes: backward passes through every block (`fullrank.plan.memory.goes_twice`).
        whole_weights: whether every rank holds them (ZeRO-1, ZeRO-2); they are of the gradients' type.
    """
    share, group = share_of_node(cluster, ranks), ranks // replicas
    rate = cluster.flops_per_second * cluster.reached_ratio * share

    def ring(bytes_: float) -> float:
        return ring_seconds(cluster, bytes_, group, all_ranks=ranks)

    def summed(bytes_: float) -> float:
        return ring(bytes_) + across_seconds(cluster, bytes_ / group, replicas, group)

    block, outside = (0.0, 0.0) if whole_weights else (ring(freight.block_bytes), ring(freight.outside_bytes))
    block_sum, outside_sum = summed(freight.block_gradient_bytes), summed(freight.outside_gradient_bytes)
    compute = communication = exposed = 0.0
    for number, row in enumerate(rounds, 1):
        forward = row.flops / 3 / rate
        backward = passes * (row.flops * 2 / 3 + (row.block_flops * _AGAIN if recomputes else 0.0)) / rate
        sums = sync == "row" or number == len(rounds)
        later = freight.blocks * (block + (block_sum if sums else 0.0))
        compute += forward + backward
        communication += outside + freight.blocks * block + later + (outside_sum if sums else 0.0)
        exposed += outside + block + (outside_sum if sums else 0.0)
        exposed += max(0.0, (freight.blocks - 1) * block - cluster.overlap_ratio * forward)
        exposed += max(0.0, later - cluster.overlap_ratio * backward)
    if whole_weights:
        updated = ring(freight.blocks * freight.block_gradient_bytes + freight.outside_gradient_bytes)
        communication, exposed = communication + updated, exposed + updated
    update = updated_bytes / (cluster.memory_bytes_per_second * share)
    update += 2 * waiting_bytes / (cluster.host_bytes_per_second * share)
    return Timing(compute, communication, exposed, update)
