"""Forms of records: what each becomes, and which records are refused and how."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fullrank.data.convert import ROLES, SPEAKERS, Conversation, Document, Pair, normalise
from fullrank.data.sources import Origin, RawRecord
from fullrank.errors import DataError

USER = {"role": "user", "content": "Why?"}
ANSWER = {"role": "assistant", "content": "Because."}


def record(**fields: Any) -> RawRecord:
    return RawRecord(Origin("a.jsonl", 7), fields)


def refusal(**fields: Any) -> str:
    with pytest.raises(DataError) as caught:
        normalise(record(**fields))
    assert caught.value.message.startswith("a.jsonl:7: ")
    return caught.value.message.removeprefix("a.jsonl:7: ")


# ---- messages -------------------------------------------------------------------------------------------------------


def test_messages_pass_through_with_tools_and_other_keys() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": None}}}
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": ""},
        {"role": "developer", "content": " kept as written \n"},
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "3", "tool_call_id": "1", "name": "f"},
        ANSWER,
        USER,
    ]
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert normalise(record(messages=messages, tools=tools, label="x")) == (
        "messages",
        Conversation(messages, tools),
    )


def test_keys_that_are_null_are_as_if_absent() -> None:
    turn = {"role": "assistant", "content": "a", "tool_calls": None, "name": None}
    _, found = normalise(record(messages=[USER, turn]))
    assert isinstance(found, Conversation)
    assert found.messages[1] == {"role": "assistant", "content": "a"}


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": " b"}]
    _, found = normalise(record(messages=[{"role": "user", "content": parts}, ANSWER]))
    assert isinstance(found, Conversation)
    assert found.messages[0]["content"] == "a b"


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [USER],
        [USER, {"role": "assistant", "content": ""}],
        [USER, {"role": "assistant", "content": " \n"}],
        [USER, {"role": "assistant", "content": None}],
        [USER, {"role": "assistant"}],
        [USER, {"role": "assistant", "content": None, "tool_calls": []}],
        [USER, {"role": "assistant", "content": []}],
        [USER, ANSWER, USER, {"role": "assistant", "content": ""}],
    ],
)
def test_messages_without_an_answer_are_refused(messages: list[Any]) -> None:
    assert "record without an answer" in refusal(messages=messages)


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ("text", "messages: must be a list of turns, found text"),
        (None, "messages: must be a list of turns, found null"),
        ([USER, "text"], "messages[1]: a turn is an object, found text"),
        ([{"content": "a"}], f"messages[0]: has no role; allowed: {', '.join(ROLES)}"),
        ([{"role": "human", "content": "a"}], "messages[0]: unknown role 'human'; allowed: system, developer, user"),
        ([{"role": ["user"], "content": "a"}], "messages[0]: unknown role ['user']"),
        ([{"role": "user"}], "messages[0]: the turn of 'user' has no content"),
        ([{"role": "user", "content": 3}], "messages[0].content: must be text, found a number"),
        ([{"role": "user", "content": [{"type": "image"}]}], "messages[0].content[0]: only parts"),
        ([{"role": "user", "content": ["a"]}], "messages[0].content[0]: only parts"),
        ([{"role": "user", "content": "a", "tool_calls": []}], "messages[0].tool_calls: must be a list, in an assis"),
        ([{"role": "assistant", "content": "a", "tool_calls": {}}], "messages[0].tool_calls: must be a list"),
    ],
)
def test_a_turn_that_cannot_be_used_is_named(messages: Any, said: str) -> None:
    assert refusal(messages=messages).startswith(said)


def test_tools_may_be_json_text_as_tables_keep_it() -> None:
    tools = [{"name": "f"}]
    for written, meant in ((json.dumps(tools), tools), (" ", None), ("[]", None), ([], None), (None, None)):
        assert normalise(record(messages=[USER, ANSWER], tools=written))[1] == Conversation([USER, ANSWER], meant)


@pytest.mark.parametrize("tools", ["not json", "{}", {"name": "f"}, 3])
def test_tools_of_another_type_are_refused(tools: Any) -> None:
    assert refusal(messages=[USER, ANSWER], tools=tools).startswith("tools: ")


# ---- prompt and completion ------------------------------------------------------------------------------------------


def test_prompt_and_completion_become_a_pair_as_written() -> None:
    assert normalise(record(prompt=" a\n", completion=" b", id=3)) == ("prompt_completion", Pair(" a\n", " b"))


def test_lists_of_messages_become_a_conversation() -> None:
    greeting = {"role": "assistant", "content": "Hello"}
    assert normalise(record(prompt=[greeting, USER], completion=[ANSWER])) == (
        "prompt_completion",
        Conversation([greeting, USER, ANSWER]),
    )


def test_the_answer_must_be_in_the_completion() -> None:
    assert "completion: record without an answer" in refusal(prompt=[USER, ANSWER], completion=[USER])


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"prompt": "a", "completion": ""}, "completion: record without an answer: it is empty"),
        ({"prompt": "a", "completion": " \n\t"}, "completion: record without an answer: it is empty"),
        ({"prompt": "a", "completion": None}, "completion: record without an answer: it is null"),
        ({"prompt": "a", "completion": 3}, "completion: must be text, found a number"),
        ({"prompt": "a", "completion": True}, "completion: must be text, found true or false"),
        ({"prompt": {}, "completion": "a"}, "prompt: must be text, found an object"),
        ({"prompt": "", "completion": "a"}, "prompt: record without a prompt"),
        ({"prompt": "a", "completion": [ANSWER]}, "prompt: must be a list of turns, found text"),
        ({"prompt": [USER], "completion": "a"}, "completion: must be a list of turns, found text"),
    ],
)
def test_a_pair_that_cannot_be_used_names_its_column(fields: dict[str, Any], said: str) -> None:
    assert refusal(**fields).startswith(said)


# ---- Alpaca ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", [{}, {"input": ""}, {"input": " "}, {"input": None}])
def test_alpaca_without_an_input(context: dict[str, Any]) -> None:
    assert normalise(record(instruction="a", output="b", **context)) == ("alpaca", Pair("a", "b"))


def test_alpaca_with_an_input() -> None:
    assert normalise(record(instruction="a", input="i", output="b")) == ("alpaca", Pair("a\n\ni", "b"))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"instruction": "a", "output": ""}, "output: record without an answer"),
        ({"instruction": "a", "output": None}, "output: record without an answer"),
        ({"instruction": "a", "output": ["b"]}, "output: must be text, found a list"),
        ({"instruction": "", "output": "b"}, "instruction: record without an instruction"),
        ({"instruction": "a", "input": 3, "output": "b"}, "input: must be text, found a number"),
    ],
)
def test_an_alpaca_record_that_cannot_be_used_names_its_column(fields: dict[str, Any], said: str) -> None:
    assert refusal(**fields).startswith(said)


# ---- ShareGPT -------------------------------------------------------------------------------------------------------


def test_sharegpt_becomes_a_conversation() -> None:
    turns = [("system", "s"), ("human", "h"), ("gpt", " g\n"), ("human", "h2"), ("tool", "t"), ("gpt", "g2")]
    conversations = [{"from": speaker, "value": value} for speaker, value in turns]
    roles = ["system", "user", "assistant", "user", "tool", "assistant"]
    expected = [{"role": role, "content": value} for role, (_, value) in zip(roles, turns, strict=True)]
    assert normalise(record(id="x", conversations=conversations)) == ("sharegpt", Conversation(expected))


def test_every_speaker_has_a_role_of_messages() -> None:
    assert set(SPEAKERS.values()) <= set(ROLES)


@pytest.mark.parametrize(
    ("turns", "said"),
    [
        ([("human", "h")], "conversations: record without an answer"),
        ([], "conversations: record without an answer"),
        ([("human", "h"), ("gpt", " ")], "conversations[1]: record without an answer"),
        ([("human", "h"), ("gpt", None)], "conversations[1]: record without an answer"),
        ([("human", "h"), ("gpt", 3)], "conversations[1].value: must be text, found a number"),
        ([("human", None), ("gpt", "g")], "conversations[0].value: must be text, found null"),
        ([("someone", "h"), ("gpt", "g")], "conversations[0]: unknown speaker 'someone'; allowed in `from`: system"),
        ([(None, "h"), ("gpt", "g")], "conversations[0]: has no `from`"),
        ([("gpt", "g"), ("human", "h"), ("gpt", "g")], "conversations[0]: the turn of 'gpt' answers nothing"),
        ([("system", "s"), ("gpt", "g"), ("human", "h")], "conversations[1]: the turn of 'gpt' answers nothing"),
    ],
)
def test_a_sharegpt_turn_that_cannot_be_used_is_named(turns: list[tuple[Any, Any]], said: str) -> None:
    conversations = [{"from": speaker, "value": value} for speaker, value in turns]
    assert refusal(conversations=conversations).startswith(said)


# ---- text, and no form or two ---------------------------------------------------------------------------------------


def test_text_becomes_a_document() -> None:
    assert normalise(record(text=" a\n", title="t")) == ("text", Document(" a\n"))


@pytest.mark.parametrize("text", ["", " \n", None])
def test_text_that_holds_nothing_is_refused(text: Any) -> None:
    assert refusal(text=text).startswith("text: record without text")


def test_columns_of_two_forms_are_refused_by_name() -> None:
    message = refusal(messages=[USER, ANSWER], text="a")
    assert message == "the columns fit two forms: messages and text"
    assert "instruction + output and text" in refusal(instruction="a", output="b", text="a b")


def test_a_column_that_is_null_does_not_make_a_form_where_another_is_filled() -> None:
    assert normalise(record(messages=None, text="a")) == ("text", Document("a"))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"prompt": "a", "label": "x"}, "there is 'prompt' but no 'completion' (columns found: prompt, label)"),
        ({"instruction": "a"}, "there is 'instruction' but no 'output'"),
    ],
)
def test_a_question_without_its_answer_column(fields: dict[str, Any], said: str) -> None:
    message = refusal(**fields)
    assert message.startswith("record without an answer: ")
    assert said in message


@pytest.mark.parametrize(("fields", "found"), [({"question": "a", "reply": "b"}, "question, reply"), ({}, "none")])
def test_an_unknown_form_lists_what_was_found_and_what_is_allowed(fields: dict[str, Any], found: str) -> None:
    with pytest.raises(DataError) as caught:
        normalise(record(**fields))
    assert caught.value.message == f"a.jsonl:7: no known form of record (columns found: {found})"
    for column in ("messages", "prompt + completion", "instruction + output", "conversations", "text"):
        assert column in caught.value.hint
