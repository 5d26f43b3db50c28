"""Report -> one HTML page that stands alone: no network, no script, readable on screen, on paper and in the dark.

Everything that comes from a model, a data file or a recipe is escaped; only the charts drawn here enter as markup.
Numbers are formatted here and in the template, never computed: what is printed stands in the records.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from fullrank.records import Score
from fullrank.report.card import usage
from fullrank.report.data_page import visible
from fullrank.report.figures import Figure
from fullrank.report.gather import (
    LOWER_IS_BETTER,
    Report,
    headline_key,
    interval_text,
    metric_name,
    outcome_of,
    p_text,
    score_text,
)
from fullrank.units import format_bytes, format_count, format_seconds, plural

SHOWN_CHARACTERS = 800
"""Longer texts are cut here; the whole text stands behind a click."""

_CONTROL_TOKEN = re.compile(r"(<\|[^|<>\n]{1,60}\|>|<(?:s|/s|bos|eos|pad|start_of_turn|end_of_turn)>|\[/?INST\])")


@dataclass(frozen=True)
class ScoreRow:
    """One line of a scores table, ready to print."""

    name: str
    base: str
    base_interval: str
    tuned: str
    tuned_interval: str
    difference: str
    difference_interval: str
    p: str
    outcome: str
    lower_is_better: bool
    is_headline: bool


@dataclass(frozen=True)
class ScoreTable:
    """The scores of one test set."""

    test: str
    examples: int
    rows: tuple[ScoreRow, ...]
    stopped: dict[str, float]


@dataclass(frozen=True)
class BigNumber:
    """A before -> after pair for the head of the page."""

    label: str
    before: str
    after: str
    below: tuple[str, ...]


@dataclass(frozen=True)
class Measured:
    """What the plan predicted beside what was measured."""

    name: str
    predicted: str
    measured: str
    ratio: str


@dataclass(frozen=True)
class Clipped:
    """The part of a text that is shown, and how many characters are not."""

    shown: str
    hidden: int


def render(report: Report, figures: Sequence[Figure], charts_note: str = "") -> str:
    """The page.

    Args:
        figures: charts to inline; none is fine.
        charts_note: why there are no charts and how to get them; printed in their place.
    """
    pages = report.data_page
    folder = pages.folder if pages else ""
    forgotten = report.evaluation.forgotten if report.evaluation else None
    environment = Environment(
        loader=PackageLoader("fullrank.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        bytes=format_bytes, seconds=format_seconds, count=format_count, metric=metric_name, score=score_text,
        interval=interval_text,
        clip=clip, control=mark_control_tokens, visible=visible, short=lambda path: visible(path.removeprefix(folder)),
    )  # fmt: skip
    page = environment.get_template("report.html.jinja").render(
        report=report,
        verdict=report.verdict,
        train=report.train,
        plan=report.plan,
        data=report.data,
        audited=pages if pages and pages.audit else None,
        big_numbers=big_numbers(report),
        tables=score_tables(report),
        forgotten=forgotten,
        figures=[(figure, Markup(figure.svg)) for figure in figures if figure.name != "scores"],
        scores_figure=next(((figure, Markup(figure.svg)) for figure in figures if figure.name == "scores"), None),
        charts_note=charts_note,
        measured=measured(report),
        plural=plural,
        usage=usage(report, str(report.root / "model")),
    )
    return page.rstrip() + "\n"


def clip(text: str, limit: int = SHOWN_CHARACTERS) -> Clipped:
    """The beginning of a text, cut between words; a text little longer than the limit is shown whole."""
    if len(text) <= limit * 1.15:
        return Clipped(text, 0)
    shown = text[:limit]
    space = max(shown.rfind(" "), shown.rfind("\n"))
    shown = shown[:space] if space > limit // 2 else shown
    return Clipped(shown, len(text) - len(shown))


def mark_control_tokens(text: str) -> Markup:
    """The text escaped, with control tokens such as `<|im_start|>` marked so that the eye can skip them."""
    parts = _CONTROL_TOKEN.split(text)
    return Markup("").join(
        Markup('<span class="control">{}</span>').format(part) if number % 2 else escape(part)
        for number, part in enumerate(parts)
    )


# ---- what the page's head and tables hold ---------------------------------------------------------------------------


def big_numbers(report: Report) -> list[BigNumber]:
    """The headline score of every test set, and the validation loss."""
    numbers = []
    heads = {test: headline_key(report.recipe, scores) for test, scores in report.tests.items()}
    for test, key in heads.items():
        if key is None:
            continue
        scores = report.tests[test]
        base, tuned, difference = scores.base[key], scores.tuned[key], scores.difference[key]
        numbers.append(
            BigNumber(
                f"{metric_name(key)} · {test} · {plural(scores.examples, 'item')}",
                score_text(base.value, 2),
                score_text(tuned.value, 2),
                (
                    f"95 %: {interval_text(base, 2)} → {interval_text(tuned, 2)}",
                    f"difference {score_text(difference.value, 2, signed=True)} ({interval_text(difference, 2, signed=True)})",
                ),
            )
        )
    train = report.train
    if "validation_loss" not in heads.values():
        numbers.append(
            BigNumber(
                "Validation loss · nats a token",
                score_text(train.validation_loss_before, 2),
                score_text(train.validation_loss_best, 2),
                (f"base model, then step {train.best_step:,} (exported)",),
            )
        )
    return numbers


def score_tables(report: Report) -> list[ScoreTable]:
    """The scores table of every test set."""
    tables = []
    for test, scores in report.tests.items():
        headline = headline_key(report.recipe, scores)
        rows = []
        for key, difference in scores.difference.items():
            if key not in scores.base or key not in scores.tuned:
                continue
            base, tuned = scores.base[key], scores.tuned[key]
            outcome = outcome_of(key, difference)
            rows.append(
                ScoreRow(
                    name=metric_name(key),
                    **_cells("base", base),
                    **_cells("tuned", tuned),
                    **_cells("difference", difference, signed=True),
                    p=p_text(scores.p_value[key]),
                    outcome=outcome,
                    lower_is_better=key in LOWER_IS_BETTER,
                    is_headline=key == headline,
                )
            )
        tables.append(ScoreTable(test, scores.examples, tuple(rows), scores.stopped_ratio))
    return tables


def _cells(column: str, score: Score, signed: bool = False) -> dict[str, str]:
    return {column: score_text(score.value, signed=signed), f"{column}_interval": interval_text(score, signed=signed)}


def measured(report: Report) -> list[Measured]:
    """Predicted against measured, where a plan is on record."""
    plan, train = report.plan, report.train
    if plan is None:
        return []
    peak = report.measured_peak_bytes
    where = "process" if train.device_peak_bytes is None else "device"
    pairs = (
        (f"Peak memory ({where})", plan.peak_bytes_predicted, peak, format_bytes),
        ("Training time", plan.train_seconds_predicted, train.loop_seconds, format_seconds),
    )
    return [
        Measured(name, show(predicted), show(found), f"{found / predicted:.2f}" if predicted else "")
        for name, predicted, found, show in pairs
    ]
