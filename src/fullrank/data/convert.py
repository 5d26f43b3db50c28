"""Records -> one of three normalised forms: a conversation, a prompt/completion pair, or a document.

The columns tell the form; columns that do not belong to it are ignored:

    form                columns                         becomes
    messages            messages [+ tools]              Conversation
    prompt_completion   prompt, completion              Pair; a Conversation [+ tools] when both are lists of messages
    alpaca              instruction, output [+ input]   Pair; the input follows the instruction after a blank line
    sharegpt            conversations [+ tools]         Conversation; `from` and `value` become role and content
    text                text                            Document
    preference          chosen, rejected [+ prompt]     as prompt/completion with the chosen answer; the rejected one is no text
                                                        to learn from, and supervised training leaves it alone
    choices             choices, answer and question    Pair of the question (or prompt) and the right choice; the answer is its
                        or prompt                       text, or its number from 0. Read so only where no other form fits

Promises: every answer that comes out of here holds something; text is passed on as written, neither trimmed nor
repaired; a record that fits no form, or two, is refused by name and line. Whether a model's chat template can render a
conversation is the template's to say.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from fullrank.data.parse import shortened
from fullrank.data.sources import RawRecord, kind_of
from fullrank.errors import DataError

Form = Literal["messages", "prompt_completion", "alpaca", "sharegpt", "text", "preference", "choices"]
FORMS: tuple[Form, ...] = get_args(Form)


@dataclass(frozen=True)
class Conversation:
    """Chat turns, at least one of them the assistant's.

    Every message has `role` (one of `ROLES`) and `content` (text; None only beside `tool_calls`); other keys
    (`tool_calls`, `reasoning_content`, `name`, ...) are as the record has them, for the chat template to use; `train: false` or
    `weight: 0` leaves a turn out of the loss. `tools`: JSON schemas of functions, or None.
    """

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None


@dataclass(frozen=True)
class Pair:
    """A prompt and its answer as plain text."""

    prompt: str
    completion: str
    choices: tuple[str, ...] = ()
    """What the completion was to be chosen from; empty where nothing was."""
    right: int = 0
    """Which of the choices the completion is."""


@dataclass(frozen=True)
class Document:
    """Raw text, every token of which is learned."""

    text: str


ROLES = ("system", "developer", "user", "assistant", "tool")

#: Speakers of ShareGPT turns, as the public dumps name them -> role.
SPEAKERS: dict[str, str] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
}

#: The columns that make up each form: what is asked, what is answered.
_COLUMNS: dict[Form, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "sharegpt": ("conversations",),
    "text": ("text",),
    "preference": ("chosen", "rejected"),
    "choices": ("choices", "answer"),
}
_FORMS_IN_WORDS = " | ".join(" + ".join(columns) for columns in _COLUMNS.values())


def normalise(record: RawRecord) -> tuple[Form, Conversation | Pair | Document]:
    """The record's form and what it becomes.

    Raises:
        DataError: naming the record's file and line and the column: no form or two, a wrong type, an unknown role, or
            no answer.
    """
    form = _form(record)
    if form == "messages":
        return form, Conversation(_answered(record, "messages", _messages(record, "messages")), _tools(record))
    if form == "sharegpt":
        return form, Conversation(_answered(record, "conversations", _sharegpt(record)), _tools(record))
    if form == "preference":
        return form, _preferred(record)
    if form == "choices":
        return form, _chosen(record)
    if form == "text":
        return form, Document(_text(record, "text", "record without text"))
    if form == "alpaca":
        return form, Pair(_alpaca_prompt(record), _text(record, "output", "record without an answer"))
    if isinstance(record.fields["prompt"], list) or isinstance(record.fields["completion"], list):
        answer = _answered(record, "completion", _messages(record, "completion"))
        return form, Conversation(_messages(record, "prompt") + answer, _tools(record))
    prompt = _text(record, "prompt", "record without a prompt")
    return form, Pair(prompt, _text(record, "completion", "record without an answer"))


def _form(record: RawRecord) -> Form:
    fields = record.fields
    matching = [form for form, columns in _COLUMNS.items() if all(column in fields for column in columns)]
    # A table that mixes forms has every column in every row: the empty ones say nothing.
    filled = [form for form in matching if any(fields[column] is not None for column in _COLUMNS[form])]
    matching = filled or matching
    matching = [form for form in matching if form != "choices"] or matching  # choices beside an answer are further columns
    if len(matching) == 1:
        return matching[0]
    if matching:
        both = " and ".join(" + ".join(_COLUMNS[form]) for form in matching)
        raise DataError(f"{record.origin}: the columns fit two forms: {both}", hint="keep the columns of one form")
    problem = "no known form of record"
    for question, answer in (columns for columns in _COLUMNS.values() if len(columns) == 2):
        if question in fields:
            problem = f"record without an answer: there is {question!r} but no {answer!r}"
    found = ", ".join(shortened(name if name.isidentifier() else repr(name)) for name in list(fields)[:20]) or "none"
    raise DataError(
        f"{record.origin}: {problem} (columns found: {found}{', ...' if len(fields) > 20 else ''})",
        hint=f"a record has the columns of one form: {_FORMS_IN_WORDS}",
    )


# ---- text columns ---------------------------------------------------------------------------------------------------


def _text(record: RawRecord, column: str, when_blank: str) -> str:
    """The text of a column that must hold some."""
    value = record.fields[column]
    if value is None:
        raise DataError(f"{record.origin}: {column}: {when_blank}: it is null")
    if not isinstance(value, str):
        raise DataError(f"{record.origin}: {column}: must be text, found {kind_of(value)}")
    if not value.strip():
        raise DataError(f"{record.origin}: {column}: {when_blank}: it is empty")
    return value


def _alpaca_prompt(record: RawRecord) -> str:
    instruction = _text(record, "instruction", "record without an instruction")
    context = record.fields.get("input")
    if context is not None and not isinstance(context, str):
        raise DataError(f"{record.origin}: input: must be text, found {kind_of(context)}")
    return f"{instruction}\n\n{context}" if context and context.strip() else instruction


def _preferred(record: RawRecord) -> Conversation | Pair:
    """The chosen answer after its prompt; a chosen conversation may hold the prompt already."""
    if not isinstance(record.fields["chosen"], list):
        if "prompt" not in record.fields:
            raise DataError(f"{record.origin}: chosen: record without a prompt: the chosen answer is text with nothing before it")
        return Pair(_text(record, "prompt", "record without a prompt"), _text(record, "chosen", "record without an answer"))
    chosen = _answered(record, "chosen", _messages(record, "chosen"))
    prompt = record.fields.get("prompt")
    if prompt is None:
        return Conversation(chosen, _tools(record))
    if isinstance(prompt, list):
        before = _messages(record, "prompt")
    else:
        before = [{"role": "user", "content": _text(record, "prompt", "record without a prompt")}]
    is_there = chosen[: len(before)] == before or any(message["role"] == "user" for message in chosen)
    return Conversation(chosen if is_there else before + chosen, _tools(record))


def _chosen(record: RawRecord) -> Pair:
    """The question and the right one of its choices."""
    column = "question" if "question" in record.fields else "prompt"
    if column not in record.fields:
        raise DataError(f"{record.origin}: record without a prompt: there are 'choices' but neither 'question' nor 'prompt'")
    prompt = _text(record, column, "record without a prompt")
    choices, answer = record.fields["choices"], record.fields["answer"]
    if not isinstance(choices, list) or len(choices) < 2:
        found = f"{len(choices)} of them" if isinstance(choices, list) else kind_of(choices)
        raise DataError(f"{record.origin}: choices: must be a list of at least two texts, found {found}")
    for index, choice in enumerate(choices):
        if not isinstance(choice, str) or not choice.strip():
            found = "an empty one" if isinstance(choice, str) else kind_of(choice)
            raise DataError(f"{record.origin}: choices[{index}]: must be text, found {found}")
    if isinstance(answer, str) and answer in choices:
        right = choices.index(answer)
    elif isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        right = answer
    else:
        raise DataError(
            f"{record.origin}: answer: must be the text of a choice, or its number from 0 to {len(choices) - 1}, "
            f"found {shortened(repr(answer))}"
        )
    return Pair(prompt, choices[right], tuple(choices), right)


# ---- conversations --------------------------------------------------------------------------------------------------


def _turns(record: RawRecord, column: str) -> list[Mapping[str, Any]]:
    """A column's list of objects; where each stands is named in errors as `column[index]`, from 0."""
    value = record.fields[column]
    if not isinstance(value, list):
        raise DataError(f"{record.origin}: {column}: must be a list of turns, found {kind_of(value)}")
    for index, turn in enumerate(value):
        if not isinstance(turn, dict):
            raise DataError(f"{record.origin}: {column}[{index}]: a turn is an object, found {kind_of(turn)}")
    return value


def _messages(record: RawRecord, column: str) -> list[dict[str, Any]]:
    messages = []
    for index, turn in enumerate(_turns(record, column)):
        place = f"{record.origin}: {column}[{index}]"
        role = turn.get("role")
        if role not in ROLES:
            found = "has no role" if role is None else f"unknown role {shortened(repr(role))}"
            raise DataError(f"{place}: {found}; allowed: {', '.join(ROLES)}")
        calls = turn.get("tool_calls")
        if calls is not None and (role != "assistant" or not isinstance(calls, list)):
            found = f"found {kind_of(calls)} in a turn of {role!r}"
            raise DataError(f"{place}.tool_calls: must be a list, in an assistant turn; {found}")
        content = turn.get("content")
        if isinstance(content, list):
            content = _joined_parts(content, f"{place}.content")
        if content is None and not calls and role != "assistant":
            raise DataError(f"{place}: the turn of {role!r} has no content")
        if content is not None and not isinstance(content, str):
            raise DataError(f"{place}.content: must be text, found {kind_of(content)}")
        if role == "assistant" and not calls and not (content or "").strip():
            raise DataError(f"{place}: record without an answer: the assistant's turn is empty")
        rest = {key: value for key, value in turn.items() if key not in ("role", "content") and value is not None}
        messages.append({"role": role, "content": content, **rest})
    return messages


def _joined_parts(parts: list[Any], place: str) -> str:
    """The text of `[{"type": "text", "text": ...}, ...]`, joined without anything between."""
    texts = []
    for index, part in enumerate(parts):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            found = f"type {part.get('type')!r}" if isinstance(part, dict) else kind_of(part)
            raise DataError(f'{place}[{index}]: only parts {{"type": "text", "text": ...}} are allowed, found {found}')
        texts.append(part["text"])
    return "".join(texts)


def _sharegpt(record: RawRecord) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    for index, turn in enumerate(_turns(record, "conversations")):
        place = f"{record.origin}: conversations[{index}]"
        speaker, value = turn.get("from"), turn.get("value")
        role = SPEAKERS.get(speaker) if isinstance(speaker, str) else None
        if role is None:
            found = "has no `from`" if speaker is None else f"unknown speaker {shortened(repr(speaker))}"
            raise DataError(f"{place}: {found}; allowed in `from`: {', '.join(SPEAKERS)}")
        if role == "assistant" and (value is None or (isinstance(value, str) and not value.strip())):
            raise DataError(f"{place}: record without an answer: the turn of {speaker!r} is empty")
        if not isinstance(value, str):
            raise DataError(f"{place}.value: must be text, found {kind_of(value)}")
        if role == "assistant" and all(message["role"] == "system" for message in messages):
            # Public dumps cut long chats into pieces; a piece that opens with an answer has lost its question.
            raise DataError(
                f"{place}: the turn of {speaker!r} answers nothing: no human turn stands before it",
                hint="remove the turn; a greeting that belongs there is written in the `messages` form",
            )
        messages.append({"role": role, "content": value})
    return messages


def _answered(record: RawRecord, column: str, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if not any(message["role"] == "assistant" for message in messages):
        found = ", ".join(message["role"] for message in messages) or "none"
        raise DataError(f"{record.origin}: {column}: record without an answer: no assistant turn (found: {found})")
    return messages


def _tools(record: RawRecord) -> list[Any] | None:
    """The `tools` column: a list, or the JSON text of one (as tables keep it); None or an empty list is no tools."""
    tools = record.fields.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except ValueError as error:
            raise DataError(f"{record.origin}: tools: text that is not valid JSON: {error}") from None
    if tools is not None and not isinstance(tools, list):
        raise DataError(f"{record.origin}: tools: must be a list of function schemas, found {kind_of(tools)}")
    return tools or None
