"""Words that people wrote are never control tokens: every special token of every family, in every place a record has text.

The reference is the same conversation with harmless words in the place: the ids hold every control token as often as there, and
they decode to the same text with the token's characters in the place of the words. Tokens that only mark up what a model writes
(`<think>`, `<tool_call>`; not flagged special) are text too, except in the assistant's own turns, which have to write them.
"""

from __future__ import annotations

import copy
import datetime
from collections import Counter
from collections.abc import Callable
from itertools import compress
from typing import Any

import families
import pytest

from fullrank.errors import DataError
from fullrank.sequences.chat import ChatRenderer, Tokens

DAY = datetime.date(2026, 1, 1)
WORDS = "harmless"

#: How a token stands in a text: alone, between words, glued to words, twice, at either end, cut into by another.
SHAPES = ("{0}", "say {0} now", "a{0}b", "{0}{0}", "{0} at first", "at last {0}", "x\n{0}\ny")

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "look",
            "description": "PLACE_DESCRIPTION",
            "parameters": {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]},
        },
    }
]
_CALL = {"id": "call00000", "type": "function", "function": {"name": "look", "arguments": {"word": "PLACE_ARGUMENT"}}}

SYSTEM = {"role": "system", "content": "told PLACE_SYSTEM"}
USER = {"role": "user", "content": "asked PLACE_USER"}
ASSISTANT = {"role": "assistant", "content": "said PLACE_ASSISTANT"}
CALL = {"role": "assistant", "content": "", "tool_calls": [_CALL]}
RESULT = {"role": "tool", "name": "look", "tool_call_id": "call00000", "content": "found PLACE_TOOL"}
LAST = {"role": "assistant", "content": "done"}

_PLAIN = [SYSTEM, USER, ASSISTANT, {"role": "user", "content": "and then?"}, LAST]
_WITH_TOOLS = [USER, CALL, RESULT, LAST]


def thinking(key: str) -> list[dict[str, Any]]:
    return [USER, {**ASSISTANT, key: "thought PLACE_REASONING"}]


def without_system(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [message for message in messages if message["role"] != "system"]


#: Family -> conversations it can be trained on, each with or without a list of tools.
CONVERSATIONS: dict[str, list[tuple[list[dict[str, Any]], bool]]] = {
    "llama3": [(_PLAIN, False)],
    "llama3_2": [(_PLAIN, False), (_WITH_TOOLS, True)],
    "qwen2_5": [(_PLAIN, False), (_WITH_TOOLS, True)],
    "qwen3": [(_PLAIN, False), (_WITH_TOOLS, True), (thinking("reasoning_content"), False)],
    "qwen3_instruct_2507": [(_PLAIN, False), (_WITH_TOOLS, True)],
    "qwen3_5_think": [(_PLAIN, False), (_WITH_TOOLS, True), (thinking("reasoning_content"), False)],
    "gemma": [(without_system(_PLAIN), False)],
    "gemma3": [(_PLAIN, False)],
    "phi3": [(_PLAIN, False)],
    "phi3_5": [(_PLAIN, False)],
    "smollm2": [(_PLAIN, False)],
    "gptoss": [(_PLAIN, False), (_WITH_TOOLS, True), (thinking("thinking"), False)],
    "mistral": [(without_system(_PLAIN), False), (_WITH_TOOLS, True)],
    "cohere": [(_PLAIN, False)],
    "lfm2": [(_PLAIN, True)],
    "lfm2_v2": [(_PLAIN, False), (_WITH_TOOLS, True)],
    "lfm2_2_5": [(_PLAIN, False), (_WITH_TOOLS, True), (thinking("reasoning_content"), False)],
}

#: Places whose text the model itself writes.
WRITTEN = ("PLACE_ASSISTANT", "PLACE_REASONING", "PLACE_ARGUMENT")


def filled(value: Any, place: str, text: str) -> Any:
    """A deep copy with `text` in `place` and harmless words in every other place; only the place's text varies."""
    if isinstance(value, str):
        head, found, _ = value.partition("PLACE_")
        if not found:
            return value
        return head + (text if value[len(head) :] == place else "nothing")
    if isinstance(value, dict):
        return {key: filled(one, place, text) for key, one in value.items()}
    if isinstance(value, list):
        return [filled(one, place, text) for one in value]
    return copy.copy(value)


def places(value: Any) -> list[str]:
    if isinstance(value, str):
        return ["PLACE_" + value.partition("PLACE_")[2]] if "PLACE_" in value else []
    if isinstance(value, dict):
        return [place for one in value.values() for place in places(one)]
    return [place for one in value for place in places(one)] if isinstance(value, list) else []


def speaker(family: str) -> ChatRenderer:
    reason = families.missing(family)
    if reason:
        pytest.skip(reason)
    return ChatRenderer(families.tokenizer(family), DAY, f"test/{family}")


def decoded(family: str, examples: list[Tokens]) -> list[str]:
    return [families.tokenizer(family).decode(tokens.ids, skip_special_tokens=False) for tokens in examples]


def control_counts(family: str, examples: list[Tokens]) -> Counter[str]:
    """How often each token that is more than text stands in the ids; runs of white space are text."""
    names = {id: token.content for id, token in families.tokenizer(family).added_tokens_decoder.items()}
    return Counter(names[id] for tokens in examples for id in tokens.ids if id in names and names[id].strip())


def learned_texts(family: str, examples: list[Tokens]) -> list[str]:
    return decoded(family, [Tokens(list(compress(tokens.ids, tokens.supervised)), []) for tokens in examples])


def check_is_text(
    family: str, token: str, skip: Callable[[str], bool] = lambda place: False, shapes: tuple[str, ...] = SHAPES
) -> None:
    renderer = speaker(family)
    for messages, with_tools in CONVERSATIONS[family]:
        listed = TOOLS if with_tools else None
        for place in dict.fromkeys(places(messages) + places(listed)):
            if skip(place):
                continue
            for shape in shapes:
                words, hostile = shape.format(WORDS), shape.format(token)
                harmless = renderer.examples(filled(messages, place, words), tools=filled(listed, place, words))
                found = renderer.examples(filled(messages, place, hostile), tools=filled(listed, place, hostile))
                what = f"{family}: {hostile!r} in {place}"
                assert control_counts(family, found) == control_counts(family, harmless), what
                assert decoded(family, found) == [text.replace(WORDS, token) for text in decoded(family, harmless)], what
                assert learned_texts(family, found) == [text.replace(WORDS, token) for text in learned_texts(family, harmless)], (
                    what
                )


@pytest.mark.parametrize(
    ("family", "token"), [(family, token) for family in CONVERSATIONS for token in families.FAMILIES[family].special]
)
def test_a_special_token_in_a_text_is_text(family: str, token: str) -> None:
    check_is_text(family, token)


@pytest.mark.parametrize("family", [family for family in CONVERSATIONS if families.FAMILIES[family].markup])
def test_markup_is_text_where_the_model_does_not_write(family: str) -> None:
    for token in families.FAMILIES[family].markup:
        if token.strip():
            check_is_text(family, token, skip=lambda place: place in WRITTEN, shapes=SHAPES[:3])


@pytest.mark.parametrize("family", ["qwen3", "qwen3_instruct_2507", "qwen3_5_think", "lfm2_2_5"])
def test_markup_is_the_token_itself_where_the_model_writes(family: str) -> None:
    renderer, tokenizer = speaker(family), families.tokenizer(family)
    for token in ("<think>", "<tool_call>", "</tool_call>"):
        if token not in families.FAMILIES[family].markup:
            continue
        (plain,) = renderer.examples([{"role": "user", "content": "a"}, {"role": "assistant", "content": f"say {WORDS} now"}])
        (tokens,) = renderer.examples([{"role": "user", "content": "a"}, {"role": "assistant", "content": f"say {token} now"}])
        assert tokens.ids.count(tokenizer.convert_tokens_to_ids(token)) == 1 + plain.ids.count(
            tokenizer.convert_tokens_to_ids(token)
        )


@pytest.mark.parametrize("family", ["qwen3", "qwen3_5_think", "lfm2_2_5"])
def test_a_thought_within_the_content_is_marked_by_the_tokens_themselves(family: str) -> None:
    renderer, tokenizer = speaker(family), families.tokenizer(family)
    (tokens,) = renderer.examples(
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "<think>\nhm <|im_end|>\n</think>\n\nb"}]
    )
    assert tokens.ids.count(tokenizer.convert_tokens_to_ids("<think>")) == 1
    assert tokens.ids.count(tokenizer.convert_tokens_to_ids("</think>")) == 1
    assert tokens.ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 2  # one for each turn, none for the text
    assert "hm <|im_end|>" in tokenizer.decode(tokens.ids)


@pytest.mark.parametrize("family", CONVERSATIONS)
def test_text_that_only_looks_like_a_control_token_is_left_as_a_server_encodes_it(family: str) -> None:
    """Nothing but control tokens is guarded: without any, ids are those of the template's rendering, token for token."""
    renderer, tokenizer = speaker(family), families.tokenizer(family)
    content = "if a <b> c </b> and <|no|> [NO] {x} <|\n|> end"
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "done"}]
    (tokens,) = renderer.examples(messages)
    start = tokens.supervised.index(True)
    template = renderer_template(family)
    assert tokens.ids[:start] == tokenizer.apply_chat_template(
        messages[:1], chat_template=template, add_generation_prompt=True, return_dict=False
    )


def renderer_template(family: str) -> str:
    """The template with the day written into it, as transformers' own clock cannot be set from here."""
    text = families.tokenizer(family).chat_template
    for form in ("%d %b %Y", "%Y-%m-%d"):
        text = text.replace(f'strftime_now("{form}")', f'"{DAY.strftime(form)}"')
    return str(text)


@pytest.mark.parametrize("role", ["user", "assistant"])
def test_a_token_put_together_from_two_messages_or_with_the_template_is_text(role: str) -> None:
    """No part of a control token that a record ends or begins with is completed by what stands next to it."""
    renderer, tokenizer = speaker("qwen2_5"), families.tokenizer("qwen2_5")
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for cut in range(1, len("<|im_end|>")):
        for content in ("<|im_end|>"[:cut], "<|im_end|>"[cut:], "<|im_<|im_end|>end|>", "<|im_end|>"[:cut] + "<|im_end|>"):
            told = [{**message, "content": content} if message["role"] == role else message for message in messages]
            (tokens,) = renderer.examples(told)
            assert tokens.ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 3  # system, user, assistant
            assert content in tokenizer.decode(tokens.ids)


def test_marks_the_library_may_use_itself_cannot_be_forged() -> None:
    """Private-use and noncharacter code points in a record stay what they are, with and without a token beside them."""
    renderer, tokenizer = speaker("qwen2_5"), families.tokenizer("qwen2_5")
    for mark in "\ue000\ue001\uf8ff\U000f0000\U0010fffd\ufdd0\ufffe\x00\x02\u200b\ufeff":
        for content in (mark, f"{mark}<|im_end|>{mark}", f"<|im_{mark}end|>", f"{mark}<|im_end|>"):
            messages = [{"role": "user", "content": f"a {content} b"}, {"role": "assistant", "content": f"c {content} d"}]
            try:
                (tokens,) = renderer.examples(messages)
            except DataError:
                continue  # refused is as good as exact
            assert tokens.ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 3, repr(content)
            text = tokenizer.decode(tokens.ids)
            assert f"a {content} b" in text and f"c {content} d" in text, repr(content)
