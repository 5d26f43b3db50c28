"""A simulation as text: its assumptions, then a table for strong and one for weak scaling, then what they show."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from fullrank.records import Cluster, SimulatedRow, Simulation
from fullrank.units import format_bytes, format_count, format_seconds, plural

_TITLES = {
    "strong": "strong scaling: the recipe's step, shared by more devices (what is learned stays the same)",
    "weak": "weak scaling: as much for each device as one alone has, so that a step grows (what is learned changes)",
}


def printed(found: Simulation, console: Console) -> None:
    """Prints it, whole wherever it goes."""
    console.width = max(console.width, _WIDTH)
    console.print(Group(*_lines(found)), soft_wrap=True)


def _lines(found: Simulation) -> list[RenderableType]:
    cluster = found.cluster
    trained = "all" if found.trained_parameters == found.model.parameters else format_count(found.trained_parameters)
    head = [
        f"simulation: {found.model.source}, {format_count(found.model.parameters)} parameters, {trained} trained, "
        f"{found.precision}, {found.optimizer}; {found.tokens_per_step:,.0f} tokens a step",
        *_cluster(cluster),
        *(f"  {words}" for words in found.assumptions),
    ]
    tables = [_table([row for row in found.rows if row.scaling == scaling], cluster, _TITLES[scaling]) for scaling in _TITLES]
    return [Text("\n".join(head)), *tables, Text("\n".join(f"- {words}" for words in found.notes))]


def _cluster(cluster: Cluster) -> list[str]:
    return [
        f"on {cluster.device}: {format_bytes(cluster.memory_bytes)}, {cluster.flops_per_second / 1e12:,.4g} TFLOP/s "
        f"{cluster.compute_type}, of which {cluster.reached_ratio:.2f} is reached; memory "
        f"{_rate(cluster.memory_bytes_per_second)}, host {_rate(cluster.host_bytes_per_second)}",
        f"  {plural(cluster.devices_per_node, 'device')} a node; links {_rate(cluster.node_bytes_per_second)} inside, "
        f"{_rate(cluster.network_bytes_per_second)} between nodes (each way, a device), {cluster.link_ratio:.2f} of it reached",
        f"  {1e6 * cluster.call_latency_seconds:.3g} us a collective, {1e6 * cluster.node_latency_seconds:.3g} us a hop inside, "
        f"{1e6 * cluster.network_latency_seconds:.3g} us between nodes; it hides behind {cluster.overlap_ratio:.2f} of compute",
        f"  from: {cluster.source}",
        f"  price: {cluster.price_per_hour:g} an hour a device" if cluster.price_per_hour is not None else "  price: not given",
    ]


def _rate(bytes_per_second: float) -> str:
    return f"{format_bytes(bytes_per_second)}/s"


_SIZES = ("devices", "memory", "batch", "rows", "recom-\npute", "busy")
_TIMES = ("compute\ns", "communi-\ncation s", "exposed\ns", "step\ns", "tokens\na second", "effi-\nciency", "run")
#: Columns of the widest table; a narrower terminal wraps its lines rather than lose what stands in them.
_WIDTH = 120


def _table(rows: Sequence[SimulatedRow], cluster: Cluster, title: str) -> Table:
    has_price = cluster.price_per_hour is not None
    table = Table(title=title, title_justify="left", title_style="", box=None, pad_edge=False)
    for name in [*_SIZES, *_TIMES, *(["price"] if has_price else [])]:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        sizes = (f"{row.devices:,}", format_bytes(row.peak_bytes), f"{row.global_batch_size:,}", f"{row.rows_per_device:,}")
        table.add_row(*sizes, row.recompute, f"{row.busy_ratio:.2f}", *(_times(row, has_price) if row.fits else ["too large"]))
    return table


def _times(row: SimulatedRow, has_price: bool) -> list[str]:
    seconds = (row.compute_seconds, row.communication_seconds, row.exposed_seconds, row.step_seconds)
    return [
        *(_short(one or 0.0) for one in seconds),
        f"{row.tokens_per_second or 0.0:,.0f}",
        f"{row.efficiency_ratio or 0.0:.2f}",
        "" if row.run_seconds is None else format_seconds(row.run_seconds),
        *(["" if row.price is None else f"{row.price:,.2f}"] if has_price else []),
    ]


def _short(seconds: float) -> str:
    if 0 < seconds < 0.001:
        return "< 0.001"
    return f"{seconds:.3g}" if seconds < 100 else f"{seconds:,.0f}"
