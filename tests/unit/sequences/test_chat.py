"""Chat -> ids and mask: hand-checked on ChatML, compared with transformers where it has a mask, refused where none is exact."""

from __future__ import annotations

import datetime
from typing import Any

import pytest
import tiny
from tokenizers import processors

from fullrank.errors import DataError
from fullrank.sequences.chat import ChatRenderer, Tokens

DAY = datetime.date(2026, 1, 1)

GENERATION_MARKS = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ '<|im_start|>assistant\\n' }}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# What the templates of reasoning models do: thoughts of earlier answers are dropped once a later turn follows.
FORGETS_THOUGHTS = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if loop.last %}{{ message['content'] }}{% else %}{{ message['content'].split('</think>')[-1] }}{% endif %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# The prompt a server sends ends with words that the finished turn does not have.
OTHER_PROMPT = tiny.CHATML.replace(
    "'<|im_start|>assistant\\n' }}{% endif %}", "'<|im_start|>assistant\\n<think>\\n' }}{% endif %}"
)
NO_END = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n' }}{% endfor %}" + (
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
PRINTS_TODAY = "{{ '<|im_start|>system\\nToday is ' + strftime_now('%d %b %Y') + '<|im_end|>\\n' }}" + tiny.CHATML
DEFAULT_SYSTEM = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nbe kind<|im_end|>\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def renderer(template: str | None = tiny.CHATML, **changes: Any) -> ChatRenderer:
    return ChatRenderer(tiny.tokenizer(chat_template=template, **changes), DAY, "tiny/model")


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def one(speaker: ChatRenderer, *arguments: Any, **options: Any) -> Tokens:
    """The only example of a conversation."""
    (tokens,) = speaker.examples(*arguments, **options)
    return tokens


def pieces(speaker: ChatRenderer, tokens: Tokens) -> list[tuple[bool, str]]:
    """The text in stretches of equal mask."""
    stretches: list[tuple[bool, list[int]]] = []
    for token, inside in zip(tokens.ids, tokens.supervised, strict=True):
        if not stretches or stretches[-1][0] != inside:
            stretches.append((inside, []))
        stretches[-1][1].append(token)
    return [(inside, speaker.decode(ids)) for inside, ids in stretches]


# ---- masks by hand ----------------------------------------------------------------------------------------------------------


def test_every_assistant_turn_is_supervised_from_its_first_character_through_its_end_of_turn_token() -> None:
    speaker = renderer()
    conversation = [
        turn("system", "be brief"),
        turn("user", "what is 2+2"),
        turn("assistant", "look it up"),
        turn("tool", "4"),
        turn("assistant", "four"),
        turn("user", "thanks"),
    ]
    tokens = one(speaker, conversation)
    assert pieces(speaker, tokens) == [
        (
            False,
            "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nwhat is 2+2<|im_end|>\n<|im_start|>assistant\n",
        ),
        (True, "look it up<|im_end|>"),
        (False, "\n<|im_start|>tool\n4<|im_end|>\n<|im_start|>assistant\n"),
        (True, "four<|im_end|>"),
        (False, "\n<|im_start|>user\nthanks<|im_end|>\n"),
    ]


def test_loss_on_completion_supervises_the_last_answer_only() -> None:
    speaker = renderer()
    conversation = [turn("user", "a"), turn("assistant", "one"), turn("user", "b"), turn("assistant", "two")]
    tokens = one(speaker, conversation, loss_on="completion")
    assert [text for inside, text in pieces(speaker, tokens) if inside] == ["two<|im_end|>"]


def test_loss_on_all_supervises_every_token_and_keeps_the_ids() -> None:
    speaker = renderer()
    conversation = [turn("user", "a"), turn("assistant", "one")]
    everything, answers = one(speaker, conversation, loss_on="all"), one(speaker, conversation)
    assert everything.ids == answers.ids
    assert all(everything.supervised)
    assert everything.supervised_targets() == len(everything.ids) - 1  # nothing predicts the first token


def test_tools_reach_the_template() -> None:
    speaker = renderer()
    tools = [{"type": "function", "function": {"name": "lookup", "parameters": {}}}]
    conversation = [turn("user", "a"), turn("assistant", "b")]
    with_tools = pieces(speaker, one(speaker, conversation, tools=tools))
    assert '"name": "lookup"' in with_tools[0][1]
    assert with_tools[1] == (True, "b<|im_end|>")


def test_an_end_of_turn_token_that_pads_as_well_stays_supervised() -> None:
    spoken = tiny.tokenizer(pad_token="<|im_end|>")
    assert spoken.pad_token_id == spoken.eos_token_id
    speaker = ChatRenderer(spoken, DAY, "tiny/model")
    tokens = one(speaker, [turn("user", "a"), turn("assistant", "b")])
    assert pieces(speaker, tokens)[1] == (True, "b<|im_end|>")


def test_control_tokens_written_by_a_user_do_not_move_the_mask() -> None:
    speaker = renderer()
    tokens = one(speaker, [turn("user", "say <|im_end|>"), turn("assistant", "no")])
    assert [text for inside, text in pieces(speaker, tokens) if inside] == ["no<|im_end|>"]


def test_text_of_many_bytes_a_character_is_supervised_whole() -> None:
    speaker = renderer()
    tokens = one(speaker, [turn("user", "größer?"), turn("assistant", "≥ 5 € 🙂")])
    assert [text for inside, text in pieces(speaker, tokens) if inside] == ["≥ 5 € 🙂<|im_end|>"]


def test_white_space_inside_an_answer_is_supervised_when_the_tokenizer_trims_offsets() -> None:
    # Tokenizers of the RoBERTa kind give tokens of white space an empty span.
    spoken = tiny.tokenizer()
    spoken.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    speaker = ChatRenderer(spoken, DAY, "tiny/model")
    tokens = one(speaker, [turn("user", "a"), turn("assistant", "one\n\n  two")])
    assert [text for inside, text in pieces(speaker, tokens) if inside] == ["one\n\n  two<|im_end|>"]


@pytest.mark.parametrize("template", [tiny.CHATML, DEFAULT_SYSTEM])
def test_a_conversation_that_opens_with_an_answer_does_not_learn_what_the_template_writes(template: str) -> None:
    speaker = renderer(template)
    tokens = one(speaker, [turn("assistant", "welcome"), turn("user", "hi"), turn("assistant", "yes")])
    assert [text for inside, text in pieces(speaker, tokens) if inside] == ["welcome<|im_end|>", "yes<|im_end|>"]


# ---- tokens as a server makes them ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", ["four", " four", "\nfour", "\n\nfour", "  four", "\tfour", "\n", " "])
def test_the_ids_are_those_of_the_served_prompt_followed_by_the_answer(answer: str) -> None:
    speaker = renderer()
    asked = [turn("system", "be brief"), turn("user", "2+2")]
    tokens = one(speaker, [*asked, turn("assistant", answer)])
    served = speaker.ids(speaker.prompt(asked))
    assert tokens.ids[: len(served)] == served
    assert tokens.supervised[: len(served)] == [False] * len(served)
    assert tokens.supervised[len(served)]
    assert pieces(speaker, tokens)[1] == (True, f"{answer}<|im_end|>")
    assert speaker.decode(tokens.ids) == speaker.text([*asked, turn("assistant", answer)])


def test_an_answer_that_would_melt_into_the_prompt_is_a_case_that_exists() -> None:
    # The law above would be empty if the tokenizer never joined prompt and answer.
    speaker = renderer()
    whole = speaker.text([turn("user", "2+2"), turn("assistant", "\n\nfour")])
    served = speaker.ids(speaker.prompt([turn("user", "2+2")]))
    assert speaker.ids(whole)[: len(served)] != served


def test_only_the_last_answer_begins_with_white_space_in_a_long_conversation() -> None:
    speaker = renderer()
    asked = [turn("user", "a"), turn("assistant", "one"), turn("user", "b")]
    tokens = one(speaker, [*asked, turn("assistant", "\n\ntwo")])
    served = speaker.ids(speaker.prompt(asked))
    assert tokens.ids[: len(served)] == served
    assert [text for inside, text in pieces(speaker, tokens) if inside] == ["one<|im_end|>", "\n\ntwo<|im_end|>"]


# ---- compared with transformers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", tiny.chat_rows(11), ids=lambda row: f"{len(row['messages'])} turns")
def test_a_template_with_generation_marks_gives_the_mask_of_transformers(row: dict[str, Any]) -> None:
    speaker = renderer(GENERATION_MARKS)
    theirs = tiny.tokenizer(chat_template=GENERATION_MARKS).apply_chat_template(
        row["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ours = one(speaker, row["messages"])
    assert ours.ids == theirs["input_ids"]
    assert [int(inside) for inside in ours.supervised] == theirs["assistant_masks"]
    assert any(ours.supervised)


def test_generation_marks_change_nothing() -> None:
    conversation = tiny.chat_rows(6)[5]["messages"]
    assert one(renderer(GENERATION_MARKS), conversation) == one(renderer(), conversation)


# ---- templates that rewrite earlier turns -----------------------------------------------------------------------------------


def test_turns_that_a_template_rewrites_are_learned_in_examples_of_their_own() -> None:
    speaker = renderer(FORGETS_THOUGHTS)
    thought = [turn("user", "a"), turn("assistant", "<think>hm</think>one"), turn("user", "b"), turn("assistant", "two")]
    first, second = speaker.examples(thought)
    asked = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    assert pieces(speaker, first) == [(False, asked), (True, "<think>hm</think>one<|im_end|>"), (False, "\n")]
    assert pieces(speaker, second)[:2] == [
        (False, f"{asked}one<|im_end|>\n<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n"),
        (True, "two<|im_end|>"),
    ]


def test_turns_that_stand_unchanged_share_one_example() -> None:
    speaker = renderer(FORGETS_THOUGHTS)
    plain = [turn("user", "a"), turn("assistant", "one"), turn("user", "b"), turn("assistant", "two")]
    assert one(speaker, plain) == one(renderer(), plain)
    assert [text for inside, text in pieces(speaker, one(speaker, plain)) if inside] == ["one<|im_end|>", "two<|im_end|>"]


# ---- which turns ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mark", [{"train": False}, {"weight": 0}, {"weight": 0.0, "train": False}])
def test_a_turn_that_the_record_leaves_out_is_context_only(mark: dict[str, Any]) -> None:
    speaker = renderer()
    conversation = [turn("user", "a"), {**turn("assistant", "one"), **mark}, turn("user", "b"), turn("assistant", "two")]
    plain = [{key: value for key, value in message.items() if key in ("role", "content")} for message in conversation]
    tokens = one(speaker, conversation)
    assert tokens.ids == one(speaker, plain).ids
    assert [text for inside, text in pieces(speaker, tokens) if inside] == ["two<|im_end|>"]
    everything = one(speaker, conversation, loss_on="all")
    assert [text for inside, text in pieces(speaker, everything) if not inside] == ["one<|im_end|>"]


@pytest.mark.parametrize(
    ("mark", "problem"),
    [
        ({"weight": 0.5}, "`weight` must be 0 or 1"),
        ({"train": "no"}, "`train` must be true or false"),
        ({"train": True, "weight": 0}, "`train` says True and `weight` says 0"),
        ({"train": False}, "every assistant turn is left out"),
    ],
)
def test_other_weights_are_refused(mark: dict[str, Any], problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        one(renderer(), [turn("user", "a"), {**turn("assistant", "one"), **mark}])


@pytest.mark.parametrize(
    ("message", "lost"),
    [
        ({"content": "one", "reasoning_content": "because"}, "reasoning"),
        ({"content": "", "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": {}}}]}, "call of look"),
    ],
)
def test_what_the_template_does_not_write_of_an_answer_is_refused(message: dict[str, Any], lost: str) -> None:
    with pytest.raises(DataError, match=rf"turn 2 \(assistant\): it does not write the (turn's )?{lost}"):
        one(renderer(), [turn("user", "a"), {"role": "assistant", **message}])


def test_a_template_that_leaves_out_the_system_turn_is_refused() -> None:
    deaf = (
        "{% for message in messages %}{% if message['role'] != 'system' %}"
        + tiny.CHATML.partition("{% for message in messages %}")[2]
    )
    deaf = deaf.replace("{% endfor %}", "{% endif %}{% endfor %}", 1)
    with pytest.raises(DataError, match=r"turn 1 \(system\): it does not write this turn's text"):
        one(renderer(deaf), [turn("system", "be brief"), turn("user", "a"), turn("assistant", "one")])


# ---- refused ----------------------------------------------------------------------------------------------------------------


def test_a_template_that_shortens_the_answer_to_learn_is_refused() -> None:
    forgets_at_once = FORGETS_THOUGHTS.replace("loop.last", "false")
    thought = [turn("user", "a"), turn("assistant", "<think>hm</think>one")]
    with pytest.raises(DataError, match=r"tiny/model, turn 2 \(assistant\): it does not write the turn's reasoning"):
        one(renderer(forgets_at_once), thought)


def test_a_template_whose_prompt_is_not_what_the_turn_begins_with_is_refused() -> None:
    with pytest.raises(DataError, match=r"tiny/model, turn 2 \(assistant\): what comes before the turn is rendered differently"):
        one(renderer(OTHER_PROMPT), [turn("user", "a"), turn("assistant", "one")])


def test_a_template_that_ends_no_turn_is_refused() -> None:
    with pytest.raises(DataError, match=r"tiny/model, turn 2 \(assistant\): no control token ends the turn"):
        one(renderer(NO_END), [turn("user", "a"), turn("assistant", "one")])


def test_a_template_that_refuses_a_conversation_is_quoted() -> None:
    strict = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(
        DataError, match=r"the chat template of tiny/model, turn 1 \(user\): it refuses the conversation: roles must alternate"
    ):
        one(renderer(strict), [turn("user", "a"), turn("assistant", "one")])


def test_messages_without_a_template_say_where_to_give_one() -> None:
    with pytest.raises(DataError, match=r"tiny/model has no chat template.*data\.chat_template"):
        one(renderer(None), [turn("user", "a"), turn("assistant", "one")])


def test_a_conversation_without_an_answer_is_refused() -> None:
    with pytest.raises(DataError, match="without an assistant turn"):
        one(renderer(), [turn("user", "a")])


def test_a_tokenizer_without_offsets_is_refused() -> None:
    slow = tiny.tokenizer()
    slow.__class__ = type("Slow", (type(slow),), {"is_fast": False})
    with pytest.raises(DataError, match=r"tiny/model: its tokenizer has no tokenizer\.json"):
        ChatRenderer(slow, DAY, "tiny/model")


# ---- the clock, pairs, documents, stop tokens -------------------------------------------------------------------------------


def test_a_template_that_prints_today_prints_the_recipes_day() -> None:
    conversation = [turn("user", "a"), turn("assistant", "one")]
    spoken = tiny.tokenizer(chat_template=PRINTS_TODAY)
    assert "Today is 01 Jan 2026" in ChatRenderer(spoken, DAY, "tiny").text(conversation)
    assert "Today is 29 Feb 2024" in ChatRenderer(spoken, datetime.date(2024, 2, 29), "tiny").prompt(conversation[:1])
    today = datetime.datetime.now().strftime("%d %b %Y")
    assert today in spoken.apply_chat_template(conversation, tokenize=False), "without the frozen clock it is today's"


def test_a_pair_is_a_conversation_of_one_exchange() -> None:
    speaker = renderer()
    assert speaker.pair("2+2", "four") == one(speaker, [turn("user", "2+2"), turn("assistant", "four")])
    assert all(speaker.pair("2+2", "four", loss_on="all").supervised)


@pytest.mark.parametrize("completion", [" four", "four", "\n\nfour"])
def test_a_pair_without_a_template_is_prompt_ids_then_answer_ids_then_end_of_sequence(completion: str) -> None:
    speaker = renderer(None)
    spoken = tiny.tokenizer(chat_template=None)
    tokens = speaker.pair("2+2 =", completion)
    served = spoken("2+2 =")["input_ids"]
    assert tokens.ids[: len(served)] == served
    assert spoken.decode(tokens.ids[len(served) : -1]) == completion
    assert tokens.ids[-1] == spoken.eos_token_id
    assert tokens.supervised == [False] * len(served) + [True] * (len(tokens.ids) - len(served))
    assert all(speaker.pair("2+2 =", completion, loss_on="all").supervised)


def test_a_document_is_supervised_throughout_and_ends_once() -> None:
    speaker = renderer(None)
    (tokens,) = speaker.documents(["the sea"])
    assert tokens.supervised == [True] * len(tokens.ids)
    assert speaker.decode(tokens.ids) == "the sea<|im_end|>"
    quoted, empty = speaker.documents(["the sea<|im_end|>", ""])
    assert speaker.decode(quoted.ids) == "the sea<|im_end|><|im_end|>" and quoted.ids.count(tokens.ids[-1]) == 1
    assert empty.ids == tokens.ids[-1:]


def test_without_an_end_of_sequence_token_plain_text_is_refused() -> None:
    spoken = tiny.tokenizer(chat_template=None)
    spoken.eos_token = None
    with pytest.raises(DataError, match="no end-of-sequence token"):
        ChatRenderer(spoken, DAY, "tiny").documents(["the sea"])


def test_the_stop_tokens_are_the_end_of_sequence_and_the_templates_end_of_turn() -> None:
    spoken = tiny.tokenizer()
    ids = {token: spoken.convert_tokens_to_ids(token) for token in tiny.CONTROL_TOKENS}
    assert ChatRenderer(spoken, DAY, "tiny").stop_ids() == [ids["<|im_end|>"]]
    spoken.eos_token = "<|endoftext|>"
    renderer = ChatRenderer(spoken, DAY, "tiny")
    assert renderer.stop_ids() == [ids["<|endoftext|>"]]
    renderer.pair("the sky", "the sea", loss_on="all")  # what an answer ended with is known once one was rendered
    assert renderer.stop_ids() == sorted([ids["<|endoftext|>"], ids["<|im_end|>"]])


def test_a_date_format_that_the_template_computes_is_refused() -> None:
    computed = "{% set style = '%Y' %}{{ strftime_now(style) }}" + tiny.CHATML
    with pytest.raises(DataError, match=r"refuses the conversation: .*cannot be held fixed"):
        renderer(computed).text([turn("user", "a")])
