"""Text to ids, exactly as a server would make them, with control tokens that people wrote kept text.

What carries loss is decided elsewhere (`fullrank.sequences.chat`): here a rendering, a text with its supervised
stretches, is made into token ids and a mask. Tokenizers that work word by word are given the parts of many renderings
at once; others the whole, with the places of its tokens. Shape legend: T tokens of an example.
"""

from __future__ import annotations

import datetime
import json
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from tokenizers import Tokenizer

from fullrank.errors import DataError
from fullrank.sequences.batch import BatchEncoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, Any]
Span = tuple[int, int]
"""First character and end."""


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


# ---- text from people -----------------------------------------------------------------------------------------------


class Guard:
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


class Encoder:
    """Text -> ids with one tokenizer, in parts where parts give what the whole would."""

    def __init__(self, chat_format: ChatFormat) -> None:
        self._format = chat_format
        self.tokenizer: Tokenizer = Tokenizer.from_str(chat_format.tokenizer_json)
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self._control_ids = frozenset(token.id for token in chat_format.control_tokens)
        self._control_texts = tuple(token.text for token in chat_format.control_tokens)
        self._borders: dict[tuple[str, str], bool] = {}

    def warm(self) -> None:
        """See `ChatRenderer.warm`."""
        self._batches  # noqa: B018

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
        encoded = iter(self._batches.ids(plain, add_special_tokens=False))
        result = []
        for parts in cut:
            ids: list[int] = []
            supervised: list[bool] = []
            for part in parts:
                more = self.ids(part.text, part.guards) if part.guards else next(encoded)
                ids += more
                supervised += [part.supervised] * len(more)
            result.append(Tokens(ids, supervised))
        return result

    @cached_property
    def _batches(self) -> BatchEncoder:
        return BatchEncoder(self.tokenizer, self._format.tokenizer_json, self._control_texts, self._format.name)

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
        encoded = self._batches.ids(texts, add_special_tokens=True)
        return [
            self.plain_ids(text, begins=True) if self._names_control_tokens(text) else ids
            for text, ids in zip(texts, encoded, strict=True)
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
        renamed = {token.text: f"{Guard.OPEN}{token.id}{Guard.CLOSE}" for token in self._format.control_tokens}
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
    encoder: Encoder, before: str, after: str, encode: Callable[[str, int], list[_Located]]
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

MARK = re.compile(f"[{Guard.OPEN}{Guard.CLOSE}]")


def unmarked(text: str) -> tuple[str, tuple[Span, ...]]:
    """A text without its marks, and what stood between them."""
    if Guard.OPEN not in text:
        return MARK.sub("", text), ()
    guards = []
    opened: int | None = None
    for number, mark in enumerate(MARK.finditer(text)):  # every mark before takes one character
        if mark[0] == Guard.OPEN:
            opened = mark.start() - number
        elif opened is not None:
            guards.append((opened, mark.start() - number))
            opened = None
    return MARK.sub("", text), tuple(guards)


def rendering_of(marked: str, *, spans: Sequence[Span], left_out: Sequence[Span] = (), last: Span | None = None) -> Rendering:
    """A rendering without marks; the spans are counted with them."""
    marks = [mark.start() for mark in MARK.finditer(marked)]

    def clean(some: Iterable[Span]) -> tuple[Span, ...]:
        return tuple((low - bisect_left(marks, low), high - bisect_left(marks, high)) for low, high in sorted(some))

    text, guards = unmarked(marked)
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
