"""figures: every chart the records allow, as SVG with ids of its own and as PNG; honest thinning."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from fullrank.report import figures
from fullrank.report.gather import gather
from fullrank.run import Run

MakeRun = Callable[..., Run]


@pytest.fixture
def drawn(make_run: MakeRun) -> list[figures.Figure]:
    pytest.importorskip("altair")
    pytest.importorskip("vl_convert")
    return figures.draw(gather(make_run()))


def test_every_chart_is_there_in_both_forms(drawn: list[figures.Figure]) -> None:
    assert [figure.name for figure in drawn] == ["scores", "loss", "learning_rate", "gradient_norm", "changed", "speed"]
    for figure in drawn:
        assert ElementTree.fromstring(figure.svg).tag == "{http://www.w3.org/2000/svg}svg"
        assert figure.png.startswith(b"\x89PNG\r\n")
        assert not re.search(r'(?:href|src)="https?:', figure.svg)


def test_ids_differ_between_charts_of_one_page(drawn: list[figures.Figure]) -> None:
    identifiers = [identifier for figure in drawn for identifier in re.findall(r'\bid="([^"]+)"', figure.svg)]
    assert len(identifiers) == len(set(identifiers))
    for figure in drawn:
        assert set(re.findall(r"url\(#([^)]+)\)", figure.svg)) <= set(re.findall(r'\bid="([^"]+)"', figure.svg))


def test_every_colour_of_a_chart_has_a_dark_counterpart(drawn: list[figures.Figure], make_run: MakeRun) -> None:
    from fullrank.report import html

    page = html.render(gather(make_run(name="other")), [])
    for figure in drawn:
        for attribute, colour in set(re.findall(r'(fill|stroke)="(#[0-9a-f]{6}|white|black)"', figure.svg)):
            assert f'.chart svg [{attribute}="{colour}"]' in page, (figure.name, attribute, colour)


def test_captions_say_what_was_clipped_and_exported(drawn: list[figures.Figure]) -> None:
    captions = {figure.name: figure.caption for figure in drawn}
    assert re.search(r"limit of 1; \d+ of 90 steps", captions["gradient_norm"])
    assert "step 75, whose weights were exported" in captions["loss"]


def test_charts_without_a_record_are_left_out(make_run: MakeRun) -> None:
    pytest.importorskip("altair")
    assert figures.draw(gather(make_run(only_training=True))) == []


def test_thinning_averages_consecutive_steps_and_says_over_how_many(make_run: MakeRun) -> None:
    rows = gather(make_run()).steps
    points, every = figures.thin(rows, "loss", points=20)
    assert every == 5 and len(points) == 18
    assert points[1] == {"step": 10, "value": pytest.approx(sum(row.loss for row in rows[5:10]) / 5)}
    assert figures.thin(rows, "loss")[1] == 1


def test_validation_starts_at_the_base_model(make_run: MakeRun) -> None:
    report = gather(make_run())
    points = figures.validation_points(report)
    assert points[0] == {"step": 0, "value": report.train.validation_loss_before, "exported": False}
    assert [point["step"] for point in points if point["exported"]] == [75]
    assert len(figures.validation_points(replace(report, steps=()))) == 1
