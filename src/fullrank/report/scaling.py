"""A simulation -> one chart: where a step's time goes, and what is left of a device's speed, from one device to many.

Two columns, strong and weak scaling; above, seconds of a step by part; below, efficiency. Numbers of devices that do not fit
have a place on the axis and no bar. Needs the `report` extra.
"""

from __future__ import annotations

from typing import Any

from fullrank.records import Simulation
from fullrank.report.figures import BASE, GRID, MUTED, TUNED, Figure, altair, render

_COLUMN_WIDTH, _BARS_HEIGHT, _LINE_HEIGHT = 420, 210, 130
#: Part of a step, its colour, and what it is called.
_PARTS = (("compute", TUNED), ("exposed communication", BASE), ("update", MUTED))
_TITLES = {
    "strong": "Strong scaling: the recipe's step, shared by more devices",
    "weak": "Weak scaling: as much for each device, so that a step grows",
}


def draw(simulation: Simulation) -> Figure:
    """The chart.

    Raises:
        UsageError: Altair or its renderer is not installed.
    """
    alt = altair()
    columns = [_column(alt, simulation, scaling) for scaling in _TITLES]
    cluster = simulation.cluster
    caption = (
        f"Simulated from stated assumptions, not measured: {simulation.model.source} on {cluster.device}, "
        f"{cluster.devices_per_node} to a node. Bars: seconds of a step; lines: tokens a second of a device, beside the "
        "fewest devices that fit."
    )
    words = f"{simulation.model.source} on {cluster.device}, {cluster.devices_per_node} to a node: simulated, not measured"
    title = alt.Title(words, anchor="start", fontSize=14, fontWeight=600, offset=10)
    whole = alt.hconcat(*columns, spacing=28, title=title).resolve_scale(color="shared")
    return render("simulation", "From one device to many", caption, whole)


def parts(simulation: Simulation, scaling: str) -> list[dict[str, Any]]:
    """Seconds of a step by part, for every number of devices that fits."""
    return [
        {"devices": f"{row.devices:,}", "part": part, "order": number, "seconds": seconds}
        for row in simulation.rows
        if row.scaling == scaling and row.fits
        for number, (part, seconds) in enumerate(
            zip((name for name, _ in _PARTS), (row.compute_seconds, row.exposed_seconds, row.update_seconds), strict=True)
        )
    ]


def _column(alt: Any, simulation: Simulation, scaling: str) -> Any:
    rows = [row for row in simulation.rows if row.scaling == scaling]
    names = [f"{row.devices:,}" for row in rows]
    domain = alt.Scale(domain=names)
    bottom = alt.X("devices:N", sort=names, scale=domain, axis=alt.Axis(title="Devices", labelAngle=0, grid=False))
    top = alt.X("devices:N", sort=names, scale=domain, axis=alt.Axis(title=None, labels=False, ticks=False, grid=False))
    colors = alt.Scale(domain=[name for name, _ in _PARTS], range=[color for _, color in _PARTS])
    key = alt.Legend(title=None, orient="top", direction="horizontal")
    bars = (
        alt.Chart(alt.Data(values=parts(simulation, scaling)), width=_COLUMN_WIDTH, height=_BARS_HEIGHT)
        .mark_bar()
        .encode(
            x=top,
            y=alt.Y("seconds:Q", stack="zero", axis=alt.Axis(title="Seconds of a step", tickCount=5)),
            color=alt.Color("part:N", scale=colors, legend=key),
            order=alt.Order("order:Q"),
        )
    )
    unfit = [{"devices": f"{row.devices:,}", "words": "does not fit"} for row in rows if not row.fits]
    if unfit:
        words = alt.Chart(alt.Data(values=unfit)).mark_text(
            angle=270, align="left", baseline="middle", dx=6, fontSize=11, color=MUTED
        )
        bars = bars + words.encode(x=top, y=alt.value(_BARS_HEIGHT), text="words:N")
    values = [{"devices": f"{row.devices:,}", "value": row.efficiency_ratio} for row in rows if row.efficiency_ratio is not None]
    efficiency = alt.Chart(alt.Data(values=values), width=_COLUMN_WIDTH, height=_LINE_HEIGHT)
    y = alt.Y(
        "value:Q", axis=alt.Axis(title="Efficiency", format=".2f", values=[0, 0.25, 0.5, 0.75, 1]), scale=alt.Scale(domain=[0, 1])
    )
    line = efficiency.mark_line(color=TUNED, strokeWidth=1.6, clip=False, point={"color": TUNED, "size": 30}).encode(
        x=bottom, y=y
    )
    rule = alt.Chart(alt.Data(values=[{"value": 1}])).mark_rule(color=GRID).encode(y="value:Q")
    title = alt.Title(_TITLES[scaling], anchor="start", frame="group", fontSize=12, fontWeight=600, offset=8)
    return alt.vconcat(bars.properties(title=title), rule + line, spacing=8)
