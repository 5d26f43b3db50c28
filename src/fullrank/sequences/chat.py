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
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from tokenizers import Tokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from fullrank.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, Any]
LossOn = Literal["assistant", "completion", "all"]
Span = tuple[int, int]


@dataclass(frozen=True)
class Tokens:
    """One example: ids_T and, for each, whether predicting it carries loss."""

    ids: list[int]
    supervised: list[bool]

    def supervised_targets(self) -> int:
        """Supervised tokens that have a token before them, the only ones a causal model predicts."""
        return sum(self.supervised[1:])


@dataclass(frozen=True)
class Rendering:
    """The text of one example and its supervised stretches."""

    text: str
    guards: tuple[Span, ...]
    """Control tokens that people wrote: text."""
    spans: tuple[Span, ...]
    """What carries loss, in order."""
    left_out: tuple[Span, ...] = ()
    """With `last`: what does not carry loss, where everything else does."""
    last: Span | None = None
    """With loss on every token: the last answer, which is tokenized apart from its prompt as every answer is."""


class ControlToken(NamedTuple):
    """A token of the tokenizer that text from people must not become."""

    text: str
    id: int
    special: bool
    """Flagged special: never meant in content. Others are markup that an assistant writes."""


@dataclass(frozen=True)
class ChatFormat:
    """What a renderer is made of, in plain values that travel to other processes."""

    tokenizer_json: str
    template: str | None
    template_with_tools: str | None
    special_tokens: dict[str, Any]
    """What templates see: bos_token, eos_token, ..."""
    control_tokens: tuple[ControlToken, ...]
    eos_token: str | None
    eos_id: int | None
    date: datetime.date
    name: str

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, date: datetime.date, name: str) -> ChatFormat:
        """The format of a transformers tokenizer.

        Raises:
            DataError: a slow tokenizer.
        """
        if not tokenizer.is_fast:
            raise DataError(f"{name}: its tokenizer has no tokenizer.json; masks need the character offsets of a fast tokenizer")
        has_template = bool(tokenizer.chat_template)
        control = []
        for text, number in sorted(tokenizer.get_added_vocab().items(), key=lambda item: item[1]):
            special = bool(tokenizer.added_tokens_decoder[number].special) or text in tokenizer.all_special_tokens
            if special or text.strip("<>|_/") != text:
                control.append(ControlToken(text, number, special))
        eos = tokenizer.eos_token
        if eos and all(token.text != eos for token in control):
            control.append(ControlToken(eos, int(tokenizer.eos_token_id), True))
        backend: Any = tokenizer
        return cls(
            tokenizer_json=backend.backend_tokenizer.to_str(),
            template=tokenizer.get_chat_template(None, None) if has_template else None,
            template_with_tools=tokenizer.get_chat_template(None, [{}]) if has_template else None,
            special_tokens=dict(tokenizer.special_tokens_map),
            control_tokens=tuple(control),
            eos_token=eos,
            eos_id=None if tokenizer.eos_token_id is None else int(tokenizer.eos_token_id),
            date=date,
            name=name,
        )


def special_texts(chat_format: ChatFormat) -> list[str]:
    """The special tokens as text: what no content means."""
    return [token.text for token in chat_format.control_tokens if token.special]


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
        self._encoder = _Encoder(chat_format)
        self._guard = _Guard(chat_format.control_tokens)
        self._templates: dict[bool, str] = {}
        self._turn_ends: set[int] = set()

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
        return _MARK.sub("", self._rendered(messages, tools, generation_prompt=generation_prompt))

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
        return self._encoder.ids(*_unmarked(self._rendered(messages, tools, generation_prompt=True)))

    def text_ids(self, text: str) -> list[int]:
        """Ids of text from people that begins a sequence: what a model without a template is asked."""
        return self._encoder.plain_ids(text, begins=True)

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
            return [_rendering(whole, spans=(), left_out=[span for span in spans if span], last=answer)]
        found: list[tuple[int, Rendering]] = []
        remaining = list(turns)
        text, last = whole, len(messages) - 1
        while remaining:
            spans_of = {turn: self._turn(messages, tools, turn, text, last) for turn in remaining}
            held = {turn: span for turn, span in spans_of.items() if span is not None}
            if len(held) > 1:
                # Where an answer would melt into its prompt once it is context, later answers are served other tokens.
                final, rendering = max(held), _rendering(text, spans=list(held.values()))
                at = dict(zip(held, rendering.spans, strict=True))
                held = {turn: held[turn] for turn in held if turn == final or not self._encoder.melts(rendering, at[turn])}
            if held:
                found.append((max(held), _rendering(text, spans=list(held.values()))))
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

# ---- text from people -----------------------------------------------------------------------------------------------


class _Guard:
    """Marks control tokens inside content before a template sees it, so that they can be told from those it writes itself.

    The marks are two Unicode noncharacters (U+FDD0, U+FDD1), which have no meaning and are not for interchange; content that
    holds them is refused.
    """

    OPEN, CLOSE = "\ufdd0", "\ufdd1"

    def __init__(self, control_tokens: Sequence[ControlToken]) -> None:
        self._special = _any_of([token.text for token in control_tokens if token.special])
        self._every = _any_of([token.text for token in control_tokens])
        self._first = frozenset(token.text[0] for token in control_tokens)

    def marked(self, messages: Sequence[Message], tools: list[Any] | None) -> tuple[Sequence[Message], list[Any] | None]:
        """The messages and tools with every control token in their texts marked."""
        return [self._message(message) for message in messages], self._value(tools, self._every)

    def _message(self, message: Message) -> Message:
        pattern = self._special if message["role"] == "assistant" else self._every
        marked = {key: self._value(value, pattern) for key, value in message.items() if key != "role"}
        return {"role": message["role"], **marked}

    def _value(self, value: Any, pattern: re.Pattern[str]) -> Any:
        if isinstance(value, str):
            if self.OPEN in value or self.CLOSE in value:
                raise DataError("the text holds U+FDD0 or U+FDD1, code points that are no characters (Unicode 23.7)")
            if any(first in value for first in self._first):
                return pattern.sub(f"{self.OPEN}\\g<0>{self.CLOSE}", value)
            return value
        if isinstance(value, dict):
            return {key: self._value(below, pattern) for key, below in value.items()}
        if isinstance(value, list):
            return [self._value(item, pattern) for item in value]
        return value


def _any_of(texts: Sequence[str]) -> re.Pattern[str]:
    """Matches any of the texts, the longest first; nothing where there are none."""
    return re.compile("|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True)) or "(?!)")


# ---- text to ids ----------------------------------------------------------------------------------------------------


class _Located(NamedTuple):
    """A token and the characters it was made from."""

    id: int
    low: int
    high: int


class _Encoder:
    """Text -> ids with one tokenizer, in parts where parts give what the whole would."""

    def __init__(self, chat_format: ChatFormat) -> None:
        self._format = chat_format
        self.tokenizer: Tokenizer = Tokenizer.from_str(chat_format.tokenizer_json)
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self._control_ids = frozenset(token.id for token in chat_format.control_tokens)
        self._control_texts = tuple(token.text for token in chat_format.control_tokens)
        self._borders: dict[tuple[str, str], bool] = {}

    def ids(self, text: str, guards: Sequence[Span] = ()) -> list[int]:
        if guards:
            return [token.id for token in self._located(text, guards)]
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False))

    # ---- renderings -------------------------------------------------------------------------------------------------

    def tokens(self, renderings: list[Rendering]) -> list[Tokens]:
        if not self._splits_cleanly:
            return [self._whole(rendering) for rendering in renderings]
        cut = [list(_parts(rendering)) for rendering in renderings]
        plain = [part.text for parts in cut for part in parts if not part.guards]
        encoded = iter(self.tokenizer.encode_batch_fast(plain, add_special_tokens=False))
        result = []
        for parts in cut:
            ids: list[int] = []
            supervised: list[bool] = []
            for part in parts:
                more = self.ids(part.text, part.guards) if part.guards else next(encoded).ids
                ids += more
                supervised += [part.supervised] * len(more)
            result.append(Tokens(ids, supervised))
        return result

    @cached_property
    def _splits_cleanly(self) -> bool:
        """Whether text cut before an answer and after an end-of-turn token gives the ids of the whole.

        So it is for byte-level BPE: it works word by word and puts no space before a text, and a control token is always a word
        of its own, unless it takes white space beside it along.
        """
        description = json.loads(self._format.tokenizer_json)
        stages = description["pre_tokenizer"] or {}
        stages = stages["pretokenizers"] if stages.get("type") == "Sequence" else [stages]
        is_byte_level = any(stage.get("type") == "ByteLevel" for stage in stages)
        leaves_the_start_alone = all(
            stage.get("type") in ("ByteLevel", "Split", "Digits") and not stage.get("add_prefix_space") for stage in stages
        )
        normalizer = (description["normalizer"] or {"type": None})["type"]
        takes_space_along = any(
            token["lstrip"] or token["rstrip"] or token["single_word"] or (token["normalized"] and normalizer)
            for token in description["added_tokens"]
        )
        return is_byte_level and leaves_the_start_alone and normalizer in (None, "NFC") and not takes_space_along

    def _whole(self, rendering: Rendering) -> Tokens:
        """Tokens of the whole text; supervised where they begin inside a span."""
        text, guards = rendering.text, rendering.guards
        located = self._located(text, guards)
        start, end = rendering.last or rendering.spans[-1]
        prompt = self.ids(text[:start], _within(guards, 0, start))
        begins = next((n for n, token in enumerate(located) if token.low >= start and token.high > token.low), len(located))
        if [token.id for token in located[:begins]] != prompt or located[begins].low != start:
            # The answer's first characters would melt into one token with the prompt's last (an answer that begins with a space
            # or a new line, say). A server tokenizes the prompt alone, so the answer is tokenized as what follows it.
            located = self._located(text[:start], _within(guards, 0, start))
            answer, is_exact = self._after(text[:start], text[start:end], _within(guards, start, end))
            if not is_exact:
                raise DataError(
                    f"the tokenizer of {self._format.name} cannot split this conversation where the answer begins "
                    "without changing its text"
                )
            located += [_Located(n, low + start, high + start) for n, low, high in answer]
            # The end-of-turn token goes before what follows, since it may take white space along.
            stop = max((token for token in self._control_texts if text.endswith(token, start, end)), key=len, default="")
            tail = end - len(stop)
            behind = self._located(text[tail:], _within(guards, tail, len(text)))[1 if stop else 0 :]
            located += [_Located(n, low + tail, high + tail) for n, low, high in behind]
        supervised = [rendering.last is not None] * len(located)
        for low, high in rendering.left_out if rendering.last else rendering.spans:
            # A token's end may lie beyond the span: some control tokens take the white space behind them along.
            inside = [n for n, token in enumerate(located) if low <= token.low < high and token.high > token.low]
            for n in range(inside[0], inside[-1] + 1):  # white space in between may have an empty span
                supervised[n] = rendering.last is None
        return Tokens([token.id for token in located], supervised)

    def melts(self, rendering: Rendering, span: Span) -> bool:
        """Whether an answer would share a token with what stands before it, or lose white space to it."""
        start, end = span
        first = 0
        if self._splits_cleanly:  # words are cut by what is near
            if rendering.text[start - 1] == "\n" and self._ends_a_word(
                rendering.text[max(0, start - 8) : start], rendering.text[start]
            ):
                return False
            first, end = max(0, start - _NEAR), min(end, start + _NEAR)
        before, after = rendering.text[first:start], rendering.text[start:end]
        following, _ = self._after(before, after, _within(rendering.guards, start, end))
        prompt = self.ids(before, _within(rendering.guards, first, start))
        together = self.ids(before + after, _within(rendering.guards, first, end))
        return together != prompt + [token.id for token in following]

    def _ends_a_word(self, before: str, first: str) -> bool:
        """Whether a word ends after `before`, which ends in a line break, when `first` follows."""
        if first.isspace():  # white space runs on
            return False
        if (before, first) not in self._borders:
            pieces = self.tokenizer.pre_tokenizer.pre_tokenize_str(before + first)
            self._borders[before, first] = any(end == len(before) for _, (_, end) in pieces)
        return self._borders[before, first]

    def continuation(self, before: str, after: str) -> list[int]:
        """Ids of `after` as they follow `before`: without the space some tokenizers put before every text."""
        guards = tuple((match.start(), match.end()) for match in self._control_pattern.finditer(after))
        return [token.id for token in self._after(before, after, guards)[0]]

    def _after(self, before: str, after: str, guards: Sequence[Span]) -> tuple[list[_Located], bool]:
        """Tokens of `after` as they follow `before`, and whether they say exactly that."""
        return _following(self, before, after, lambda text, shift: self._located(text, _moved(guards, shift)))

    def _located(self, text: str, guards: Sequence[Span]) -> list[_Located]:
        """Tokens and their characters: control tokens outside the guards, plain text everywhere else."""
        covered = list(text) if guards else []
        for low, high in guards:
            covered[low:high] = self._filler * (high - low)
        found = _tokens_of(self.tokenizer, "".join(covered) if guards else text)
        if not guards:
            return found
        located: list[_Located] = []
        position = 0
        for token in found:
            if token.id in self._control_ids:
                located += [*self._textual_segment(text, position, token.low), token]
                position = token.high
        return located + self._textual_segment(text, position, len(text))

    # ---- text that must not become control tokens -------------------------------------------------------------------

    def plain_ids(self, text: str, *, begins: bool) -> list[int]:
        """Ids of text from people: no control token comes out of it, whatever it says.

        Args:
            begins: whether the text begins a sequence, so that the tokenizer may put its first token before it.
        """
        ids = list(self.tokenizer.encode(text, add_special_tokens=begins).ids)
        if not self._names_control_tokens(text):
            return ids
        added = self.tokenizer.encode("", add_special_tokens=begins).ids
        first = added[:1] if added[:1] == ids[:1] else []
        return [*first, *(token.id for token in self._textual_segment(text, 0, len(text))), *added[len(first) :]]

    def plain_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`plain_ids` of texts that each begin a sequence, in a fraction of the time."""
        encoded = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=True)
        return [
            self.plain_ids(text, begins=True) if self._names_control_tokens(text) else list(encoding.ids)
            for text, encoding in zip(texts, encoded, strict=True)
        ]

    def _names_control_tokens(self, text: str) -> bool:
        return any(token in text for token in self._control_texts)

    def _textual_segment(self, text: str, start: int, end: int) -> list[_Located]:
        """Tokens of a stretch of text in which no control token is meant."""
        if start >= end:
            return []
        segment = text[start:end]
        if start:
            found, _ = _following(self, text[:start], segment, lambda some, shift: _tokens_of(self._textual, some))
        else:
            found = _tokens_of(self._textual, segment)
        if any(token.id in self._control_ids for token in found):
            raise DataError(f"the tokenizer of {self._format.name} makes a control token out of ordinary text: {segment[:60]!r}")
        return [_Located(number, low + start, high + start) for number, low, high in found]

    @cached_property
    def _textual(self) -> Tokenizer:
        """The tokenizer with its control tokens renamed to what no text holds; every other token keeps its id."""
        description = json.loads(self._format.tokenizer_json)
        renamed = {token.text: f"{_Guard.OPEN}{token.id}{_Guard.CLOSE}" for token in self._format.control_tokens}
        vocabulary = description["model"]["vocab"]
        if isinstance(vocabulary, dict):
            description["model"]["vocab"] = {renamed.get(text, text): number for text, number in vocabulary.items()}
        else:
            description["model"]["vocab"] = [[renamed.get(text, text), score] for text, score in vocabulary]
        for token in description["added_tokens"]:
            token["content"] = renamed.get(token["content"], token["content"])
        description["post_processor"] = None
        return Tokenizer.from_str(json.dumps(description))

    @cached_property
    def _control_pattern(self) -> re.Pattern[str]:
        return _any_of(self._control_texts)

    @cached_property
    def _filler(self) -> str:
        """A letter that is part of no control token."""
        used = "".join(self._control_texts)
        return next(letter for letter in "xqzjkvwXQZJKVW0123456789~" if letter not in used)


#: Characters on each side of a border that decide whether a token crosses it, for tokenizers that cut text into words first.
_NEAR = 64


def _tokens_of(tokenizer: Tokenizer, text: str) -> list[_Located]:
    encoding = tokenizer.encode(text, add_special_tokens=False)
    return [_Located(number, low, high) for number, (low, high) in zip(encoding.ids, encoding.offsets, strict=True)]


def _following(
    encoder: _Encoder, before: str, after: str, encode: Callable[[str, int], list[_Located]]
) -> tuple[list[_Located], bool]:
    """Tokens of `after` without the space that some tokenizers put before every text, and whether they say exactly that.

    Args:
        encode: tokens of a text in which `after` begins at the given character.
    """
    alone = encode(after, 0)
    if encoder.decode([token.id for token in alone]) == after:
        return alone, True
    anchor = before[-1:] or "\n"
    joint, head = encode(anchor + after, len(anchor)), encode(anchor, len(anchor))
    ids = [token.id for token in joint]
    if ids[: len(head)] == [token.id for token in head] and encoder.decode(ids) == anchor + after:
        return [_Located(number, low - len(anchor), high - len(anchor)) for number, low, high in joint[len(head) :]], True
    return alone, False


def _within(spans: Sequence[Span], start: int, end: int) -> tuple[Span, ...]:
    """The spans inside a stretch of text, counted from its start."""
    return tuple((low - start, high - start) for low, high in spans if start <= low and high <= end)


def _moved(spans: Sequence[Span], shift: int) -> tuple[Span, ...]:
    return tuple((low + shift, high + shift) for low, high in spans)


# ---- marks and parts ------------------------------------------------------------------------------------------------

_MARK = re.compile(f"[{_Guard.OPEN}{_Guard.CLOSE}]")


def _unmarked(text: str) -> tuple[str, tuple[Span, ...]]:
    """A text without its marks, and what stood between them."""
    if _Guard.OPEN not in text:
        return _MARK.sub("", text), ()
    guards = []
    opened: int | None = None
    for number, mark in enumerate(_MARK.finditer(text)):  # every mark before takes one character
        if mark[0] == _Guard.OPEN:
            opened = mark.start() - number
        elif opened is not None:
            guards.append((opened, mark.start() - number))
            opened = None
    return _MARK.sub("", text), tuple(guards)


def _rendering(marked: str, *, spans: Sequence[Span], left_out: Sequence[Span] = (), last: Span | None = None) -> Rendering:
    """A rendering without marks; the spans are counted with them."""
    marks = [mark.start() for mark in _MARK.finditer(marked)]

    def clean(some: Iterable[Span]) -> tuple[Span, ...]:
        return tuple((low - bisect_left(marks, low), high - bisect_left(marks, high)) for low, high in sorted(some))

    text, guards = _unmarked(marked)
    return Rendering(text, guards, clean(spans), clean(left_out), clean([last])[0] if last else None)


class _Part(NamedTuple):
    text: str
    guards: tuple[Span, ...]
    supervised: bool


def _parts(rendering: Rendering) -> Iterator[_Part]:
    """The text cut where prompts and answers end, each part with whether it carries loss."""
    is_all = rendering.last is not None
    borders = [(low, high, not is_all) for low, high in (rendering.left_out if is_all else rendering.spans)]
    if rendering.last:
        borders.append((rendering.last[0], rendering.last[0], True))
    position = 0
    for low, high, inside in [*sorted(borders), (len(rendering.text), len(rendering.text), True)]:
        for start, end, supervised in ((position, low, is_all), (low, high, inside)):
            if start < end:
                yield _Part(rendering.text[start:end], _within(rendering.guards, start, end), supervised)
        position = high
