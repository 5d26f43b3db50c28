"""Token ids -> an example as the model sees it: every token with its text, whether it carries loss, and whose turn it is in.

Promises: the text of a token is what its bytes say. A token that holds a part of a character shows its bytes (`⟨E2 82⟩`), and the
one that ends the character shows which it was (`⟨AC=€⟩`). A turn is named only where the template itself tells: by rendering the
conversation up to the turn and through it, and by following each text through the template. What cannot be told belongs to
`template`, whether it is a default system prompt or a turn that the template moved; nothing is guessed from its look.

Drawing it is for the terminal and the report, which read the record; hostile text is theirs to make harmless.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from fullrank.errors import DataError
from fullrank.records import ShownExample, ShownToken, ShownTurn

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from fullrank.sequences.chat import ChatRenderer, Message

#: The role of tokens that belong to no turn, or to one that cannot be told.
TEMPLATE = "template"


class TokensLike(Protocol):
    """An example's tokens, from a renderer or a store."""

    @property
    def ids(self) -> Sequence[int]:
        """ids_T."""
        ...

    @property
    def supervised(self) -> Sequence[bool]:
        """For each token, whether predicting it carries loss."""
        ...


def shown(
    example: TokensLike,
    *,
    split: str,
    number: int,
    origin: str,
    tokenizer: Tokenizer,
    control_ids: Collection[int],
    turns: Sequence[tuple[int, str]],
    cut: str,
) -> ShownExample:
    """The record of an example.

    The first token of a sequence is predicted from nothing, so it is shown without loss whatever its mask says, and the count of
    supervised tokens is the one that the data card adds up.

    Args:
        number: position of the example in the split's store.
        tokenizer: the backend of a fast tokenizer (`tokenizer.backend_tokenizer` in transformers).
        control_ids: ids of control tokens.
        turns: where each turn begins, as (token position, role), ascending; what stands before the first is the template's.
        cut: what was cut off, and where; empty for a whole example.
    """
    texts = token_texts(tokenizer, example.ids)
    tokens = [
        ShownToken(id=int(token), text=text, supervised=bool(inside) and place > 0, control=int(token) in control_ids)
        for place, (token, text, inside) in enumerate(zip(example.ids, texts, example.supervised, strict=True))
    ]
    starts = [*([] if turns and turns[0][0] == 0 else [(0, TEMPLATE)]), *turns, (len(tokens), TEMPLATE)]
    return ShownExample(
        split=split,
        example=number,
        origin=origin,
        tokens=len(tokens),
        supervised_tokens=sum(token.supervised for token in tokens),
        turns=[ShownTurn(role=role, tokens=tokens[start:end]) for (start, role), (end, _) in pairwise(starts) if start < end],
        cut=cut,
    )


# ---- the text of tokens ---------------------------------------------------------------------------------------------


def token_texts(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """The text of each token where it stands; joined, they are the text wherever no token ends inside a character."""
    texts = []
    open_bytes = b""  # of a character that earlier tokens began
    for piece in token_bytes(tokenizer, ids):
        text, open_bytes = _text_of(piece, open_bytes)
        texts.append(text)
    return texts


def token_bytes(tokenizer: Tokenizer, ids: Sequence[int]) -> list[bytes]:
    """The bytes each token stands for, before any clean-up that decoding whole texts does; empty for an id without a token."""
    spelling = _Spelling.of(tokenizer)
    added = tokenizer.get_added_tokens_decoder()
    pieces = []
    for number in map(int, ids):
        if number in added:
            pieces.append(added[number].content.encode())
        else:
            pieces.append(spelling.bytes_of(tokenizer.id_to_token(number) or ""))
    return pieces


class _Spelling(NamedTuple):
    """How the entries of a vocabulary spell bytes, as the tokenizer's decoder says."""

    is_byte_level: bool
    has_byte_fallback: bool
    space: str
    """What stands for a space, such as `▁`; empty where nothing does."""

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> _Spelling:
        decoder = tokenizer.decoder
        steps = list(_steps(json.loads(decoder.__getstate__()))) if decoder is not None else []
        space = ""
        for step in steps:
            if step["type"] == "Metaspace":
                space = step["replacement"]
            elif step["type"] == "Replace" and step["content"] == " ":
                space = step["pattern"].get("String", "")
        names = {step["type"] for step in steps}
        return cls("ByteLevel" in names, "ByteFallback" in names, space)

    def bytes_of(self, entry: str) -> bytes:
        if self.is_byte_level:
            # An entry outside the alphabet is one that the tokenizer's maker spelled in plain text.
            in_alphabet = all(letter in _BYTE_OF_LETTER for letter in entry)
            return bytes(_BYTE_OF_LETTER[letter] for letter in entry) if in_alphabet else entry.encode()
        if self.has_byte_fallback and (match := _BYTE_ENTRY.fullmatch(entry)):
            return bytes([int(match[1], 16)])
        return (entry.replace(self.space, " ") if self.space else entry).encode()


def _steps(decoder: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The decoders of a sequence of decoders, however nested."""
    if decoder["type"] == "Sequence":
        for below in decoder["decoders"]:
            yield from _steps(below)
    else:
        yield decoder


def _byte_letters() -> dict[str, int]:
    """The alphabet of byte-level vocabularies: printable Latin-1 stands for itself, other bytes for letters from U+0100 on.

    As in `bytes_to_unicode` of GPT-2's encoder.py (Radford et al. 2019).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


_BYTE_OF_LETTER = _byte_letters()
_BYTE_ENTRY = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _text_of(piece: bytes, open_bytes: bytes) -> tuple[str, bytes]:
    """A token's text after the open bytes of a character, and the bytes of a character that it leaves open in its turn."""
    text = ""
    if open_bytes:
        # The first byte of a character has as many leading ones as the character has bytes (RFC 3629).
        missing = 8 - (~open_bytes[0] & 0xFF).bit_length() - len(open_bytes)
        more = piece[:missing]
        try:
            text, piece = f"⟨{_hex(more)}={(open_bytes + more).decode()}⟩", piece[missing:]
        except UnicodeDecodeError as error:
            if error.reason == "unexpected end of data" and more == piece:
                return f"⟨{_hex(more)}⟩", open_bytes + more
            # no character after all: the piece is read as if it stood alone
    while piece:
        try:
            return text + piece.decode(), b""
        except UnicodeDecodeError as error:
            text += piece[: error.start].decode() + f"⟨{_hex(piece[error.start : error.end])}⟩"
            if error.reason == "unexpected end of data":
                return text, piece[error.start :]
            piece = piece[error.end :]
    return text, b""


def _hex(some: bytes) -> str:
    return some.hex(" ").upper()


# ---- whose turn it is -----------------------------------------------------------------------------------------------


def turn_starts(
    renderer: ChatRenderer,
    messages: Sequence[Message],
    tools: list[Any] | None,
    ids: Sequence[int],
    tokenizer: Tokenizer,
) -> list[tuple[int, str]]:
    """Where each turn begins among the tokens of a conversation: (token position, role), ascending, the first at 0.

    The ids are those of a rendering of the whole conversation, or through one of its assistant turns, or one unbroken stretch of
    either. A token that holds the end of one turn and the beginning of the next counts to the first.
    """
    pieces = token_bytes(tokenizer, ids)
    answers = [number + 1 for number, message in enumerate(messages) if message["role"] == "assistant"]
    for count in dict.fromkeys([len(messages), *reversed(answers)]):
        text = _rendered(renderer, messages[:count], tools)
        found = None if text is None else _aligned(pieces, text.encode(errors="replace"))
        if text is None or found is None:
            continue
        starts: dict[int, str] = {}
        before = TEMPLATE
        for place, role in _in_text(_spans(renderer, messages[:count], tools, text)):
            byte = len(text[:place].encode(errors="replace"))
            # A token across the border of a turn and the template counts to the turn.
            after = (n for n, (begin, end) in enumerate(found) if begin >= byte or (before == TEMPLATE and end > byte))
            starts[next(after, len(found))] = role
            before = role
        starts.pop(len(found), None)  # begins after the tokens end
        return list(starts.items()) or [(0, TEMPLATE)]
    return [(0, TEMPLATE)]


class _Span(NamedTuple):
    """Characters of a rendering that belong to one turn, end exclusive."""

    start: int
    end: int
    role: str


def _in_text(spans: Sequence[_Span]) -> Iterator[tuple[int, str]]:
    """(first character, role) of every stretch, those between the spans being the template's."""
    position = 0
    for span in spans:
        if span.start > position:
            yield position, TEMPLATE
        yield span.start, span.role
        position = span.end
    yield position, TEMPLATE


def _aligned(pieces: Sequence[bytes], text: bytes) -> list[tuple[int, int]] | None:
    """The bytes of the text that each token stands for, end exclusive; None where the tokens do not spell a stretch of it.

    Two liberties that tokenizers take are allowed for: a space put before a text, and white space beside a control token that the
    token swallows.
    """
    places: list[tuple[int, int]] = []
    position = 0
    for piece in pieces:
        after_space = position
        while text[after_space : after_space + 1].isspace():
            after_space += 1
        spellings = [piece, piece[1:]] if piece[:1] == b" " else [piece]
        ways = [(place, some) for place in (position, after_space) for some in spellings if text.startswith(some, place)]
        if not ways:
            break
        position = ways[0][0] + len(ways[0][1])
        places.append((ways[0][0], position))
    else:
        return places
    joined = b"".join(pieces)
    first = text.find(joined)
    if first < 0 or text.find(joined, first + 1) >= 0:
        return None
    return list(pairwise(accumulate((len(piece) for piece in pieces), initial=first)))


#: Put into a text to see where the template puts it: letters only, so that no template treats it as markup.
_MARK = "qzjxkvQZJXKVqzjxkv"


def _spans(renderer: ChatRenderer, messages: Sequence[Message], tools: list[Any] | None, whole: str) -> list[_Span]:
    """The stretches of `whole` that belong to one message each, ascending, none overlapping.

    A turn reaches from where the rendering of the messages before it ends to where the rendering through it ends, if its
    text is there and no other's. Where an end cannot be told (some templates write a turn differently once others follow),
    the turn reaches from the first to the last character of its text as far as the template passed it on.
    """
    cuts = [_ends_of(message) for message in messages]
    starts = [_place_in(renderer, messages, tools, whole, number, cut[0]) for number, cut in enumerate(cuts)]
    ends = [_place_in(renderer, messages, tools, whole, number, cut[1]) for number, cut in enumerate(cuts)]
    borders: list[int | None] = [_heading(renderer, messages[0], whole, starts[0])]
    for number in range(1, len(messages)):
        through = _rendered(renderer, messages[:number], tools)
        if through and whole.startswith(through):
            borders.append(len(through))
        else:  # the turn before is written differently when it is the last
            borders.append(_heading(renderer, messages[number], whole, starts[number]))
    borders.append(len(whole))
    if any(
        cut[1] and end is None and (None in (low, high) or message["content"].strip() not in whole[low:high])
        for message, cut, end, (low, high) in zip(messages, cuts, ends, pairwise(borders), strict=True)
    ):
        # A text that cannot be followed may stand in another message's turn: none reaches beyond its own text.
        borders = [None] * len(borders)
    spans: list[_Span] = []
    for number, message in enumerate(messages):
        low, high, start, end = borders[number], borders[number + 1], starts[number], ends[number]
        others = [place for n, place in enumerate(ends) if n != number and place is not None]
        if end is not None:
            low = start if low is None or low >= end or any(low < place <= end for place in others) else low
            high = end if high is None or high < end or any(end < place <= high for place in others) else high
        if low is not None and high is not None and low < high and not any(low < place <= high for place in others):
            spans.append(_Span(low, high, message["role"]))
    spans.sort()
    return [span for before, span in pairwise([_Span(0, 0, ""), *spans]) if before.end <= span.start]


def _rendered(renderer: ChatRenderer, messages: Sequence[Message], tools: list[Any] | None) -> str | None:
    """The conversation as the template writes it; None where the template refuses it."""
    try:
        return renderer.text(messages, tools=tools)
    except DataError:
        return None


def _place_in(
    renderer: ChatRenderer, messages: Sequence[Message], tools: list[Any] | None, whole: str, number: int, cuts: Sequence[int]
) -> int | None:
    """The character of `whole` at which a cut through a message's text stands, the first of the cuts that can be followed.

    None where the template does more to the text than pass it on.
    """
    for cut in cuts:
        content = messages[number]["content"]
        marked = {**messages[number], "content": content[:cut] + _MARK + content[cut:]}
        text = _rendered(renderer, [*messages[:number], marked, *messages[number + 1 :]], tools) or ""
        before, found, after = text.partition(_MARK)
        if found and before + after == whole:
            return len(before)
    return None


def _ends_of(message: Message) -> tuple[Sequence[int], Sequence[int]]:
    """Where a message's text begins and where it ends: with white space around it and, for templates that strip it, without."""
    content = message.get("content")
    if not isinstance(content, str) or not content.strip():
        return (), ()
    return (0, len(content) - len(content.lstrip())), (len(content), len(content.rstrip()))


def _heading(renderer: ChatRenderer, message: Message, whole: str, start: int | None) -> int | None:
    """The character of `whole` at which the turn begins whose text begins at `start`: behind a default system prompt, say.

    How a turn of its role is headed is seen where the same message comes a second time.
    """
    if start is None:
        return None
    content, answer = message["content"], {"role": "assistant", "content": "a"}
    for before in ([message], [message, answer]):
        once, twice = _rendered(renderer, before, None), _rendered(renderer, [*before, message], None)
        if once is None or twice is None or not twice.startswith(once):
            continue
        written = twice[len(once) :]
        found = [hit for text in (content.rstrip(), content.strip()) for hit in re.finditer(re.escape(text), written)]
        headings = [written[: hit.start()] for hit in found]
        fitting = [heading for heading in headings if heading and whole.endswith(heading, 0, start)]
        if fitting:
            return start - len(max(fitting, key=len))
    return None
