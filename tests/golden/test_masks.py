"""The masks of stock chat templates are the golden ones, token for token, and every learned turn is trained as it is served.

The golden files are written from hand-coded formatters (make_masks.py). Expected ids are those of each segment tokenized alone:
a segment begins where a server begins to generate, or behind a token that ends a turn. The law is checked a second time with
transformers' own rendering, and the formatters against the templates: neither goes through the library.
"""

from __future__ import annotations

import datetime
import sys
from pathlib import Path
from typing import Any

import families
import pytest

from fullrank.errors import DataError
from fullrank.sequences.chat import ChatRenderer, Tokens

sys.path.insert(0, str(Path(__file__).parent))
import make_masks

DAY = datetime.date(*make_masks.DAY)
GRID = [(family, case) for family in families.FAMILIES for case in make_masks.cases(family)]
RENDERED = [(family, case) for family, case in GRID if not isinstance(make_masks.golden(family)[case], set)]


class _TheDay(datetime.datetime):
    """What transformers' `strftime_now` sees as now."""

    @classmethod
    def now(cls, tz: Any = None) -> Any:
        return cls.combine(DAY, datetime.time(12))


@pytest.fixture(autouse=True)
def _frozen_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.utils import chat_template_utils

    monkeypatch.setattr(chat_template_utils, "datetime", _TheDay)


def speaker(family: str) -> ChatRenderer:
    reason = families.missing(family)
    if reason:
        pytest.skip(reason)
    return ChatRenderer(families.tokenizer(family), DAY, f"test/{family}")


def expected(family: str, example: make_masks.Example) -> Tokens:
    """Every segment tokenized alone, control tokens recognised."""
    tokenizer, swallow = families.tokenizer(family), families.FAMILIES[family].swallow
    ids: list[int] = []
    supervised: list[bool] = []
    before = ""
    for text, inside in example.segments:
        if before.endswith(swallow):  # the token before takes the white space after it
            text = text.lstrip()
        new = tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
        ids += new
        supervised += [inside] * len(new)
        before = text or before
    return Tokens(ids, supervised)


def pieces(family: str, tokens: Tokens) -> list[tuple[bool, list[str]]]:
    """Tokens in stretches of equal mask, for people to compare."""
    stretches: list[tuple[bool, list[str]]] = []
    for token, inside in zip(tokens.ids, tokens.supervised, strict=True):
        if not stretches or stretches[-1][0] != inside:
            stretches.append((inside, []))
        stretches[-1][1].append(families.tokenizer(family).decode([token]))
    return stretches


def spans(tokens: Tokens) -> list[tuple[int, int]]:
    """[start, end) of the supervised stretches."""
    edges = [n for n, inside in enumerate(tokens.supervised) if inside != (n > 0 and tokens.supervised[n - 1])]
    if len(edges) % 2:
        edges.append(len(tokens.supervised))
    return list(zip(edges[::2], edges[1::2], strict=True))


@pytest.mark.parametrize("family", families.FAMILIES)
def test_the_files_are_what_the_formatters_write(family: str) -> None:
    assert (make_masks.MASKS / f"{family}.txt").read_text(encoding="utf-8") == make_masks.document(family)


@pytest.mark.parametrize(("family", "case"), GRID)
def test_masks_are_the_golden_ones(family: str, case: str) -> None:
    renderer = speaker(family)
    asked = make_masks.CASES[case]
    golden = make_masks.golden(family)[case]
    if isinstance(golden, set):
        with pytest.raises(DataError, match=rf"(?s)test/{family}.*\b({'|'.join(golden)})\b"):
            renderer.examples(asked.messages, tools=asked.tools, loss_on=asked.loss_on)
        return
    found = renderer.examples(asked.messages, tools=asked.tools, loss_on=asked.loss_on)
    wanted = [expected(family, example) for example in golden]
    assert [pieces(family, tokens) for tokens in found] == [pieces(family, tokens) for tokens in wanted]
    assert [tokens.ids for tokens in found] == [tokens.ids for tokens in wanted]
    assert [tokens.supervised for tokens in found] == [tokens.supervised for tokens in wanted]


@pytest.mark.parametrize(("family", "case"), RENDERED)
def test_what_stands_before_a_learned_turn_is_what_a_server_feeds_the_model(family: str, case: str) -> None:
    renderer = speaker(family)
    asked = make_masks.CASES[case]
    golden = make_masks.golden(family)[case]
    found = renderer.examples(asked.messages, tools=asked.tools, loss_on=asked.loss_on)
    learned = []
    for tokens, example in zip(found, golden, strict=True):
        for (start, _), turn in zip(spans(tokens), example.turns, strict=True):
            served = families.tokenizer(family).apply_chat_template(
                asked.messages[:turn], tools=asked.tools, add_generation_prompt=True, return_dict=False
            )
            assert tokens.ids[:start] == served
            learned.append(turn)
    assert sorted(learned) == sorted(set(learned))  # each turn once


@pytest.mark.parametrize(("family", "case"), RENDERED)
def test_the_formatters_write_what_the_templates_write(family: str, case: str) -> None:
    reason = families.missing(family)
    if reason:
        pytest.skip(reason)
    asked = make_masks.CASES[case]
    golden = make_masks.golden(family)[case]
    for example in golden:
        rendered = families.tokenizer(family).apply_chat_template(
            asked.messages[: example.until], tools=asked.tools, tokenize=False
        )
        assert "".join(text for text, _ in example.segments) == rendered


@pytest.mark.parametrize("family", [family for family, case in RENDERED if case == "single_turn"])
def test_loss_on_all_supervises_every_token_of_the_same_ids(family: str) -> None:
    renderer = speaker(family)
    golden = make_masks.golden(family)["single_turn"]
    (tokens,) = renderer.examples(make_masks.CASES["single_turn"].messages, loss_on="all")
    assert tokens.ids == expected(family, golden[0]).ids
    assert all(tokens.supervised)
