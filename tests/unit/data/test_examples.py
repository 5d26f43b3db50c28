"""Examples within a length: every token of a long text learned once, an answer never lost without a word."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fullrank.data.examples import Limit, chunks, fit
from fullrank.errors import DataError
from fullrank.sequences.chat import Tokens


def document(length: int) -> Tokens:
    """A text whose ids say where they stand."""
    return Tokens(list(range(length)), [True] * length)


def answer(prompt: int, length: int, tail: int = 0) -> Tokens:
    ids = list(range(prompt + length + tail))
    return Tokens(ids, [False] * prompt + [True] * length + [False] * tail)


def limit(tokens: int, too_long: str, overlap: float = 0.125) -> Limit:
    return Limit(tokens, f"data.max_length is {tokens}", too_long, overlap)  # type: ignore[arg-type]


LENGTHS = st.integers(1, 400)
MOST = st.integers(2, 64)
RATIOS = st.floats(0.0, 1.0, exclude_max=True)


# ---- chunks ---------------------------------------------------------------------------------------------------------


@given(LENGTHS, MOST, RATIOS)
def test_every_token_is_learned_once_and_after_the_one_before_it(length: int, most: int, ratio: float) -> None:
    pieces = chunks(document(length), most, ratio)
    learned = [token for piece in pieces for token, supervised in zip(piece.ids, piece.supervised, strict=True) if supervised]
    assert learned == list(range(length))
    for piece in pieces:
        assert len(piece.ids) == len(piece.supervised) <= most
        for place, (token, supervised) in enumerate(zip(piece.ids, piece.supervised, strict=True)):
            if supervised and token:
                assert place and piece.ids[place - 1] == token - 1


@given(LENGTHS, MOST, RATIOS)
def test_a_chunk_begins_with_the_end_of_the_one_before_and_adds_to_it(length: int, most: int, ratio: float) -> None:
    pieces = chunks(document(length), most, ratio)
    assert [len(piece.ids) for piece in pieces[:-1]] == [most] * (len(pieces) - 1)
    for before, after in itertools.pairwise(pieces):
        context = after.supervised.index(True)
        assert after.ids[:context] == before.ids[-context:] and all(after.supervised[context:])
        # The share that was asked for, and always one token to predict from and one to predict.
        assert context == min(max(1, int(ratio * most)), most - 1)


@given(st.lists(st.booleans(), min_size=3, max_size=300), MOST, RATIOS)
def test_what_carries_no_loss_in_the_text_carries_none_in_its_chunks(mask: list[bool], most: int, ratio: float) -> None:
    pieces = chunks(Tokens(list(range(len(mask))), mask), most, ratio)
    learned = [token for piece in pieces for token, supervised in zip(piece.ids, piece.supervised, strict=True) if supervised]
    assert learned == [place for place, supervised in enumerate(mask) if supervised]


@given(st.lists(st.integers(2, 150), min_size=1, max_size=5), MOST)
def test_two_texts_never_share_a_chunk(lengths: list[int], most: int) -> None:
    texts = [Tokens([number * 1000 + place for place in range(length)], [True] * length) for number, length in enumerate(lengths)]
    kept = fit(texts, limit(most, "chunk"), is_document=True).examples
    assert all(len({token // 1000 for token in piece.ids}) == 1 for piece in kept)
    assert [token for piece in kept for token, on in zip(piece.ids, piece.supervised, strict=True) if on] == [
        token for text in texts for token in text.ids
    ]


# ---- the four ways --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("too_long", ["error", "drop", "truncate", "chunk"])
@pytest.mark.parametrize("length", [9, 10])
def test_what_is_short_enough_stays_as_it_is(too_long: str, length: int) -> None:
    example = answer(4, length - 4)
    found = fit([example], limit(10, too_long), is_document=False)
    assert found.examples == [example]
    assert (found.truncated, found.dropped, found.chunked) == (0, 0, False)


def test_an_error_says_how_long_it_is_and_where_the_limit_comes_from() -> None:
    with pytest.raises(DataError, match=r"^11 tokens, data\.max_length is 10 and data\.too_long is error$"):
        fit([answer(4, 7)], limit(10, "error"), is_document=False)


def test_a_conversation_is_not_cut_into_pieces() -> None:
    with pytest.raises(DataError, match=r"^11 tokens, data\.max_length is 10 and only raw text can be chunked$"):
        fit([answer(4, 7)], limit(10, "chunk"), is_document=False)


def test_dropping_leaves_the_others() -> None:
    short, long = answer(2, 3), answer(4, 7)
    found = fit([short, long, short], limit(10, "drop"), is_document=False)
    assert found.examples == [short, short] and (found.dropped, found.truncated) == (1, 0)


@given(st.integers(0, 40), st.integers(1, 40), st.integers(0, 10), st.integers(2, 40))
def test_truncation_keeps_the_beginning_and_never_loses_a_whole_answer(prompt: int, length: int, tail: int, most: int) -> None:
    example = answer(prompt, length, tail)
    # The first token of all has nothing before it, so that it is no target.
    learnable = [place for place in range(max(1, prompt), prompt + length) if place < most]
    if not learnable:
        with pytest.raises(DataError, match="no supervised token is left"):
            fit([example], limit(most, "truncate"), is_document=False)
        return
    found = fit([example], limit(most, "truncate"), is_document=False)
    (kept,) = found.examples
    assert kept.ids == example.ids[:most] and kept.supervised == example.supervised[:most]
    assert found.truncated == (len(example.ids) > most)


def test_a_lost_answer_is_told_with_the_place_of_the_cut() -> None:
    with pytest.raises(DataError, match=r"^no supervised token is left: the answer begins after token 10$"):
        fit([answer(2, 3), answer(12, 3)], limit(10, "truncate"), is_document=False)


@pytest.mark.parametrize("too_long", ["error", "drop", "truncate", "chunk"])
def test_an_example_with_nothing_to_learn_is_refused_however_short(too_long: str) -> None:
    with pytest.raises(DataError, match=r"^no supervised token is left$"):
        fit([Tokens([1, 2, 3], [True, False, False])], limit(10, too_long), is_document=False)
