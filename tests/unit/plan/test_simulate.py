"""The arithmetic of a simulated step, by hand."""

from __future__ import annotations

from typing import Any

import pytest

from fullrank.plan.simulate import Freight, Round, Timing, across_seconds, ring_seconds, timing
from fullrank.records import Cluster

#: Round numbers: 100 FLOP/s of which half is reached, four devices a node, links of 10 and 2 bytes a second, reached wholly.
CLUSTER = Cluster(
    device="a-device",
    device_type="cuda",
    source="made up",
    compute_type="bf16",
    memory_bytes=1000,
    flops_per_second=100.0,
    reached_ratio=0.5,
    memory_bytes_per_second=50.0,
    host_bytes_per_second=5.0,
    devices_per_node=4,
    node_bytes_per_second=10.0,
    network_bytes_per_second=2.0,
    link_ratio=1.0,
    call_latency_seconds=0.0,
    node_latency_seconds=0.0,
    network_latency_seconds=0.0,
    overlap_ratio=0.0,
    shares_node=False,
)
#: Two blocks of 40 bytes, 20 outside; gradients of twice that.
FREIGHT = Freight(blocks=2, block_bytes=40, outside_bytes=20, block_gradient_bytes=80, outside_gradient_bytes=40)
#: 300 operations, 240 of them in blocks.
ROUND = Round(flops=300, block_flops=240)


def cluster(**changes: Any) -> Cluster:
    return CLUSTER.model_copy(update=changes)


def step(assumed: Cluster = CLUSTER, **changes: Any) -> Timing:
    given: dict[str, Any] = {
        "ranks": 4,
        "replicas": 1,
        "recomputes": False,
        "sync": "step",
        "updated_bytes": 0.0,
        "waiting_bytes": 0.0,
    }
    rounds = changes.pop("rounds", [ROUND])
    return timing(assumed, rounds, FREIGHT, **(given | changes))


# ---- collectives ----------------------------------------------------------------------------------------------------


def test_a_ring_passes_all_but_a_ranks_own_part() -> None:
    assert ring_seconds(CLUSTER, 100, 1) == 0
    assert ring_seconds(CLUSTER, 100, 2) == pytest.approx(1 / 2 * 100 / 10)
    assert ring_seconds(CLUSTER, 100, 4) == pytest.approx(3 / 4 * 100 / 10)


def test_across_nodes_the_adapters_of_a_node_work_together() -> None:
    # 4 x 2 bytes a second, less than the 10 of the device's own link
    assert ring_seconds(CLUSTER, 100, 8) == pytest.approx(7 / 8 * 100 / 8)
    # with adapters of 4, 16 together, the device's link is what is left
    assert ring_seconds(cluster(network_bytes_per_second=4.0), 100, 8) == pytest.approx(7 / 8 * 100 / 10)


def test_latency_is_a_call_and_every_hop() -> None:
    slow = cluster(call_latency_seconds=100.0, node_latency_seconds=1.0, network_latency_seconds=10.0)
    assert ring_seconds(slow, 0, 4) == pytest.approx(100 + 3 * 1)
    assert ring_seconds(slow, 0, 8) == pytest.approx(100 + 6 * 1 + 1 * 10)
    assert ring_seconds(slow, 0, 16) == pytest.approx(100 + 12 * 1 + 3 * 10)


def test_a_part_of_a_links_rate_is_reached() -> None:
    assert ring_seconds(cluster(link_ratio=0.5), 100, 4) == pytest.approx(2 * ring_seconds(CLUSTER, 100, 4))


def test_replicas_sum_their_parts_over_the_network_twice() -> None:
    assert across_seconds(CLUSTER, 100, 1, 4) == 0
    assert across_seconds(CLUSTER, 100, 2, 4) == pytest.approx(2 * 1 / 2 * 100 / 2)
    assert across_seconds(CLUSTER, 100, 4, 4) == pytest.approx(2 * 3 / 4 * 100 / 2)
    # two groups of two ranks meet inside their node
    assert across_seconds(CLUSTER, 100, 2, 2) == pytest.approx(2 * 1 / 2 * 100 / 10)


def test_ranks_of_a_shared_node_share_its_links() -> None:
    shared = cluster(shares_node=True)
    assert ring_seconds(shared, 100, 2) == ring_seconds(CLUSTER, 100, 2)  # as two had it
    assert ring_seconds(shared, 100, 4) == pytest.approx(2 * ring_seconds(CLUSTER, 100, 4))


# ---- steps ----------------------------------------------------------------------------------------------------------


def test_one_device_computes_and_tells_nobody() -> None:
    assert step(ranks=1) == Timing(compute=300 / 50, communication=0, exposed=0, update=0)


def test_recomputed_blocks_cost_a_third_of_theirs_again() -> None:
    assert step(ranks=1, recomputes=True).compute == pytest.approx((300 + 240 / 3) / 50)


def test_two_backward_passes() -> None:
    # 100 forward, 200 + 80 of a backward pass that computes blocks again
    assert step(ranks=1, recomputes=True, passes=2).compute == pytest.approx((100 + 2 * 280) / 50)


def test_every_row_gathers_blocks_twice_and_the_last_sums_gradients() -> None:
    gathered, summed = 3 / 4 * (20 + 2 * 2 * 40) / 10, 3 / 4 * (2 * 80 + 40) / 10
    assert step().communication == pytest.approx(gathered + summed)
    assert step(rounds=[ROUND] * 3).communication == pytest.approx(3 * gathered + summed)
    assert step(rounds=[ROUND] * 3, sync="row").communication == pytest.approx(3 * (gathered + summed))


def test_nothing_hides_where_nothing_overlaps() -> None:
    found = step()
    assert found.exposed == pytest.approx(found.communication)
    assert found.step == pytest.approx(found.compute + found.communication)


def test_what_compute_hides_is_not_exposed() -> None:
    # forward 2 s hide the second block's gather (3 s) but for 1; backward 4 s hide 6 + 12 s but for 14. Nothing precedes the
    # gather of what is outside (1.5 s) and of the first block (3 s); nothing follows the sum of what is outside (3 s).
    assert step(cluster(overlap_ratio=1.0)).exposed == pytest.approx(1.5 + 3 + 1 + 14 + 3)
    fast = cluster(overlap_ratio=1.0, flops_per_second=1.0)
    assert step(fast).exposed == pytest.approx(1.5 + 3 + 3)


def test_replicas_gather_in_their_group_alone() -> None:
    whole, hybrid = step(ranks=8), step(ranks=8, replicas=2)
    inside = step(ranks=4).communication
    # a rank has a quarter of 80 + 80 + 40 bytes of gradients, summed over two groups at 2 bytes a second
    assert hybrid.communication == pytest.approx(inside + 2 * 1 / 2 * (200 / 4) / 2)
    assert whole.communication == pytest.approx(7 / 8 * (180 + 200) / 8)


def test_updates_move_memory_and_what_waits_goes_both_ways() -> None:
    assert step(updated_bytes=100, waiting_bytes=10).update == pytest.approx(100 / 50 + 2 * 10 / 5)


def test_ranks_of_one_cpu_compute_no_faster_together() -> None:
    alone, four = step(cluster(shares_node=True), ranks=1), step(cluster(shares_node=True), ranks=4)
    assert four.compute == pytest.approx(4 * alone.compute)  # each has a quarter of the cores for a row like the one's


def test_more_ranks_never_take_less_communication() -> None:
    seconds = [step(ranks=2**k).communication for k in range(11)]
    assert seconds == sorted(seconds)


def test_weights_that_are_whole_everywhere_are_gathered_once_a_step() -> None:
    """Gradients of 2 x 80 + 40 = 200 bytes; on four ranks at 10 a second, three quarters of them are passed on: 15 s."""
    for sync, sums in (("step", 1), ("row", 2)):
        found = step(rounds=[ROUND, ROUND], sync=sync, whole_weights=True)
        assert found.communication == found.exposed == pytest.approx(sums * 15 + 15)
    assert step(ranks=1, whole_weights=True).communication == 0
