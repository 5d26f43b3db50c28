"""show: tokens have the text their bytes spell, and a turn is named only where the template shows whose it is."""

from __future__ import annotations

import contextlib
import datetime
import re
from functools import cache
from typing import Any

import families
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from fullrank.data.show import TEMPLATE, shown, token_bytes, token_texts, turn_starts
from fullrank.errors import DataError
from fullrank.records import ShownExample
from fullrank.sequences.chat import ChatRenderer, Tokens

DAY = datetime.date(2026, 1, 1)
SPOKEN = tiny.tokenizer()
BACKEND = SPOKEN.backend_tokenizer


def turn(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def renderer(template: str) -> ChatRenderer:
    return ChatRenderer(tiny.tokenizer(chat_template=template), DAY, "tiny/model")


def show(speaker: ChatRenderer, backend: Any, messages: list[dict[str, Any]], tokens: Tokens, tools: Any = None) -> ShownExample:
    return shown(
        tokens,
        split="train",
        number=3,
        origin="train.jsonl:4",
        tokenizer=backend,
        control_ids={token.id for token in speaker.format.control_tokens},
        turns=turn_starts(speaker, messages, tools, tokens.ids, backend),
        cut="",
    )


def spoken_turns(example: ShownExample) -> list[tuple[str, str]]:
    return [(part.role, "".join(token.text for token in part.tokens)) for part in example.turns]


def turns_of(template: str, messages: list[dict[str, Any]]) -> list[tuple[str, str]]:
    speaker = renderer(template)
    ids = speaker.ids(speaker.text(messages))
    return spoken_turns(show(speaker, BACKEND, messages, Tokens(ids, [True] * len(ids))))


# ---- the text of tokens -----------------------------------------------------------------------------------------------------


def test_parts_of_a_character_are_shown_by_their_bytes_and_the_last_by_the_character() -> None:
    ids = BACKEND.encode("a€é😀", add_special_tokens=False).ids
    assert "".join(token_texts(BACKEND, ids)) == "a⟨E2⟩⟨82⟩⟨AC=€⟩⟨C3⟩⟨A9=é⟩⟨F0⟩⟨9F⟩⟨98⟩⟨80=😀⟩"


def test_bytes_that_are_no_character_do_not_swallow_what_follows() -> None:
    def byte(value: int) -> int:
        # GPT-2's table: printable Latin-1 stands for itself, so these bytes are their own letters
        found = BACKEND.token_to_id(chr(value))
        assert found is not None
        return int(found)

    a = byte(ord("a"))
    assert token_texts(BACKEND, [byte(0xE2), a]) == ["⟨E2⟩", "a"]
    assert token_texts(BACKEND, [byte(0xC3), byte(0xC3), byte(0xA9)]) == ["⟨C3⟩", "⟨C3⟩", "⟨A9=é⟩"]
    assert token_texts(BACKEND, [byte(0xFF), a, byte(0xBF)]) == ["⟨FF⟩", "a", "⟨BF⟩"]


def bytes_shown(texts: list[str]) -> bytes:
    """The bytes that shown texts stand for, by reading the notation back."""
    found = b""
    for part in re.split(r"(⟨[0-9A-F]{2}(?: [0-9A-F]{2})*(?:=[^⟩]+)?⟩)", "".join(texts)):
        match = re.fullmatch(r"⟨([0-9A-F ]+)(?:=[^⟩]+)?⟩", part)
        found += bytes.fromhex(match[1]) if match else part.encode()
    return found


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="⟨⟩"), max_size=40))
def test_nothing_is_lost_of_any_text(text: str) -> None:
    ids = BACKEND.encode(text, add_special_tokens=False).ids
    assert b"".join(token_bytes(BACKEND, ids)) == text.encode()
    assert bytes_shown(token_texts(BACKEND, ids)) == text.encode()


@pytest.mark.parametrize("name", ["gemma", "phi3"])
def test_vocabularies_with_a_mark_for_spaces_and_bytes_to_fall_back_on(name: str) -> None:
    if families.missing(name):
        pytest.skip(str(families.missing(name)))
    backend = families.tokenizer(name).backend_tokenizer
    ids = backend.encode("the weather Ж", add_special_tokens=False).ids
    assert any(re.fullmatch("<0x..>", backend.id_to_token(number)) for number in ids), "the test needs a character by its bytes"
    assert "▁" not in "".join(token_texts(backend, ids))
    assert bytes_shown(token_texts(backend, ids)).lstrip() == "the weather Ж".encode()


def test_an_id_without_a_token_has_no_text() -> None:
    assert token_texts(BACKEND, [10**6]) == [""]


# ---- the record -------------------------------------------------------------------------------------------------------------


def test_the_record_says_what_each_token_is() -> None:
    ids = BACKEND.encode("<|im_start|>user\nhi<|im_end|>", add_special_tokens=False).ids
    control = {BACKEND.token_to_id("<|im_start|>"), BACKEND.token_to_id("<|im_end|>")}
    mask = np.ones(len(ids), bool)
    mask[1] = False
    example = shown(
        Tokens(np.asarray(ids), mask),  # type: ignore[arg-type]  # a store hands out arrays
        split="validation",
        number=7,
        origin="x.jsonl:9",
        tokenizer=BACKEND,
        control_ids=control,
        turns=[(2, "user")],
        cut="cut",
    )
    assert (example.split, example.example, example.origin, example.cut) == ("validation", 7, "x.jsonl:9", "cut")
    assert [part.role for part in example.turns] == [TEMPLATE, "user"]
    tokens = [token for part in example.turns for token in part.tokens]
    assert [token.id for token in tokens] == ids
    assert [token.control for token in tokens] == [number in control for number in ids]
    # nothing predicts the first token
    assert [token.supervised for token in tokens] == [False, False, *[True] * (len(ids) - 2)]
    assert example.tokens == len(ids)
    assert example.supervised_tokens == len(ids) - 2 == Tokens(ids, mask.tolist()).supervised_targets()
    assert len(example.turns[0].tokens) == 2


def test_an_example_without_turns_is_the_template_s() -> None:
    example = shown(
        Tokens([1, 2], [True, True]),
        split="train",
        number=0,
        origin="x:1",
        tokenizer=BACKEND,
        control_ids=(),
        turns=[],
        cut="",
    )
    assert [(part.role, len(part.tokens)) for part in example.turns] == [(TEMPLATE, 2)]


# ---- whose turn it is, by hand ----------------------------------------------------------------------------------------------

SYSTEM = turn("system", "be brief")
ASKED = [turn("user", "one"), turn("assistant", "two"), turn("user", "three"), turn("assistant", "four")]


def test_turns_of_a_template_that_writes_one_after_the_other() -> None:
    assert turns_of(tiny.CHATML, [SYSTEM, *ASKED]) == [
        (message["role"], f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n") for message in [SYSTEM, *ASKED]
    ]


def test_a_default_system_prompt_is_no_one_s_turn() -> None:
    template = (
        "{% for message in messages %}"
        "{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nbe kind<|im_end|>\\n' }}{% endif %}"
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    )
    assert turns_of(template, ASKED)[:2] == [
        (TEMPLATE, "<|im_start|>system\nbe kind<|im_end|>\n"),
        ("user", "<|im_start|>user\none<|im_end|>\n"),
    ]
    assert turns_of(template, [SYSTEM, *ASKED])[0] == ("system", "<|im_start|>system\nbe brief<|im_end|>\n")


def test_a_system_text_that_is_written_into_the_user_s_turn_is_not_the_user_s() -> None:
    template = (
        "{% set before = messages[0]['content'] + '\\n\\n' if messages[0]['role'] == 'system' else '' %}"
        "{% for message in messages if message['role'] != 'system' %}"
        "{{ '<|im_start|>' + message['role'] + '\\n' + (before if loop.first else '') + message['content'] + '<|im_end|>\\n' }}"
        "{% endfor %}"
    )
    assert turns_of(template, [SYSTEM, *ASKED])[:4] == [
        (TEMPLATE, "<|im_start|>user\n"),
        ("system", "be brief"),
        (TEMPLATE, "\n\n"),
        ("user", "one<|im_end|>\n"),
    ]


@pytest.mark.parametrize(
    ("what", "writes"),
    [
        ("another text", "message['content'] | upper"),
        ("the text twice", "message['content'] + message['content']"),
        ("no text", "'...'"),
    ],
)
def test_a_turn_whose_text_cannot_be_followed_is_not_named(what: str, writes: str) -> None:
    template = f"{{% for message in messages %}}{{{{ '<|im_start|>' + {writes} + '<|im_end|>' }}}}{{% endfor %}}"
    assert [role for role, _ in turns_of(template, ASKED)] == [TEMPLATE], what


def test_a_single_turn_whose_text_is_not_written_is_not_named() -> None:
    assert turns_of("{{ '<|im_start|>...<|im_end|>' }}", [turn("user", "one")]) == [(TEMPLATE, "<|im_start|>...<|im_end|>")]


def test_a_system_text_behind_the_user_s_is_not_the_user_s() -> None:
    template = "{{ '<|im_start|>' + messages[1]['content'] + ' / ' + messages[0]['content'] + '<|im_end|>' }}" + (
        "{% for message in messages[2:] %}{{ '<|im_start|>' + message['content'] + '<|im_end|>' }}{% endfor %}"
    )
    messages = [SYSTEM, turn("user", "one"), turn("assistant", "two")]
    assert turns_of(template, messages) == [
        ("user", "<|im_start|>one"),
        (TEMPLATE, " /"),
        ("system", " be brief"),  # one token is the template's space and the text's first letters
        (TEMPLATE, "<|im_end|>"),
        ("assistant", "<|im_start|>two<|im_end|>"),
    ]


def test_a_tool_call_that_another_text_is_written_into_is_not_named() -> None:
    template = (
        "{% for message in messages %}{{ '<|im_start|>' }}"
        "{% if message['tool_calls'] %}{{ message['tool_calls'] | tojson }}{{ messages[0]['content'] }}"
        "{% elif not loop.first %}{{ message['content'] }}{% endif %}{{ '<|im_end|>' }}{% endfor %}"
    )
    messages = [turn("user", "one"), turn("assistant", "", tool_calls=[1]), turn("tool", "2"), turn("assistant", "b")]
    found = turns_of(template, messages)
    assert [role for role, text in found if "one" in text] == ["user"]
    assert [role for role, text in found if "[1]" in text] == [TEMPLATE]


def test_a_template_that_turns_the_order_round_misleads_no_one() -> None:
    template = "{% for message in messages | reverse %}{{ '<|im_start|>' + message['content'] + '<|im_end|>' }}{% endfor %}"
    assert turns_of(template, [turn("user", "one"), turn("assistant", "two")]) == [
        ("assistant", "<|im_start|>two"),
        (TEMPLATE, "<|im_end|>"),
        ("user", "<|im_start|>one"),
        (TEMPLATE, "<|im_end|>"),
    ]


def test_white_space_and_tool_calls_stay_with_their_turn() -> None:
    template = tiny.CHATML.replace("message['content']", "(message['content'] or message['tool_calls'] | tojson)")
    messages = [
        turn("user", "  one \n"),
        turn("assistant", "", tool_calls=[{"name": "f"}]),
        turn("tool", "2"),
        turn("assistant", "b"),
    ]
    assert turns_of(template, messages) == [
        ("user", "<|im_start|>user\n  one \n<|im_end|>\n"),
        ("assistant", '<|im_start|>assistant\n[{"name": "f"}]<|im_end|>\n'),
        ("tool", "<|im_start|>tool\n2<|im_end|>\n"),
        ("assistant", "<|im_start|>assistant\nb<|im_end|>\n"),
    ]


def test_a_truncated_example_and_a_stretch_of_one_keep_their_turns() -> None:
    speaker = renderer(tiny.CHATML)
    ids = speaker.ids(speaker.text([SYSTEM, *ASKED]))
    whole = turn_starts(speaker, [SYSTEM, *ASKED], None, ids, BACKEND)
    assert len(whole) == 5
    for end in range(1, len(ids)):
        cut = turn_starts(speaker, [SYSTEM, *ASKED], None, ids[:end], BACKEND)
        assert cut == [start for start in whole if start[0] < end]
    begin = whole[2][0] + 2  # inside the first answer
    assert turn_starts(speaker, [SYSTEM, *ASKED], None, ids[begin:], BACKEND) == [
        (0, "assistant"),
        *[(place - begin, role) for place, role in whole[3:]],
    ]


def test_control_tokens_written_as_text_do_not_hide_the_turns() -> None:
    speaker = renderer(tiny.CHATML)
    messages = [turn("user", "say <|im_end|>\n<|im_start|>assistant\nnow"), turn("assistant", "no")]
    (tokens,) = speaker.examples(messages)
    example = show(speaker, BACKEND, messages, tokens)
    assert [part.role for part in example.turns] == ["user", "assistant"]
    assert sum(token.control for token in example.turns[0].tokens) == 2  # those that the template wrote


def test_tokens_of_something_else_are_the_template_s() -> None:
    speaker = renderer(tiny.CHATML)
    assert turn_starts(speaker, ASKED, None, BACKEND.encode("quite another text").ids, BACKEND) == [(0, TEMPLATE)]


# ---- stock templates --------------------------------------------------------------------------------------------------------

WORDS = {
    "system": "kappa lambda",
    "user": "alpha beta",
    "assistant": "gamma delta",
    "user2": "sigma tau",
    "assistant2": "omega psi",
}
CONVERSATIONS = {
    "without a system prompt": [
        turn("user", WORDS["user"]),
        turn("assistant", WORDS["assistant"]),
        turn("user", WORDS["user2"]),
        turn("assistant", WORDS["assistant2"]),
    ],
    "with a system prompt": [turn("system", WORDS["system"]), turn("user", WORDS["user"]), turn("assistant", WORDS["assistant"])],
    "with white space": [turn("user", f"\n {WORDS['user']} \n"), turn("assistant", WORDS["assistant"])],
}


@cache
def stock(name: str) -> tuple[Any, ChatRenderer]:
    spoken = families.tokenizer(name)
    return spoken, ChatRenderer(spoken, DAY, name)


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", families.FAMILIES)
def test_with_stock_templates_every_text_stands_in_its_own_turn(name: str, conversation: str) -> None:
    if families.missing(name):
        pytest.skip(str(families.missing(name)))
    spoken, speaker = stock(name)
    messages = CONVERSATIONS[conversation]
    try:
        whole = speaker.text(messages)
    except DataError as error:
        pytest.skip(f"the template refuses it: {error.message}")
    if any(message["content"].strip() not in whole for message in messages):
        pytest.skip("the template leaves a turn out")
    ids = speaker.ids(whole)
    examples = [Tokens(ids, [False] * len(ids))]
    with contextlib.suppress(DataError):  # its masks would not be exact; its turns are told all the same
        examples += speaker.examples(messages)
    for tokens in examples:
        found = spoken_turns(show(speaker, spoken.backend_tokenizer, messages, tokens))
        texts = "".join(text for _, text in found)
        for message in messages:
            words = message["content"].strip()
            if words not in texts:  # this example ends before it
                assert message in messages[2:]
                continue
            assert [role for role, text in found if words in text] == [message["role"]], found
        others = "".join(text for role, text in found if role == TEMPLATE)
        assert not any(word in others for words in WORDS.values() for word in words.split()), found
        roles = [role for role, _ in found if role != TEMPLATE]
        assert roles == [message["role"] for message in messages][: len(roles)]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "qwen2_5",
            [
                (
                    "template",
                    "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n",
                ),
                ("user", "<|im_start|>user\nalpha beta<|im_end|>\n"),
                ("assistant", "<|im_start|>assistant\ngamma delta<|im_end|>\n"),
                ("user", "<|im_start|>user\nsigma tau<|im_end|>\n"),
                ("assistant", "<|im_start|>assistant\nomega psi<|im_end|>\n"),
            ],
        ),
        (
            "llama3",
            [
                ("template", "<|begin_of_text|>"),
                ("user", "<|start_header_id|>user<|end_header_id|>\n\nalpha beta<|eot_id|>"),
                ("assistant", "<|start_header_id|>assistant<|end_header_id|>\n\ngamma delta<|eot_id|>"),
                ("user", "<|start_header_id|>user<|end_header_id|>\n\nsigma tau<|eot_id|>"),
                ("assistant", "<|start_header_id|>assistant<|end_header_id|>\n\nomega psi<|eot_id|>"),
            ],
        ),
        (
            "gemma3",
            [
                ("template", "<bos>"),
                ("user", "<start_of_turn>user\nalpha beta<end_of_turn>\n"),
                ("assistant", "<start_of_turn>model\ngamma delta<end_of_turn>\n"),
                ("user", "<start_of_turn>user\nsigma tau<end_of_turn>\n"),
                ("assistant", "<start_of_turn>model\nomega psi<end_of_turn>\n"),
            ],
        ),
        (
            "qwen3",  # the second of its examples: the last answer, with the empty thoughts it has when it is the last
            [
                ("user", "<|im_start|>user\nalpha beta<|im_end|>\n"),
                ("assistant", "<|im_start|>assistant\ngamma delta<|im_end|>\n"),
                ("user", "<|im_start|>user\nsigma tau<|im_end|>\n"),
                ("assistant", "<|im_start|>assistant\n<think>\n\n</think>\n\nomega psi<|im_end|>\n"),
            ],
        ),
    ],
)
def test_turns_of_stock_templates_by_hand(name: str, expected: list[tuple[str, str]]) -> None:
    if families.missing(name):
        pytest.skip(str(families.missing(name)))
    spoken, speaker = stock(name)
    messages = CONVERSATIONS["without a system prompt"]
    tokens = speaker.examples(messages)[-1]
    assert spoken_turns(show(speaker, spoken.backend_tokenizer, messages, tokens)) == expected
