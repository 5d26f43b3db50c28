"""Report -> charts: Altair specifications rendered to SVG for the page and PNG for slides; no browser, no network.

Promises: axes carry units; colour never carries a meaning alone (the base model is hollow, the tuned one filled); long
curves are thinned by averaging consecutive steps, and the caption says over how many. Needs the `report` extra; the
page stands without it.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fullrank.errors import missing_extra
from fullrank.records import StepRow
from fullrank.report.gather import LOWER_IS_BETTER, Report, metric_name, score_text

# The page's stylesheet maps these five colours to its dark theme; a colour added here needs a rule there.
INK = "#1f2933"
MUTED = "#5f6b7a"
GRID = "#e4e7eb"
BASE = "#8a6d3b"
TUNED = "#0b5fa5"

WIDTH, HEIGHT = 440, 250
"""Of a whole curve chart, axes included, so that neighbours in the page line up."""
PANEL_WIDTH, ROW_HEIGHT = 360, 58
"""Of the plot of a score panel, and of one score in it."""
POINTS = 400
"""Most points of a curve: about one a pixel."""
PNG_SCALE = 2.5


@dataclass(frozen=True)
class Figure:
    """One chart: file name without suffix, words around it, and both renderings."""

    name: str
    title: str
    caption: str
    svg: str
    png: bytes


def draw(report: Report) -> list[Figure]:
    """Every chart the records allow, in the order of the page.

    Raises:
        UsageError: Altair or its renderer is not installed.
    """
    alt = altair()
    scores = _scores(alt, report)
    figures = [scores] if scores else []
    rows = [row for row in report.steps if row.step > 0]
    if len(rows) > 1:
        figures += [
            _loss(alt, report, rows),
            _learning_rate(alt, rows),
            _gradient_norm(alt, report, rows),
            _changed(alt, report, rows),
            _speed(alt, rows),
        ]
    return figures


def altair() -> Any:
    """The library, once what it renders with is there.

    Raises:
        UsageError: Altair or its renderer is not installed.
    """
    try:
        import altair as alt
        import vl_convert  # noqa: F401 - what Altair renders SVG and PNG with
    except ImportError as error:
        package = "vl-convert-python" if error.name == "vl_convert" else "altair"
        raise missing_extra(package, "report", "drawing charts") from error
    return alt


# ---- data -----------------------------------------------------------------------------------------------------------


def thin(rows: Sequence[StepRow], field: str, points: int = POINTS) -> tuple[list[dict[str, float]], int]:
    """`field` over the steps as at most `points` means of consecutive steps, each at its last step.

    Returns:
        the points as {step, value} and how many steps one stands for.
    """
    every = math.ceil(len(rows) / points) or 1
    groups = [rows[start : start + every] for start in range(0, len(rows), every)]
    return [{"step": group[-1].step, "value": sum(getattr(row, field) for row in group) / len(group)} for group in groups], every


def validation_points(report: Report) -> list[dict[str, Any]]:
    """Validation losses over the steps, the base model's at step 0, with the exported one marked."""
    losses = {row.step: row.validation_loss for row in report.steps if row.validation_loss is not None}
    losses.setdefault(0, report.train.validation_loss_before)
    return [{"step": step, "value": loss, "exported": step == report.train.best_step} for step, loss in sorted(losses.items())]


def _per_step(every: int) -> str:
    return "One point a step." if every == 1 else f"Each point is the mean of {every} consecutive steps."


# ---- charts ---------------------------------------------------------------------------------------------------------


def _axis(alt: Any, title: str | None, **options: Any) -> Any:
    return alt.Axis(title=title, **options)


def _steps_axis(alt: Any, steps: float) -> Any:
    """The same axis under every curve: from 0, the base model, to the last step; ticks at whole steps."""
    axis = _axis(alt, "Optimizer step", format=",d", grid=False, tickCount=min(6, steps))
    return alt.X("step:Q", axis=axis, scale=alt.Scale(domain=[0, steps], nice=False))


def _line(alt: Any, values: list[dict[str, float]], title: str, axis: dict[str, Any], scale: dict[str, Any]) -> Any:
    """One quantity over the steps."""
    y = alt.Y("value:Q", axis=_axis(alt, title, tickCount=5, **axis), scale=alt.Scale(**scale))
    chart = alt.Chart(alt.Data(values=values), width=WIDTH, height=HEIGHT)
    return chart.mark_line(color=TUNED, strokeWidth=1.4, point=_points_of(len(values), TUNED)).encode(
        x=_steps_axis(alt, values[-1]["step"]), y=y
    )


def _points_of(count: int, color: str) -> Any:
    """A line through two or three points says little by itself, so a very short curve shows its points."""
    return {"color": color, "size": 22} if count < 4 else False


def _loss(alt: Any, report: Report, rows: Sequence[StepRow]) -> Figure:
    training, every = thin(rows, "loss")
    validation = validation_points(report)
    values = [{**point, "series": "training"} for point in training] + [{**point, "series": "validation"} for point in validation]
    color = alt.Color(
        "series:N",
        scale=alt.Scale(domain=["training", "validation"], range=[BASE, TUNED]),
        legend=alt.Legend(title=None, orient="top-right", symbolType="circle", direction="vertical"),
    )
    y = alt.Y("value:Q", axis=_axis(alt, "Loss (nats a token)", tickCount=5), scale=alt.Scale(zero=False, nice=True))
    x = _steps_axis(alt, rows[-1].step)
    base = alt.Chart(alt.Data(values=values), width=WIDTH, height=HEIGHT)
    of_training = base.transform_filter("datum.series === 'training'").mark_line(
        strokeWidth=1, opacity=0.85, point=_points_of(len(training), BASE)
    )
    of_validation = base.transform_filter("datum.series === 'validation'").mark_line(strokeWidth=1.8)
    dots = base.transform_filter("datum.series === 'validation'").mark_point(filled=True, opacity=1)
    size = alt.condition("datum.exported", alt.value(90), alt.value(28))
    chart = alt.layer(
        of_training.encode(x=x, y=y, color=color),
        of_validation.encode(x=x, y=y, color=color),
        dots.encode(x=x, y=y, color=color, size=size),
    )
    caption = (
        f"Mean loss over supervised tokens. {_per_step(every)} Step 0 of the validation loss is the base model; the "
        "large point is "
        f"step {report.train.best_step:,}, whose weights were exported."
    )
    return render("loss", "Training and validation loss", caption, chart)


def _learning_rate(alt: Any, rows: Sequence[StepRow]) -> Figure:
    values, every = thin(rows, "learning_rate")
    chart = _line(alt, values, "Learning rate", {"format": ".1e"}, {"zero": True})
    return render("learning_rate", "Learning rate", f"The rate each step was made with. {_per_step(every)}", chart)


def _gradient_norm(alt: Any, report: Report, rows: Sequence[StepRow]) -> Figure:
    values, every = thin(rows, "grad_norm")
    positive = [point["value"] for point in values if point["value"] > 0]
    wide = len(positive) == len(values) and max(positive) > 100 * min(positive)
    scale: dict[str, Any] = {"type": "log"} if wide else {"zero": True}
    chart = _line(alt, values, "Gradient norm" + (" (log scale)" if wide else ""), {}, scale)
    limit = report.recipe.train.clip_norm
    words = f"Global L2 norm before clipping. {_per_step(every)}"
    if limit is not None:
        clipped = sum(row.grad_norm > limit for row in rows)
        rule = alt.Chart(alt.Data(values=[{"value": limit}])).mark_rule(color=MUTED, strokeDash=[5, 4]).encode(y="value:Q")
        chart = alt.layer(chart, rule)
        words += f" Dashed: the limit of {limit:g}; {clipped:,} of {len(rows):,} steps were scaled down to it."
    return render("gradient_norm", "Gradient norm", words, chart)


def _changed(alt: Any, report: Report, rows: Sequence[StepRow]) -> Figure:
    values, every = thin(rows, "changed_ratio")
    chart = _line(alt, values, "Share of weights changed", {"format": ".2f"}, {"domain": [0, 1]})
    rounded = report.recipe.train.precision.removeprefix("bf16-")
    words = f"Of a sample of every tensor, the share that a step changed. {_per_step(every)} "
    if rounded in ("stochastic", "kahan", "nearest"):
        words += (
            f"Weights of 16 bits stay where an update is too small for them; {rounded} rounding "
            + {
                "stochastic": "moves as many, by chance, as makes the mean right.",
                "kahan": "keeps what is left over for later steps.",
                "nearest": "loses it.",
            }[rounded]
        )
    else:
        words += "Weights of 32 bits stay only where an update is too small even for them, or is nothing."
    return render("changed", "Weights changed", words, chart)


def _speed(alt: Any, rows: Sequence[StepRow]) -> Figure:
    every = math.ceil(len(rows) / POINTS) or 1
    groups = [rows[start : start + every] for start in range(0, len(rows), every)]
    values = [
        {"step": group[-1].step, "value": sum(row.tokens for row in group) / seconds}
        for group in groups
        if (seconds := sum(row.seconds for row in group)) > 0
    ]
    chart = _line(alt, values, "Tokens a second", {"format": "~s"}, {"zero": True})
    return render(
        "speed",
        "Training speed",
        f"Tokens of the step over its wall time, validations left out. {_per_step(every)}",
        chart,
    )


def _scores(alt: Any, report: Report) -> Figure | None:
    """Base and tuned scores with their intervals: one row a score, one panel a test set. Scores in [0, 1] only."""
    panels: list[Any] = []
    for test, scores in report.tests.items():
        keys = [key for key in scores.difference if key not in LOWER_IS_BETTER and key in scores.base and key in scores.tuned]
        # a function of the user's may have another range
        keys = [key for key in keys if all(s.low >= 0 and s.high <= 1 for s in (scores.base[key], scores.tuned[key]))]
        values = [
            {"score": metric_name(key), "model": model, "text": score_text(score.value, 2), **score.model_dump()}
            for key in keys
            for model, score in (("base", scores.base[key]), ("tuned", scores.tuned[key]))
        ]
        if keys:
            panels.append(
                _score_panel(
                    alt,
                    f"{test} ({scores.examples:,} items)",
                    [metric_name(key) for key in keys],
                    values,
                    legend=not panels,
                )
            )
    if not panels:
        return None
    caption = (
        "Points are scores, bars their 95 % intervals over the test items. Hollow (brown): base model; "
        "filled (blue): tuned model."
    )
    return render("scores", "Before and after", caption, alt.vconcat(*panels, spacing=14))


def _score_panel(alt: Any, title: str, order: list[str], values: list[dict[str, Any]], legend: bool) -> Any:
    models = ["base", "tuned"]
    x_axis = _axis(alt, "Score (1 is perfect)", values=[0, 0.25, 0.5, 0.75, 1], format=".2~f", labelFlush=False)
    x = alt.X("value:Q", axis=x_axis, scale=alt.Scale(domain=[0, 1], nice=False))
    y = alt.Y(
        "score:N",
        sort=order,
        axis=_axis(alt, None, ticks=False, domain=False, labelPadding=8),
        scale=alt.Scale(paddingInner=0.3),
    )
    offset = alt.YOffset("model:N", sort=models, scale=alt.Scale(paddingOuter=0.2))
    key = alt.Legend(title=None, orient="top-right", direction="horizontal", offset=-26) if legend else None
    scale = alt.Scale(domain=models, range=[BASE, TUNED])
    color = alt.Color("model:N", scale=scale, legend=key)
    base = alt.Chart(alt.Data(values=values), width=PANEL_WIDTH, height=ROW_HEIGHT * len(order))
    bars = base.mark_rule(strokeWidth=2).encode(
        x=alt.X("low:Q", axis=x_axis, title=x_axis.title), x2="high:Q", y=y, yOffset=offset, color=color
    )
    hollow = base.transform_filter("datum.model === 'base'").mark_point(
        filled=True, fill="white", size=46, strokeWidth=1.8, opacity=1
    )
    filled = base.transform_filter("datum.model === 'tuned'").mark_point(filled=True, size=62, opacity=1)
    # The label stands inside the plot whatever the score: to the left of points in the right half.
    label = {"fontSize": 11, "color": INK, "baseline": "bottom", "dy": -4}
    right = base.transform_filter("datum.value > 0.5").mark_text(align="right", dx=6, **label)
    left = base.transform_filter("datum.value <= 0.5").mark_text(align="left", dx=-6, **label)
    return alt.layer(
        bars,
        hollow.encode(x=x, y=y, yOffset=offset, stroke=alt.Stroke("model:N", scale=scale, legend=None)),
        filled.encode(x=x, y=y, yOffset=offset, color=color),
        right.encode(x=x, y=y, yOffset=offset, text="text:N"),
        left.encode(x=x, y=y, yOffset=offset, text="text:N"),
    ).properties(title=alt.Title(title, anchor="start", frame="group", fontSize=12, fontWeight=600, offset=6))


# ---- rendering ------------------------------------------------------------------------------------------------------


def render(name: str, title: str, caption: str, chart: Any) -> Figure:
    """A chart in both forms, in the style of all charts."""
    if not hasattr(chart, "vconcat"):
        chart = chart.properties(autosize={"type": "fit", "contains": "padding"})
    svg, png = io.StringIO(), io.BytesIO()
    _styled(chart, "transparent").save(svg, format="svg")
    # The PNG is for slides of any colour: on a transparent ground its axes would be lost on a dark one.
    _styled(chart, "white").save(png, format="png", scale_factor=PNG_SCALE)
    return Figure(name, title, caption, _without_prolog(svg.getvalue()), png.getvalue())


def _styled(chart: Any, background: str) -> Any:
    axis = {
        "labelColor": MUTED,
        "titleColor": MUTED,
        "titleFontWeight": "normal",
        "titleFontSize": 12,
        "labelFontSize": 11,
        "titlePadding": 8,
        "gridColor": GRID,
        "domainColor": GRID,
        "tickColor": GRID,
    }
    return (
        chart.configure(background=background, font="Helvetica, Arial, sans-serif", padding=6)
        .configure_view(stroke=None)
        .configure_axis(**axis)
        .configure_legend(labelColor=INK, labelFontSize=12)
        .configure_title(color=INK)
    )


def _without_prolog(svg: str) -> str:
    """An SVG fit to stand inside a page."""
    return svg[svg.index("<svg") :]
