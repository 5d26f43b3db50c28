"""A chat session: turns are kept, rendered by the template, and forgotten when asked."""

from __future__ import annotations

import datetime
from typing import Any

import pytest
import tiny

from fullrank.errors import DataError
from fullrank.generation.chat import ChatSession
from fullrank.generation.decode import greedy
from fullrank.sequences.chat import ChatRenderer


def session(model: Any, *, system: str | None = None, template: str | None = tiny.CHATML) -> tuple[ChatSession, ChatRenderer]:
    tokenizer = tiny.tokenizer(chat_template=template)
    renderer = ChatRenderer(tokenizer, datetime.date(2026, 1, 1), "tiny")
    talk = ChatSession("tiny", model, tokenizer, renderer, system=system, stop_ids=renderer.stop_ids(), max_new_tokens=6)
    return talk, renderer


def expected(model: Any, renderer: ChatRenderer, text: str) -> str:
    (answer,) = greedy(model, [renderer.ids(text)], stop_ids=renderer.stop_ids(), max_new_tokens=6)
    return str(tiny.tokenizer().decode(answer.ids, skip_special_tokens=True))


def test_an_answer_continues_the_whole_conversation() -> None:
    model = tiny.model("llama")
    talk, renderer = session(model, system="be brief")
    turns = [{"role": "system", "content": "be brief"}]
    for words in ("what is the sky", "and the sea"):
        turns.append({"role": "user", "content": words})
        wanted = expected(model, renderer, renderer.prompt(turns))
        assert "".join(talk.answer(words)) == wanted
        turns.append({"role": "assistant", "content": wanted})
    talk.forget()
    fresh = renderer.prompt([turns[0], {"role": "user", "content": "and the sea"}])
    assert "".join(talk.answer("and the sea")) == expected(model, renderer, fresh)


def test_without_a_template_a_message_is_continued_as_text() -> None:
    model = tiny.model("llama")
    talk, renderer = session(model, template=None)
    assert "".join(talk.answer("the sky is")) == expected(model, renderer, "the sky is")


def test_a_conversation_beyond_the_context_is_refused_in_words() -> None:
    talk, _ = session(tiny.model("llama", max_position_embeddings=16))
    with pytest.raises(DataError, match="fills the model's context of 16"):
        list(talk.answer("a long message " * 20))


def test_a_failure_while_writing_is_raised_where_the_answer_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("llama")
    talk, _ = session(model)

    def out_of_memory(*_: Any, **__: Any) -> None:
        raise MemoryError("no more")

    monkeypatch.setattr(model, "generate", out_of_memory)
    with pytest.raises(MemoryError, match="no more"):
        list(talk.answer("what is the sky"))
