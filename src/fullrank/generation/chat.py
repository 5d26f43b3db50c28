"""A conversation with a model: the same template and stop tokens that training used."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextIteratorStreamer

from fullrank.generation.decode import greedy_arguments, room_for_answer
from fullrank.sequences.chat import ChatRenderer


class ChatSession:
    """Keeps the turns; answers greedily, piece by piece.

    Args:
        name: what the user is told they talk to.
        model: on its device.
        tokenizer: the model's.
        renderer: of this tokenizer; without a chat template each message is continued as plain text.
        system: system turn that every conversation begins with.
        stop_ids: what ends an answer.
        max_new_tokens: longest answer.
    """

    def __init__(
        self,
        name: str,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        renderer: ChatRenderer,
        *,
        system: str | None,
        stop_ids: Sequence[int],
        max_new_tokens: int,
    ) -> None:
        self.name = name
        self._model, self._tokenizer, self._renderer = model, tokenizer, renderer
        self._stop_ids, self._max_new_tokens = stop_ids, max_new_tokens
        self._opening: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
        self._messages = list(self._opening)

    def forget(self) -> None:
        """Starts a new conversation."""
        self._messages = list(self._opening)

    def answer(self, message: str) -> Iterator[str]:
        """The model's answer in pieces as they are decoded; it joins the conversation once complete.

        Raises:
            DataError: the conversation fills the model's context.
        """
        turns = [*self._messages, {"role": "user", "content": message}]
        ids = self._renderer.prompt_ids(turns) if self._renderer.has_template else self._renderer.text_ids(message)
        streamer = TextIteratorStreamer(self._tokenizer, skip_prompt=True, skip_special_tokens=True)
        ids_1T = torch.tensor([ids], device=self._model.device)
        room = room_for_answer(self._model, len(ids), self._max_new_tokens)
        arguments = greedy_arguments(self._stop_ids, room)
        failures: list[Exception] = []

        def write() -> None:
            try:
                cast(Any, self._model).generate(
                    input_ids=ids_1T, attention_mask=torch.ones_like(ids_1T), streamer=streamer, **arguments
                )
            except Exception as error:  # a thread's own: without an end the reader would wait for ever
                failures.append(error)
                streamer.end()

        writer = threading.Thread(target=write, daemon=True)
        writer.start()
        pieces = []
        for piece in streamer:
            pieces.append(piece)
            yield piece
        writer.join()
        if failures:
            raise failures[0]
        self._messages = [*turns, {"role": "assistant", "content": "".join(pieces)}]
