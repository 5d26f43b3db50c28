"""Writes the golden masks (`python tests/golden/make_masks.py`): what each family trains on, spelled out by hand.

One small function per family writes a conversation in that family's documented prompt format, as pieces of text with the turn
that has to write each; a second rule says which turns one rendering can teach together. No Jinja and nothing of the library is
used, so the files are a second opinion on both. A file shows every case: supervised text in ⟦ ⟧, a new line as ⏎ before the line
break, how many turns each example shows and which it teaches, or `refused: turn 2` where the template cannot write what the
record has, or cannot be trained as it is served (of several, one is to be named). Turns count from 1, system and tool turns
included.

The law: what stands before a learned turn is what a server feeds the model there, and the turn is what the model must write,
from the first character after the generation prompt through the token that ends the turn.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MASKS = Path(__file__).with_name("masks")

#: The day that templates which print one are shown (1 January 2026).
DAY = (2026, 1, 1)

Message = dict[str, Any]
#: Text, and the index of the message whose writer must produce it (None: the template's own, or someone else's words).
Piece = tuple[str, int | None]
#: The index of a turn, or "tools": the list of them.
Blame = int | str


@dataclass(frozen=True)
class Case:
    """A conversation and what is asked of it."""

    messages: list[Message]
    tools: list[Message] | None = None
    loss_on: str = "assistant"


@dataclass(frozen=True)
class Example:
    """One sequence: how many messages it shows, the turns it teaches (their indices), its text in stretches of equal mask."""

    until: int
    turns: list[int]
    segments: list[tuple[str, bool]]


# ---- the conversations ------------------------------------------------------------------------------------------------------

WEATHER: Message = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Name of the city"},
                "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
            },
            "required": ["city"],
        },
    },
}


def system(content: str) -> Message:
    return {"role": "system", "content": content}


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def answer(content: str, thought: str | None = None, **more: Any) -> Message:
    thoughts = {} if thought is None else {"reasoning_content": thought}
    return {"role": "assistant", "content": content, **thoughts, **more}


def call(city: str, number: int = 0, content: str | None = "", thought: str | None = None, **more: Any) -> Message:
    asked = {"id": f"call{number:05d}", "type": "function"}
    asked["function"] = {"name": "get_weather", "arguments": {"city": city, "unit": "celsius"}}  # type: ignore[assignment]
    thoughts = {} if thought is None else {"reasoning_content": thought}
    return {"role": "assistant", "content": content, **thoughts, "tool_calls": [asked], **more}


def result(content: str, number: int = 0) -> Message:
    return {"role": "tool", "name": "get_weather", "tool_call_id": f"call{number:05d}", "content": content}


TWO_CALLS = call("Paris")
TWO_CALLS = {**TWO_CALLS, "tool_calls": [*TWO_CALLS["tool_calls"], *call("Zürich", 1)["tool_calls"]]}

#: Some templates take a call's arguments as text only.
TEXT_CALL = call("Zürich", train=False)
TEXT_CALL = {**TEXT_CALL, "tool_calls": [{**TEXT_CALL["tool_calls"][0], "function": {"name": "get_weather", "arguments": "{}"}}]}

FRANCE, GERMANY = user("What is the capital of France?"), user("And of Germany?")
PARIS, BERLIN = answer("Paris."), answer("Berlin, since 1990.")
ASKED = user("Is it warm in Zürich?")
WARM = answer("Yes, it is 24 °C.")

CASES: dict[str, Case] = {
    "single_turn": Case([FRANCE, PARIS]),
    "system_multi_turn": Case([system("Answer in a word.\n\nBe kind."), FRANCE, PARIS, GERMANY, BERLIN]),
    "multi_turn": Case([FRANCE, PARIS, GERMANY, BERLIN, user("And of Italy?"), answer("Rome.")]),
    "ends_with_user": Case([FRANCE, PARIS, GERMANY, BERLIN, user("Thanks!")]),
    "train_false": Case([FRANCE, answer("Lyon.", train=False), GERMANY, BERLIN]),
    "weight_0": Case([FRANCE, answer("Paris.", weight=1), GERMANY, answer("Bonn.", weight=0)]),
    "completion": Case([system("Be brief."), FRANCE, PARIS, GERMANY, BERLIN], loss_on="completion"),
    "unicode": Case(
        [user("Où? 你好 🙂 e\u0301 שלום\u200d"), answer("À Zürich 東京 👩\u200d🚀 \u0627\u0644"), user("¿?"), answer("—")]
    ),
    "blank_lines": Case(
        [
            user("A list:\n\n- one\n\n\n- two\t(2)\n\n"),
            answer("def f():\n\n    return 1\n\n\nf()"),
            user("\n\nMore?"),
            answer("No."),
        ]
    ),
    "white_space": Case([FRANCE, answer("\n\nParis. ")]),
    "white_space_multi_turn": Case([FRANCE, answer("\n\nParis. "), GERMANY, answer(" Berlin.\n")]),
    "tools_listed": Case([FRANCE, PARIS], [WEATHER]),
    "tools": Case([ASKED, call("Zürich"), result("24 °C"), WARM], [WEATHER]),
    "tools_then_more": Case(
        [ASKED, call("Zürich"), result("24 °C"), WARM, user("In Paris?"), call("Paris", 1), result("9", 1), answer("No.")],
        [WEATHER],
    ),
    "tools_and_system": Case([system("Be brief."), ASKED, call("Zürich"), result("24 °C"), WARM], [WEATHER]),
    "call_without_list": Case([ASKED, call("Zürich"), result("24 °C"), WARM]),
    "call_as_context": Case([ASKED, call("Zürich", train=False), result("24 °C"), WARM], [WEATHER]),
    "call_with_words": Case([ASKED, call("Zürich", content="Let me look."), result("24 °C"), WARM], [WEATHER]),
    "call_with_null_content": Case([ASKED, call("Zürich", content=None), result("24 °C"), WARM], [WEATHER]),
    "two_calls": Case([user("Paris or Zürich?"), TWO_CALLS, result("9"), result("24", 1), answer("Zürich.")], [WEATHER]),
    "answer_to_results": Case([ASKED, TEXT_CALL, result("24 °C"), WARM]),
    "reasoning": Case([FRANCE, answer("Paris.", "France, so Paris.")]),
    "reasoning_multi_turn": Case(
        [FRANCE, answer("Paris.", "France, so Paris."), GERMANY, answer("Berlin.", "Not Bonn.\n\nBerlin.")]
    ),
    "reasoning_last_only": Case([FRANCE, PARIS, GERMANY, answer("Berlin.", "Not Bonn.")]),
    "reasoning_tools": Case(
        [
            ASKED,
            call("Zürich", thought="I must look."),
            result("24 °C"),
            answer("Yes.", "24 is warm."),
            user("Sure?"),
            answer("Yes."),
        ],
        [WEATHER],
    ),
    "reasoning_within_content": Case([FRANCE, answer("<think>\nFrance.\n</think>\n\nParis."), GERMANY, BERLIN]),
}


#: Cases that only some families are asked.
ONLY = {"answer_to_results": ("deepseekv3",)}


def cases(family: str) -> list[str]:
    return [case for case in CASES if family in ONLY.get(case, (family,))]


# ---- what is common to families ---------------------------------------------------------------------------------------------


def as_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def is_learned(message: Message) -> bool:
    return message["role"] == "assistant" and message.get("train") is not False and message.get("weight") != 0


def is_call(message: Message) -> bool:
    return bool(message.get("tool_calls"))


def functions(message: Message) -> list[Message]:
    return [asked["function"] for asked in message.get("tool_calls", [])]


def last_user(messages: Sequence[Message]) -> int:
    return max((at for at, message in enumerate(messages) if message["role"] == "user"), default=-1)


def begins_with_new_line(message: Message) -> bool:
    """The answer's first new line melts into one token with the prompt's last once both are context."""
    return (message["content"] or "").startswith("\n")


class Family:
    """How a family writes a conversation, which turns share a rendering, and what it cannot write.

    `pieces(messages, tools)`: the whole conversation, rendered without a generation prompt.
    `keeps(messages, tools, turn)`: whether rendering `messages` leaves the assistant turn as it was written when it was the
    last, and what stands before it as it was served.
    `refused(case)`: the turns that cannot be written or trained, "tools" when the list of tools cannot be written; empty
    where nothing is refused.
    """

    def __init__(
        self,
        pieces: Callable[[list[Message], list[Message] | None], list[Piece]],
        *,
        keeps: Callable[[list[Message], list[Message] | None, int], bool] = lambda messages, tools, turn: True,
        refused: Callable[[Case], list[Blame]] = lambda case: [],
    ) -> None:
        self.pieces, self.keeps, self.refused = pieces, keeps, refused

    def examples(self, case: Case) -> list[Example]:
        """The examples of a case that is not refused."""
        turns, until = learned_turns(case), len(case.messages)
        examples: list[Example] = []
        while turns:
            shown = case.messages[:until]
            together = [turn for turn in turns if turn == until - 1 or self.keeps(shown, case.tools, turn)]
            if together:
                examples.append(Example(until, together, joined(self.pieces(shown, case.tools), together)))
            turns = [turn for turn in turns if turn not in together]
            until = turns[-1] + 1 if turns else 0
        return sorted(examples, key=lambda example: example.turns[-1])


def joined(pieces: list[Piece], learned: list[int]) -> list[tuple[str, bool]]:
    """Pieces -> stretches of text, alternately not supervised and supervised; every learned turn is a stretch of its own."""
    stretches: list[tuple[str, int | None]] = []
    for text, turn in pieces:
        turn = turn if turn in learned else None
        if stretches and stretches[-1][1] == turn:
            stretches[-1] = (stretches[-1][0] + text, turn)
        elif text:
            stretches.append((text, turn))
    return [(text, turn is not None) for text, turn in stretches]


def lacks(*what: str) -> Callable[[Case], list[Blame]]:
    """What a family whose template writes none of these (`calls`, `results`, `thoughts`, `tools`, `system`) refuses."""

    def refused(case: Case) -> list[Blame]:
        blamed: list[Blame] = ["tools"] if "tools" in what and case.tools else []
        for turn, message in enumerate(case.messages):
            lost = {
                "calls": is_call(message),
                "results": message["role"] == "tool",
                "thoughts": "reasoning_content" in message,
                "system": message["role"] == "system",
            }
            if any(lost[name] for name in what if name != "tools"):
                blamed.append(turn)
        return blamed

    return refused


def learned_turns(case: Case) -> list[int]:
    learned = [turn for turn, message in enumerate(case.messages) if is_learned(message)]
    return learned[-1:] if case.loss_on == "completion" else learned


# ---- Llama 3 ----------------------------------------------------------------------------------------------------------------


def llama3_header(role: str) -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"


def llama3(messages: list[Message], tools: list[Message] | None) -> list[Piece]:
    pieces: list[Piece] = [("<|begin_of_text|>", None)]
    for turn, message in enumerate(messages):
        writer = turn if message["role"] == "assistant" else None
        pieces += [(llama3_header(message["role"]), None), (message["content"].strip() + "<|eot_id|>", writer)]
    return pieces


def llama3_2(messages: list[Message], tools: list[Message] | None) -> list[Piece]:
    told = messages[0]["content"].strip() if messages[0]["role"] == "system" else ""
    head = "<|begin_of_text|>" + llama3_header("system") + ("Environment: ipython\n" if tools else "")
    head += "Cutting Knowledge Date: December 2023\nToday Date: 01 Jan 2026\n\n" + told + "<|eot_id|>"
    pieces: list[Piece] = [(head, None)]
    first_question = next(turn for turn, message in enumerate(messages) if message["role"] == "user")
    for turn, message in enumerate(messages):
        if message["role"] == "user":
            guide = ""
            if tools and turn == first_question:
                guide = (
                    "Given the following functions, please respond with a JSON for a function call "
                    "with its proper arguments that best answers the given prompt.\n\n"
                    'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.'
                    "Do not use variables.\n\n"
                ) + "".join(as_json(tool, indent=4) + "\n\n" for tool in tools)
            pieces += [(llama3_header("user") + guide + message["content"].strip() + "<|eot_id|>", None)]
        elif message["role"] == "tool":
            pieces += [(llama3_header("ipython") + as_json(message["content"]) + "<|eot_id|>", None)]
        elif is_call(message):
            (asked,) = functions(message)
            written = f'{{"name": "{asked["name"]}", "parameters": {as_json(asked["arguments"])}}}<|eot_id|>'
            pieces += [(llama3_header("assistant"), None), (written, turn)]
        elif message["role"] == "assistant":
            pieces += [(llama3_header("assistant"), None), (message["content"].strip() + "<|eot_id|>", turn)]
    return pieces


def llama3_2_refuses(case: Case) -> list[Blame]:
    # one call a turn, and no words beside it
    wordy = [at for at, m in enumerate(case.messages) if is_call(m) and (m["content"] or len(functions(m)) > 1)]
    return [*wordy, *lacks("thoughts")(case)]


# ---- Qwen -------------------------------------------------------------------------------------------------------------------


def qwen_tools(tools: list[Message]) -> str:
    return (
        "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
        "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
        + "".join("\n" + as_json(tool) for tool in tools)
        + "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
        '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
    )


def qwen_calls(message: Message) -> list[str]:
    return [
        f'<tool_call>\n{{"name": "{asked["name"]}", "arguments": {as_json(asked["arguments"])}}}\n</tool_call>'
        for asked in functions(message)
    ]


def qwen_result(messages: list[Message], turn: int) -> str:
    """Results of one turn's calls stand together in a turn of the user."""
    opens = messages[turn - 1]["role"] != "tool"
    closes = turn + 1 == len(messages) or messages[turn + 1]["role"] != "tool"
    content = messages[turn]["content"]
    return (
        ("<|im_start|>user" if opens else "")
        + f"\n<tool_response>\n{content}\n</tool_response>"
        + ("<|im_end|>\n" if closes else "")
    )


def qwen_turns(
    messages: list[Message], system_words: str | None, written: Callable[[int, Message], str], clean: Callable[[str], str] = str
) -> list[Piece]:
    """ChatML with Qwen's results of tools; `written`: what an assistant turn says before its end-of-turn token."""
    pieces: list[Piece] = [] if system_words is None else [(f"<|im_start|>system\n{system_words}<|im_end|>\n", None)]
    for turn, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt: Piece = ("<|im_start|>assistant\n", None)
            pieces += [prompt, (written(turn, message) + "<|im_end|>", turn), ("\n", None)]
        elif message["role"] == "tool":
            pieces += [(qwen_result(messages, turn), None)]
        elif message["role"] == "user":
            pieces += [(f"<|im_start|>user\n{clean(message['content'])}<|im_end|>\n", None)]
    return pieces


def qwen_system(messages: list[Message], tools: list[Message] | None) -> str | None:
    words = messages[0]["content"] if messages[0]["role"] == "system" else None
    if tools:
        return (words + "\n\n" if words else "") + qwen_tools(tools)
    return words


def qwen2_5(messages: list[Message], tools: list[Message] | None) -> list[Piece]:
    told = messages[0]["content"] if messages[0]["role"] == "system" else None
    words = told or "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    words += "\n\n" + qwen_tools(tools) if tools else ""
    return qwen_turns(messages, words, lambda turn, message: "\n".join(filter(None, [message["content"], *qwen_calls(message)])))


def qwen3_instruct(messages: list[Message], tools: list[Message] | None) -> list[Piece]:
    def written(turn: int, message: Message) -> str:
        return "\n".join(filter(None, [message["content"], *qwen_calls(message)]))

    return qwen_turns(messages, qwen_system(messages, tools), written)


def keeps_new_lines(messages: list[Message], tools: list[Message] | None, turn: int) -> bool:
    return not begins_with_new_line(messages[turn])


def split_thought(message: Message) -> tuple[str, str]:
    """(thought, answer); a thought may also stand within the content, between `<think>` and `</think>`."""
    content = message["content"] or ""
    if "reasoning_content" in message:
        return message["reasoning_content"], content
    if "</think>" in content:
        thought, _, rest = content.partition("</think>")
        return thought.removeprefix("<think>").strip("\n"), rest.lstrip("\n")
    return "", content


def qwen3(messages: list[Message], tools: list[Message] | None) -> list[Piece]:
    """Thoughts are shown from the last question on; the empty thought only in the turn that ends the conversation."""

    def written(turn: int, message: Message) -> str:
        thought, content = split_thought(message)
        said = "\n".join(filter(None, [content, *qwen_calls(message)]))
        if turn > last_user(messages) and (thought or turn == len(messages) - 1):
            return f"<think>\n{thought}\n</think>\n\n{said.lstrip(chr(10))}"
        return said

    return qwen_turns(messages, qwen_system(messages, tools), written)


def qwen3_keeps(messages: list[Message], tools: list[Message] | None, turn: int) -> bool:
    return turn > last_user(messages) and bool(split_thought(messages[turn])[0])


def qwen3_5(messages: list[Message], tools: list[Message] | None) -> list[Piece]:
    """The prompt itself opens the thought; from the last question on every turn has one, if empty."""
    words = messages[0]["content"].strip() if messages[0]["role"] == "system" else None
    if tools:
        words = (
            "# Tools\n\nYou have access to the following functions:\n\n<tools>"
            + "".join("\n" + as_json(tool) for tool in tools)
            + "\n</tools>\n\nIf you choose to call a function ONLY reply in the following format with NO suffix:\n\n"
            "<tool_call>\n<function=example_function_name>\n<parameter=example_parameter_1>\nvalue_1\n</parameter>\n"
            "<parameter=example_parameter_2>\nThis is the value for the second parameter\nthat can span\nmultiple lines\n"
            "</parameter>\n</function>\n</tool_call>\n\n<IMPORTANT>\nReminder:\n"
            "- Function calls MUST follow the specified format: an inner <function=...></function> block must be nested within "
            "<tool_call></tool_call> XML tags\n- Required parameters MUST be specified\n"
            "- You may provide optional reasoning for your function call in natural language BEFORE the function call, but NOT "
            "after\n- If there is no function call available, answer the question like normal with your current knowledge and do "
            "not tell the user about function calls\n</IMPORTANT>" + ("\n\n" + words if words else "")
        )
    pieces: list[Piece] = []
    for text, writer in qwen_turns(messages, words, lambda turn, message: qwen3_5_says(message), clean=str.strip):
        if writer is None or writer < last_user(messages):
            pieces += [(text, writer)]
        else:
            thought, _ = split_thought(messages[writer])
            pieces += [("<think>\n", None), (f"{thought.strip()}\n</think>\n\n{text}", writer)]
    return pieces


def qwen3_5_says(message: Message) -> str:
    calls = []
    for asked in functions(message):
        values = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in asked["arguments"].items())
        calls.append(f"<tool_call>\n<function={asked['name']}>\n{values}</function>\n</tool_call>")
    content = split_thought({**message, "content": (message["content"] or "").strip()})[1]
    return (content + "\n\n" if content and calls else content) + "\n".join(calls)


def qwen3_5_keeps(messages: list[Message], tools: list[Message] | None, turn: int) -> bool:
    # An empty thought begins with a new line, which melts into one token with the prompt's once both are context.
    return turn > last_user(messages) and bool(split_thought(messages[turn])[0])


# ---- Gemma ------------------------------------------------------------------------------------------------------------------


def gemma(messages: list[Message], tools: list[Message] | None) -> list[Piece]:
    pieces: list[Piece] = [("<bos>", None)]
    prefix = ""
    for turn, message in enumerate(messages):
        if message["role"] == "system":
            prefix = message["content"] + "\n\n"
        elif message["role"] == "user":
            pieces += [(f"<start_of_turn>user\n{prefix}{message['content'].strip()}<end_of_turn>\n", None)]
            prefix = ""
        else:
            pieces += [("<start_of_turn>model\n", None), (message["content"].strip() + "<end_of_turn>", turn), ("\n", None)]
    return pieces


# ---- Phi 3 ------------------------------------------------------------------------------------------------------------------


def phi3(messages: list[Message], tools: list[Message] | None) -> list[Piece]:
    """`<|end|>` ends a turn and is where generation stops; `<|endoftext|>` only closes the whole."""
    pieces: list[Piece] = []
    for turn, message in enumerate(messages):
        writer = turn if message["role"] == "assistant" else None
        pieces += [(f"<|{message['role']}|>\n", None), (message["content"] + "<|end|>", writer), ("\n", None)]
    return [*pieces, ("<|endoftext|>", None)]


# ---- SmolLM 2 and LFM2: ChatML ----------------------------------------------------------------------------------------------


def smollm2(messages: list[Message], tools: list[Message] | None) -> list[Piece]:
    pieces: list[Piece] = []
    if messages[0]["role"] != "system":
        words = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
        pieces += [(f"<|im_start|>system\n{words}<|im_end|>\n", None)]
    for turn, message in enumerate(messages):
        writer = turn if message["role"] == "assistant" else None
        pieces += [(f"<|im_start|>{message['role']}\n", None), (message["content"] + "<|im_end|>", writer), ("\n", None)]
    return pieces


def python_call(message: Message) -> str:
    if not is_call(message):
        return ""
    calls = []
    for asked in functions(message):
        values = ", ".join(f"{key}='{value}'" for key, value in asked["arguments"].items())
        calls.append(f"{asked['name']}({values})")
    return f"<|tool_call_start|>[{', '.join(calls)}]<|tool_call_end|>"


def lfm2(messages: list[Message], tools: list[Message] | None) -> list[Piece]:
    words = [messages[0]["content"]] if messages[0]["role"] == "system" else []
    if tools:
        words.append(f"List of tools: <|tool_list_start|>[{', '.join(map(as_json, tools))}]<|tool_list_end|>")
    head = f"<|im_start|>system\n{chr(10).join(words)}<|im_end|>\n" if words else ""
    pieces: list[Piece] = [("<|startoftext|>" + head, None)]
    for turn, message in enumerate(messages):
        content = message["content"] or ""
        if message["role"] == "tool":
            pieces += [(f"<|im_start|>tool\n<|tool_response_start|>{content}<|tool_response_end|><|im_end|>\n", None)]
        elif message["role"] == "user":
            pieces += [(f"<|im_start|>user\n{content}<|im_end|>\n", None)]
        elif message["role"] == "assistant":
            written = content + python_call(message) + "<|im_end|>"
            pieces += [("<|im_start|>assistant\n", None), (written, turn), ("\n", None)]
    return pieces


def lfm2_5(messages: list[Message], tools: list[Message] | None) -> list[Piece]:
    words = [messages[0]["content"]] if messages[0]["role"] == "system" else []
    if tools:
        words.append(f"List of tools: [{', '.join(map(as_json, tools))}]")
    head = f"<|im_start|>system\n{chr(10).join(words)}<|im_end|>\n" if words else ""
    pieces: list[Piece] = [("<|startoftext|>" + head, None)]
    for turn, message in enumerate(messages):
        content = message["content"] or ""
        if message["role"] in ("user", "tool"):
            pieces += [(f"<|im_start|>{message['role']}\n{content}<|im_end|>\n", None)]
        elif message["role"] == "assistant":
            current = turn > last_user(messages)
            thought = message.get("reasoning_content")
            if not current and "</think>" in content:
                content = content.rpartition("</think>")[2].strip()
            written = f"<think>{thought}</think>" if thought and current else ""
            written += content + python_call(message) + "<|im_end|>"
            pieces += [("<|im_start|>assistant\n", None), (written, turn), ("\n", None)]
    return pieces


def lfm2_5_keeps(messages: list[Message], tools: list[Message] | None, turn: int) -> bool:
    thinks = "reasoning_content" in messages[turn] or "</think>" in (messages[turn]["content"] or "")
    if begins_with_new_line(messages[turn]):
        return False
    return turn > last_user(messages) or not thinks


# ---- gpt-oss ----------------------------------------------------------------------------------------------------------------


def gptoss_analysis(message: Message) -> str:
    """What a turn thinks: words beside a call are thoughts as well."""
    return message.get("reasoning_content") or (message["content"] or "" if is_call(message) else "")


def gptoss(messages: list[Message], tools: list[Message] | None) -> list[Piece]:
    head = (
        "<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\nKnowledge cutoff: 2024-06\n"
        "Current date: 2026-01-01\n\nReasoning: medium\n\n"
        "# Valid channels: analysis, commentary, final. Channel must be included for every message."
        + ("\nCalls to these tools must go to the commentary channel: 'functions'." if tools else "")
        + "<|end|>"
    )
    told = messages[0]["content"] if messages[0]["role"] == "system" else ""
    if told or tools:
        head += "<|start|>developer<|message|>" + (f"# Instructions\n\n{told}\n\n" if told else "")
        head += "# Tools\n\n" + GPTOSS_WEATHER if tools else ""
        head += "<|end|>"
    pieces: list[Piece] = [(head, None)]
    for turn, message in enumerate(messages):
        if message["role"] == "user":
            pieces += [(f"<|start|>user<|message|>{message['content']}<|end|>", None)]
        elif message["role"] == "tool":
            said = as_json(message["content"])
            pieces += [(f"<|start|>functions.get_weather to=assistant<|channel|>commentary<|message|>{said}<|end|>", None)]
        elif message["role"] == "assistant":
            pieces += [("<|start|>assistant", None), (gptoss_says(messages, turn), turn)]
    return pieces


def gptoss_says(messages: list[Message], turn: int) -> str:
    message, later = messages[turn], messages[turn + 1 :]
    thought = gptoss_analysis(message)
    analysis = f"<|channel|>analysis<|message|>{thought}<|end|><|start|>assistant" if thought else ""
    if is_call(message):
        (asked,) = functions(message)
        answered = any(other["role"] == "assistant" and not is_call(other) for other in later)
        asks = f" to=functions.{asked['name']}<|channel|>commentary json<|message|>{as_json(asked['arguments'])}<|call|>"
        return ("" if answered else analysis) + asks
    final = f"<|channel|>final<|message|>{message['content']}"
    return final + "<|end|>" if later else analysis + final + "<|return|>"


GPTOSS_WEATHER = """\
## functions

namespace functions {

// The weather in a city.
type get_weather = (_: {
// Name of the city
city: string,
unit?: "celsius" | "fahrenheit",
}) => any;

} // namespace functions"""


def gptoss_keeps(messages: list[Message], tools: list[Message] | None, turn: int) -> bool:
    """An answer ends in another token once a turn follows; a call and the calls before it lose their thoughts once answered."""
    if not is_call(messages[turn]):
        return False
    thoughtful = [at for at in range(turn + 1) if is_call(messages[at]) and gptoss_analysis(messages[at])]
    return all(gptoss_says(messages[: turn + 1], at) == gptoss_says(messages, at) for at in thoughtful)


def gptoss_refuses(case: Case) -> list[Blame]:
    blamed: list[Blame] = []
    for turn, message in enumerate(case.messages):
        if len(functions(message)) > 1:  # it writes only the first
            blamed.append(turn)
            continue
        # Served, the thought before a call is still there when the answer is asked for; rendered with the answer, it is gone.
        answers = is_learned(message) and not is_call(message)
        served = [at for at in range(turn) if is_call(case.messages[at]) and gptoss_analysis(case.messages[at])]
        if answers and any(gptoss_says(case.messages[:turn], at) != gptoss_says(case.messages[: turn + 1], at) for at in served):
            blamed.append(turn)
    return blamed


# ---- Mistral ----------------------------------------------------------------------------------------------------------------


def mistral(messages: list[Message], tools: list[Message] | None) -> list[Piece]:
    pieces: list[Piece] = [("<s>", None)]
    for turn, message in enumerate(messages):
        if message["role"] == "user":
            listed = f"[AVAILABLE_TOOLS] {as_json(tools)}[/AVAILABLE_TOOLS]" if tools and turn == last_user(messages) else ""
            pieces += [(f"{listed}[INST] {message['content']}[/INST]", None)]
        elif message["role"] == "tool":
            known = f'{{"content": {message["content"]}, "call_id": "{message["tool_call_id"]}"}}'
            pieces += [(f"[TOOL_RESULTS] {known}[/TOOL_RESULTS]", None)]
        elif is_call(message):
            asked = [as_json({**one["function"], "id": one["id"]}) for one in message["tool_calls"]]
            pieces += [(f"[TOOL_CALLS] [{', '.join(asked)}]</s>", turn)]
        else:
            pieces += [(f" {message['content'].strip()}</s>", turn)]
    return pieces


def mistral_keeps(messages: list[Message], tools: list[Message] | None, turn: int) -> bool:
    return not tools or last_user(messages[:turn]) == last_user(messages)


def mistral_refuses(case: Case) -> list[Blame]:
    wordy = [at for at, message in enumerate(case.messages) if is_call(message) and message["content"]]
    # The system's words are served in the last question and gone once the answer stands.
    told = [0, *learned_turns(case)] if case.messages[0]["role"] == "system" else []
    return [*told, *wordy, *lacks("thoughts")(case)]


# ---- Cohere -----------------------------------------------------------------------------------------------------------------


def cohere(messages: list[Message], tools: list[Message] | None) -> list[Piece]:
    names = {"system": "SYSTEM", "user": "USER", "assistant": "CHATBOT"}
    pieces: list[Piece] = [("<BOS_TOKEN>", None)]
    for turn, message in enumerate(messages):
        writer = turn if message["role"] == "assistant" else None
        content = message["content"] if message["role"] == "system" else message["content"].strip()
        pieces += [(f"<|START_OF_TURN_TOKEN|><|{names[message['role']]}_TOKEN|>", None)]
        pieces += [(content + "<|END_OF_TURN_TOKEN|>", writer)]
    return pieces


# ---- templates that hardly any turn can be learned with ---------------------------------------------------------------------


def never(messages: list[Message], tools: list[Message] | None) -> list[Piece]:
    raise AssertionError("every case is refused")


def deepseekv3(messages: list[Message], tools: list[Message] | None) -> list[Piece]:
    """A question, a call as context, its results and the answer to them."""
    asked, calling, found, said = messages
    (wanted,) = functions(calling)
    return [
        (f"<｜begin▁of▁sentence｜><｜User｜>{asked['content']}<｜Assistant｜><｜tool▁calls▁begin｜>", None),
        (f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{wanted['name']}\n", None),
        (f"```json\n{wanted['arguments']}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>", None),
        (f"<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>{found['content']}<｜tool▁output▁end｜><｜tool▁outputs▁end｜>", None),
        (f"{said['content']}<｜end▁of▁sentence｜>", 3),
    ]


def deepseek_refuses(case: Case) -> list[Blame]:
    """The prompt opens a thought (`<think>`) that no finished turn has, unless results of tools came before; lists of tools are
    not written, and neither are arguments that are no text.
    """
    blamed = [turn for turn in learned_turns(case) if case.messages[turn - 1]["role"] != "tool"]
    for turn, message in enumerate(case.messages):
        if any(not isinstance(wanted["arguments"], str) for wanted in functions(message)):
            blamed.append(turn)
    return [*blamed, *lacks("tools", "thoughts")(case)]


def glm4moe_refuses(case: Case) -> list[Blame]:
    """No token ends a turn: the next turn's header does, which the template writes for whoever speaks next."""
    return list(learned_turns(case))


FAMILIES: dict[str, Family] = {
    "llama3": Family(llama3, refused=lacks("calls", "thoughts", "tools")),
    "llama3_2": Family(llama3_2, refused=llama3_2_refuses),
    "qwen2_5": Family(qwen2_5, keeps=keeps_new_lines, refused=lacks("thoughts")),
    "qwen3": Family(qwen3, keeps=qwen3_keeps),
    "qwen3_instruct_2507": Family(qwen3_instruct, keeps=keeps_new_lines, refused=lacks("thoughts")),
    "qwen3_5_think": Family(qwen3_5, keeps=qwen3_5_keeps),
    "gemma": Family(gemma, refused=lacks("calls", "results", "thoughts", "tools", "system")),
    "gemma3": Family(gemma, refused=lacks("calls", "results", "thoughts", "tools")),
    "phi3": Family(phi3, keeps=keeps_new_lines, refused=lacks("calls", "thoughts", "tools")),
    "phi3_5": Family(phi3, keeps=keeps_new_lines, refused=lacks("calls", "thoughts", "tools")),
    "smollm2": Family(smollm2, keeps=keeps_new_lines, refused=lacks("calls", "thoughts", "tools")),
    "gptoss": Family(gptoss, keeps=gptoss_keeps, refused=gptoss_refuses),
    "mistral": Family(mistral, keeps=mistral_keeps, refused=mistral_refuses),
    "deepseekv3": Family(deepseekv3, refused=deepseek_refuses),
    "deepseek_r1_distill": Family(never, refused=deepseek_refuses),
    "glm4moe": Family(never, refused=glm4moe_refuses),
    "cohere": Family(cohere, refused=lacks("calls", "results", "thoughts", "tools")),
    "lfm2": Family(lfm2, keeps=keeps_new_lines, refused=lacks("calls", "thoughts")),
    "lfm2_v2": Family(lfm2, keeps=keeps_new_lines, refused=lacks("thoughts")),
    "lfm2_2_5": Family(lfm2_5, keeps=lfm2_5_keeps),
}


# ---- the files --------------------------------------------------------------------------------------------------------------


def shown(segments: list[tuple[str, bool]]) -> str:
    """Segments as a file has them; what the marks are made of stands in no case."""
    assert not any(mark in text for text, _ in segments for mark in "⟦⟧⏎")
    return "".join(f"⟦{text}⟧" if inside else text for text, inside in segments).replace("\n", "⏎\n")


def read(text: str) -> list[tuple[str, bool]]:
    """The reverse of `shown`."""
    segments: list[tuple[str, bool]] = []
    for stretch in text.replace("\n", "").replace("⏎", "\n").split("⟦"):
        inside, closed, after = stretch.partition("⟧")
        segments += [(inside, True), (after, False)] if closed else [(stretch, False)]
    return [(text, inside) for text, inside in segments if text]


def document(name: str) -> str:
    """A family's golden file."""
    lines = [f"# Golden masks of {name}, written by make_masks.py. ⟦supervised⟧, ⏎ new line, turns count from 1."]
    for label in cases(name):
        lines.append(f"\n=== {label}")
        case = CASES[label]
        blamed = FAMILIES[name].refused(case)
        if blamed:
            names = [f"turn {one + 1}" if isinstance(one, int) else one for one in blamed]
            lines.append(f"refused: {', '.join(dict.fromkeys(names))}")
            continue
        for example in FAMILIES[name].examples(case):
            lines.append(f"--- shows {example.until}, learns {', '.join(str(turn + 1) for turn in example.turns)}")
            lines.append(shown(example.segments))
    return "\n".join(lines) + "\n"


def golden(name: str) -> dict[str, list[Example] | set[str]]:
    """A family's golden file, read: case -> its examples, or what is refused (`turn 2`, `tools`): one of these is to be named."""
    cases: dict[str, list[Example] | set[str]] = {}
    text = (MASKS / f"{name}.txt").read_text(encoding="utf-8")
    for block in text.split("\n=== ")[1:]:
        case, _, body = block.partition("\n")
        if body.startswith("refused: "):
            cases[case] = set(body.removeprefix("refused: ").strip().split(", "))
            continue
        examples = []
        for part in body.removeprefix("--- shows ").split("\n--- shows "):
            head, _, shape = part.partition("\n")
            until, turns = head.split(", learns ")
            examples.append(Example(int(until), [int(turn) - 1 for turn in turns.split(", ")], read(shape)))
        cases[case] = examples
    return cases


if __name__ == "__main__":
    MASKS.mkdir(exist_ok=True)
    for family in FAMILIES:
        (MASKS / f"{family}.txt").write_text(document(family), encoding="utf-8")
