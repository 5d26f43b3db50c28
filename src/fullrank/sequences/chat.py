"""A conversation -> token ids and the supervised mask, exact for any chat template, or refused.

The template itself is the authority. For every assistant turn the conversation is rendered up to that turn (with the
generation prompt) and through it; where both renderings are prefixes of the whole, the turn's text is the difference, from the
first character the model would have to write to its end-of-turn token. A template that rewrites earlier turns, or ends a turn
with no control token, is refused by naming template and turn: nothing is guessed.

Serving is the reference for tokens: what stands before a turn is tokenized as a server would tokenize the prompt, so the
ids trained on are ids(prompt) + ids(answer).
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from fullrank.errors import DataError

Message = Mapping[str, Any]
LossOn = Literal["assistant", "completion", "all"]


@dataclass(frozen=True)
class Tokens:
    """One example: ids_T and, for each, whether predicting it carries loss."""

    ids: list[int]
    supervised: list[bool]

    def supervised_targets(self) -> int:
        """Supervised tokens that have a token before them, the only ones a causal model predicts."""
        return sum(self.supervised[1:])


class ChatRenderer:
    """Renders conversations with one tokenizer.

    Args:
        tokenizer: a fast tokenizer; its chat template may be absent when only pairs and documents are rendered.
        template_date: the day that templates printing today's date are shown.
        name: what messages call the template, such as the model's source.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template_date: datetime.date, name: str) -> None:
        if not tokenizer.is_fast:
            raise DataError(f"{name}: its tokenizer has no tokenizer.json; masks need the character offsets of a fast tokenizer")
        self.tokenizer = tokenizer
        self.name = name
        self._clock = datetime.datetime.combine(template_date, datetime.time(12))
        self._turn_ends: set[int] = set()
        self._special = {token for token in tokenizer.get_added_vocab() if self._is_control(token)}
        if tokenizer.eos_token:
            self._special.add(tokenizer.eos_token)

    def _is_control(self, token: str) -> bool:
        added = self.tokenizer.added_tokens_decoder[self.tokenizer.get_added_vocab()[token]]
        return bool(added.special) or token in self.tokenizer.all_special_tokens or token.strip("<>|_/") != token

    @property
    def has_template(self) -> bool:
        return bool(self.tokenizer.chat_template)

    # ---- rendering --------------------------------------------------------------------------------------------------

    def text(self, messages: Sequence[Message], *, tools: list[Any] | None = None, generation_prompt: bool = False) -> str:
        """The conversation as the template writes it.

        Raises:
            DataError: when the template itself refuses the conversation, with its words.
        """
        try:
            rendered = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=tools,
                chat_template=self._on_the_day(self.tokenizer.get_chat_template(None, tools)),
                tokenize=False,
                add_generation_prompt=generation_prompt,
            )
        except Exception as error:
            raise DataError(f"the chat template of {self.name} refuses the conversation: {error}") from error
        return str(rendered)

    def _on_the_day(self, template: str) -> str:
        """The template with its clock frozen: transformers hands no callable to a template, so the day is written into it."""
        frozen = _ASKS_THE_CLOCK.sub(lambda call: json.dumps(self._clock.strftime(call["format"])), template)
        if "strftime_now(" in frozen:
            raise ValueError("it prints today's date in a format computed by the template, which cannot be held fixed")
        return frozen

    def prompt(self, messages: Sequence[Message], *, tools: list[Any] | None = None) -> str:
        """What a server feeds the model before it writes the next assistant turn."""
        return self.text(messages, tools=tools, generation_prompt=True)

    def ids(self, text: str) -> list[int]:
        """Ids of rendered text; the template has already written every control token, so none is added."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    # ---- examples ---------------------------------------------------------------------------------------------------

    def conversation(
        self, messages: Sequence[Message], *, tools: list[Any] | None = None, loss_on: LossOn = "assistant"
    ) -> Tokens:
        """Tokens of a conversation with the supervised mask over the assistant turns that `loss_on` names.

        Raises:
            DataError: naming template and turn, when the mask cannot be exact.
        """
        if not self.has_template:
            raise DataError(f"{self.name} has no chat template, so `messages` cannot be rendered; give one as data.chat_template")
        whole = self.text(messages, tools=tools)
        turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        if not turns:
            raise DataError("a conversation without an assistant turn has nothing to learn from")
        spans = [self._turn_span(whole, messages, tools, turn) for turn in turns]
        if loss_on == "completion":
            spans = spans[-1:]
        tokens = self._tokenize(whole, spans)
        self._turn_ends.add(tokens.ids[max(n for n, inside in enumerate(tokens.supervised) if inside)])
        return Tokens(tokens.ids, [True] * len(tokens.ids)) if loss_on == "all" else tokens

    def pair(self, prompt: str, completion: str, *, loss_on: LossOn = "assistant") -> Tokens:
        """A prompt and its completion: a one-turn conversation where the model has a template, plain text otherwise.

        Plain text is tokenized in two parts, as a server would, and ended by the end-of-sequence token.
        """
        if self.has_template:
            messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
            return self.conversation(messages, loss_on=loss_on)
        prompt_ids = list(self.tokenizer(prompt)["input_ids"])
        answer_ids = [*self._continuation(prompt, completion), self._eos()]
        return Tokens(prompt_ids + answer_ids, [loss_on == "all"] * len(prompt_ids) + [True] * len(answer_ids))

    def document(self, text: str) -> Tokens:
        """Raw text, every token supervised, ended by the end-of-sequence token."""
        ids = [*self.tokenizer(text)["input_ids"]]
        if not ids or ids[-1] != self.tokenizer.eos_token_id:
            ids.append(self._eos())
        return Tokens(ids, [True] * len(ids))

    # ---- how it is exact --------------------------------------------------------------------------------------------

    def _turn_span(self, whole: str, messages: Sequence[Message], tools: list[Any] | None, turn: int) -> tuple[int, int]:
        """Character span of an assistant turn in `whole`: from the first character to write through its end-of-turn token."""
        place = f"the chat template of {self.name}, turn {turn + 1} (assistant)"
        through = self.text(messages[: turn + 1], tools=tools)
        before = self.prompt(messages[:turn], tools=tools) if turn else self._opening(through, tools)
        if not before or not whole.startswith(before):
            raise DataError(f"{place}: what comes before the turn is rendered differently once the turn is there, {_REWRITES}")
        if not whole.startswith(through):
            raise DataError(f"{place}: the turn is rendered differently once later turns follow, {_REWRITES}")
        end = self._end_of_turn(through, len(before))
        if end is None:
            raise DataError(f"{place}: no control token ends the turn, so the model would never learn to stop")
        return len(before), end

    def _opening(self, through: str, tools: list[Any] | None) -> str:
        """What stands before an answer that nothing was asked for: no server renders that, so it ends where the words that
        prompt any other answer end; empty when they are not in it.
        """
        asked = [{"role": "user", "content": "a"}]
        header = self.prompt(asked, tools=tools).removeprefix(self.text(asked, tools=tools))
        opening, found, _ = through.partition(header) if header else ("", "", "")
        return opening + found if found else ""

    def _end_of_turn(self, through: str, start: int) -> int | None:
        """Character after the turn's end-of-turn token: a control token with nothing but white space behind it."""
        end = len(through.rstrip())
        written = through[start:end]
        return end if any(written.endswith(token) for token in self._special) else None

    def _tokenize(self, whole: str, spans: Sequence[tuple[int, int]]) -> Tokens:
        """Tokens of `whole`; supervised where they lie inside a span."""
        encoded = self.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = list(encoded["input_ids"]), list(encoded["offset_mapping"])
        supervised = [False] * len(ids)
        clean = True
        for start, end in spans:
            inside = [n for n, (low, high) in enumerate(offsets) if low >= start and high <= end and high > low]
            if not inside or self.ids(whole[:start]) != ids[: inside[0]]:
                clean = False
                break
            for n in range(inside[0], inside[-1] + 1):  # white space in between may have an empty span
                supervised[n] = True
        if clean:
            return Tokens(ids, supervised)
        # Here the answer's first characters would melt into one token with the prompt's last (an answer that begins with a
        # space or a new line, say). A server tokenizes the prompt alone, so the parts are tokenized as it would.
        return self._tokenize_in_parts(whole, spans)

    def _tokenize_in_parts(self, whole: str, spans: Sequence[tuple[int, int]]) -> Tokens:
        ids: list[int] = []
        supervised: list[bool] = []
        position = 0
        for start, end in [*spans, (len(whole), len(whole))]:
            for low, high, inside in ((position, start, False), (start, end, True)):
                if low < high:
                    part = self._continuation(whole[:low], whole[low:high]) if low else self.ids(whole[low:high])
                    ids += part
                    supervised += [inside] * len(part)
            position = end
        if self._decode(ids) != self._decode(self.ids(whole)):
            raise DataError(
                f"the tokenizer of {self.name} cannot split this conversation where the answer begins without changing its text"
            )
        return Tokens(ids, supervised)

    def _continuation(self, before: str, after: str) -> list[int]:
        """Ids of `after` as they follow `before`: without the space some tokenizers put before every text."""
        alone = self.ids(after)
        if self._decode(alone) == after:
            return alone
        anchor = before[-1:] or "\n"
        joint, head = self.ids(anchor + after), self.ids(anchor)
        if joint[: len(head)] == head and self._decode(joint) == anchor + after:
            return joint[len(head) :]
        return alone

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _eos(self) -> int:
        eos = self.tokenizer.eos_token_id
        if eos is None:
            raise DataError(f"the tokenizer of {self.name} has no end-of-sequence token, so the model would never learn to stop")
        return int(eos)

    def stop_ids(self) -> list[int]:
        """Ids that end an answer: the end-of-sequence token, and what ended the answers of the conversations rendered so far."""
        stops = {self.tokenizer.eos_token_id, *self._turn_ends}
        return sorted(int(stop) for stop in stops if stop is not None)


_ASKS_THE_CLOCK = re.compile(r"""strftime_now\(\s*(?P<quote>["'])(?P<format>.*?)(?P=quote)\s*\)""")

_REWRITES = (
    "so what is trained would not be what is served; "
    "give one record per answer, each ending with the turn to learn, or another template as data.chat_template"
)
