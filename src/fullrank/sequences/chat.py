"""A conversation -> token ids and the supervised mask, exact for any chat template, or refused.

The template itself is the authority, and serving is the reference. For every assistant turn the conversation is rendered up to
that turn (with the generation prompt, as a server would) and through it: what the second adds to the first is what the model must
write, from the first character through the end-of-turn token. Where all of that stands unchanged in the rendering of the whole,
the conversation is one example. A template that rewrites earlier turns (reasoning that later prompts leave out, an end token that
only the last turn has) gets one example for each rendering it would be served in, so that every turn is learned once and in the
form in which it would be written. What cannot be exact is refused by naming template and turn: nothing is guessed.

Text that people wrote is never a control token: `<|im_end|>` inside a message is encoded as the characters it is made of. Tokens
that mark up what the model itself writes (`<think>`, `<tool_call>`) and are no special tokens are meant in the assistant's turns.

What is here runs in lean processes: it needs the `tokenizers` library and a template, no model and no torch.
"""

from __future__ import annotations

import datetime
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from tokenizers import Tokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from fullrank.errors import DataError
from fullrank.sequences.encode import (
    MARK,
    ChatFormat,
    Encoder,
    Guard,
    Message,
    Rendering,
    Span,
    Tokens,
    rendering_of,
    special_texts,
    unmarked,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LossOn = Literal["assistant", "completion", "all"]

__all__ = [
    "ChatFormat",
    "ChatRenderer",
    "LossOn",
    "Message",
    "Rendering",
    "Tokens",
    "as_conversation",
    "learned_turns",
    "special_texts",
]


class ChatRenderer:
    """Renders conversations with one tokenizer.

    Args:
        tokenizer: a fast tokenizer, or a format taken from one; its chat template may be absent when only pairs and documents are
            rendered.
        template_date: the day that templates printing today's date are shown.
        name: what messages call the template, such as the model's source.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template_date: datetime.date, name: str) -> None:
        self._make(ChatFormat.of(tokenizer, template_date, name))

    @classmethod
    def from_format(cls, chat_format: ChatFormat) -> ChatRenderer:
        """A renderer in another process than its tokenizer."""
        renderer = cls.__new__(cls)
        renderer._make(chat_format)
        return renderer

    def _make(self, chat_format: ChatFormat) -> None:
        self.format = chat_format
        self.name = chat_format.name
        self._encoder = Encoder(chat_format)
        self._guard = Guard(chat_format.control_tokens)
        self._templates: dict[bool, str] = {}
        self._turn_ends: set[int] = set()

    def warm(self) -> None:
        """Loads what encodes batches, and runs none of it: what runs may start threads, and such a process is not copied."""
        self._encoder.warm()

    @property
    def backend(self) -> Tokenizer:
        """The tokenizer as it is used here."""
        return self._encoder.tokenizer

    @property
    def has_template(self) -> bool:
        return bool(self.format.template)

    # ---- rendering --------------------------------------------------------------------------------------------------

    def text(self, messages: Sequence[Message], *, tools: list[Any] | None = None, generation_prompt: bool = False) -> str:
        """The conversation as the template writes it.

        Raises:
            DataError: when the template itself refuses the conversation, with its words and the turn.
        """
        return MARK.sub("", self._rendered(messages, tools, generation_prompt=generation_prompt))

    def _rendered(self, messages: Sequence[Message], tools: list[Any] | None, *, generation_prompt: bool = False) -> str:
        """`_render`, naming the first turn that the template does not take."""
        try:
            return self._render(messages, tools, generation_prompt=generation_prompt)
        except _TemplateRefusal as refusal:
            for count in range(1, len(messages) + 1):
                try:
                    self._render(messages[:count], tools)
                except _TemplateRefusal as earlier:
                    if count == len(messages) or str(earlier) == str(refusal):
                        where = f"turn {count} ({messages[count - 1]['role']})"
                        raise DataError(f"the chat template of {self.name}, {where}: it {earlier}") from refusal
            raise DataError(f"the chat template of {self.name} {refusal}") from refusal

    def _render(self, messages: Sequence[Message], tools: list[Any] | None, *, generation_prompt: bool = False) -> str:
        # A key with no value is not given: templates ask `is defined`, and would write the word None.
        given = [{k: v for k, v in message.items() if v is not None and k not in _OURS} for message in messages]
        try:
            rendered: Any = render_jinja_template(
                conversations=[given],
                tools=tools,
                chat_template=self._template(bool(tools)),
                add_generation_prompt=generation_prompt,
                **self.format.special_tokens,
            )
        except Exception as error:
            raise _TemplateRefusal(f"refuses the conversation: {error}") from error
        return str(rendered[0][0])  # (texts, generation indices), whatever its annotation says

    def _template(self, with_tools: bool) -> str:
        """The template with its clock frozen: transformers hands no callable to a template, so the day is written into it."""
        if with_tools not in self._templates:
            template = self.format.template_with_tools if with_tools else self.format.template
            noon = datetime.datetime.combine(self.format.date, datetime.time(12))
            frozen = _ASKS_THE_CLOCK.sub(lambda call: json.dumps(noon.strftime(call["format"])), str(template))
            if "strftime_now(" in frozen:
                raise ValueError("it prints today's date in a format computed by the template, which cannot be held fixed")
            self._templates[with_tools] = frozen
        return self._templates[with_tools]

    def prompt(self, messages: Sequence[Message], *, tools: list[Any] | None = None) -> str:
        """What a server feeds the model before it writes the next assistant turn."""
        return self.text(messages, tools=tools, generation_prompt=True)

    def prompt_ids(self, messages: Sequence[Message], *, tools: list[Any] | None = None) -> list[int]:
        """The prompt's ids, control tokens that people wrote encoded as text."""
        messages, tools = self._guard.marked(messages, tools)
        return self._encoder.ids(*unmarked(self._rendered(messages, tools, generation_prompt=True)))

    def text_ids(self, text: str) -> list[int]:
        """Ids of text from people that begins a sequence: what a model without a template is asked."""
        return self._encoder.plain_ids(text, begins=True)

    def answer_ids(self, prompt: str, answer: str) -> list[int]:
        """Ids of an answer as a model would write them behind a rendered prompt, without what ends it."""
        return self._encoder.continuation(prompt, answer)

    def ids(self, text: str) -> list[int]:
        """Ids of rendered text; the template has already written every control token, so none is added."""
        return self._encoder.ids(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, control tokens included."""
        return self._encoder.decode(ids)

    # ---- examples ---------------------------------------------------------------------------------------------------

    def examples(
        self, messages: Sequence[Message], *, tools: list[Any] | None = None, loss_on: LossOn = "assistant"
    ) -> list[Tokens]:
        """Tokens of a conversation, each learned turn supervised in exactly one of the examples.

        Raises:
            DataError: naming template and turn, when the mask cannot be exact.
        """
        return self.tokens(self.renderings(messages, tools=tools, loss_on=loss_on))

    def pair(self, prompt: str, completion: str, *, loss_on: LossOn = "assistant") -> Tokens:
        """A prompt and its completion: a one-turn conversation where the model has a template, plain text otherwise.

        Plain text is tokenized in two parts, as a server would, and ended by the end-of-sequence token.
        """
        if self.has_template:
            return self.examples(as_conversation(prompt, completion), loss_on=loss_on)[0]
        prompt_ids = self.text_ids(prompt)
        answer_ids = [*self._encoder.continuation(prompt, completion), self._eos()]
        return Tokens(prompt_ids + answer_ids, [loss_on == "all"] * len(prompt_ids) + [True] * len(answer_ids))

    def documents(self, texts: Sequence[str]) -> list[Tokens]:
        """Raw texts, every token supervised, each ended by the end-of-sequence token."""
        ended = [
            ids if ids and ids[-1] == self.format.eos_id else [*ids, self._eos()] for ids in self._encoder.plain_batch(texts)
        ]
        return [Tokens(ids, [True] * len(ids)) for ids in ended]

    def _eos(self) -> int:
        if self.format.eos_id is None:
            raise DataError(f"the tokenizer of {self.name} has no end-of-sequence token, so the model would never learn to stop")
        return self.format.eos_id

    def stop_ids(self) -> list[int]:
        """Ids that end an answer: the end-of-sequence token, and what ended the answers rendered since `forget_stop_ids`."""
        stops = {self.format.eos_id, *self._turn_ends}
        return sorted(stop for stop in stops if stop is not None)

    def forget_stop_ids(self) -> None:
        """Begins anew to collect what ends answers."""
        self._turn_ends.clear()

    def tokens(self, renderings: Iterable[Rendering]) -> list[Tokens]:
        """Tokens of renderings; those of many records are encoded together in a fraction of the time."""
        return self._encoder.tokens(list(renderings))

    # ---- which text is learned --------------------------------------------------------------------------------------

    def renderings(
        self, messages: Sequence[Message], *, tools: list[Any] | None = None, loss_on: LossOn = "assistant"
    ) -> list[Rendering]:
        """The renderings in which a conversation is learned, in the order of their last learned turn.

        Raises:
            DataError: naming template and turn.
        """
        if not self.has_template:
            raise DataError(f"{self.name} has no chat template, so `messages` cannot be rendered; give one as data.chat_template")
        turns, left_out = learned_turns(messages, loss_on)
        messages, tools = self._guard.marked(messages, tools)
        whole = self._rendered(messages, tools)
        self._check_context(whole, messages, tools)
        if loss_on == "all":
            spans = [self._turn(messages, tools, turn, whole, len(messages) - 1) for turn in left_out]
            for turn, span in zip(left_out, spans, strict=True):
                if span is None:
                    raise DataError(f"{self._place(turn)}: it is rewritten by later turns, so it cannot be left out of the loss")
            # What ends an answer is known from one, and where the last prompt ends.
            answer = self._turn(messages, tools, turns[-1], whole, len(messages) - 1) if turns else None
            return [rendering_of(whole, spans=(), left_out=[span for span in spans if span], last=answer)]
        found: list[tuple[int, Rendering]] = []
        remaining = list(turns)
        text, last = whole, len(messages) - 1
        while remaining:
            spans_of = {turn: self._turn(messages, tools, turn, text, last) for turn in remaining}
            held = {turn: span for turn, span in spans_of.items() if span is not None}
            if len(held) > 1:
                # Where an answer would melt into its prompt once it is context, later answers are served other tokens.
                final, rendering = max(held), rendering_of(text, spans=list(held.values()))
                at = dict(zip(held, rendering.spans, strict=True))
                held = {turn: held[turn] for turn in held if turn == final or not self._encoder.melts(rendering, at[turn])}
            if held:
                found.append((max(held), rendering_of(text, spans=list(held.values()))))
                remaining = [turn for turn in remaining if turn not in held]
            elif last == remaining[-1]:
                raise DataError(
                    f"{self._place(last)}: what comes before the turn is rendered differently once the turn is there, {_REWRITES}"
                )
            if remaining:
                last = remaining[-1]
                text = self._render(messages[: last + 1], tools)
        return [rendering for _, rendering in sorted(found, key=lambda item: item[0])]

    def _place(self, turn: int) -> str:
        return f"the chat template of {self.name}, turn {turn + 1} (assistant)"

    def _turn(self, messages: Sequence[Message], tools: list[Any] | None, turn: int, text: str, last: int) -> Span | None:
        """Span of an assistant turn in `text`, the rendering of all turns through `last`: from the first character to write
        through its end-of-turn token; None where the text does not hold the turn as it would be served.
        """
        through = text if turn == last else self._rendered(messages[: turn + 1], tools)
        before = self._rendered(messages[:turn], tools, generation_prompt=True) if turn else self._opening(through, tools)
        if not before or not through.startswith(before):
            return None
        end = self._end(messages[: turn + 1], tools, through, len(before))
        if not text.startswith(through[:end]):
            return None
        written = through[len(before) : end]
        ends = [token for token in self.format.control_tokens if written.endswith(token.text)]  # a marked one ends in its mark
        if not ends:
            raise DataError(f"{self._place(turn)}: no control token ends the turn, so the model would never learn to stop")
        self._turn_ends.add(max(ends, key=lambda token: len(token.text)).id)
        self._check_written(messages[turn], written, turn)
        return len(before), end

    def _end(self, messages: Sequence[Message], tools: list[Any] | None, through: str, start: int) -> int:
        """Where a turn that `through` ends with ends: behind its last control token, or behind the one before it where that is
        what ends a turn, and the last one what ends a whole rendering (Phi 3).
        """
        end = len(through.rstrip())
        last = next((token.text for token in self.format.control_tokens if through.endswith(token.text, start, end)), "")
        shorter = through[start : end - len(last)].rstrip()
        if last and shorter.endswith(tuple(token.text for token in self.format.control_tokens)):
            try:
                continued = self._render([*messages, {"role": "user", "content": "a"}], tools)
            except _TemplateRefusal:
                return end
            if continued.startswith(through[: start + len(shorter)]) and not continued.startswith(through[:end]):
                return start + len(shorter)
        return end

    def _opening(self, through: str, tools: list[Any] | None) -> str:
        """What stands before an answer that nothing was asked for: no server renders that, so it ends where the words that
        prompt any other answer end; empty when they are not in it.
        """
        asked = [{"role": "user", "content": "a"}]
        header = self._render(asked, tools, generation_prompt=True).removeprefix(self._render(asked, tools))
        opening, found, _ = through.partition(header) if header else ("", "", "")
        return opening + found if found else ""

    # ---- what a template must not lose ------------------------------------------------------------------------------

    def _check_context(self, whole: str, messages: Sequence[Message], tools: list[Any] | None) -> None:
        named = list(_names(tools or []))
        if named and not any(name in whole for name in named):
            raise DataError(
                f"the chat template of {self.name} writes no tools, and the record has {len(named)}",
                hint="give a template that writes them as data.chat_template, or take `tools` out of the record",
            )
        for number, message in enumerate(messages):
            role, content = message["role"], message.get("content")
            lost = None
            if role in ("system", "developer", "user") and isinstance(content, str) and content.strip() not in whole:
                lost = "this turn's text"
            called = list(_names(message.get("tool_calls") or []))
            named += called
            if called and (missing := next(_missing(named, whole), None)):
                lost = f"the call of {missing}"
            if lost:
                raise DataError(
                    f"the chat template of {self.name}, turn {number + 1} ({role}): it does not write {lost}",
                    hint="give a template that does as data.chat_template, or take the turn out of the record",
                )

    def _check_written(self, message: Message, written: str, turn: int) -> None:
        """An answer that the template shortens would be learned shortened."""
        lost = None
        reasoning = next((message[key] for key in _REASONING if message.get(key)), None)
        if reasoning and str(reasoning).strip() not in written:
            lost = "reasoning"
        if any(piece.strip() not in written for piece in _THINK.split(message.get("content") or "")):
            lost = "reasoning" if _THINK.search(message["content"]) else "text"
        if any(_missing(_names(message.get("tool_calls") or []), written)):
            lost = "tool call"
        if lost:
            raise DataError(
                f"{self._place(turn)}: it does not write the turn's {lost} as the record has it",
                hint="give a template that does as data.chat_template, or mark the turn `train: false`",
            )


def as_conversation(prompt: str, completion: str) -> list[dict[str, Any]]:
    """A pair as a conversation of one exchange."""
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]


def learned_turns(messages: Sequence[Message], loss_on: LossOn) -> tuple[list[int], list[int]]:
    """Positions of the assistant turns that are learned, and of those that a record leaves out (`train: false`, `weight: 0`).

    Raises:
        DataError: no turn is learned, or a weight that is neither 0 nor 1: every supervised token weighs the same.
    """
    learned: list[int] = []
    left_out: list[int] = []
    for turn, message in enumerate(messages):
        train, weight = message.get("train"), message.get("weight")
        if train not in (None, True, False):
            raise DataError(f"turn {turn + 1}: `train` must be true or false, found {train!r}")
        if weight not in (None, 0, 1):
            raise DataError(f"turn {turn + 1}: `weight` must be 0 or 1, found {weight!r}: every supervised token weighs the same")
        if None not in (train, weight) and bool(train) != bool(weight):
            raise DataError(f"turn {turn + 1}: `train` says {train} and `weight` says {weight}")
        if message["role"] == "assistant":
            (left_out if train is False or weight == 0 else learned).append(turn)
    if not learned and not left_out:
        raise DataError("a conversation without an assistant turn has nothing to learn from")
    if loss_on == "completion":
        last = max(learned + left_out)
        learned = [turn for turn in learned if turn == last]
    if not learned and loss_on != "all":
        raise DataError("every assistant turn is left out by `train: false` or `weight: 0`, so there is nothing to learn from")
    return learned, left_out


def _names(functions: Iterable[Any]) -> Iterator[str]:
    """Names of tools or tool calls, in OpenAI's nested form or plain."""
    for function in functions:
        inner = function.get("function", function) if isinstance(function, dict) else None
        if isinstance(inner, dict) and isinstance(inner.get("name"), str):
            yield inner["name"]


def _missing(names: Iterable[str], text: str) -> Iterator[str]:
    """The names that a text does not hold as often as they are given."""
    return (name for name, count in Counter(names).items() if text.count(name) < count)


class _TemplateRefusal(Exception):
    """A template raised an error of its own."""


#: Keys of a message that are ours to read and not the template's.
_OURS = ("train", "weight")
_REASONING = ("reasoning_content", "thinking", "reasoning")
_THINK = re.compile(r"</?think>")
_ASKS_THE_CLOCK = re.compile(r"""strftime_now\(\s*(?P<quote>["'])(?P<format>.*?)(?P=quote)\s*\)""")
_REWRITES = (
    "so what is trained would not be what is served; "
    "give one record per answer, each ending with the turn to learn, or another template as data.chat_template"
)
