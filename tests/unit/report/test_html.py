"""html: one page that stands alone, escapes what it did not write, and prints a section only where a record stands."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from fullrank.records import EvaluationCard
from fullrank.report import html
from fullrank.report.gather import Report, gather
from fullrank.run import Run

MakeRun = Callable[..., Run]
VOID = {"meta", "br", "link", "img", "hr", "input"}


class Page(HTMLParser):
    """Collects headings and text, and fails on tags that do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.headings: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.text += " "
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            assert name not in ("src", "href"), f"{tag} loads or links {value}"
            assert not name.startswith("on"), f"{tag} has a script in {name}"

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)
        if "style" not in self.open:
            self.text += data


@pytest.fixture
def report(make_run: MakeRun) -> Report:
    return gather(make_run())


def test_the_page_stands_alone(report: Report) -> None:
    text = html.render(report, [])
    page = Page(text)
    assert {"script", "link", "iframe", "img"}.isdisjoint(page.tags)
    assert "@import" not in text and "url(" not in text
    assert page.headings[1:] == [
        "What was done",
        "Scores",
        "What was forgotten",
        "Validation loss",
        "Answers side by side",
        "Proof",
        "Cost",
        "Using the model",
        "For the record",
    ]


def test_what_was_forgotten_is_told_as_recorded(report: Report) -> None:
    page = Page(html.render(report, []))
    text = " ".join(page.text.split())
    assert "64 texts that the base model wrote by itself" in text
    assert "the base model's own 64 texts 2,871 0.123 0.111 to 0.137 +0.095 +0.080 to +0.110" in text
    assert "manuals 12 texts 4,321 0.500 0.440 to 0.560" in text
    assert "all 120 0.617" in text and "facts 30 0.700" in text
    assert "block 0 0.00340 0.01250" in text and "head and norms 0.00050" in text
    cautions = " ".join(report.verdict.cautions)
    assert "0.123 nats a token from the base's (95 % interval 0.111 to 0.137)" in cautions
    assert "a token there has become 0.91 times as likely" in cautions  # exp(-0.0953)
    assert "Of 120 general questions it answers fewer right: 0.617 before, 0.492 after" in cautions


def test_sections_without_a_record_are_left_out(make_run: MakeRun) -> None:
    page = Page(html.render(gather(make_run(only_training=True)), []))
    assert page.headings == [
        "Trained, not yet measured on a task.",
        "What was done",
        "Validation loss",
        "Proof",
        "Cost",
        "For the record",
    ]
    for word in ("Predicted", "fullrank chat", "bootstrap", "steps.jsonl", "None"):
        assert word not in page.text


def test_what_others_wrote_is_escaped(report: Report) -> None:
    evil = '<script>alert(1)</script><img src=x onerror="x()">&amp;'
    shown = report.samples[0]
    item = shown.samples[0].item
    hostile = replace(
        item,
        tuned=item.tuned.model_copy(update={"answer": evil, "prompt": f"<|im_start|>{evil}", "reference": evil, "id": evil}),
    )
    shown = replace(shown, test=evil, samples=(replace(shown.samples[0], item=hostile),))
    page = Page(html.render(replace(report, samples=(shown,), recipe_text=evil, environment={evil: evil}), [], charts_note=evil))
    assert page.text.count(evil) >= 8


def test_numbers_of_the_records_are_on_the_page(report: Report) -> None:
    text = " ".join(Page(html.render(report, [])).text.split())
    for words in (
        "The tuned model does the task better.",
        "F1 rose from 0.15 to 0.96 on 80 items of the test set “seen”.",
        "This may be claimed",
        "95 %: 0.10 to 0.19 → 0.91 to 1.00",
        "134.5M parameters",
        "resumed from step 40",
        "272 of 272",
        "512 tokens compared",
        "Peak memory (process) 3.39 GB 3.48 GB 1.03",
        "Training time 3 min 56 s 3 min 28 s 0.88",
        "134,515,008 parameters x 2 moments x 4 bytes",
        "12 Alpaca records were converted",
    ):
        assert words in text, words


def test_every_difference_shows_its_p_value(report: Report) -> None:
    rows = [row for table in html.score_tables(report) for row in table.rows]
    assert {row.p for row in rows} == {"p < 0.001"}
    assert len(re.findall("<small>p &lt; 0.001</small>", html.render(report, []))) == len(rows)


def test_an_unclear_difference_is_not_claimed(make_run: MakeRun, make_evaluation: Callable[..., EvaluationCard]) -> None:
    card = make_evaluation()
    card.tests["seen"].difference["f1"] = card.tests["seen"].difference["f1"].model_copy(update={"low": -0.01})
    text = html.render(gather(make_run(evaluation=card)), [])
    assert "No significant difference" in text and "may not be claimed" in text and "This may be claimed" not in text


def test_the_model_is_shown_where_it_is_wrong(report: Report) -> None:
    text = Page(html.render(report, [])).text
    assert "tuned model not fully right" in text and "worse than the base model" in text
    assert "(cut at the length limit)" in text and "(empty)" in text


def test_long_texts_are_cut_between_words_and_whole_behind_a_click() -> None:
    text = "word " * 400
    part = html.clip(text, 100)
    assert part.shown == ("word " * 20).rstrip() and part.hidden == len(text) - len(part.shown)
    assert html.clip("short").hidden == 0
    assert html.clip("x" * 110, 100).hidden == 0
    assert len(html.clip("x" * 300, 100).shown) == 100


def test_control_tokens_are_marked_and_the_rest_escaped() -> None:
    assert html.mark_control_tokens("<|im_end|><b>") == '<span class="control">&lt;|im_end|&gt;</span>&lt;b&gt;'


def test_peak_memory_is_the_device_s_where_there_is_one(report: Report) -> None:
    on_device = replace(report, train=report.train.model_copy(update={"device_peak_bytes": 3_393_240_128}))
    first = html.measured(on_device)[0]
    assert (first.name, first.measured, first.ratio) == ("Peak memory (device)", "3.39 GB", "1.00")


def test_a_page_is_the_same_each_time(report: Report) -> None:
    assert html.render(report, []) == html.render(report, [])
    assert not re.search(r"0x[0-9a-f]{8}", html.render(report, []))
